"""What footer, header and locators of a VHD say, read from its file and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.errors import FormatError
from hvreplica.formats.vhd_bat import BlockGeometry
from hvreplica.formats.vhd_batmap import (
    BATMAP_CREATOR,
    BATMAP_HEADER,
    batmap_header_offset,
    unpack_batmap,
)
from hvreplica.formats.vhd_footer import (
    FOOTER_BYTES,
    OLD_FOOTER_BYTES,
    Footer,
    VhdType,
    choose_footer,
    unpack_footer,
)
from hvreplica.formats.vhd_header import (
    BAT_ENTRY_BYTES,
    DYNAMIC_HEADER_BYTES,
    DynamicHeader,
    unpack_dynamic_header,
)
from hvreplica.formats.vhd_locator import (
    ABSOLUTE,
    ABSOLUTE_OLD,
    FILE_URL,
    RELATIVE,
    RELATIVE_OLD,
    LocatorEntry,
    decode_locator,
)

if TYPE_CHECKING:
    from hvreplica.files import BlockFile

LOCATOR_STRUCTURE = "parent locator"
# A relative name still leads to the parent where a chain was moved as a whole.
_NAME_ORDER = (RELATIVE, FILE_URL, ABSOLUTE, RELATIVE_OLD, ABSOLUTE_OLD)


@dataclass(frozen=True, slots=True)
class Image:
    """The fixed facts of a dynamic or differencing VHD file.

    has_tail: whether `footer` is the one at the end of the file. structures: (file_offset, length, name) of
    all that is not a block. parent_names: in the order to try. has_batmap: XenServer believes one.
    """

    footer: Footer
    header: DynamicHeader
    geometry: BlockGeometry
    has_tail: bool
    structures: tuple[tuple[int, int, str], ...]
    parent_names: tuple[str, ...]
    has_batmap: bool

    @property
    def has_parent(self) -> bool:
        """Whether this is a differencing disk."""
        return self.footer.disk_type == VhdType.DIFFERENCING

    def table_place(self, end: int) -> tuple[int, int]:
        """Return (file_offset, length) of the whole table as the header declares it, cut off at `end`.

        Nothing may be put there, though the disk may need fewer entries: other programs read them all.
        """
        header = self.header
        stop = min(header.table_offset + header.max_table_entries * BAT_ENTRY_BYTES, end)
        return header.table_offset, stop - header.table_offset


def read_footer(file: BlockFile) -> Footer:
    """Return the footer that counts, checked against the file. Raises: FormatError of the kind that fits."""
    size = file.size()
    trailing = [_footer_at(file, size - length, length) for length in (FOOTER_BYTES, OLD_FOOTER_BYTES)]
    footer = choose_footer(trailing, _footer_at(file, 0, FOOTER_BYTES), file_size_bytes=size)
    footer.validate_within(size)
    return footer


def _footer_at(file: BlockFile, file_offset: int, length: int) -> Footer | FormatError:
    try:
        if file_offset < 0:
            return unpack_footer(b"", file_offset=0)
        return unpack_footer(file.read(file_offset, length), file_offset=file_offset)
    except FormatError as error:
        return error


def read_image(file: BlockFile, footer: Footer) -> Image:
    """Return what a disk that is not fixed is. Raises: FormatError of the kind that fits."""
    size = file.size()
    header = unpack_dynamic_header(
        file.read(footer.data_offset, DYNAMIC_HEADER_BYTES), file_offset=footer.data_offset
    )
    header.validate()
    header.validate_within(size, virtual_bytes=footer.current_size)
    geometry = BlockGeometry.of(virtual_bytes=footer.current_size, block_bytes=header.block_size)
    table_bytes = geometry.block_count * BAT_ENTRY_BYTES
    structures = [
        (0, FOOTER_BYTES, "copy of the footer"),
        (header.at, DYNAMIC_HEADER_BYTES, "dynamic disk header"),
        (header.table_offset, table_bytes, "BAT"),
    ]
    # A footer of 511 bytes may start anywhere; one that is the copy at 0 is no tail.
    has_tail = footer.at + footer.footer_bytes == size and footer.at > 0
    if has_tail:
        structures.append((footer.at, footer.footer_bytes, "footer"))
    names: tuple[str, ...] = ()
    if footer.disk_type == VhdType.DIFFERENCING:
        used = _locators_within(header, size)
        structures += [(e.platform_data_offset, e.platform_data_length, LOCATOR_STRUCTURE) for e in used]
        names = _parent_names(file, header, used)
    batmap = _batmap_structures(file, footer, header)
    return Image(
        footer=footer,
        header=header,
        geometry=geometry,
        has_tail=has_tail,
        structures=(*structures, *batmap),
        parent_names=names,
        has_batmap=bool(batmap),
    )


def _locators_within(header: DynamicHeader, file_size_bytes: int) -> list[LocatorEntry]:
    """Return the locators that can be read: a damaged one must not hide the parent that another one names."""
    used = []
    for entry in header.locators:
        try:
            entry.validate_within(file_size_bytes)
        except FormatError:
            continue
        if entry.is_used:
            used.append(entry)
    return used


def _parent_names(file: BlockFile, header: DynamicHeader, locators: list[LocatorEntry]) -> tuple[str, ...]:
    names = []
    for code in _NAME_ORDER:
        for entry in locators:
            if entry.platform_code == code:
                data = file.read(entry.platform_data_offset, entry.platform_data_length)
                names.append(decode_locator(code, data))
    return tuple(dict.fromkeys(name for name in (*names, header.parent_name) if name))


def _batmap_structures(file: BlockFile, footer: Footer, header: DynamicHeader) -> list[tuple[int, int, str]]:
    """Return the places of a batmap that XenServer would believe, none where there is none.

    A damaged one is none too: it is XenServer's own, and nothing here is read from it.
    """
    if not footer.creator_application.startswith(BATMAP_CREATOR):
        return []
    file_offset = batmap_header_offset(header)
    try:
        batmap = unpack_batmap(file.read(file_offset, BATMAP_HEADER.size), file_offset=file_offset)
        batmap.validate()
        batmap.validate_within(file.size())
    except FormatError:
        return []
    return [
        (file_offset, BATMAP_HEADER.size, "batmap header"),
        (batmap.batmap_offset, batmap.batmap_bytes, "batmap"),
    ]
