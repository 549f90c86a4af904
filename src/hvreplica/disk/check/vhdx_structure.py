"""Level "structure" of a VHDX: identifier, headers, region tables, metadata.

Spec: [MS-VHDX] 2.2, 2.6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hvreplica.errors import FormatError
from hvreplica.formats.vhdx_header import (
    FILE_BYTES_MAX,
    FILE_IDENTIFIER,
    FILE_SIGNATURE,
    HEADER,
    HEADER_BYTES,
    HEADER_OFFSETS,
    HEADER_SECTION_BYTES,
    choose_header,
    unpack_header,
)
from hvreplica.formats.vhdx_metadata import (
    FILE_PARAMETERS,
    FILE_PARAMETERS_ITEM,
    KNOWN_ITEMS,
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
    region_errors_within,
    unpack_region_table,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hvreplica.disk.check.findings import Findings
    from hvreplica.disk.check.vhdx_file import VhdxFile
    from hvreplica.formats.vhdx_header import Header
    from hvreplica.formats.vhdx_metadata import MetadataTable
    from hvreplica.formats.vhdx_region import Region, RegionTable

_HEADER_COPY: Mapping[str, str] = {"BadSignature": "header-signature", "ChecksumMismatch": "header-checksum"}
_HEADER: Mapping[str, str] = {
    "UnsupportedVersion version": "header-version",
    "UnsupportedVersion log_version": "header-log-version",
    "FieldOutOfRange": "header-log-misaligned",
    "Overlap": "header-log-overlap",
    "Truncated": "header-log-outside-file",
}
_TABLE_COPY: Mapping[str, str] = {
    "BadSignature": "region-table-signature",
    "ChecksumMismatch": "region-table-checksum",
    "FieldOutOfRange": "region-table-count",
}
_REGION: Mapping[str, str] = {
    "UnsupportedVersion": "region-unknown-required",
    "Overlap guid": "region-duplicate",
    "FieldOutOfRange guid": "region-missing",
    "FieldOutOfRange": "region-misaligned",
    "Overlap": "region-overlap",
    "Truncated": "region-outside-file",
}
_METADATA: Mapping[str, str] = {
    "BadSignature": "metadata-signature",
    "FieldOutOfRange": "metadata-count",
    "Overlap item_id": "metadata-item-duplicate",
    "UnsupportedVersion": "metadata-item-unknown-required",
    "FieldOutOfRange flags": "metadata-item-flags",
    "FieldOutOfRange length": "metadata-item-length",
    "FieldOutOfRange offset": "metadata-item-outside-region",
    "Overlap offset": "metadata-item-overlap",
}
_ITEM: Mapping[str, str] = {
    "FieldOutOfRange length": "metadata-item-size",
    "FieldOutOfRange": "metadata-item-missing",
    "Truncated": "metadata-item-outside-region",
}
_PARAMETERS: Mapping[str, str] = {
    "FieldOutOfRange block_size": "parameter-block-size",
    "FieldOutOfRange flags": "parameter-flags",
    "FieldOutOfRange logical_sector_size": "parameter-logical-sector-size",
    "FieldOutOfRange physical_sector_size": "parameter-physical-sector-size",
    "FieldOutOfRange virtual_disk_size": "parameter-disk-size",
}
_ITEM_LAYOUTS = (
    (FILE_PARAMETERS_ITEM, FILE_PARAMETERS),
    (VIRTUAL_DISK_SIZE_ITEM, VIRTUAL_DISK_SIZE),
    (VIRTUAL_DISK_ID_ITEM, VIRTUAL_DISK_ID),
    (LOGICAL_SECTOR_SIZE_ITEM, LOGICAL_SECTOR_SIZE),
    (PHYSICAL_SECTOR_SIZE_ITEM, PHYSICAL_SECTOR_SIZE),
)


def check_size(subject: VhdxFile, findings: Findings) -> None:
    """Check that the file can hold a header section, and is no longer than a VHDX can be."""
    size = subject.file.size()
    if size < HEADER_SECTION_BYTES:
        findings.add(
            "file-truncated",
            "the file ends inside its header section",
            offset=size,
            expected=f"at least {HEADER_SECTION_BYTES} bytes",
            actual=f"{size} bytes",
            spec="[MS-VHDX] 2.2",
            hint="restore the file from a copy",
        )
    if size > FILE_BYTES_MAX:
        findings.add(
            "file-too-long",
            "the file is longer than any VHDX can be",
            expected=f"at most {FILE_BYTES_MAX} bytes",
            actual=f"{size} bytes",
        )


def check_identifier(subject: VhdxFile, findings: Findings) -> None:
    """Check the first 8 bytes; to be called after all other structures, which say whether it is a VHDX."""
    signature = subject.file.read(0, min(len(FILE_SIGNATURE), subject.file.size()))
    if signature == FILE_SIGNATURE:
        return
    findings.add(
        "identifier-signature",
        "the file does not start as a VHDX",
        severity="corrupt" if findings.has("corrupt") else None,
        offset=0,
        field="signature",
        expected=FILE_SIGNATURE,
        actual=signature,
        spec=FILE_IDENTIFIER.spec,
    )


def check_headers(subject: VhdxFile, findings: Findings) -> None:
    """Check both headers and choose the current one, which is left in `subject`. Spec: [MS-VHDX] 2.2.2."""
    candidates = [_read_header(subject, at) for at in HEADER_OFFSETS]
    errors = [_error_of(candidate) for candidate in candidates]
    subject.valid_headers = tuple(error is None for error in errors)
    any_valid = any(subject.valid_headers)
    for error in errors:
        code = _HEADER_COPY.get(type(error).__name__)
        if error is not None and code is not None:
            findings.add_error(code, error, severity=None if any_valid else "corrupt")
    if not any_valid:
        findings.add(
            "no-valid-header",
            "neither header copy is valid",
            offset=HEADER_OFFSETS[0],
            spec=HEADER.spec,
            hint="the start of the file was overwritten; restore the file from a copy",
        )
        return
    chosen = candidates[choose_header(candidates)]
    if isinstance(chosen, FormatError):
        raise TypeError("a header that cannot be read was chosen")
    subject.header = chosen
    numbers = [each.sequence_number for each in candidates if not isinstance(each, FormatError)]
    if all(subject.valid_headers) and numbers[0] == numbers[1]:
        findings.add(
            "header-sequence-equal",
            "both headers have one sequence number; the first counts",
            offset=HEADER_OFFSETS[1] + HEADER.offset_of("sequence_number"),
            field="sequence_number",
            actual=numbers[1],
            spec=HEADER.spec,
        )
    for error in chosen.errors_within(subject.file.size()):
        is_missing = error.field == "log_length" and error.actual == 0
        code = "header-log-missing" if is_missing else _HEADER.get(f"{type(error).__name__} {error.field}")
        findings.add_error(code or _HEADER[type(error).__name__], error)


def _read_header(subject: VhdxFile, file_offset: int) -> Header | FormatError:
    try:
        return unpack_header(subject.file.read(file_offset, HEADER_BYTES), file_offset=file_offset)
    except FormatError as error:
        return error


def _error_of(candidate: Header | FormatError) -> FormatError | None:
    if isinstance(candidate, FormatError):
        return candidate
    try:
        candidate.validate()
    except FormatError as error:
        return error
    return None


def check_regions(subject: VhdxFile, findings: Findings) -> None:
    """Check both region tables and the regions of the one that counts. Spec: [MS-VHDX] 2.2.3."""
    copies = [_read_region_table(subject, at) for at in REGION_TABLE_OFFSETS]
    errors = [list(copy.copy_errors()) if copy is not None else [] for copy in copies]
    valid = [copy for copy, faults in zip(copies, errors, strict=True) if copy is not None and not faults]
    subject.valid_tables = tuple(copy in valid for copy in copies)
    for error in (error for faults in errors for error in faults):
        findings.add_error(_TABLE_COPY[type(error).__name__], error, severity=None if valid else "corrupt")
    if not valid:
        findings.add(
            "no-valid-region-table",
            "neither copy of the region table is valid",
            offset=REGION_TABLE_OFFSETS[0],
            spec="[MS-VHDX] 2.2.3",
            hint="the start of the file was overwritten; restore the file from a copy",
        )
        return
    table = subject.table = valid[0]
    if len(valid) > 1 and valid[0].checksum != valid[1].checksum:
        findings.add(
            "region-tables-differ",
            "both copies of the region table are valid, and differ; the first counts",
            offset=REGION_TABLE_OFFSETS[1],
            spec="[MS-VHDX] 2.2.3",
        )
    findings.add_errors(table.entry_errors(), _REGION)
    header = subject.header
    within = region_errors_within(
        table.regions,
        file_size_bytes=subject.view.size(),
        log_offset=header.log_offset if header is not None else 0,
        log_length=header.log_length if header is not None else 0,
    )
    findings.add_errors(within, _REGION)
    for guid in (BAT_REGION, METADATA_REGION):
        _check_known_region(table, guid in {region.guid for region in table.regions}, guid, findings)
    for region in table.regions:
        _note_region(region, findings)


def _check_known_region(table: RegionTable, is_there: bool, guid: object, findings: Findings) -> None:  # noqa: FBT001
    if not is_there:
        findings.add(
            "region-missing",
            f"the region table has no {'BAT' if guid == BAT_REGION else 'metadata region'}",
            offset=table.at,
            field="guid",
            expected=guid,
            spec="[MS-VHDX] 2.2.3.2",
        )


def _note_region(region: Region, findings: Findings) -> None:
    known = region.guid in {BAT_REGION, METADATA_REGION}
    if known and not region.required:
        findings.add(
            "region-not-required",
            f"the {region.name} is not marked required, which VirtualBox refuses",
            offset=region.at + 28,
            field="required",
            expected=1,
            actual=region.required,
            spec="[MS-VHDX] 2.2.3.2",
        )
    if not known and not region.required:
        findings.add(
            "region-unknown",
            f"a region of {region.length} bytes that is not known here; it is kept as it is",
            offset=region.at,
            field="guid",
            actual=region.guid,
            spec="[MS-VHDX] 2.2.3.2",
        )


def _read_region_table(subject: VhdxFile, file_offset: int) -> RegionTable | None:
    try:
        return unpack_region_table(
            subject.view.read(file_offset, REGION_TABLE_BYTES), file_offset=file_offset
        )
    except FormatError:
        return None


def check_metadata(subject: VhdxFile, findings: Findings) -> None:
    """Check the metadata table and what the known items say. Spec: [MS-VHDX] 2.6."""
    regions = subject.table.regions if subject.table is not None else ()
    region = next((region for region in regions if region.guid == METADATA_REGION), None)
    if region is None or region.file_offset + METADATA_TABLE_BYTES > subject.view.size():
        return
    at = region.file_offset
    table = unpack_metadata_table(subject.view.read(at, METADATA_TABLE_BYTES), file_offset=at)
    findings.add_errors(table.errors(), _METADATA)
    findings.add_errors(table.errors_within(region.length), _METADATA)
    for entry in table.entries:
        if (entry.item_id not in KNOWN_ITEMS or entry.is_user) and not entry.is_required:
            findings.add(
                "metadata-item-unknown",
                f"an item of {entry.length} bytes that is not known here; it is kept as it is",
                offset=entry.at,
                field="item_id",
                actual=entry.item_id,
                spec="[MS-VHDX] 2.6.1.2",
            )
    subject.metadata = table
    subject.parameters = _read_parameters(subject, table, findings)
    if subject.parameters is not None:
        findings.add_errors(subject.parameters.errors(), _PARAMETERS)


def _read_parameters(subject: VhdxFile, table: MetadataTable, findings: Findings) -> DiskParameters | None:
    rows: dict[str, Any] = {}
    for item_id, layout in _ITEM_LAYOUTS:
        try:
            entry = table.find(item_id)
            rows.update(layout.unpack(subject.view.read(table.at + entry.offset, layout.size)))
        except FormatError as error:
            findings.add_errors([error], _ITEM)
    if len(rows) < sum(len(layout.fields) for _, layout in _ITEM_LAYOUTS):
        return None
    return DiskParameters(
        virtual_bytes=rows["virtual_disk_size"],
        block_bytes=rows["block_size"],
        logical_sector_bytes=rows["logical_sector_size"],
        physical_sector_bytes=rows["physical_sector_size"],
        virtual_disk_id=rows["virtual_disk_id"],
        flags=rows["flags"],
        at=table.at,
    )
