"""What region table and metadata of a VHDX say, read from a file whose own log is empty or laid over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.errors import FieldOutOfRange, FormatError, UnsupportedVersion
from hvreplica.formats.vhdx_bat import BAT_ENTRY_BYTES, BatGeometry
from hvreplica.formats.vhdx_header import FILE_IDENTIFIER, HEADER_SECTION_BYTES, unpack_creator
from hvreplica.formats.vhdx_metadata import (
    FILE_PARAMETERS,
    FILE_PARAMETERS_ITEM,
    LOGICAL_SECTOR_SIZE,
    LOGICAL_SECTOR_SIZE_ITEM,
    METADATA_TABLE_BYTES,
    PHYSICAL_SECTOR_SIZE,
    PHYSICAL_SECTOR_SIZE_ITEM,
    VIRTUAL_DISK_ID,
    VIRTUAL_DISK_ID_ITEM,
    VIRTUAL_DISK_SIZE,
    VIRTUAL_DISK_SIZE_ITEM,
    DiskParameters,
    unpack_metadata_table,
)
from hvreplica.formats.vhdx_region import (
    BAT_REGION,
    METADATA_REGION,
    REGION_TABLE_BYTES,
    REGION_TABLE_OFFSETS,
    choose_region_table,
    unpack_region_table,
    validate_regions_within,
)

if TYPE_CHECKING:
    from hvreplica.files import BlockFile
    from hvreplica.formats.vhdx_header import Header
    from hvreplica.formats.vhdx_region import Region, RegionTable


@dataclass(frozen=True, slots=True)
class Image:
    """The fixed facts of one VHDX file.

    Structures: (file_offset, length, name) of all that is not a block.
    """

    creator: str
    parameters: DiskParameters
    geometry: BatGeometry
    bat: Region
    structures: tuple[tuple[int, int, str], ...]


def read_creator(file: BlockFile) -> str:
    """Return the creator text. Raises: BadSignature if this is no VHDX, Truncated."""
    return unpack_creator(file.read(0, FILE_IDENTIFIER.size))


def read_image(file: BlockFile, header: Header, creator: str) -> Image:
    """Return what the file is, all of it checked.

    Raises: FormatError of the kind that fits; UnsupportedVersion for a disk with a parent.
    """
    table = choose_region_table([_read_region_table(file, at) for at in REGION_TABLE_OFFSETS])
    validate_regions_within(
        table.regions,
        file_size_bytes=file.size(),
        log_offset=header.log_offset,
        log_length=header.log_length,
    )
    parameters = _read_parameters(file, table.find(METADATA_REGION))
    if parameters.has_parent:
        raise UnsupportedVersion(
            "this is a differencing disk; only disks without a parent can be opened",
            field="flags",
            expected="HasParent not set",
            actual="HasParent set",
            spec=FILE_PARAMETERS.spec,
            hint="merge the chain into one disk first, for example with Hyper-V's Merge-VHD or Convert-VHD",
        )
    geometry = BatGeometry.of(
        virtual_bytes=parameters.virtual_bytes,
        block_bytes=parameters.block_bytes,
        logical_sector_bytes=parameters.logical_sector_bytes,
    )
    bat = table.find(BAT_REGION)
    if bat.length < geometry.entry_count * BAT_ENTRY_BYTES:
        raise FieldOutOfRange(
            "the BAT is too short for the size of the disk",
            offset=bat.at,
            field="length",
            expected=f"at least {geometry.entry_count * BAT_ENTRY_BYTES}",
            actual=bat.length,
            spec="[MS-VHDX] 2.5",
        )
    structures = [(0, HEADER_SECTION_BYTES, "header section")]
    structures += [(region.file_offset, region.length, region.name) for region in table.regions]
    if header.log_length:
        structures.append((header.log_offset, header.log_length, "log"))
    return Image(creator, parameters, geometry, bat, tuple(structures))


def _read_region_table(file: BlockFile, file_offset: int) -> RegionTable | FormatError:
    try:
        return unpack_region_table(file.read(file_offset, REGION_TABLE_BYTES), file_offset=file_offset)
    except FormatError as error:
        return error


def _read_parameters(file: BlockFile, region: Region) -> DiskParameters:
    at = region.file_offset
    table = unpack_metadata_table(file.read(at, METADATA_TABLE_BYTES), file_offset=at)
    table.validate()
    table.validate_within(region.length)
    rows = {}
    for item_id, layout in (
        (FILE_PARAMETERS_ITEM, FILE_PARAMETERS),
        (VIRTUAL_DISK_SIZE_ITEM, VIRTUAL_DISK_SIZE),
        (VIRTUAL_DISK_ID_ITEM, VIRTUAL_DISK_ID),
        (LOGICAL_SECTOR_SIZE_ITEM, LOGICAL_SECTOR_SIZE),
        (PHYSICAL_SECTOR_SIZE_ITEM, PHYSICAL_SECTOR_SIZE),
    ):
        entry = table.find(item_id)
        rows.update(layout.unpack(file.read(at + entry.offset, layout.size)))
    parameters = DiskParameters(
        virtual_bytes=rows["virtual_disk_size"],
        block_bytes=rows["block_size"],
        logical_sector_bytes=rows["logical_sector_size"],
        physical_sector_bytes=rows["physical_sector_size"],
        virtual_disk_id=rows["virtual_disk_id"],
        flags=rows["flags"],
        at=at,
    )
    parameters.validate()
    return parameters
