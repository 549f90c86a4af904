"""What a check has learned of one VHDX: each level reads what those before it left here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.formats.vhdx_bat import BAT_ENTRY_BYTES, BatGeometry
from hvreplica.formats.vhdx_header import FILE_BYTES_MAX, HEADER_SECTION_BYTES
from hvreplica.formats.vhdx_metadata import BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, SECTOR_SIZES, VIRTUAL_BYTES_MAX
from hvreplica.formats.vhdx_region import BAT_REGION
from hvreplica.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hvreplica.disk.vhdx.replay import ReplayPlan
    from hvreplica.files import BlockFile
    from hvreplica.formats.vhdx_header import Header
    from hvreplica.formats.vhdx_metadata import DiskParameters, MetadataTable
    from hvreplica.formats.vhdx_region import Region, RegionTable
    from hvreplica.native import BatWalk


@dataclass(slots=True)
class VhdxFile:
    """One file under check.

    view: the file as a replay of its log would leave it, or the file itself where there is none. header: the
    current one. table: the copy of the region table that counts. valid_headers, valid_tables: which
    copies are valid. used_units: MiB from the start of the file to the end of the last use. None where it
    could not be told.
    """

    file: BlockFile
    view: BlockFile
    header: Header | None = None
    valid_headers: tuple[bool, ...] = (False, False)
    plan: ReplayPlan | None = None
    table: RegionTable | None = None
    valid_tables: tuple[bool, ...] = (False, False)
    metadata: MetadataTable | None = None
    parameters: DiskParameters | None = None
    walk: BatWalk | None = None
    used_units: int | None = None

    @property
    def file_units(self) -> int:
        """Whole MiB in the file that a block could have."""
        return min(self.view.size(), FILE_BYTES_MAX) // MIB

    @property
    def bat(self) -> Region | None:
        """The BAT region."""
        regions = self.table.regions if self.table is not None else ()
        return next((region for region in regions if region.guid == BAT_REGION), None)

    def structures(self) -> Iterator[tuple[int, int, str]]:
        """Yield (file_offset, length, name) of all that is not a block."""
        yield 0, HEADER_SECTION_BYTES, "header section"
        if self.header is not None and self.header.log_length:
            yield self.header.log_offset, self.header.log_length, "log"
        for region in self.table.regions if self.table is not None else ():
            yield region.file_offset, region.length, region.name


@dataclass(frozen=True, slots=True)
class Entries:
    """How many BAT entries a disk has, and how many stand in its region."""

    chunk_ratio: int
    block_count: int
    needed_count: int
    present_count: int

    @staticmethod
    def of(subject: VhdxFile) -> Entries | None:
        """Return the counts, None where the parameters or the region do not allow to tell."""
        parameters, bat = subject.parameters, subject.bat
        if parameters is None or bat is None or not _can_count(parameters):
            return None
        geometry = BatGeometry.of(
            virtual_bytes=parameters.virtual_bytes,
            block_bytes=parameters.block_bytes,
            logical_sector_bytes=parameters.logical_sector_bytes,
            has_parent=parameters.has_parent,
        )
        room_bytes = max(min(bat.length, subject.view.size() - bat.file_offset), 0)
        needed_count = geometry.entry_count
        present_count = min(needed_count, room_bytes // BAT_ENTRY_BYTES)
        return Entries(geometry.chunk_ratio, geometry.block_count, needed_count, present_count)

    def block_of(self, index: int) -> int:
        """Return the payload block of an entry; for a sector-bitmap entry the block after it."""
        return index - index // (self.chunk_ratio + 1)

    def is_bitmap(self, index: int) -> bool:
        """Return whether this is the entry of a sector bitmap."""
        return index % (self.chunk_ratio + 1) == self.chunk_ratio

    def name(self, index: int) -> str:
        """Return the block of an entry for a message."""
        if self.is_bitmap(index):
            return f"the sector bitmap of chunk {index // (self.chunk_ratio + 1)}"
        return f"block {self.block_of(index)}"


def _can_count(parameters: DiskParameters) -> bool:
    block, size = parameters.block_bytes, parameters.virtual_bytes
    return (
        BLOCK_BYTES_MIN <= block <= BLOCK_BYTES_MAX
        and not block & (block - 1)
        and parameters.logical_sector_bytes in SECTOR_SIZES
        and 0 < size <= VIRTUAL_BYTES_MAX
    )
