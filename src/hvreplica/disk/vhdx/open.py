"""Open a VHDX: headers, own log, regions, metadata, BAT, in this order, each checked before it is used.

Spec: [MS-VHDX] 2.2.2.1, 2.3.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.disk.vhdx.bat import Bat
from hvreplica.disk.vhdx.disk import VhdxDisk
from hvreplica.disk.vhdx.headers import Headers
from hvreplica.disk.vhdx.image import read_creator, read_image
from hvreplica.disk.vhdx.overlay import OverlayFile
from hvreplica.disk.vhdx.replay import plan_replay
from hvreplica.errors import FormatError
from hvreplica.formats.guid import NIL

if TYPE_CHECKING:
    from hvreplica.clock import Clock
    from hvreplica.files import BlockFile


def open_vhdx(file: BlockFile, *, clock: Clock, virtual_bytes: int | None = None) -> VhdxDisk:
    """Return the disk in `file`, which it then owns, without its parent; writable if the file is.

    A log that is not empty is replayed in place if the file is writable, else in memory; a clean file is not
    changed. virtual_bytes: show a disk of this size instead of the one that the file says, for whoever is
    about to change that. On an error the file stays open and belongs to the caller. Raises: FormatError of
    the kind that fits.
    """
    try:
        return _open(file, clock, virtual_bytes)
    except FormatError as error:
        error.at(file.path)
        raise


def _open(file: BlockFile, clock: Clock, virtual_bytes: int | None) -> VhdxDisk:
    creator = read_creator(file)
    headers = Headers(file)
    replayed = headers.current.log_guid != NIL
    shown: BlockFile = file
    if replayed:
        plan = plan_replay(file, headers.current)
        # Both ways the result is checked before the file is changed: a log that leads nowhere is left for
        # experts.
        overlay = OverlayFile(file, plan)
        if file.writable:
            Bat(overlay, read_image(overlay, headers.current, creator))
            headers.update(file_write_guid=clock.guid())
            plan.apply_to(file)
            headers.update(log_guid=NIL)
        else:
            shown = overlay
    image = read_image(shown, headers.current, creator, virtual_bytes=virtual_bytes)
    bat = Bat(shown, image)
    return VhdxDisk(
        file=file,
        shown=_payload_file(file, shown, image.structures),
        headers=headers,
        image=image,
        bat=bat,
        replayed=replayed,
        clock=clock,
    )


def _payload_file(
    file: BlockFile, shown: BlockFile, structures: tuple[tuple[int, int, str], ...]
) -> BlockFile:
    """Return the file itself for payload where the overlay changes no payload:

    Native kernels need a descriptor.
    """
    if isinstance(shown, OverlayFile) and shown.leaves_payload(structures):
        return file
    return shown
