"""Change single fields of VHD and VHDX files and set their checksums right again, apart from the code under
test.

Offsets are those of the specifications: VHD 1.0, and [MS-VHDX] 2.2 to 2.6.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from hvreplica.native import crc32c

if TYPE_CHECKING:
    from pathlib import Path

VHD_FOOTER_BYTES = 512
_HEADERS = (64 << 10, 128 << 10)
_REGION_TABLES = (192 << 10, 256 << 10)
_REGION_TABLE_BYTES = 64 << 10
_MIB = 1 << 20
BAT = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
FILE_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
LOGICAL_SECTOR_SIZE = uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PARENT_LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")


def peek(path: Path, offset: int, length: int) -> bytes:
    """Return bytes of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def poke(path: Path, offset: int, octets: bytes) -> None:
    """Change bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(octets)


def big(path: Path, offset: int, length: int) -> int:
    """Return a number of a VHD."""
    return int.from_bytes(peek(path, offset, length), "big")


def little(path: Path, offset: int, length: int) -> int:
    """Return a number of a VHDX."""
    return int.from_bytes(peek(path, offset, length), "little")


def _vhd_sealed(octets: bytes, at: int) -> bytes:
    total = ~(sum(octets) - sum(octets[at : at + 4])) & 0xFFFF_FFFF
    return octets[:at] + total.to_bytes(4, "big") + octets[at + 4 :]


def footer_offset(path: Path) -> int:
    """Return where a VHD's footer stands."""
    return path.stat().st_size - VHD_FOOTER_BYTES


def set_footer(path: Path, at: int, octets: bytes, *, copies: bool = True) -> None:
    """Change a field of a VHD's footer, and of its copy at the start where there is one."""
    places = [footer_offset(path)]
    if copies and peek(path, 0, 8) == b"conectix":
        places.append(0)
    for place in places:
        footer = bytearray(peek(path, place, VHD_FOOTER_BYTES))
        footer[at : at + len(octets)] = octets
        poke(path, place, _vhd_sealed(bytes(footer), 64))


def set_dynamic_header(path: Path, at: int, octets: bytes) -> None:
    """Change a field of a VHD's dynamic disk header."""
    place = dynamic_header_offset(path)
    header = bytearray(peek(path, place, 1024))
    header[at : at + len(octets)] = octets
    poke(path, place, _vhd_sealed(bytes(header), 36))


def dynamic_header_offset(path: Path) -> int:
    """Return where a VHD's dynamic disk header stands."""
    return big(path, footer_offset(path) + 16, 8)


def vhd_table_offset(path: Path) -> int:
    """Return where a VHD's block allocation table stands."""
    return big(path, dynamic_header_offset(path) + 16, 8)


def bitmap_offset(path: Path, block: int) -> int:
    """Return where the bitmap of an allocated block of a VHD stands."""
    entry = big(path, vhd_table_offset(path) + 4 * block, 4)
    assert entry != 0xFFFF_FFFF
    return entry * 512


def set_header(path: Path, index: int, at: int, octets: bytes) -> None:
    """Change a field of one of a VHDX's two headers."""
    _set_summed(path, _HEADERS[index], 4096, {at: octets})


def header_field(path: Path, index: int, at: int, length: int) -> int:
    """Return a number of one of a VHDX's two headers."""
    return little(path, _HEADERS[index] + at, length)


def current_header(path: Path) -> int:
    """Return which of two good headers counts."""
    return int(header_field(path, 1, 8, 8) > header_field(path, 0, 8, 8))


def log_place(path: Path) -> tuple[int, int]:
    """Return offset and length of a VHDX's log."""
    index = current_header(path)
    return header_field(path, index, 72, 8), header_field(path, index, 68, 4)


def _set_summed(path: Path, place: int, length: int, changes: dict[int, bytes]) -> None:
    octets = bytearray(peek(path, place, length))
    for at, new in changes.items():
        octets[at : at + len(new)] = new
    octets[4:8] = bytes(4)
    octets[4:8] = crc32c(octets).to_bytes(4, "little")
    poke(path, place, bytes(octets))


def region_offset(path: Path, region: uuid.UUID) -> int:
    """Return where a region of a VHDX stands."""
    at = peek(path, _REGION_TABLES[0], _REGION_TABLE_BYTES).index(region.bytes_le)
    return little(path, _REGION_TABLES[0] + at + 16, 8)


def add_region(path: Path, region: uuid.UUID, octets: bytes, *, required: bool) -> int:
    """Append a region of 1 MiB to a VHDX and list it in both tables; return its offset."""
    offset = -(-path.stat().st_size // _MIB) * _MIB
    poke(path, offset, octets.ljust(_MIB, b"\0"))
    count = little(path, _REGION_TABLES[0] + 8, 4)
    row = (
        region.bytes_le
        + offset.to_bytes(8, "little")
        + _MIB.to_bytes(4, "little")
        + required.to_bytes(4, "little")
    )
    for place in _REGION_TABLES:
        changes = {8: (count + 1).to_bytes(4, "little"), 16 + 32 * count: row}
        _set_summed(path, place, _REGION_TABLE_BYTES, changes)
    return offset


def metadata_row(path: Path, item: uuid.UUID) -> int:
    """Return where the row of a metadata item stands in the file."""
    place = region_offset(path, METADATA)
    return place + peek(path, place, 64 << 10).index(item.bytes_le)


def metadata_item(path: Path, item: uuid.UUID) -> tuple[int, int]:
    """Return offset in the file and length of a metadata item."""
    row = metadata_row(path, item)
    return region_offset(path, METADATA) + little(path, row + 16, 4), little(path, row + 20, 4)


def add_metadata(path: Path, item: uuid.UUID, octets: bytes, *, flags: int) -> int:
    """Add a metadata item behind all others; return its offset in the file, 0 where it is empty."""
    place = region_offset(path, METADATA)
    count = little(path, place + 10, 2)
    rows = [place + 32 + 32 * index for index in range(count)]
    end = max(64 << 10, *(little(path, row + 16, 4) + little(path, row + 20, 4) for row in rows))
    start = -(-end // 4096) * 4096 if octets else 0
    row = (
        item.bytes_le
        + start.to_bytes(4, "little")
        + len(octets).to_bytes(4, "little")
        + flags.to_bytes(8, "little")
    )
    poke(path, place + 10, (count + 1).to_bytes(2, "little"))
    poke(path, place + 32 + 32 * count, row)
    if octets:
        poke(path, place + start, octets)
    return place + start if octets else 0


def bat_entry(path: Path, index: int) -> int:
    """Return an entry of a VHDX's BAT."""
    return little(path, region_offset(path, BAT) + 8 * index, 8)


def set_bat_entry(path: Path, index: int, entry: int) -> None:
    """Change an entry of a VHDX's BAT."""
    poke(path, region_offset(path, BAT) + 8 * index, entry.to_bytes(8, "little"))


def replace_in_locator(path: Path, old: str, new: str) -> None:
    """Change text of the same length in a VHDX's parent locator."""
    offset, length = metadata_item(path, PARENT_LOCATOR)
    octets = peek(path, offset, length)
    assert len(old) == len(new)
    assert old.encode("utf-16-le") in octets, old
    poke(path, offset, octets.replace(old.encode("utf-16-le"), new.encode("utf-16-le")))
