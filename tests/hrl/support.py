"""Logs and disks for the tests of this folder."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica.formats.hrl import LogHeader
from hvreplica.hrl import LogWriter
from tests.support.build import random_bytes
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from hvreplica.files import BlockFile, FileSystem

LOG = Path("/logs/a.hrl")
LOG_ID = uuid.UUID("11111111-2222-4333-8444-555555555555")
PREVIOUS_ID = uuid.UUID("66666666-7777-4888-9999-aaaaaaaaaaaa")
DATA_WRITE_GUID = uuid.UUID("bbbbbbbb-cccc-4ddd-8eee-ffffffffffff")
NOW_S = 1_735_689_600.0


def new_files() -> FaultFiles:
    return FaultFiles("/logs")


def new_writer(files: FileSystem, path: Path = LOG, *, metadata_bytes: int = 4096) -> LogWriter:
    return LogWriter.create(
        files,
        path,
        log_id=LOG_ID,
        previous_log_id=PREVIOUS_ID,
        data_write_guid=DATA_WRITE_GUID,
        clock=FakeClock(now_s=NOW_S),
        metadata_bytes=metadata_bytes,
    )


def rows(*extents: tuple[int, int]) -> NDArray[np.int64]:
    return np.array(extents, np.int64).reshape(-1, 2)


def write_log(
    files: FileSystem, writes: Iterable[tuple[int, bytes]], path: Path = LOG, **options: Any
) -> LogWriter:
    """Write and close a log of (disk_offset, data), one append each."""
    writer = new_writer(files, path, **options)
    for disk_offset, data in writes:
        writer.append(rows((disk_offset, len(data))), data)
    writer.close()
    return writer


def many_writes(
    count: int, *, length: int = 512, stride: int = 1024, seed: int = 0
) -> list[tuple[int, bytes]]:
    data = random_bytes(count * length, seed)
    return [(index * stride, data[index * length : (index + 1) * length]) for index in range(count)]


def rewrite_header(files: FaultFiles, path: Path = LOG, **changes: Any) -> None:
    """Change fields of a log's header and seal it anew."""
    file = files.open(path, writable=True)
    file.write(LogHeader.unpack(file.read(0, 4096)).sealed(**changes).pack(), 0)
    file.close()


def reopen_as_unclosed(files: FaultFiles, path: Path = LOG) -> None:
    """Make a closed log what a crash just before close() leaves."""
    rewrite_header(files, path, eol_location=0, current_size=0, total_metadata_entries=0)


def patch(files: FaultFiles, offset: int, data: bytes, path: Path = LOG) -> None:
    file = files.open(path, writable=True)
    file.write(data, offset)
    file.close()


class MemoryDisk:
    """A disk as bytes: what apply_log() asks of one, and a model of it."""

    def __init__(
        self, virtual_bytes: int, *, logical_sector_bytes: int = 512, content: bytes | None = None
    ) -> None:
        self.content = bytearray(virtual_bytes if content is None else content)
        self.virtual_bytes = virtual_bytes
        self.logical_sector_bytes = logical_sector_bytes
        self.copied: list[tuple[int, int]] = []
        self.zeroed: list[tuple[int, int]] = []

    def copy_extents(
        self, source_file: BlockFile, source_offsets: NDArray[Any], extents: NDArray[Any]
    ) -> None:
        for source_offset, (offset, length) in zip(source_offsets.tolist(), extents.tolist(), strict=True):
            assert offset + length <= self.virtual_bytes
            assert offset % self.logical_sector_bytes == length % self.logical_sector_bytes == 0
            self.content[offset : offset + length] = source_file.read(source_offset, length)
            self.copied.append((offset, length))

    def write_zeroes(self, disk_offset: int, length: int) -> None:
        assert disk_offset + length <= self.virtual_bytes
        self.content[disk_offset : disk_offset + length] = bytes(length)
        self.zeroed.append((disk_offset, length))
