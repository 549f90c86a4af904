"""The verbs that need no other side: disks, logs, certificates, and what a store holds.

Thin on purpose: paths in, the operating system's files and clock given to the layer that owns the verb.
"""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hvreplica.clock import SYSTEM
from hvreplica.disk import compare_disks, convert_disk, create_disk, open_disk
from hvreplica.errors import NoSuchPoint
from hvreplica.files import OS_FILES
from hvreplica.hrl import apply_log, dump_entries, recover_log, verify_log
from hvreplica.hrl import log_info as read_log_info
from hvreplica.store import Store
from hvreplica.transport import allow, init_tls

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from hvreplica.disk import CompareReport, ConvertReport, DiskInfo, MapEntry
    from hvreplica.hrl import ApplyReport, LogEntry, LogInfo, LogReport
    from hvreplica.progress import ProgressCallback
    from hvreplica.store import ExportReport, PointStatus, StoreStatus

    PathLike = str | os.PathLike[str]
    DiskFormat = Literal["raw", "vhdx"]
    DiskType = Literal["dynamic", "fixed"]

TRUST_FILE = "trust.toml"


def disk_info(path: PathLike) -> DiskInfo:
    """Return what the disk in a file is. Raises: FormatError, OSError."""
    with contextlib.closing(open_disk(OS_FILES, Path(path), clock=SYSTEM)) as disk:
        return disk.info()


def disk_map(path: PathLike) -> Iterator[MapEntry]:
    """Yield runs (offset, length, state, file_offset) that cover the whole disk, in order."""
    with contextlib.closing(open_disk(OS_FILES, Path(path), clock=SYSTEM)) as disk:
        yield from disk.map()


def disk_create(
    path: PathLike,
    size_bytes: int,
    *,
    format: DiskFormat = "vhdx",  # noqa: A002 - the word that every disk tool uses
    type: DiskType = "dynamic",  # noqa: A002 - as above
    block_bytes: int | None = None,
    logical_sector_bytes: int = 512,
    physical_sector_bytes: int = 4096,
    overwrite: bool = False,
) -> DiskInfo:
    """Make an empty disk that reads as zeros, durable on return. Raises: FileExistsError unless overwrite."""
    create_disk(
        OS_FILES,
        Path(path),
        virtual_bytes=size_bytes,
        format=format,
        type=type,
        block_bytes=block_bytes,
        logical_sector_bytes=logical_sector_bytes,
        physical_sector_bytes=physical_sector_bytes,
        clock=SYSTEM,
        overwrite=overwrite,
    )
    return disk_info(path)


def disk_convert(
    source: PathLike,
    target: PathLike,
    *,
    format: DiskFormat | None = None,  # noqa: A002 - as above
    type: DiskType = "dynamic",  # noqa: A002 - as above
    block_bytes: int | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> ConvertReport:
    """Copy a disk into another format. format: by the target's ending (.vhdx, else raw) where it is None."""
    return convert_disk(
        OS_FILES,
        Path(source),
        Path(target),
        format=format or ("vhdx" if Path(target).suffix.lower() == ".vhdx" else "raw"),
        type=type,
        block_bytes=block_bytes,
        clock=SYSTEM,
        progress=progress,
        overwrite=overwrite,
    )


def disk_compare(
    first: PathLike, second: PathLike, *, progress: ProgressCallback | None = None
) -> CompareReport:
    """Compare what two disks hold, whatever their formats; stops at the first difference."""
    return compare_disks(OS_FILES, Path(first), Path(second), clock=SYSTEM, progress=progress)


def log_info(path: PathLike) -> LogInfo:
    """Return what the header of an .hrl says, closed or not."""
    return read_log_info(OS_FILES, Path(path))


def log_verify(path: PathLike, *, progress: ProgressCallback | None = None) -> LogReport:
    """Check an .hrl from end to end, data included. Raises: NotClosed, FormatError at the first fault."""
    return verify_log(OS_FILES, Path(path), progress=progress)


def log_apply(path: PathLike, disk: PathLike, *, progress: ProgressCallback | None = None) -> ApplyReport:
    """Write an .hrl into a disk, newest write wins; durable on return. Cut off, it can be repeated."""
    with contextlib.closing(open_disk(OS_FILES, Path(disk), writable=True, clock=SYSTEM)) as target:
        report = apply_log(OS_FILES, Path(path), target, progress=progress)
        target.flush()
    return report


def log_dump(path: PathLike) -> Iterator[LogEntry]:
    """Yield the entries of an .hrl, oldest first."""
    return dump_entries(OS_FILES, Path(path))


def log_recover(path: PathLike) -> LogReport:
    """Close an .hrl that its writer never closed, at its last whole metadata block."""
    return recover_log(OS_FILES, Path(path))


def tls_init(folder: PathLike, *, names: Sequence[str] = ()) -> list[str]:
    """Make a CA, certificates for both sides and a trust list in `folder`;

    return the paths. Never overwrites.
    """
    return [str(path) for path in init_tls(OS_FILES, Path(folder), clock=SYSTEM, names=names)]


def tls_trust(folder: PathLike, certificate: str, vm_patterns: Sequence[str]) -> None:
    """Let a certificate ("sha256:…" or a common name) write the VMs that match a pattern;

    takes effect at once.
    """
    allow(OS_FILES, Path(folder) / TRUST_FILE, certificate=certificate, vm=list(vm_patterns), clock=SYSTEM)


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
