"""The verb `failover planned`: promote the replica of a VM that was prepared at its primary, without loss."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.store import FailoverStatus, Store, Wish, fail_over
from hvreplica.store import failover_status as status_of
from hvreplica.store.at_instant import WAIT_S

if TYPE_CHECKING:
    import os

    from hvreplica.progress import ProgressCallback

    PathLike = str | os.PathLike[str]


def failover_planned(
    store: PathLike, vm: str, *, wait_s: float = WAIT_S, progress: ProgressCallback | None = None
) -> FailoverStatus:
    """Make the replica of a VM the active side, its primary being off and all of it being here.

    That is so from `replicate --prepare-failover` at the primary until its next claim. On return the disks to
    run from are durable; they are named in the answer. Cut anywhere, the same call goes on. Raises:
    InvalidTransition where the primary has not prepared it or goes on since, Locked, StoreError.
    """
    with contextlib.closing(Store.open_reading(OS_FILES, Path(store), clock=SYSTEM)) as opened:
        home = opened.home(vm)
        fail_over(home, "planned", Wish(wait_s=wait_s, progress=progress))
        return status_of(home)
