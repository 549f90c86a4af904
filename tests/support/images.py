"""Disk images for the tests: unpacked with holes for zeros, and told apart by a digest of what the guest
sees.

The digest, `nz4k`, is SHA-256 over every chunk of 4096 guest bytes at a multiple of 4096 that is not all
zero, in ascending order: its offset as 8 bytes little-endian, then the chunk; the last one may be short. It
does not depend on what is allocated, and a disk of terabytes costs no more than the data in it.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import os
import random
import zipfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from hvreplica.disk import data_windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from hvreplica.disk import Disk

CHUNK_BYTES = 4096
_PIECE_BYTES = 1 << 20  # of one read
_HOLE_BYTES = 64 << 10  # zeros of this size, and at a multiple of it, become holes of an unpacked file
_WHOLE_BYTES_MAX = 256 << 20  # larger disks are not read in full through readers that know of no holes
_SAMPLE_BYTES = 64 << 10
_SAMPLES = 64

Range = tuple[int, int]  # offset, length


class Nz4k:
    """The digest, of pieces that come in ascending order, each but the last in whole chunks."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, offset: int, piece: bytes | bytearray | memoryview) -> None:
        """Take in guest bytes; `offset` is a multiple of 4096."""
        view = memoryview(piece)
        whole = len(view) // CHUNK_BYTES * CHUNK_BYTES
        words = np.frombuffer(view[:whole], np.uint64).reshape(-1, CHUNK_BYTES // 8)
        for index in np.flatnonzero(words.any(axis=1)).tolist():
            self._chunk(offset + index * CHUNK_BYTES, view[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
        if any(view[whole:]):
            self._chunk(offset + whole, view[whole:])

    def hexdigest(self) -> str:
        """Return the digest of what came so far."""
        return self._hash.hexdigest()

    def _chunk(self, offset: int, chunk: memoryview) -> None:
        self._hash.update(offset.to_bytes(8, "little"))
        self._hash.update(chunk)


@dataclass(frozen=True, slots=True)
class Content:
    """What a guest sees: how many bytes, and their digest."""

    virtual_bytes: int
    nz4k: str


def digest_ranges(read: Callable[[int, int], Any], ranges: Iterable[Range], virtual_bytes: int) -> str:
    """Return nz4k of what `read(offset, length)` gives for `ranges`, sorted; the rest counts as zeros."""
    digest = Nz4k()
    done = 0
    for offset, length in ranges:
        start = max(done, offset // CHUNK_BYTES * CHUNK_BYTES)
        end = min(-(-(offset + length) // CHUNK_BYTES) * CHUNK_BYTES, virtual_bytes)
        for at in range(start, end, _PIECE_BYTES):
            wanted = min(_PIECE_BYTES, end - at)
            piece = read(at, wanted)
            assert len(piece) == wanted, f"{len(piece)} bytes of {wanted} at {at}"
            digest.add(at, piece)
        done = max(done, end)
    return digest.hexdigest()


def disk_content(disk: Disk) -> Content:
    """Return what a disk of ours holds."""

    def read(offset: int, length: int) -> bytearray:
        buffer = bytearray(length)
        disk.read_into(buffer, offset)
        return buffer

    return Content(disk.virtual_bytes, digest_ranges(read, disk_ranges(disk), disk.virtual_bytes))


def disk_ranges(disk: Disk) -> Iterator[Range]:
    """Yield the ranges that a disk of ours says may hold data."""
    for _, _, rows in data_windows(disk, 0, disk.virtual_bytes):
        yield from (tuple(row) for row in rows.tolist())


def file_content(path: Path, virtual_bytes: int | None = None) -> Content:
    """Return what a raw file holds, its holes skipped; virtual_bytes: only so much from its start."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size if virtual_bytes is None else virtual_bytes
        ranges = (
            (offset, min(length, size - offset)) for offset, length in _held(file.fileno()) if offset < size
        )
        return Content(
            size, digest_ranges(lambda at, length: os.pread(file.fileno(), length, at), ranges, size)
        )


def file_ranges(path: Path) -> list[Range]:
    """Return the ranges of a file that are no holes."""
    with path.open("rb") as file:
        return list(_held(file.fileno()))


def _held(descriptor: int) -> Iterator[Range]:
    end, size = 0, os.fstat(descriptor).st_size
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole is left
            return
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end - start


def ranges_to_ask(data: Iterable[Range], virtual_bytes: int, seed: int = 0) -> list[Range]:
    """Return what to read through a reader that knows of no holes: all of a small disk.

    Of a large one, all `data` and samples of the rest, so that a digest still is that of the whole disk if
    the reader is right, and another one if it has data where none is in a sample.
    """
    if virtual_bytes <= _WHOLE_BYTES_MAX:
        return [(0, virtual_bytes)]
    rng = random.Random(seed)
    chunks = virtual_bytes // CHUNK_BYTES
    samples = [(rng.randrange(chunks) * CHUNK_BYTES, _SAMPLE_BYTES) for _ in range(_SAMPLES)]
    ends = [(0, _SAMPLE_BYTES), (virtual_bytes - _SAMPLE_BYTES, _SAMPLE_BYTES)]
    return merged((*data, *samples, *ends), virtual_bytes)


def merged(ranges: Iterable[Range], virtual_bytes: int) -> list[Range]:
    """Return ranges sorted, grown to whole chunks, joined and cut at the end of the disk."""
    joined: list[Range] = []
    for offset, length in sorted(ranges):
        start = offset // CHUNK_BYTES * CHUNK_BYTES
        end = min(-(-(offset + length) // CHUNK_BYTES) * CHUNK_BYTES, virtual_bytes)
        if joined and start <= sum(joined[-1]):
            joined[-1] = (joined[-1][0], max(end, sum(joined[-1])) - joined[-1][0])
        elif end > start:
            joined.append((start, end - start))
    return joined


def write_sparse(source: IO[bytes], target: Path) -> None:
    """Write a stream to a new file, zeros as holes: some images hold gigabytes of them."""
    with target.open("xb") as file:
        at = 0
        while piece := source.read(16 << 20):
            whole = len(piece) // _HOLE_BYTES * _HOLE_BYTES
            words = np.frombuffer(piece[:whole], np.uint64).reshape(-1, _HOLE_BYTES // 8)
            for index in np.flatnonzero(words.any(axis=1)).tolist():
                file.seek(at + index * _HOLE_BYTES)
                file.write(piece[index * _HOLE_BYTES : (index + 1) * _HOLE_BYTES])
            if whole < len(piece):
                file.seek(at + whole)
                file.write(piece[whole:])
            at += len(piece)
        file.truncate(at)


def copy_sparse(source: Path, target: Path) -> Path:
    """Copy a file and its holes."""
    with source.open("rb") as reader, target.open("xb") as writer:
        size = os.fstat(reader.fileno()).st_size
        for offset, length in _held(reader.fileno()):
            for at in range(offset, offset + length, 16 * _PIECE_BYTES):
                reader.seek(at)
                writer.seek(at)
                writer.write(reader.read(min(16 * _PIECE_BYTES, offset + length - at)))
        writer.truncate(size)
    return target


def unpacked_name(name: str) -> str:
    """Return the own name of a packed image, that by which its children know it."""
    return name.rpartition("/")[2].removesuffix(".bz2").removesuffix(".gz").removesuffix(".zip")


def unpack(folder: Path, name: str, target: Path) -> Path:
    """Unpack `name` of the folder of specimens into the folder `target`; return the image."""
    image = target / unpacked_name(name)
    if image.exists():
        return image
    if name.endswith(".zip"):
        with zipfile.ZipFile(folder / name) as archive, archive.open(archive.namelist()[0]) as member:
            write_sparse(member, image)
        return image
    opener: Any = bz2.open if name.endswith(".bz2") else gzip.open if name.endswith(".gz") else open
    with opener(folder / name, "rb") as stream:
        write_sparse(stream, image)
    return image
