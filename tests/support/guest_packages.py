"""The Debian packages of which tests make a guest: fetched once, unpacked beside, never installed.

`python -m tests.support.guest_packages` fetches them ahead of the tests; it needs nothing but Python, apt and
dpkg, and no rights. They stay in $XDG_CACHE_HOME/hvreplica, and what is there is never asked for again.
"""

from __future__ import annotations

import fnmatch
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

KERNEL, SHELL, AGENT = "linux-image-cloud-amd64", "busybox-static", "qemu-guest-agent"
# What is taken from each; the rest of a kernel is a hundred megabytes of drivers for other machines.
_WANTED = {
    KERNEL: (
        "boot/vmlinuz-*",
        *(
            f"lib/modules/*/{folder}"
            for folder in (
                "modules.builtin",
                "kernel/drivers/virtio/*",
                "kernel/drivers/block/virtio_blk.*",
                "kernel/drivers/char/virtio_console.*",
                "kernel/fs/ext4/*",
                "kernel/fs/jbd2/*",
                "kernel/fs/mbcache.*",
                "kernel/crypto/*",
                "kernel/lib/*",
            )
        ),
    ),
    SHELL: ("bin/busybox",),
    AGENT: ("sbin/qemu-ga", "bin/qemu-ga"),
}
_TIMEOUT_S = 300


class PackagesMissing(Exception):
    """A package is neither there nor to be had; says what to do."""


def cache() -> Path:
    """Return the folder in which packages stay from run to run; another where other parts are wanted."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hvreplica" / f"guest-{zlib.crc32(repr(_WANTED).encode()):08x}"


def fetch(folder: Path | None = None) -> dict[str, Path]:
    """Return, for each package, the folder that holds what the guest needs of it. Raises: PackagesMissing."""
    folder = folder or cache()
    if platform.machine() != "x86_64":
        raise PackagesMissing("a guest is made from the packages of amd64 only")
    return {package: _unpacked(folder, package) for package in _WANTED}


def _unpacked(folder: Path, package: str) -> Path:
    ready = sorted(folder.glob(f"{package}=*"))
    if ready:
        return ready[-1]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as working:
        file = _downloaded(Path(working), package)
        parts = Path(working) / "parts"
        _unpack(file, _WANTED[package], parts)
        version = file.name.removesuffix(".deb").split("_", 1)[1]
        target = folder / f"{package}={version}"
        try:
            os.replace(parts, target)
        except OSError:
            if not target.is_dir():  # else somebody else was quicker
                raise
    return target


def _downloaded(folder: Path, package: str) -> Path:
    """Download one package into an empty folder; a metapackage stands for what it depends on."""
    name = package
    if package == KERNEL:
        control = _run(["apt-cache", "show", "--no-all-versions", package], folder)
        found = re.search(r"^Depends:.*?\b(linux-image-[\w.+-]+)", control, re.MULTILINE)
        if found is None:
            raise PackagesMissing(f"the package {package} names no kernel")
        name = found[1]
    _run(["apt-get", "download", "-q", name], folder)
    files = list(folder.glob("*.deb"))
    if len(files) != 1:
        raise PackagesMissing(f"apt-get download {name} left {len(files)} packages")
    return files[0]


def _unpack(file: Path, wanted: tuple[str, ...], target: Path) -> None:
    target.mkdir()
    count = 0
    command = ["dpkg-deb", "--fsys-tarfile", os.fspath(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() and any(fnmatch.fnmatch(member.name, f"*/{part}") for part in wanted):
                    content = archive.extractfile(member)
                    assert content is not None
                    place = target / Path(member.name).name
                    with place.open("wb") as output:
                        shutil.copyfileobj(content, output)
                    count += 1
        process.stdout.read()
    if process.returncode != 0 or not count:
        raise PackagesMissing(f"{file.name} cannot be unpacked: {count} files, dpkg-deb {process.returncode}")


def _run(command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise PackagesMissing(f"{' '.join(command)}: {error}") from None
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip() or "no reason").splitlines()[-1]
        raise PackagesMissing(f"{' '.join(command)}: {words} (is apt-get update due?)")
    return done.stdout


if __name__ == "__main__":
    try:
        fetch()
    except PackagesMissing as error:
        sys.exit(f"no guest: {error}")
