"""The demo's guest: a disk with real files on it, and a person at work who removes some and writes others.

Where mkfs.ext4 and debugfs are present the disk holds a real ext4 file system, made and changed without
mounting it. Elsewhere the same files stand one after the other on the bare disk, with room between them, and
the change is a seeded scatter of 4 KiB writes: the same kind of data, without a file system's metadata.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import stat
import subprocess
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hvreplica import native
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.errors import HvReplicaError
from hvreplica.files import OS_FILES
from hvreplica.units import KIB, MIB, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

GRAIN_BYTES = 4 * KIB
_WINDOW_BYTES = 4 * MIB
_CONTENT_BYTES_MAX = 256 * MIB
_FILES_SEEN_MAX = 6000  # of each folder: a walk through all of it would take longer than the rest of the demo
_FILES_MAX = 1200
_FILE_BYTES_MAX = 16 * MIB
_LARGE_FILE_BYTES = 64 * KIB
_NEW_FILES = 24
_REMOVED_FILES = 12
_SCATTERED_WRITES = 512
_TOOL_TIMEOUT_S = 120
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._/+-]+")  # what debugfs takes without quoting


class SourceFile(NamedTuple):
    """A file of this machine that the guest gets."""

    path: Path
    length: int


class Guest(NamedTuple):
    """A guest's disk as a raw image. kind: "ext4" or "plain files"."""

    image: Path
    kind: str
    size_bytes: int
    files: list[SourceFile]
    spare_files: list[SourceFile]

    @property
    def data_bytes(self) -> int:
        """Bytes of files on it."""
        return sum(file.length for file in self.files)


