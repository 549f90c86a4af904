"""Open a VHD: footer, header, locators, BAT, in this order, each checked before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.disk.vhd.disk import FixedVhdDisk, VhdDisk
from hvreplica.disk.vhd.image import read_footer, read_image
from hvreplica.disk.vhd.table import VhdTable
from hvreplica.errors import FormatError
from hvreplica.formats.vhd_footer import COOKIE, FOOTER_BYTES, OLD_FOOTER_BYTES, SECTOR_BYTES
from hvreplica.units import align_up

if TYPE_CHECKING:
    from hvreplica.disk.vhd.image import Image
    from hvreplica.files import BlockFile


def looks_like_vhd(file: BlockFile) -> bool:
    """Return whether a footer's cookie stands where one may be."""
    size = file.size()
    for file_offset in (0, size - FOOTER_BYTES, size - OLD_FOOTER_BYTES):
        if 0 <= file_offset <= size - len(COOKIE) and file.read(file_offset, len(COOKIE)) == COOKIE:
            return True
    return False


def open_vhd(file: BlockFile) -> VhdDisk | FixedVhdDisk:
    """Return the disk in `file`, which it then owns, without its parent; writable if the file is.

    A footer that is missing at the end is written again if the file is writable; a whole file is not changed.
    On an error the file stays open and belongs to the caller. Raises: FormatError of the kind that fits.
    """
    try:
        footer = read_footer(file)
        if footer.is_fixed:
            return FixedVhdDisk(file, footer)
        image = read_image(file, footer)
        table = VhdTable(file, image)
        if file.writable and not image.has_tail:
            _write_tail(file, image, table)
            image = read_image(file, read_footer(file))
    except FormatError as error:
        error.at(file.path)
        raise
    return VhdDisk(file=file, image=image, table=table)


def _write_tail(file: BlockFile, image: Image, table: VhdTable) -> None:
    """Write the footer behind all that the file holds; what a crash left behind that is cut off.

    Until it is durable the copy at offset 0 counts, as it did before.
    """
    ends = [file_offset + length for file_offset, length, _ in image.structures]
    ends.append(sum(image.table_place(file.size())))
    bitmap_offsets = table.bitmap_offsets()
    if len(bitmap_offsets):
        ends.append(int(bitmap_offsets[-1]) + image.geometry.place_bytes)
    end = align_up(max(ends), SECTOR_BYTES)
    file.write(image.footer.pack(), end)
    file.resize(end + FOOTER_BYTES)
    file.sync()
