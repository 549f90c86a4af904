"""Give a differencing VHD another parent: identity, name and locators, durably and all at once.

The identity stands in a header of two sectors that has no copy, so writing it in place could tear it. Instead
the whole header goes to a new place, and the footer, one sector, says which place counts:

    1. copy of the footer made right: from here the footer at the end may get lost
    2. aside, at the end: new header, new names, sync; nothing points there yet
    3. footer behind them, which points there, and copy of the footer, sync: now the new parent counts
    4. at home, where the old header was: new header, new names, sync; nothing pointed there any more
    5. footer at the end, which points home again, and copy of the footer, sync
    6. footer over what was written aside, file cut behind it, sync; until then the copy counts

In between each footer that a reader may choose, the one at the end or the copy, points to a header that is
durable and whole. Afterwards the file is laid out as before, because readers that look for the header at 512
only are likely. Names go where old ones stood if they fit, else they stay at the end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hvreplica.disk.vhd.image import LOCATOR_STRUCTURE
from hvreplica.formats.vhd_footer import FOOTER_BYTES, SECTOR_BYTES
from hvreplica.formats.vhd_header import DYNAMIC_HEADER_BYTES, HEADER_COOKIE, HEADER_OFFSET
from hvreplica.formats.vhd_locator import LOCATOR_COUNT, LOCATOR_SPACE_BYTES, LocatorEntry
from hvreplica.units import align_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hvreplica.disk.vhd.image import Image
    from hvreplica.disk.vhd.parent import ParentNames
    from hvreplica.files import BlockFile
    from hvreplica.formats.vhd_footer import Footer


class _Place(NamedTuple):
    """Room for one locator's data."""

    file_offset: int
    space: int


def relink(file: BlockFile, image: Image, *, bitmap_offsets: NDArray[np.int64], parent: ParentNames) -> None:
    """Make `parent` the one of the differencing VHD in `file`; durable on return.

    image: as the file is now, with a footer at its end. bitmap_offsets: of all blocks. What `image` says of
    header and footer is stale afterwards.
    """
    home = _home(file, image, bitmap_offsets)
    end = align_up(image.footer.at, SECTOR_BYTES)
    places, end = _places(image, bitmap_offsets, parent, end)
    beyond = end + DYNAMIC_HEADER_BYTES
    aside = []
    for _, data in parent.locators:
        aside.append(_Place(beyond, align_up(len(data), SECTOR_BYTES)))
        beyond += aside[-1].space
    if file.read(0, FOOTER_BYTES) != image.footer.pack():
        file.write(image.footer.pack(), 0)
        file.sync()
    file.resize(beyond + FOOTER_BYTES)
    _write_header(file, image, parent, at=end, places=aside)
    _switch(file, replace(image.footer, data_offset=end), beyond)
    _write_header(file, image, parent, at=home, places=places)
    at_home = replace(image.footer, data_offset=home)
    _switch(file, at_home, beyond)
    file.write(at_home.pack(), end)
    file.resize(end + FOOTER_BYTES)
    file.sync()


def _home(file: BlockFile, image: Image, bitmap_offsets: NDArray[np.int64]) -> int:
    """Return where the header is to stand: where it stands, or back at 512 if a power cut left it aside."""
    usual_end = HEADER_OFFSET + DYNAMIC_HEADER_BYTES
    was_there = file.read(HEADER_OFFSET, len(HEADER_COOKIE)) == HEADER_COOKIE
    rest = [at for at, length, _ in image.structures if at + length > HEADER_OFFSET]
    first = min([*rest, *bitmap_offsets[:1].tolist()])
    return HEADER_OFFSET if was_there and first >= usual_end else image.footer.data_offset


def _places(
    image: Image, bitmap_offsets: NDArray[np.int64], parent: ParentNames, end: int
) -> tuple[list[_Place], int]:
    """Return where each locator of `parent` is to stay, and where the file then ends.

    Rooms of old locators come first; how much one has is told in bytes or sectors, so it is believed only
    where nothing else stands.
    """
    rooms = _rooms(image, bitmap_offsets, end)
    places = []
    for _, data in parent.locators:
        fitting = next((room for room in rooms if room.space >= len(data)), None)
        if fitting is None:
            fitting = _Place(end, max(LOCATOR_SPACE_BYTES, align_up(len(data), SECTOR_BYTES)))
            end += fitting.space
        else:
            rooms.remove(fitting)
        places.append(fitting)
    return places, end


def _rooms(image: Image, bitmap_offsets: NDArray[np.int64], end: int) -> list[_Place]:
    """Return the rooms of the old locators, apart from each other and from all else."""
    old = [(entry.platform_data_offset, entry) for entry in image.header.locators if entry.is_used]
    busy = [(at, at + length) for at, length, name in image.structures if name != LOCATOR_STRUCTURE]
    rooms: list[_Place] = []
    for start, entry in old:
        others = [(at, at + each.platform_data_length) for at, each in old if each is not entry]
        # The first block that ends behind the start of the room bounds it, as everything else does.
        first = int(np.searchsorted(bitmap_offsets + image.geometry.place_bytes, start, "right"))
        blocks = bitmap_offsets[first : first + 1].tolist()
        limit = min([end, *blocks, *(low for low, high in (*busy, *others) if high > start)])
        space = min(max(entry.platform_data_space, entry.platform_data_length), limit - start)
        if space > 0:
            rooms.append(_Place(start, space))
            busy.append((start, start + space))
    return rooms


def _write_header(
    file: BlockFile, image: Image, parent: ParentNames, *, at: int, places: Sequence[_Place]
) -> None:
    entries = []
    for (platform_code, data), place in zip(parent.locators, places, strict=True):
        file.write(data, place.file_offset)
        entries.append(LocatorEntry(platform_code, place.space, len(data), place.file_offset))
    header = replace(
        image.header,
        parent_unique_id=parent.unique_id,
        parent_time_stamp=0,
        parent_name=parent.name,
        locators=(*entries, *(LocatorEntry(),) * (LOCATOR_COUNT - len(entries))),
    )
    file.write(header.pack(), at)
    file.sync()


def _switch(file: BlockFile, footer: Footer, end: int) -> None:
    """Make `footer` count, at the end and as the copy: each old or new by itself is right in between."""
    file.write(footer.pack(), end)
    file.write(footer.pack(), 0)
    file.sync()
