"""Programs that are not ours, used as oracles; without one the test is skipped loudly, or fails in CI."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from pathlib import Path

PACKAGES = {
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "7z": "p7zip-full",
    "vhdiinfo": "libvhdi-utils",
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "nbddump": "libnbd-bin",
    "nbdsh": "python3-libnbd",
    "nbdkit": "nbdkit",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-storage-daemon": "qemu-system-common",
    "fio": "fio",
    "socat": "socat",
    "mkfs.ext4": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "zstd": "zstd",
    "lz4": "lz4",
}
_SYSTEM_FOLDERS = "/usr/sbin:/sbin:/usr/local/sbin"  # mkfs and its like, which a user's PATH often lacks


def tools_are_required() -> bool:
    """Return whether a missing tool is an error here (HVREPLICA_REQUIRE_TOOLS=1), as it is in CI."""
    return os.environ.get("HVREPLICA_REQUIRE_TOOLS", "") not in {"", "0"}


def missing(what: str) -> NoReturn:
    """Skip the running test for want of `what`, or fail it where nothing may be missing."""
    if tools_are_required():
        pytest.fail(f"{what}; HVREPLICA_REQUIRE_TOOLS=1 makes this an error", pytrace=False)
    pytest.skip(f"NOT TESTED: {what}")


def find_tool(name: str) -> str | None:
    """Return the path of a program, or None."""
    return shutil.which(name) or shutil.which(name, path=_SYSTEM_FOLDERS)


def require_tool(name: str) -> str:
    """Return the path of a program; skip or fail the running test where it is absent."""
    path = find_tool(name)
    if path is None:
        missing(f"{name} is not installed (Debian: apt-get install {PACKAGES.get(name, name)})")
    return path


def run_tool(
    name: str,
    *arguments: str | Path,
    expected: tuple[int, ...] = (0,),
    timeout_s: float = 60,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a required program, output captured as text; any other exit code fails the test and shows it."""
    command = [require_tool(name), *(os.fspath(argument) for argument in arguments)]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode not in expected:
        pytest.fail(f"{' '.join(command)} -> {done.returncode}\n{done.stdout}{done.stderr}")
    return done
