"""The verbs that read a store, beside the process that serves it."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.replication.point_names import point_to_open
from hvreplica.store import Store
from hvreplica.store.pace import Pace

if TYPE_CHECKING:
    import os

    from hvreplica.progress import ProgressCallback
    from hvreplica.store import ExportReport, PointDiff, PointStatus, StoreStatus, StoreVerdict, VmVerdict

    PathLike = str | os.PathLike[str]
    DiskFormat = Literal["raw", "vhd", "vhdx"]


def store_status(store: PathLike) -> StoreStatus:
    """Return what a store holds; while it is being served, too."""
    with contextlib.closing(Store.open_reading(OS_FILES, Path(store), clock=SYSTEM)) as opened:
        return opened.status()


def point_list(store: PathLike, vm: str) -> list[PointStatus]:
    """Return the recovery points of a VM, oldest first. Raises: NoSuchPoint for an unknown VM."""
    with contextlib.closing(Store.open_reading(OS_FILES, Path(store), clock=SYSTEM)) as opened:
        return opened.points(vm)


def point_export(
    store: PathLike,
    vm: str,
    output: PathLike,
    *,
    point: str | None = None,
    disk: int = 0,
    format: DiskFormat = "vhdx",  # noqa: A002 - as above
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> ExportReport:
    """Write one disk of a recovery point to a file of its own;

    whole under that name on return, or nothing of it. point: its id, "latest" (as None), "latest-app", or an
    instant, for which a point is made that stays, see point_at(). Replication goes on meanwhile.
    """
    with contextlib.closing(Store.open_reading(OS_FILES, Path(store), clock=SYSTEM)) as opened:
        return opened.export_point(
            vm,
            None if point is None else point_to_open(opened.home(vm), point),
            disk,
            Path(output),
            format=format,
            overwrite=overwrite,
            progress=progress,
        )


def point_diff(store: PathLike, vm: str, a: str, b: str, *, coarse: bool = False) -> PointDiff:
    """Return the ranges in which two recovery points of a VM differ, whichever is older.

    coarse: what was written between them, without comparing any bytes.
    """
    with contextlib.closing(Store.open_reading(OS_FILES, Path(store), clock=SYSTEM)) as opened:
        return opened.diff_points(vm, a, b, coarse=coarse)


def store_verify(
    store: PathLike,
    *,
    vm: str | None = None,
    rate_limit: int | None = None,
    progress: ProgressCallback | None = None,
) -> StoreVerdict:
    """Read a store again, or one VM of it, and mark recovery points that are damaged.

    Replication goes on meanwhile, and a call that was cut is gone on with by the next one. rate_limit: bytes
    a second. Raises: NoSuchPoint for an unknown VM, Locked where a VM changes too fast.
    """
    pace = Pace(SYSTEM, threading.Event().wait, rate_bytes_s=rate_limit, progress=progress)
    with contextlib.closing(Store.open_reading(OS_FILES, Path(store), clock=SYSTEM)) as opened:
        return opened.verify(vm, pace)


def point_verify(
    store: PathLike,
    vm: str,
    *,
    point: str = "latest",
    rate_limit: int | None = None,
    progress: ProgressCallback | None = None,
) -> VmVerdict:
    """Read one recovery point again and hold it against its digest; it is marked if it is damaged.

    point: its id, or "latest". rate_limit: bytes a second. Raises: NoSuchPoint, Locked.
    """
    pace = Pace(SYSTEM, threading.Event().wait, rate_bytes_s=rate_limit, progress=progress)
    with contextlib.closing(Store.open_reading(OS_FILES, Path(store), clock=SYSTEM)) as opened:
        return opened.verify_point(vm, point, pace)
