"""The verbs that read a store, beside the process that serves it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.store import Store

if TYPE_CHECKING:
    import os

    from hvreplica.progress import ProgressCallback
    from hvreplica.store import ExportReport, PointDiff, PointStatus, StoreStatus

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

    whole under that name on return, or nothing of it. point: its id, "latest" (as None) or "latest-app".
    Replication goes on meanwhile.
    """
    with contextlib.closing(Store.open_reading(OS_FILES, Path(store), clock=SYSTEM)) as opened:
        return opened.export_point(
            vm,
            point,
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
