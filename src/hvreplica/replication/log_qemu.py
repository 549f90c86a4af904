"""The verb that makes an .hrl of what a VM wrote that QEMU serves itself, as a function."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hvreplica.capture.qemu_bitmap import QemuBitmap
from hvreplica.capture.qmp import Qmp
from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.progress import Progress
from hvreplica.replication.log_sources import log_id_of, write_log

if TYPE_CHECKING:
    import os
    import uuid

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem
    from hvreplica.progress import ProgressCallback

    PathLike = str | os.PathLike[str]


class LogFromQemu(msgspec.Struct, frozen=True, kw_only=True):
    """A log of what a VM wrote.

    full: it holds the whole disk. data_bytes: guest bytes in it, zeros included.
    """

    node: str
    bitmap: str
    full: bool
    path: str
    log_id: str
    previous_log_id: str
    virtual_bytes: int
    entries: int
    data_bytes: int
    log_bytes: int


def log_from_qemu(  # noqa: PLR0913 - each is a choice that a user may make
    qmp: PathLike,
    node: str,
    bitmap: str,
    output: PathLike,
    *,
    full: bool = False,
    follows: uuid.UUID | PathLike | None = None,
    scratch: PathLike | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    files: FileSystem = OS_FILES,
    clock: Clock = SYSTEM,
) -> LogFromQemu:
    """Write into a log what changed on a node of a QEMU since the last log, as it was at one instant.

    qmp: the socket of a monitor that nobody else uses now. bitmap: the name of ours on that node. full: log
    all that it holds, and begin to track. follows: the log before it, or its id, for PreviousUniqueId.
    scratch: a folder in which QEMU may open files of ours, by default that of the output. Durable on return;
    only then does QEMU forget that this changed, so that a call that was cut off is repeated and the next log
    holds it too. Raises: TrackingLost where QEMU has no such bitmap; Unreachable, QemuRefused, PeerClosed;
    FileExistsError unless overwrite.
    """
    path = Path(output).absolute()
    previous_log_id = log_id_of(files, follows)
    folder = Path(scratch).absolute() if scratch is not None else path.parent
    with Qmp(qmp) as monitor:
        source = QemuBitmap(monitor, node, bitmap, scratch=folder, full=full, files=files)
        told_bytes = 0

        def on_read(length: int) -> None:
            nonlocal told_bytes
            told_bytes += length
            if progress is not None:
                progress(Progress("push", told_bytes, max(source.virtual_bytes, told_bytes), told_bytes))

        summary = write_log(
            files,
            path,
            source,
            previous_log_id=previous_log_id,
            data_write_guid=None,  # QEMU does not tell that of a VHDX
            on_read=on_read,
            overwrite=overwrite,
            clock=clock,
        )
        source.settle()
    return LogFromQemu(
        node=node,
        bitmap=bitmap,
        full=full,
        path=str(output),
        log_id=summary.log_id,
        previous_log_id=summary.previous_log_id,
        virtual_bytes=source.virtual_bytes,
        entries=summary.entries,
        data_bytes=summary.data_bytes,
        log_bytes=summary.log_bytes,
    )
