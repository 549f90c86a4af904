"""The structures of a VHD, each by itself."""

from __future__ import annotations

import functools
import uuid
from pathlib import Path

import numpy as np

from hvreplica.disk import create_disk, open_disk
from hvreplica.formats import vhd_bat, vhd_batmap, vhd_footer, vhd_header, vhd_locator
from hvreplica.units import KIB, MIB
from tests.fuzz.registry import Fuzzer
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

_DISK, _PARENT = Path("/d/disk.vhd"), Path("/d/base.vhd")
_FOOTER_BYTES = vhd_footer.FOOTER_BYTES
_HEADER_BYTES = vhd_header.DYNAMIC_HEADER_BYTES
_CODES = (vhd_locator.RELATIVE, vhd_locator.ABSOLUTE, vhd_locator.FILE_URL, vhd_locator.RELATIVE_OLD, b"Mac ")


def _summed(data: bytes, start: int, length: int, checksum_offset: int) -> bytes:
    """Return `data` with the checksum of the structure at `start` set right."""
    if len(data) < start + length:
        return data
    piece = bytearray(data[start : start + length])
    checksum = vhd_footer.vhd_checksum(piece, checksum_offset)
    piece[checksum_offset : checksum_offset + 4] = checksum.to_bytes(4, "big")
    return data[:start] + bytes(piece) + data[start + length :]


def _footer_summed(data: bytes, start: int) -> bytes:
    return _summed(data, start, _FOOTER_BYTES, vhd_footer.FOOTER.offset_of("checksum"))


def _header_summed(data: bytes, start: int) -> bytes:
    return _summed(data, start, _HEADER_BYTES, vhd_header.DYNAMIC_HEADER.offset_of("checksum"))


def _attack_footers(data: bytes) -> None:
    tail = vhd_footer.unpack_footer(data[:_FOOTER_BYTES], file_offset=8 * MIB)
    copy = vhd_footer.unpack_footer(data[_FOOTER_BYTES : 2 * _FOOTER_BYTES], file_offset=0)
    footer = vhd_footer.choose_footer([tail], copy, file_size_bytes=8 * MIB)
    footer.validate_within(8 * MIB)
    assert 0 < footer.current_size <= vhd_footer.VIRTUAL_BYTES_MAX
    assert vhd_footer.geometry_of(footer.current_size) <= vhd_footer.GEOMETRY_MAX


def _attack_header(data: bytes) -> None:
    header = vhd_header.unpack_dynamic_header(data, file_offset=512)
    header.validate()
    header.validate_within(8 * MIB, virtual_bytes=64 * MIB)
    assert vhd_batmap.batmap_header_offset(header) > header.table_offset
    for entry in header.locators:
        entry.validate_within(8 * MIB)
        assert "\0" not in vhd_locator.decode_locator(entry.platform_code, data[:1000])


def _attack_table(data: bytes) -> None:
    """Take the first 4 bytes for the size of the file, the rest for its BAT."""
    geometry = vhd_bat.BlockGeometry.of(virtual_bytes=5 * MIB + 512, block_bytes=512 * KIB)
    offsets = vhd_bat.unpack_bat(data[4:], geometry.block_count)
    vhd_bat.validate_bat(
        offsets,
        geometry,
        table_offset=0x600,
        file_size_bytes=int.from_bytes(data[:4], "big"),
        structures=[(0, 0x800, "structures")],
    )
    places = np.sort(offsets[offsets != vhd_bat.NO_OFFSET])
    assert (np.diff(places) >= geometry.bitmap_bytes + 512).all()


def _table_seeds() -> list[bytes]:
    rows = np.arange(11, dtype=np.int64) * (520 * KIB) + 0x800
    rows[3] = vhd_bat.NO_OFFSET
    return [(16 * MIB).to_bytes(4, "big") + vhd_bat.pack_bat(each) for each in (rows, rows[::-1])]


def _attack_batmap(data: bytes) -> None:
    batmap = vhd_batmap.unpack_batmap(data, file_offset=0x800)
    batmap.validate()
    batmap.validate_within(8 * MIB)


@functools.cache
def _files() -> FaultFiles:
    files = FaultFiles("/d")
    clock = FakeClock()
    create_disk(files, _PARENT, virtual_bytes=4 * MIB, format="vhd", block_bytes=512 * KIB, clock=clock)
    create_disk(files, _DISK, format="vhd", block_bytes=512 * KIB, parent=_PARENT, clock=clock)
    with open_disk(files, _DISK, writable=True, clock=clock) as disk:
        disk.write(b"\1" * (600 * KIB), 0)
        disk.write(b"\2" * 512, 3 * MIB)
    files.settle()
    return files


def _footer_seeds() -> list[bytes]:
    content = _files().content_of(_DISK)
    return [content[-512:] + content[:512], content[-512:-511] * 512 + content[:512]]


def _header_seeds() -> list[bytes]:
    content = _files().content_of(_DISK)
    other = vhd_header.DynamicHeader(
        table_offset=0x600, max_table_entries=128, block_size=MIB, parent_unique_id=uuid.UUID(int=9)
    )
    return [content[512 : 512 + _HEADER_BYTES], other.pack()]


def _attack_locator(data: bytes) -> None:
    """Take the first byte for the platform: whatever the rest is, it spells a name of bounded length."""
    name = vhd_locator.decode_locator(_CODES[data[0] % len(_CODES)] if data else b"none", data[1:])
    assert "\0" not in name
    assert len(name) <= len(data)


FUZZERS = (
    Fuzzer(
        "vhd_footers",
        _footer_seeds,
        _attack_footers,
        lambda data: _footer_summed(_footer_summed(data, 0), 512),
    ),
    Fuzzer("vhd_header", _header_seeds, _attack_header, lambda data: _header_summed(data, 0)),
    Fuzzer("vhd_table", _table_seeds, _attack_table),
    Fuzzer(
        "vhd_batmap",
        lambda: [
            vhd_batmap.BATMAP_HEADER.pack(cookie=b"tdbatmap", batmap_offset=0xA00, batmap_size=1),
        ],
        _attack_batmap,
    ),
    Fuzzer(
        "vhd_locator", lambda: [b"\0" + ".\\a.vhd".encode("utf-16-le"), b"\2file:///a.vhd"], _attack_locator
    ),
)
