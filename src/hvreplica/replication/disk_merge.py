"""The verbs that change which disk rests on which, as functions: paths in, typed results out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hvreplica.clock import SYSTEM
from hvreplica.disk.merge import merge_disk
from hvreplica.disk.rebase import rebase_disk
from hvreplica.files import OS_FILES

if TYPE_CHECKING:
    import os

    from hvreplica.disk.merge import MergeReport
    from hvreplica.disk.rebase import RebaseReport
    from hvreplica.progress import ProgressCallback

    PathLike = str | os.PathLike[str]


def disk_merge(
    child: PathLike, *, keep: bool = False, force: bool = False, progress: ProgressCallback | None = None
) -> MergeReport:
    """Write what a differencing disk holds into its parent and remove it, or keep it; durable on return.

    After a crash the same call finishes. force: also where other disks beside the two rest on one of them.
    Raises: ParentInUse for those; ParentMissing if it has no parent or none is found.
    """
    return merge_disk(OS_FILES, Path(child), keep=keep, force=force, clock=SYSTEM, progress=progress)


def disk_rebase(
    child: PathLike, parent: PathLike, *, unsafe: bool = False, progress: ProgressCallback | None = None
) -> RebaseReport:
    """Give a differencing disk another parent, without a change of what its guest sees; durable on return.

    What differs is copied into the child first, unless the new parent has the right identity, or with unsafe,
    which believes that it holds the same. Raises: ParentMissing, ParentMismatch, ParentLoop.
    """
    return rebase_disk(OS_FILES, Path(child), Path(parent), unsafe=unsafe, clock=SYSTEM, progress=progress)
