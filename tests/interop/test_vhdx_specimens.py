"""VHDX files made by Windows, Hyper-V, Disk2VHD, qemu and openvmm read as their makers meant them.

The truth is `nz4k` of expected.json: SHA-256 over offset and bytes of every 4096-byte chunk that is not all zero.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import compare_disks, convert_disk, data_windows, open_disk
from hvreplica.disk.raw import RawDisk
from hvreplica.errors import UnsupportedVersion
from hvreplica.files import OS_FILES

if TYPE_CHECKING:
    from hvreplica.disk import Disk

_FOLDER = os.environ.get("HVREPLICA_SPECIMENS", "")
_LIST = Path(_FOLDER) / "expected.json"
_EXPECTED = json.loads(_LIST.read_text()) if _FOLDER and _LIST.is_file() else {}
NAMES = sorted(name for name in _EXPECTED if "vhdx" in name)
CHILDREN = [name for name in NAMES if "with" in _EXPECTED[name] or "refuse" in _EXPECTED[name]]
_CHUNK_BYTES = 4096
WHOLE = [name for name in NAMES if name not in CHILDREN]


def unpack(folder: Path, name: str, target: Path) -> Path:
    packed = (folder / name).read_bytes()
    if name.endswith(".bz2"):
        packed = bz2.decompress(packed)
    elif name.endswith(".gz"):
        packed = gzip.decompress(packed)
    elif name.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            packed = archive.read(archive.namelist()[0])
    with target.open("wb") as file:  # zeros as holes: some hold gigabytes of them
        for at in range(0, len(packed), _CHUNK_BYTES):
            chunk = packed[at : at + _CHUNK_BYTES]
            if chunk.count(0) != len(chunk):
                file.seek(at)
                file.write(chunk)
        file.truncate(len(packed))
    return target


def content(path: Path) -> str:
    """Return a digest of a file's bytes; holes are skipped, so that it is quick."""
    with RawDisk(OS_FILES.open(path)) as disk:
        return f"{disk.virtual_bytes} {nz4k(disk)}"


def nz4k(disk: Disk) -> str:
    digest = hashlib.sha256()
    for _, _, rows in data_windows(disk, 0, disk.virtual_bytes):
        for offset, length in rows.tolist():
            buffer = bytearray(length)
            disk.read_into(buffer, offset)
            for at in range(0, length, 4096):
                chunk = bytes(buffer[at : at + 4096])
                if chunk.count(0) != len(chunk):
                    digest.update((offset + at).to_bytes(8, "little") + chunk)
    return digest.hexdigest()


def test_specimens_are_there(specimens: Path) -> None:
    assert (specimens / "expected.json").is_file()
    assert len(WHOLE) >= 15


@pytest.mark.parametrize("name", WHOLE)
def test_guest_bytes_are_those_expected(specimens: Path, tmp_path: Path, name: str) -> None:
    path = unpack(specimens, name, tmp_path / "disk.vhdx")
    before = content(path)
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        assert disk.virtual_bytes == _EXPECTED[name]["virtual_bytes"]
        assert nz4k(disk) == _EXPECTED[name]["nz4k"]
        dirty = disk.info().log == "replayed"
        assert dirty == ("dirty" in name or "replay" in name)
    assert content(path) == before
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        assert nz4k(disk) == _EXPECTED[name]["nz4k"]
    assert (content(path) != before) == dirty
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        assert disk.info().log == "clean"


@pytest.mark.parametrize("name", WHOLE)
def test_a_write_changes_nothing_else(specimens: Path, tmp_path: Path, name: str) -> None:
    path = unpack(specimens, name, tmp_path / "disk.vhdx")
    copy = tmp_path / "copy.vhdx"
    convert_disk(OS_FILES, path, copy, clock=SYSTEM)
    assert compare_disks(OS_FILES, path, copy, clock=SYSTEM).equal
    for target in (path, copy):
        with open_disk(OS_FILES, target, writable=True, clock=SYSTEM) as disk:
            size, sector = disk.virtual_bytes, disk.logical_sector_bytes
            disk.write(b"\xa5" * sector, size - sector)
            disk.write_zeroes(size // 2 // sector * sector, min(size // 4, 64 << 20))
            disk.flush()
            disk.write(b"\x5a" * sector, size // 2 // sector * sector)
    assert compare_disks(OS_FILES, path, copy, clock=SYSTEM).equal


@pytest.mark.parametrize("name", CHILDREN)
def test_differencing_disks_are_refused_with_a_hint(specimens: Path, tmp_path: Path, name: str) -> None:
    path = unpack(specimens, name, tmp_path / "disk.vhdx")
    for writable in (False, True):
        with pytest.raises(UnsupportedVersion) as caught:
            open_disk(OS_FILES, path, writable=writable, clock=SYSTEM)
        assert caught.value.hint
