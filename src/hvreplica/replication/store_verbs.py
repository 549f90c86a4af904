"""The verbs that read a store, beside the process that serves it."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hvreplica.clock import SYSTEM
from hvreplica.errors import NoSuchPoint
from hvreplica.files import OS_FILES
from hvreplica.store import Store

if TYPE_CHECKING:
    import os

    from hvreplica.progress import ProgressCallback
    from hvreplica.store import ExportReport, PointStatus, StoreStatus

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

    whole under that name on return, or nothing of it.
    """
    try:
        point_id = None if point is None else uuid.UUID(point)
    except ValueError:
        raise NoSuchPoint(
            "this is not the id of a recovery point", actual=point, hint="see `point list`"
        ) from None
    with contextlib.closing(Store.open_reading(OS_FILES, Path(store), clock=SYSTEM)) as opened:
        return opened.export_point(
            vm,
            point_id,
            disk,
            Path(output),
            format=format,
            overwrite=overwrite,
            progress=progress,
        )