def make_guest(image: Path, size_bytes: int) -> Guest:
    """Make the raw image of a guest's disk, sparse, with real files for an eighth of it."""
    found = _find_files(min(size_bytes // 8, _CONTENT_BYTES_MAX))
    spare_files = found[:: max(len(found) // _NEW_FILES, 2)][:_NEW_FILES]
    files = sorted(set(found) - set(spare_files))
    file = OS_FILES.open(image, create=True, exclusive=True)
    file.resize(size_bytes)
    file.close()
    if _tool("mkfs.ext4") and _tool("debugfs"):
        _make_ext4(image, files)
        kind = "ext4"
    else:
        _lay_out(image, size_bytes, files)
        kind = "plain files"
    return Guest(image, kind, size_bytes, files, spare_files)


def change_guest(guest: Guest, *, turn: int = 0) -> str:
    """Let the guest work on its image, each time with other files; return what it did, in words."""
    if guest.kind == "ext4":
        removed = guest.files[turn :: max(len(guest.files) // _REMOVED_FILES, 1)][:_REMOVED_FILES]
        _work_in_ext4(guest.image, f"/work{turn or ''}", removed, guest.spare_files)
        return f"removed {len(removed)} files and wrote {len(guest.spare_files)} new ones"
    _scatter_writes(guest, turn * _SCATTERED_WRITES)
    return f"wrote {_SCATTERED_WRITES} scattered pieces of 4 KiB"


def write_changes(image: Path, disk_path: Path) -> int:
    """Bring the disk to the image's content in writes of 4 KiB, as a guest does; return the bytes written."""
    changed_bytes = 0
    source = OS_FILES.open(image)
    disk = open_disk(OS_FILES, disk_path, writable=True, clock=SYSTEM)
    try:
        for start in range(0, disk.virtual_bytes, _WINDOW_BYTES):
            end = min(start + _WINDOW_BYTES, disk.virtual_bytes)
            if not len(disk.extents(start, end)) and not any(source.data_extents(start, end)):
                continue
            wanted, present = bytearray(end - start), bytearray(end - start)
            source.read_into(wanted, start)
            disk.read_into(present, start)
            runs = native.changed_runs(present, wanted, GRAIN_BYTES)
            if len(runs):
                view = memoryview(wanted)
                data = b"".join(view[offset : offset + length] for offset, length in runs.tolist())
                runs[:, 0] += start
                disk.write_extents(runs, data)
                changed_bytes += len(data)
        disk.flush()
    finally:
        disk.close()
        source.close()
    return changed_bytes


def digest(disk_path: Path) -> str:
    """Return the SHA-256 of what a guest reads from the first to the last byte of the disk."""
    state = hashlib.sha256()
    zeros = bytes(_WINDOW_BYTES)
    buffer = bytearray(_WINDOW_BYTES)
    disk = open_disk(OS_FILES, disk_path, clock=SYSTEM)
    try:
        for start in range(0, disk.virtual_bytes, _WINDOW_BYTES):
            length = min(_WINDOW_BYTES, disk.virtual_bytes - start)
            if len(disk.extents(start, start + length)):
                window = memoryview(buffer)[:length]
                disk.read_into(window, start)
                state.update(window)
            else:
                state.update(memoryview(zeros)[:length])
    finally:
        disk.close()
    return state.hexdigest()


def data_digest(disk_path: Path) -> str:
    """Return a hash of where the disk holds something else than zeros, and what: quick for a sparse one."""
    state = hashlib.sha256()
    buffer = bytearray(_WINDOW_BYTES)
    disk = open_disk(OS_FILES, disk_path, clock=SYSTEM)
    try:
        for start in range(0, disk.virtual_bytes, _WINDOW_BYTES):
            length = min(_WINDOW_BYTES, disk.virtual_bytes - start)
            if len(disk.extents(start, start + length)):
                window = memoryview(buffer)[:length]
                disk.read_into(window, start)
                if np.frombuffer(window, np.uint8).any():
                    state.update(b"%d:" % start)
                    state.update(window)
    finally:
        disk.close()
    return state.hexdigest()


def _find_files(budget_bytes: int) -> list[SourceFile]:
    """Return readable files of this machine, none twice: large ones first, up to a number and their bytes."""
    seen: set[tuple[int, int]] = set()
    found: list[SourceFile] = []
    for root in dict.fromkeys((sysconfig.get_paths()["stdlib"], "/usr/share", "/usr/lib")):
        for path, facts in itertools.islice(_regular_files(Path(root)), _FILES_SEEN_MAX):
            identity = (facts.st_dev, facts.st_ino)
            fits = 0 < facts.st_size <= _FILE_BYTES_MAX and _PLAIN_NAME.fullmatch(os.fspath(path))
            if fits and identity not in seen:
                seen.add(identity)
                found.append(SourceFile(path, facts.st_size))
    found.sort(key=lambda file: file.length < _LARGE_FILE_BYTES)  # stable: the order of names stays within
    chosen: list[SourceFile] = []
    left_bytes = budget_bytes
    for file in found:
        if len(chosen) < _FILES_MAX and file.length <= left_bytes and _readable(file.path):
            left_bytes -= file.length
            chosen.append(file)
    return chosen


def _regular_files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files under `folder` in the order of names; follow no links, pass by what cannot be read."""
    try:
        names = OS_FILES.names(folder)
    except OSError:
        return
    for name in names:
        path = folder / name
        try:
            facts = path.lstat()
        except OSError:
            continue
        if stat.S_ISDIR(facts.st_mode):
            yield from _regular_files(path)
        elif stat.S_ISREG(facts.st_mode):
            yield path, facts


def _readable(path: Path) -> bool:
    try:
        OS_FILES.open(path).close()
    except OSError:
        return False
    return True


def _make_ext4(image: Path, files: Sequence[SourceFile]) -> None:
    """Make a file system and put each file where it stands on this machine, without a copy on the way."""
    _run(["mkfs.ext4", "-q", "-F", "-L", "demo", os.fspath(image)])
    commands = []
    made = {Path("/")}
    for file in files:
        for folder in reversed((file.path.parent, *file.path.parent.parents)):
            if folder not in made:
                made.add(folder)
                commands.append(f"mkdir {folder}")
        commands += [f"cd {file.path.parent}", f"write {file.path} {file.path.name}"]
    _debugfs(image, commands)


def _work_in_ext4(
    image: Path, folder: str, removed: Sequence[SourceFile], written: Sequence[SourceFile]
) -> None:
    commands = [f"rm {file.path}" for file in removed]
    commands += [f"mkdir {folder}", f"cd {folder}"]
    commands += [f"write {file.path} {index:03}-{file.path.name}" for index, file in enumerate(written)]
    _debugfs(image, commands)


def _debugfs(image: Path, commands: Sequence[str]) -> None:
    _run(["debugfs", "-w", os.fspath(image)], text="\n".join(commands) + "\n")


def _lay_out(image: Path, size_bytes: int, files: Sequence[SourceFile]) -> None:
    """Write the files one after the other, with as much room after each as the disk has to spare."""
    total_bytes = sum(align_up(file.length, GRAIN_BYTES) for file in files)
    gap_bytes = max(size_bytes - total_bytes, 0) // 2 // max(len(files), 1) // GRAIN_BYTES * GRAIN_BYTES
    target = OS_FILES.open(image, writable=True)
    position = 0
    try:
        for file in files:
            data = _read(file)
            if position + len(data) > size_bytes:
                break
            target.write(data, position)
            position += align_up(file.length, GRAIN_BYTES) + gap_bytes
    finally:
        target.close()


def _read(file: SourceFile) -> bytes:
    source = OS_FILES.open(file.path)
    try:
        return source.read(0, min(file.length, source.size()))
    finally:
        source.close()


def _scatter_writes(guest: Guest, first: int) -> None:
    """Overwrite grains at places that a seed decides; a third of each compresses."""
    target = OS_FILES.open(guest.image, writable=True)
    try:
        for index in range(first, first + _SCATTERED_WRITES):
            stream = hashlib.shake_128(b"hvreplica demo %d" % index).digest(GRAIN_BYTES)
            grain = int.from_bytes(stream[:8], "little") % (guest.size_bytes // GRAIN_BYTES)
            text_bytes = GRAIN_BYTES // 3
            target.write(b" " * text_bytes + stream[text_bytes:], grain * GRAIN_BYTES)
    finally:
        target.close()


def _tool(name: str) -> str | None:
    """Return where a tool stands; Debian keeps those for file systems out of an ordinary user's path."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")


def _run(command: list[str], *, text: str = "") -> None:
    """Run a tool. Raises: HvReplicaError with its last words if it fails."""
    tool = _tool(command[0]) or command[0]
    done = subprocess.run(
        [tool, *command[1:]],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=_TOOL_TIMEOUT_S,
        errors="replace",
    )
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()
        raise HvReplicaError(
            f"{command[0]} ended with {done.returncode}: {words[-1] if words else 'no message'}",
            path=command[-1],
        )


def images_identical(first: Path, second: Path) -> bool | None:
    """Return whether qemu-img finds the two disks identical; None where there is no qemu-img."""
    tool = _tool("qemu-img")
    if tool is None:
        return None
    done = subprocess.run(
        [tool, "compare", "-U", os.fspath(first), os.fspath(second)],
        capture_output=True,
        check=False,
        timeout=_TOOL_TIMEOUT_S,
    )
    if done.returncode not in (0, 1):
        words = done.stderr.decode(errors="replace").strip()
        raise HvReplicaError(f"qemu-img compare ended with {done.returncode}: {words}", path=second)
    return done.returncode == 0


def copy_export(socket: Path, image: Path) -> bool:
    """Copy the first disk that is served over NBD at a Unix socket; return False without nbdcopy."""
    if _tool("nbdcopy") is None:
        return False
    _run(["nbdcopy", f"nbd+unix:///0?socket={socket}", os.fspath(image)])
    return True


def file_system_sound(image: Path) -> bool | None:
    """Return whether e2fsck finds nothing to repair in the image; None where there is no e2fsck."""
    tool = _tool("e2fsck")
    if tool is None:
        return None
    command = [tool, "-f", "-n", os.fspath(image)]
    done = subprocess.run(command, capture_output=True, check=False, timeout=_TOOL_TIMEOUT_S)
    return done.returncode == 0
