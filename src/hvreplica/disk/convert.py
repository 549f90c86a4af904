"""Copy a disk into a new file of another format, type or block size.

Two threads each read a batch, drop its zeros, and write the rest; what the source does not hold is not read.
The target has its name only when it is complete and durable.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from hvreplica import native
from hvreplica.disk.create import create_disk, require_folder
from hvreplica.disk.extents import batches, data_windows, select_runs
from hvreplica.disk.open import open_disk
from hvreplica.disk.parallel import Scratch, map_ordered
from hvreplica.errors import HvReplicaError
from hvreplica.files import require_unused
from hvreplica.progress import Progress
from hvreplica.units import MIB, align_up

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from hvreplica.clock import Clock
    from hvreplica.disk.disk import Disk
    from hvreplica.disk.open import DiskType, Format
    from hvreplica.files import FileSystem
    from hvreplica.progress import ProgressCallback

# Large enough that the fixed price of a batch does not count, small enough for the last-level cache of most
# machines: data is met three times, from memory once.
_BATCH_BYTES = 4 * MIB
_GRAIN_BYTES = 4096
_SECTOR_BYTES = 512


class ConvertReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a conversion did. read_bytes: from the source; written_bytes: to the target, zeros left out."""

    source: str
    target: str
    format: str
    virtual_bytes: int
    read_bytes: int
    written_bytes: int


def convert_disk(  # noqa: PLR0913 - each is a choice that a user may make
    files: FileSystem,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    source_format: Format | None = None,
    format: Format = "vhdx",  # noqa: A002 - the word that users type
    type: DiskType = "dynamic",  # noqa: A002 - the word that users type
    block_bytes: int | None = None,
    logical_sector_bytes: int | None = None,
    parent: str | os.PathLike[str] | None = None,
    clock: Clock,
    progress: ProgressCallback | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Write what the disk `source` holds into a new file `target`, durable on return.

    logical_sector_bytes: of the target, None takes the source's. parent: the file of the source's parent,
    where its names do not lead to it. A raw source whose size is no multiple of 512 is padded with zeros.
    Raises: FileExistsError unless overwrite; FormatError for the source; FieldOutOfRange for sizes that the
    target's format does not allow.
    """
    target = Path(target)
    _require_free_name(files, target, overwrite=overwrite)
    with open_disk(files, source, format=source_format, parent=parent, shared=True, clock=clock) as reader:
        return convert_open_disk(
            files,
            reader,
            target,
            source_name=str(source),
            format=format,
            type=type,
            block_bytes=block_bytes,
            logical_sector_bytes=logical_sector_bytes,
            clock=clock,
            progress=progress,
            overwrite=overwrite,
        )


def convert_open_disk(  # noqa: PLR0913 - as above
    files: FileSystem,
    reader: Disk,
    target: Path,
    *,
    source_name: str,
    format: Format = "vhdx",  # noqa: A002 - the word that users type
    type: DiskType = "dynamic",  # noqa: A002 - the word that users type
    block_bytes: int | None = None,
    logical_sector_bytes: int | None = None,
    clock: Clock,
    progress: ProgressCallback | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Write what `reader` shows, which nobody changes meanwhile, into a new file; see convert_disk().

    source_name: how the report calls it.
    """
    _require_free_name(files, target, overwrite=overwrite)
    temporary = target.with_name(f".{target.name}.{clock.guid().hex[:8]}.partial")
    # The source and its parents are locked by now, so that none of them can be the target.
    require_unused(files, target)
    try:
        create_disk(
            files,
            temporary,
            virtual_bytes=align_up(reader.virtual_bytes, max(reader.logical_sector_bytes, _SECTOR_BYTES)),
            format=format,
            type=type,
            block_bytes=block_bytes,
            logical_sector_bytes=logical_sector_bytes or reader.logical_sector_bytes,
            physical_sector_bytes=reader.physical_sector_bytes,
            clock=clock,
        )
        with open_disk(files, temporary, writable=True, format=format, clock=clock) as writer:
            read_bytes, written_bytes = copy_data(reader, writer, progress)
        files.replace(temporary, target)
    except BaseException as error:
        files.unlink(temporary)
        if isinstance(error, HvReplicaError) and error.path == temporary:
            error.path = target  # the name that the user knows
        raise
    files.sync_directory(target.parent)
    return ConvertReport(
        source=source_name,
        target=str(target),
        format=format,
        virtual_bytes=reader.virtual_bytes,
        read_bytes=read_bytes,
        written_bytes=written_bytes,
    )


def _require_free_name(files: FileSystem, target: Path, *, overwrite: bool) -> None:
    if not overwrite and files.exists(target):
        raise FileExistsError(17, "a file of this name exists; it was not touched", str(target))
    require_folder(files, target)


def copy_data(source: Disk, target: Disk, progress: ProgressCallback | None = None) -> tuple[int, int]:
    """Write the data of `source` to `target`, an empty disk not smaller; return bytes read and written.

    Nothing is durable until the target is flushed. Memory is bounded.
    """
    scratch = Scratch(_BATCH_BYTES)

    def copy(rows: NDArray[np.int64]) -> tuple[int, int]:
        buffer = scratch.take(int(rows[:, 1].sum()))
        source.read_extents(rows, buffer.data)
        return len(buffer), _write_without_zeros(target, rows, buffer)

    def wanted() -> Iterator[NDArray[np.int64]]:
        for _, _, rows in data_windows(source, 0, source.virtual_bytes):
            yield from batches(rows, _BATCH_BYTES)

    read_bytes = written_bytes = 0
    for read, written in map_ordered(copy, wanted()):
        read_bytes, written_bytes = read_bytes + read, written_bytes + written
        if progress is not None:
            # The bytes still to come are known only when the walk has met them; the whole disk bounds them.
            progress(Progress("convert", read_bytes, source.virtual_bytes, raw_bytes=read_bytes))
    return read_bytes, written_bytes


def _write_without_zeros(target: Disk, rows: NDArray[np.int64], buffer: NDArray[np.uint8]) -> int:
    runs = native.data_runs(buffer.data, _GRAIN_BYTES)
    if not len(runs):
        return 0
    if len(runs) == 1 and int(runs[0, 1]) == len(buffer):
        target.write_extents(rows, buffer.data)
        return len(buffer)
    chosen = select_runs(rows, runs)
    packed = np.concatenate([buffer[start : start + length] for start, length in runs.tolist()])
    target.write_extents(chosen, packed.data)
    return len(packed)
