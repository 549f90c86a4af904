"""The verbs that make a replica the active side, or take that back; beside the process that serves it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.replication.point_names import parse_point
from hvreplica.store import FailoverStatus, Store, Wish, cancel, commit, fail_over
from hvreplica.store import failover_status as status_of
from hvreplica.store.at_instant import WAIT_S
from hvreplica.store.firedrill import end_firedrill
from hvreplica.store.open_point import LATEST

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from hvreplica.progress import ProgressCallback
    from hvreplica.store.home import VmHome

    PathLike = str | os.PathLike[str]


def failover_unplanned(
    store: PathLike,
    vm: str,
    *,
    point: str = LATEST,
    force: bool = False,
    wait_s: float = WAIT_S,
    progress: ProgressCallback | None = None,
) -> FailoverStatus:
    """Make the replica of a VM the active side, at `point`; its primary is locked out from now on.

    point: "latest", "latest-app", a point's id, or an instant between two cycles, see point_at(), for which a
    point of kind manual is made first: the primary is let in until that is there. force: also one that is
    damaged. wait_s: how long to wait for who reads or changes the VM's disks. On return the disks to run from
    are durable; they are named in the answer. Cut anywhere, the same call goes on. What the primary wrote
    after its last acknowledged cut is not in it: stop the primary first. Raises: NoSuchPoint,
    InvalidTransition, FailoverRefused, Locked, StoreError.
    """
    with _opened(store, vm) as home:
        fail_over(home, "unplanned", Wish(parse_point(point), force=force, wait_s=wait_s, progress=progress))
        return status_of(home)


def failover_cancel(
    store: PathLike,
    vm: str,
    *,
    point: str | None = None,
    force: bool = False,
    wait_s: float = WAIT_S,
    progress: ProgressCallback | None = None,
) -> FailoverStatus:
    """Take a failover back, so that the primary may replicate again; or fail over to another `point`.

    force: although the active disks hold writes, which are lost. Raises: FailoverRefused without it,
    InvalidTransition once it was committed, NoSuchPoint, Locked, StoreError.
    """
    with _opened(store, vm) as home:
        wish = Wish(None if point is None else parse_point(point), force, wait_s=wait_s, progress=progress)
        cancel(home, wish)
        return status_of(home)


def failover_commit(
    store: PathLike, vm: str, *, delete_points: bool = False, wait_s: float = WAIT_S
) -> FailoverStatus:
    """Make a failover final. The points stay, unless `delete_points`: then the newest alone does.

    Raises: InvalidTransition, PointInUse, Locked, StoreError.
    """
    with _opened(store, vm) as home:
        commit(home, Wish(delete_points=delete_points, wait_s=wait_s))
        return status_of(home)


def failover_test_cleanup(store: PathLike, vm: str) -> FailoverStatus:
    """Remove the test failover of a VM and what was written to it; nothing is done where there is none.

    Raises: NoSuchPoint for an unknown VM, Locked while a process serves it.
    """
    with _opened(store, vm) as home:
        end_firedrill(home)
        return status_of(home)


def failover_status(store: PathLike, vm: str) -> FailoverStatus:
    """Return where a failover of a VM stands. Raises: NoSuchPoint for an unknown VM."""
    with _opened(store, vm) as home:
        return status_of(home)


@contextlib.contextmanager
def _opened(store: PathLike, vm: str) -> Iterator[VmHome]:
    with contextlib.closing(Store.open_reading(OS_FILES, Path(store), clock=SYSTEM)) as opened:
        yield opened.home(vm)
