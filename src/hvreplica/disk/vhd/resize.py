"""Change the size of a VHD. Each step leaves a valid file of the old size, or of the new one.

    grow     1. the last block, of which the file may lack what lies behind the disk, gets a whole place
             2. room in the BAT: entries behind the last block become absent, or a copy of the table goes to
                the end of the file; the header points to it by one sector
             3. the disk is shown with its new size, though the footers have the old one; what would not read
                as zeros in the new range is made so
             4. the size: the copy of the footer at offset 0, then the footer at the end, which counts
    shrink   1. blocks behind the new end become absent, where that shows zeros
             2. the size, as above
             3. entries behind the new end become absent, and the file is cut

A fixed disk has one footer, at its end, and no moment may be without: a new file takes the place of the old.
A parent longer than its child shows in no entry of a VHD as zeros: the range gets blocks, which are holes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.copy import copy_range, copy_within
from hvreplica.disk.grown import hide_what_grows
from hvreplica.disk.vhd.create import CREATOR_APPLICATION, CREATOR_HOST_OS, CREATOR_VERSION
from hvreplica.disk.vhd.disk import VhdDisk
from hvreplica.disk.vhd.image import read_footer, read_image
from hvreplica.disk.vhd.space import first_place
from hvreplica.disk.vhd.table import VhdTable
from hvreplica.formats.vhd_bat import NO_OFFSET, pack_bat, unpack_bat
from hvreplica.formats.vhd_batmap import BATMAP_COOKIE, batmap_header_offset
from hvreplica.formats.vhd_footer import GEOMETRY_MAX, SECTOR_BYTES, Geometry
from hvreplica.formats.vhd_header import BAT_ENTRY_BYTES, DYNAMIC_HEADER_BYTES, repointed_header
from hvreplica.units import align_up

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from hvreplica.clock import Clock
    from hvreplica.disk.vhd.disk import FixedVhdDisk, VhdParts
    from hvreplica.files import FileSystem
    from hvreplica.formats.vhd_footer import Footer

# Creators of whose footers qemu takes the size; with all others it believes the geometry, which rounds down.
_CREATORS_OF_SIZES = (b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS")


def grow_vhd(disk: VhdDisk, virtual_bytes: int) -> None:
    """Make a disk that is not fixed, open for writing, with its parent, longer; durable on return.

    The disk is closed then, or after an error as good as abandoned: its file is open, its content old or new.
    """
    parts = disk.parts()
    parts.session.begin()
    _make_last_whole(parts)
    old_footer = drop_batmap(parts)
    parts.session.flush()
    _make_room(parts, -(-virtual_bytes // disk.block_bytes))
    footer = resized_footer(old_footer, virtual_bytes)
    image = read_image(parts.file, replace(read_footer(parts.file), current_size=virtual_bytes))
    shown = VhdDisk(file=parts.file, image=image, table=VhdTable(parts.file, image), footer=old_footer)
    if disk.parent is not None:
        shown.attach(disk.parent)
    shown.parts().session.begin()
    hide_what_grows(shown, disk.virtual_bytes)
    shown.parts().session.replace_footer(footer)
    shown.close()


def shrink_vhd(disk: VhdDisk, virtual_bytes: int) -> None:
    """Make a disk that is not fixed, open for writing, and reads as zeros behind its new end, shorter.

    Durable on return; called again with the size that the disk has, it does what a power cut left undone.
    """
    parts = disk.parts()
    parts.session.begin()
    footer = drop_batmap(parts)
    geometry = parts.image.geometry
    behind = np.arange(-(-virtual_bytes // geometry.block_bytes), geometry.block_count)
    if not parts.image.has_parent:
        parts.session.discard(behind)
    parts.session.flush()
    floor = first_use(parts)
    if virtual_bytes != disk.virtual_bytes:
        parts.session.replace_footer(resized_footer(footer, virtual_bytes))
        # Of a child only now: in the old size the parent's bytes would have shown.
        parts.session.discard(behind)
        parts.session.flush()
    parts = read_again(parts)
    _clear_entries(parts, parts.image.header.max_table_entries)
    if virtual_bytes != disk.virtual_bytes:
        repoint(parts, parts.image.header.table_offset, parts.image.geometry.block_count)
        parts = read_again(parts)
    parts.session.begin()
    parts.session.cut(floor=floor)


def read_again(parts: VhdParts) -> VhdParts:
    """Return the disk as its file says it is now."""
    image = read_image(parts.file, read_footer(parts.file))
    return VhdDisk(file=parts.file, image=image, table=VhdTable(parts.file, image)).parts()


def resize_fixed(files: FileSystem, disk: FixedVhdDisk, virtual_bytes: int, *, clock: Clock) -> None:
    """Put a file of another size in the place of a fixed disk's, under its name, durable on return.

    The guest's bytes are copied, holes left out, by the file system where it can. Its identity stays.
    """
    path: Path = disk.path
    temporary = path.with_name(f".{path.name}.{clock.guid().hex[:8]}.partial")
    file = files.open(temporary, create=True, exclusive=True, mode=0o600)
    try:
        file.resize(virtual_bytes)
        copy_range(disk.file, file, 0, 0, min(disk.virtual_bytes, virtual_bytes))
        file.write(resized_footer(disk.footer, virtual_bytes).pack(), virtual_bytes)
        file.sync()
        read_footer(file)  # what was written must read back before it gets its name
        file.close()
        files.copy_attributes(path, temporary)
        files.replace(temporary, path)
    except BaseException:
        file.close()
        files.unlink(temporary)
        raise
    files.sync_directory(path.parent)


def resized_footer(footer: Footer, virtual_bytes: int) -> Footer:
    """Return the footer for another size, with a creator of whom qemu believes that size."""
    resized = footer.resized(virtual_bytes)
    geometry = Geometry(resized.cylinders, resized.heads, resized.sectors_per_track)
    product = geometry.cylinders * geometry.heads * geometry.sectors_per_track * SECTOR_BYTES
    if (
        resized.creator_application in _CREATORS_OF_SIZES
        or geometry == GEOMETRY_MAX
        or product == virtual_bytes
    ):
        return resized
    return _as_of_windows(resized)


def _as_of_windows(footer: Footer) -> Footer:
    return replace(
        footer,
        creator_application=CREATOR_APPLICATION,
        creator_version=CREATOR_VERSION,
        creator_host_os=CREATOR_HOST_OS,
    )


def drop_batmap(parts: VhdParts) -> Footer:
    """Take out XenServer's batmap, if there is one, and return the footer that counts then. After begin().

    First both footers say that there is none: XenServer expects one in a file of its own.
    """
    footer = parts.image.footer
    if not parts.image.has_batmap:
        return footer
    footer = _as_of_windows(footer)
    parts.session.replace_footer(footer)
    parts.file.write(bytes(len(BATMAP_COOKIE)), batmap_header_offset(parts.image.header))
    parts.file.sync()
    return footer


def first_use(parts: VhdParts) -> int:
    """Return the first place for a block: behind the structures before the first one that is there.

    Less than a place that no specification names may lie between them, and is kept; more was given back.
    """
    header, geometry = parts.image.header, parts.image.geometry
    starts = parts.table.placed_ranges()[:, 1]
    first = int(starts.min()) if len(starts) else parts.image.footer.at
    table_end = header.table_offset + header.max_table_entries * BAT_ENTRY_BYTES
    ends = [sum(row[:2]) for row in parts.image.structures if row[0] < first and row[2] != "footer"]
    floor = max(*ends, table_end if table_end <= first else 0)
    place = first_place(floor, geometry)
    return place if first - place >= geometry.place_bytes else first


def whole_ranges(parts: VhdParts) -> NDArray[np.int64]:
    """Return (block, file_offset, length) of all blocks with a place; of the last all, if it has the room."""
    geometry = parts.image.geometry
    ranges = parts.table.placed_ranges()
    last = ranges[:, 0] == geometry.block_count - 1
    if last.any():
        start = int(ranges[last, 1][0])
        end = start + geometry.place_bytes
        structures = np.array([row[:2] for row in parts.image.structures], np.int64)
        busy = np.concatenate((structures, ranges[~last, 1:]))
        if end <= parts.file.size() and not ((busy[:, 0] < end) & (busy.sum(axis=1) > start)).any():
            ranges[last, 2] = geometry.place_bytes
    return ranges


def _make_last_whole(parts: VhdParts) -> None:
    """Move the last block if its place has not room for what it will hold."""
    ranges = whole_ranges(parts)
    last = ranges[ranges[:, 0] == parts.image.geometry.block_count - 1]
    if not len(last) or int(last[0, 2]) == parts.image.geometry.place_bytes:
        return
    start, length = last[0, 1:].tolist()
    place = parts.session.take_place()
    copy_within(parts.file, start, place, length)
    parts.session.move(last[:, 0], np.array([place], np.int64))
    parts.session.flush()


def _make_room(parts: VhdParts, count: int) -> None:
    """Make the header's table one of at least `count` entries, absent from the disk's last block on."""
    header, geometry = parts.image.header, parts.image.geometry
    # The writer of a table has filled up its last sector.
    room = align_up(header.max_table_entries * BAT_ENTRY_BYTES, SECTOR_BYTES) // BAT_ENTRY_BYTES
    table_offset = header.table_offset
    if count <= room and _is_free(parts, count):
        _clear_entries(parts, count)
    else:
        length = align_up(count * BAT_ENTRY_BYTES, SECTOR_BYTES)
        table_offset = parts.session.reserve(length)
        table = parts.file.read(header.table_offset, geometry.block_count * BAT_ENTRY_BYTES)
        parts.file.write(table.ljust(length, b"\xff"), table_offset)
        parts.session.flush()
    if count > header.max_table_entries or table_offset != header.table_offset:
        repoint(parts, table_offset, count)


def repoint(parts: VhdParts, table_offset: int, count: int) -> None:
    """Make the header's table one of `count` entries at `table_offset`, durably."""
    at = parts.image.header.at
    packed = parts.file.read(at, DYNAMIC_HEADER_BYTES)
    packed = repointed_header(packed, table_offset=table_offset, max_table_entries=count)
    # One sector, so that place and count change together.
    parts.file.write(packed[:SECTOR_BYTES], at)
    parts.file.sync()


def _is_free(parts: VhdParts, count: int) -> bool:
    """Return whether entries up to `count` may be written where the table stands."""
    header, geometry = parts.image.header, parts.image.geometry
    start = header.table_offset + geometry.block_count * BAT_ENTRY_BYTES
    end = header.table_offset + count * BAT_ENTRY_BYTES
    used = parts.table.used_ranges()
    tail = parts.image.footer.at
    return end <= tail and not ((used[:, 0] < end) & (used.sum(axis=1) > start)).any()


def _clear_entries(parts: VhdParts, count: int) -> None:
    """Make the entries of the table that no block of the disk has absent, up to `count` of them."""
    header, geometry = parts.image.header, parts.image.geometry
    start = header.table_offset + geometry.block_count * BAT_ENTRY_BYTES
    missing = count - geometry.block_count
    if missing <= 0 or not _is_free(parts, count):
        return
    offsets = unpack_bat(parts.file.read(start, missing * BAT_ENTRY_BYTES), missing)
    if (offsets != NO_OFFSET).any():
        parts.file.write(pack_bat(np.full(missing, NO_OFFSET, np.int64)), start)
        parts.file.sync()
