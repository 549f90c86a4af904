"""VHD files of Windows, Virtual PC, VirtualBox, XenServer and qemu read as expected.json says, and are written well.

The truth is `nz4k`: SHA-256 over offset and bytes of every 4096-byte chunk that is not all zero.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import Disk, compare_disks, convert_disk, data_windows, open_disk
from hvreplica.errors import ChecksumMismatch
from hvreplica.files import OS_FILES
from hvreplica.formats.vhd_bat import NO_OFFSET, unpack_bat, unpack_bitmap
from hvreplica.formats.vhd_batmap import batmap_header_offset, unpack_batmap
from hvreplica.formats.vhd_header import unpack_dynamic_header
from tests.support.tools import run_tool

_FOLDER = os.environ.get("HVREPLICA_SPECIMENS", "")
_LIST = Path(_FOLDER) / "expected.json"
_EXPECTED = json.loads(_LIST.read_text()) if _FOLDER and _LIST.is_file() else {}
NAMES = sorted(name for name in _EXPECTED if "vhd" in name and "vhdx" not in name)
WHOLE = [name for name in NAMES if not _EXPECTED[name].get("either")]
DAMAGED = [name for name in NAMES if _EXPECTED[name].get("either")]
OF_XEN = [name for name in WHOLE if "blktap" in name or "xapi" in name]


def unpack(folder: Path, name: str, target: Path) -> Path:
    """Unpack an image and its parents under their own names; return the image."""
    for each in (*_EXPECTED.get(name, {}).get("with", []), name):
        packed = (folder / each).read_bytes()
        packed = {".bz2": bz2.decompress, ".gz": gzip.decompress}.get(Path(each).suffix, bytes)(packed)
        path = target / Path(each).name.removesuffix(".bz2").removesuffix(".gz")
        path.write_bytes(packed)
    return path


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


def change(path: Path) -> None:
    """Write, zero and write again, at both ends and in the middle."""
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        size = disk.virtual_bytes
        disk.write(b"\xa5" * 1024, size - 1024)
        disk.write_zeroes(size // 2 // 512 * 512, min(size // 4, 64 << 20))
        disk.write_zeroes(0, min(size, 4 << 20))
        disk.flush()
        disk.write(b"\x5a" * 700, size // 2 // 512 * 512 + 100)
        disk.write(b"\x3c" * (3 << 20), 0)


def test_specimens_are_there(specimens: Path) -> None:
    assert (specimens / "expected.json").is_file()
    assert len(WHOLE) >= 17
    assert len(DAMAGED) == len(OF_XEN) == 2


@pytest.mark.parametrize("name", WHOLE)
def test_guest_bytes_are_those_expected_and_opening_changes_nothing(
    specimens: Path, tmp_path: Path, name: str
) -> None:
    path = unpack(specimens, name, tmp_path)
    before = path.read_bytes()
    for writable in (False, True):
        with open_disk(OS_FILES, path, writable=writable, clock=SYSTEM) as disk:
            assert disk.virtual_bytes == _EXPECTED[name]["virtual_bytes"]
            assert nz4k(disk) == _EXPECTED[name]["nz4k"]
            assert disk.info().format == "vhd"
        assert path.read_bytes() == before


@pytest.mark.parametrize("name", WHOLE)
def test_a_write_changes_nothing_else(specimens: Path, tmp_path: Path, name: str) -> None:
    path = unpack(specimens, name, tmp_path)
    copy = tmp_path / "copy.vhdx"
    convert_disk(OS_FILES, path, copy, clock=SYSTEM)
    change(path)
    change(copy)
    assert compare_disks(OS_FILES, path, copy, clock=SYSTEM).equal


@pytest.mark.parametrize("name", [name for name in WHOLE if "with" not in _EXPECTED[name]])
def test_qemu_reads_what_was_changed(specimens: Path, tmp_path: Path, name: str) -> None:
    path = unpack(specimens, name, tmp_path)
    truth = tmp_path / "truth.raw"
    change(path)
    convert_disk(OS_FILES, path, truth, format="raw", clock=SYSTEM)
    theirs = f"driver=vpc,force_size_calc=current_size,file.filename={path}"
    run_tool(
        "qemu-img", "compare", "--image-opts", theirs, f"driver=raw,file.filename={truth}", timeout_s=120
    )


@pytest.mark.parametrize("name", OF_XEN)
def test_batmap_of_xenserver_never_claims_more_than_the_bitmaps(
    specimens: Path, tmp_path: Path, name: str
) -> None:
    path = unpack(specimens, name, tmp_path)
    change(path)
    image = path.read_bytes()
    assert image[:512] == image[-512:]
    assert image[28:32] == b"tap\0"
    header = unpack_dynamic_header(image[512:1536], file_offset=512)
    batmap = unpack_batmap(image[batmap_header_offset(header) :], file_offset=batmap_header_offset(header))
    batmap.validate()
    bits = unpack_bitmap(image[batmap.batmap_offset :][: batmap.batmap_bytes], header.max_table_entries)
    offsets = unpack_bat(image[header.table_offset :], header.max_table_entries)
    for block in np.flatnonzero(bits).tolist():
        assert offsets[block] != NO_OFFSET
        assert unpack_bitmap(image[offsets[block] :][:512], 4096).all()


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("writable", [False, True])
def test_wrong_checksum_is_refused_at_its_place(
    specimens: Path, tmp_path: Path, name: str, *, writable: bool
) -> None:
    path = unpack(specimens, name, tmp_path)
    before = path.read_bytes()
    with pytest.raises(ChecksumMismatch) as caught:
        open_disk(OS_FILES, path, writable=writable, clock=SYSTEM)
    assert caught.value.path == path
    assert caught.value.field == "checksum"
    assert caught.value.hint
    assert path.read_bytes() == before
