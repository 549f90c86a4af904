"""What region table and metadata of a VHDX say, read from a file whose own log is empty or laid over it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hvreplica.errors import FieldOutOfRange, FormatError
from hvreplica.formats.vhdx_bat import BAT_ENTRY_BYTES, BatGeometry
from hvreplica.formats.vhdx_header import FILE_IDENTIFIER, HEADER_SECTION_BYTES, unpack_creator
from hvreplica.formats.vhdx_locator import unpack_parent_locator
from hvreplica.formats.vhdx_metadata import (
    FILE_PARAMETERS,
    FILE_PARAMETERS_ITEM,
    LOGICAL_SECTOR_SIZE,
    LOGICAL_SECTOR_SIZE_ITEM,
    METADATA_TABLE_BYTES,
    PARENT_LOCATOR_ITEM,
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
    from hvreplica.formats.vhdx_locator import ParentLocator
    from hvreplica.formats.vhdx_metadata import MetadataTable
    from hvreplica.formats.vhdx_region import Region, RegionTable


@dataclass(frozen=True, slots=True)
class Image:
    """The fixed facts of one VHDX file.

    structures: (file_offset, length, name) of all that is not a block. locator: of a disk with a parent.
    region_table_offset: of the copy that was read.
    """

    creator: str
    parameters: DiskParameters
    geometry: BatGeometry
    bat: Region
    structures: tuple[tuple[int, int, str], ...]
    locator: ParentLocator | None
    metadata: Region
    metadata_table: MetadataTable
    region_table_offset: int


def read_creator(file: BlockFile) -> str:
    """Return the creator text. Raises: BadSignature if this is no VHDX, Truncated."""
    return unpack_creator(file.read(0, FILE_IDENTIFIER.size))


def read_image(file: BlockFile, header: Header, creator: str, *, virtual_bytes: int | None = None) -> Image:
    """Return what the file is, all of it checked.

    virtual_bytes: take this for the size of the disk, not what the metadata says. Raises: FormatError of the
    kind that fits. A parent locator is only read: validate() it before its use.
    """
    table = choose_region_table([_read_region_table(file, at) for at in REGION_TABLE_OFFSETS])
    validate_regions_within(
        table.regions,
        file_size_bytes=file.size(),
        log_offset=header.log_offset,
        log_length=header.log_length,
    )
    metadata = table.find(METADATA_REGION)
    metadata_table = _read_metadata_table(file, metadata)
    parameters = _read_parameters(file, metadata_table)
    if virtual_bytes is not None:
        parameters = replace(parameters, virtual_bytes=virtual_bytes)
        parameters.validate()
    geometry = BatGeometry.of(
        virtual_bytes=parameters.virtual_bytes,
        block_bytes=parameters.block_bytes,
        logical_sector_bytes=parameters.logical_sector_bytes,
        has_parent=parameters.has_parent,
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
    return Image(
        creator=creator,
        parameters=parameters,
        geometry=geometry,
        bat=bat,
        structures=tuple(structures),
        locator=_read_locator(file, metadata_table) if parameters.has_parent else None,
        metadata=metadata,
        metadata_table=metadata_table,
        region_table_offset=table.at,
    )


def _read_region_table(file: BlockFile, file_offset: int) -> RegionTable | FormatError:
    try:
        return unpack_region_table(file.read(file_offset, REGION_TABLE_BYTES), file_offset=file_offset)
    except FormatError as error:
        return error


def _read_metadata_table(file: BlockFile, region: Region) -> MetadataTable:
    at = region.file_offset
    table = unpack_metadata_table(file.read(at, METADATA_TABLE_BYTES), file_offset=at)
    table.validate()
    table.validate_within(region.length)
    return table


def _read_locator(file: BlockFile, table: MetadataTable) -> ParentLocator:
    entry = table.find(PARENT_LOCATOR_ITEM)
    at = table.at + entry.offset
    return unpack_parent_locator(file.read(at, entry.length), file_offset=at)


def _read_parameters(file: BlockFile, table: MetadataTable) -> DiskParameters:
    at = table.at
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
