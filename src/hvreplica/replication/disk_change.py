"""The verbs that change the size of a disk, or of its file, as functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.clock import SYSTEM
from hvreplica.disk import compact_disk, resize_disk
from hvreplica.files import OS_FILES

if TYPE_CHECKING:
    import os

    from hvreplica.disk import CompactReport, Format, ResizeReport
    from hvreplica.progress import ProgressCallback

    PathLike = str | os.PathLike[str]


def disk_resize(
    path: PathLike,
    size_bytes: int,
    *,
    format: Format | None = None,  # noqa: A002 - the word that every disk tool uses
    parent: PathLike | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> ResizeReport:
    """Give a disk another size, durable on return; what is new reads as zeros, and only zeros can be lost.

    format: None tells by signature. parent: the parent of a differencing disk, where its names do not lead to
    it. A disk that has children must not be resized: those beside it are found and named, unless force. Cut
    off, it can be called again. Raises: FieldOutOfRange for a size that cannot be, whose hint names the
    smallest possible; ParentInUse, Locked, FormatError, ParentError.
    """
    return resize_disk(
        OS_FILES,
        path,
        size_bytes,
        format=format,
        parent=parent,
        force=force,
        clock=SYSTEM,
        progress=progress,
    )


def disk_compact(
    path: PathLike, *, parent: PathLike | None = None, progress: ProgressCallback | None = None
) -> CompactReport:
    """Make the file of a dynamic or differencing disk as short as it can be, durable on return.

    The guest sees no difference, and children stay children. Cut off, it can be called again. Raises:
    InvalidTransition for a fixed or raw disk; Locked, FormatError, ParentError.
    """
    return compact_disk(OS_FILES, path, parent=parent, clock=SYSTEM, progress=progress)
