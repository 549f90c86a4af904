"""The verbs that make an .hrl of what another source of change knows, as functions."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.disk.chain import layers
from hvreplica.disk.create import require_folder
from hvreplica.disk.open import real_path
from hvreplica.errors import ParentMismatch, ParentMissing
from hvreplica.files import OS_FILES, require_unused
from hvreplica.hrl import LogWriter
from hvreplica.hrl.reader import read_header
from hvreplica.progress import Progress
from hvreplica.tracking.differencing import DifferencingDisk

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from hvreplica.clock import Clock
    from hvreplica.disk import Disk
    from hvreplica.files import FileSystem
    from hvreplica.hrl import LogSummary
    from hvreplica.progress import ProgressCallback
    from hvreplica.tracking.compare import ChangeSource

    PathLike = str | os.PathLike[str]


class LogFromChild(msgspec.Struct, frozen=True, kw_only=True):
    """A log that was made of a differencing disk.

    base: the disk that the log is to be applied to, or a copy of it. A base that is shorter than the child is
    grown to child_virtual_bytes first; of a longer one the log leaves the rest alone. data_bytes: guest bytes
    in the log, zeros included. read_bytes: what was looked at.
    """

    child: str
    base: str
    path: str
    log_id: str
    child_virtual_bytes: int
    base_virtual_bytes: int
    entries: int
    data_bytes: int
    log_bytes: int
    read_bytes: int


def log_from_child(  # noqa: PLR0913 - each is a choice that a user may make
    child: PathLike,
    output: PathLike,
    *,
    base: PathLike | None = None,
    parent: PathLike | None = None,
    skip_equal: bool = False,
    follows: uuid.UUID | PathLike | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    files: FileSystem = OS_FILES,
    clock: Clock = SYSTEM,
) -> LogFromChild:
    """Write what a differencing disk holds into a log that makes its parent the same; durable on return.

    base: a disk further down the chain, to take all layers above it; None takes the parent. parent: the file
    of the parent, where the names in the child do not lead to it. skip_equal: read the base too and leave out
    what it has already. follows: the log before it, or its id, for PreviousUniqueId. Nobody may write to the
    chain meanwhile: it is locked. The output has its name only when it is closed and durable. Raises:
    ParentMissing if it is no differencing disk or a parent is not found, ParentMismatch for a base that is
    none of its parents, FileExistsError unless overwrite, Locked.
    """
    with open_disk(files, Path(child), shared=True, parent=parent, clock=clock) as disk:
        below = _base_of(disk, base)
        read_bytes = 0

        def on_read(length: int) -> None:
            nonlocal read_bytes
            read_bytes += length
            if progress is not None:
                progress(Progress("read", read_bytes, disk.virtual_bytes, raw_bytes=read_bytes))

        summary = write_log(
            files,
            Path(output),
            DifferencingDisk(disk, below, skip_equal=skip_equal),
            previous_log_id=log_id_of(files, follows),
            data_write_guid=disk.data_write_guid,
            on_read=on_read,
            overwrite=overwrite,
            clock=clock,
        )
        return LogFromChild(
            child=str(child),
            base=str(below.path),
            path=str(output),
            log_id=summary.log_id,
            child_virtual_bytes=disk.virtual_bytes,
            base_virtual_bytes=below.virtual_bytes,
            entries=summary.entries,
            data_bytes=summary.data_bytes,
            log_bytes=summary.log_bytes,
            read_bytes=read_bytes,
        )


def write_log(
    files: FileSystem,
    path: Path,
    source: ChangeSource,
    *,
    previous_log_id: uuid.UUID | None,
    data_write_guid: uuid.UUID | None,
    on_read: Callable[[int], None],
    overwrite: bool,
    clock: Clock,
) -> LogSummary:
    """Put the changes of `source` into a closed log at `path`, which has that name only when it is durable.

    data_write_guid: the identity of the guest's data as the log leaves it, for Vhd2DataWriteGuid. Raises:
    FileExistsError unless overwrite. Spec: [MS-HRL] 2.2.
    """
    if not overwrite and files.exists(path):
        raise FileExistsError(17, "a file of this name exists; it was not touched", str(path))
    require_folder(files, path)
    require_unused(files, path)  # which may be a disk that the source reads: it is locked by now
    temporary = path.with_name(f".{path.name}.{clock.guid().hex[:8]}.partial")
    writer = LogWriter.create(
        files,
        temporary,
        log_id=clock.guid(),
        previous_log_id=previous_log_id,
        data_write_guid=data_write_guid,
        clock=clock,
    )
    try:
        with writer:
            source.changes_into(writer, on_read=on_read)
            summary = writer.close()
        files.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            files.unlink(temporary)
        raise
    files.sync_directory(path.parent)
    return msgspec.structs.replace(summary, path=str(path))


def log_id_of(files: FileSystem, log: uuid.UUID | PathLike | None) -> uuid.UUID | None:
    """Return the UniqueId of the log in a file, or the id itself. Raises: FormatError."""
    if log is None or isinstance(log, uuid.UUID):
        return log
    with contextlib.closing(files.open(Path(log))) as file:
        return read_header(file).unique_id


def _base_of(disk: Disk, base: PathLike | None) -> Disk:
    """Return the layer below `disk` that is in the file `base`, its parent for None."""
    if disk.parent is None:
        raise ParentMissing(
            "this is no differencing disk: what it holds is no change of another disk",
            path=disk.path,
            field="type",
            expected="differencing",
            actual=disk.info().type,
            hint="a disk that stands alone is compared with what a replica holds: `hvreplica replicate`",
        )
    if base is None:
        return disk.parent
    wanted = real_path(Path(base))
    below = list(layers(disk.parent))
    for layer in below:
        if real_path(layer.path) == wanted:
            return layer
    raise ParentMismatch(
        "the base is none of this disk's parents",
        path=Path(base),
        field="base",
        expected=" or ".join(str(layer.path) for layer in below),
        actual=str(wanted),
        hint=f"`hvreplica disk map {disk.path}` shows which files the disk rests on",
    )
