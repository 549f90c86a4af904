"""Change single fields of a VHDX file, with or without the checksum that belongs to them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from hvreplica.formats.vhdx_header import HEADER, HEADER_BYTES, HEADER_OFFSETS, unpack_header
from hvreplica.formats.vhdx_metadata import (
    METADATA_TABLE_ENTRY,
    METADATA_TABLE_HEADER,
    PARENT_LOCATOR_ITEM,
    unpack_metadata_table,
)
from hvreplica.formats.vhdx_region import (
    BAT_REGION,
    METADATA_REGION,
    REGION_TABLE_BYTES,
    REGION_TABLE_OFFSETS,
    pack_region_table,
    unpack_region_table,
)

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable
    from pathlib import Path

    from hvreplica.formats.vhdx_header import Header
    from hvreplica.formats.vhdx_region import Region


class Patient:
    """A VHDX file that is operated on. Every method reads and writes the file at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, at: int, length: int) -> bytes:
        """Return bytes of the file."""
        with self.path.open("rb") as file:
            file.seek(at)
            return file.read(length)

    def write(self, at: int, data: bytes) -> None:
        """Overwrite bytes of the file."""
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(data)

    def flip(self, at: int) -> None:
        """Change one bit."""
        self.write(at, bytes([self.read(at, 1)[0] ^ 0x10]))

    def resize(self, size_bytes: int) -> None:
        """Cut the file, or grow it by zeros."""
        with self.path.open("r+b") as file:
            file.truncate(size_bytes)

    @property
    def size(self) -> int:
        """The length of the file."""
        return self.path.stat().st_size

    def headers(self) -> list[Header]:
        """Return both headers."""
        return [unpack_header(self.read(at, HEADER_BYTES), file_offset=at) for at in HEADER_OFFSETS]

    @property
    def current(self) -> Header:
        """The header that counts."""
        return max(self.headers(), key=lambda header: header.sequence_number)

    def set_headers(self, **changes: Any) -> None:
        """Change fields in both headers, and make their checksums right."""
        for at, header in zip(HEADER_OFFSETS, self.headers(), strict=True):
            self.write(at, dataclasses.replace(header, **changes).pack())

    def regions(self) -> list[Region]:
        """Return the regions of the first table."""
        at = REGION_TABLE_OFFSETS[0]
        return list(unpack_region_table(self.read(at, REGION_TABLE_BYTES), file_offset=at).regions)

    def set_regions(self, change: Callable[[list[Region]], list[Region]], *, copies: int = 2) -> None:
        """Write the regions that `change` returns to the first `copies` tables, with right checksums."""
        table = pack_region_table(change(self.regions()))
        for at in REGION_TABLE_OFFSETS[:copies]:
            self.write(at, table)

    def region(self, guid: uuid.UUID) -> Region:
        """Return one region."""
        return next(region for region in self.regions() if region.guid == guid)

    def set_region(self, guid: uuid.UUID, **changes: Any) -> None:
        """Change fields of one region in both tables."""
        self.set_regions(
            lambda regions: [dataclasses.replace(r, **changes) if r.guid == guid else r for r in regions]
        )

    @property
    def metadata_at(self) -> int:
        """Where the metadata region stands."""
        return self.region(METADATA_REGION).file_offset

    def set_item(self, item_id: uuid.UUID, *, new_id: uuid.UUID | None = None, **changes: Any) -> None:
        """Change fields of a metadata table entry."""
        entry = self.item(item_id)
        fields = {
            "item_id": new_id or item_id,
            "offset": entry.offset,
            "length": entry.length,
            "flags": entry.flags,
        }
        self.write(entry.at, METADATA_TABLE_ENTRY.pack(**{**fields, **changes}))

    def set_value(self, item_id: uuid.UUID, value: int, *, at: int = 0, length: int = 4) -> None:
        """Change `length` bytes of a metadata item's value."""
        self.write(self.metadata_at + self.item(item_id).offset + at, value.to_bytes(length, "little"))

    def add_item(self, item_id: uuid.UUID, data: bytes, *, flags: int) -> None:
        """Append a metadata item, half a MiB into the region."""
        table = self._table()
        offset = 512 << 10
        self.write(self.metadata_at + offset, data)
        row = METADATA_TABLE_ENTRY.pack(item_id=item_id, offset=offset, length=len(data), flags=flags)
        self.write(self.metadata_at + 32 * (1 + table.entry_count), row)
        self.set_item_count(table.entry_count + 1)

    def set_locator(self, data: bytes) -> None:
        """Put another parent locator in the place of the one that is there."""
        self.set_item(PARENT_LOCATOR_ITEM, length=len(data))
        self.write(self.metadata_at + self.item(PARENT_LOCATOR_ITEM).offset, data)

    def set_item_count(self, count: int) -> None:
        """Change the number of metadata items that the table claims."""
        self.write(
            self.metadata_at + METADATA_TABLE_HEADER.offset_of("entry_count"), count.to_bytes(2, "little")
        )

    def _table(self) -> Any:
        return unpack_metadata_table(self.read(self.metadata_at, 64 << 10), file_offset=self.metadata_at)

    def item(self, item_id: uuid.UUID) -> Any:
        """Return the metadata table entry of an item."""
        return next(entry for entry in self._table().entries if entry.item_id == item_id)

    def entry_at(self, index: int) -> int:
        """Return the place of a BAT entry in the file."""
        return self.region(BAT_REGION).file_offset + 8 * index

    def entry(self, index: int) -> int:
        """Return a BAT entry."""
        return int.from_bytes(self.read(self.entry_at(index), 8), "little")

    def set_entry(self, index: int, value: int) -> None:
        """Change a BAT entry."""
        self.write(self.entry_at(index), value.to_bytes(8, "little"))

    def break_checksum(self, slot: int) -> None:
        """Make one header's checksum wrong."""
        self.flip(HEADER_OFFSETS[slot] + HEADER.offset_of("reserved") + 100)
