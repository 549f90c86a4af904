"""Comparison finds every changed block, no block that did not change, and reads nothing that cannot have changed."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvreplica import native
from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.tracking.compare import ComparedDisk
from hvreplica.tracking.fingerprints import BLOCK_BYTES, FingerprintTable
from hvreplica.tracking.window import WINDOW_BYTES, runs_of, windows_with_data
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from typing_extensions import Buffer

DISK = Path("/p/a.raw")
SIZE = 5 * WINDOW_BYTES + 3 * 512  # a short last window and a short last block


class Sink:
    """A log that only remembers."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)
        self.touched = np.zeros(size, bool)
        self._lock = threading.Lock()

    def append(self, extents: NDArray[np.int64], data: Buffer) -> None:
        view, at = memoryview(data).cast("B"), 0
        with self._lock:
            for offset, length in extents.tolist():
                self.content[offset : offset + length] = view[at : at + length]
                self.touched[offset : offset + length] = True
                at += length
            assert at == len(view)

    def append_zeroes(self, disk_offset: int, length: int) -> None:
        with self._lock:
            self.content[disk_offset : disk_offset + length] = bytes(length)
            self.touched[disk_offset : disk_offset + length] = True


def files_with(content: bytes | bytearray) -> FaultFiles:
    files = FaultFiles("/p")
    files.load(DISK, bytes(content))
    return files


def table_of(files: FaultFiles, content: bytes | bytearray) -> FingerprintTable:
    table = FingerprintTable.create(files, Path("/p/0.fp"), disk_index=0, virtual_bytes=len(content))
    table.write(0, native.fingerprints(bytes(content), BLOCK_BYTES))
    return table


def compare(files: FaultFiles, table: FingerprintTable, *, workers: int = 2) -> tuple[Sink, int]:
    with contextlib.closing(open_disk(files, DISK, clock=SYSTEM)) as disk:
        sink = Sink(disk.virtual_bytes)
        changed = ComparedDisk(disk, table, workers=workers).changes_into(sink, on_read=lambda _: None)
    return sink, changed


def expect_exact(before: bytearray, after: bytearray, sink: Sink, changed: int) -> None:
    """Check that the touched blocks are the ones that differ, with the new content."""
    total = 0
    for at in range(0, len(after), BLOCK_BYTES):
        end = min(at + BLOCK_BYTES, len(after))
        differs = before[at:end] != after[at:end]
        assert sink.touched[at:end].all() == differs
        assert sink.touched[at:end].any() == differs
        if differs:
            assert sink.content[at:end] == after[at:end]
            total += end - at
    assert changed == total


@given(st.data())
def test_compare_finds_exactly_the_changed_blocks(data: st.DataObject) -> None:
    before = bytearray(np.random.default_rng(1).bytes(SIZE))
    for at in data.draw(st.lists(st.integers(0, SIZE // BLOCK_BYTES), max_size=6)):
        before[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES] = bytes(
            len(before[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES])
        )
    after = bytearray(before)
    for offset, byte, length in data.draw(
        st.lists(
            st.tuples(
                st.integers(0, SIZE - 1), st.integers(0, 255), st.sampled_from([1, 512, 4096, 9000, 300_000])
            ),
            max_size=12,
        )
    ):
        end = min(offset + length, SIZE)
        after[offset:end] = bytes([byte]) * (end - offset)
    files = files_with(after)
    sink, changed = compare(files, table_of(files, before), workers=data.draw(st.sampled_from([1, 3])))
    expect_exact(before, after, sink, changed)


def test_compare_of_a_sparse_disk_reads_only_what_can_have_changed() -> None:
    files = FaultFiles("/p")
    size = 1 << 40
    create_disk(files, DISK.with_suffix(".vhdx"), virtual_bytes=size, clock=SYSTEM)
    table = FingerprintTable.create(files, Path("/p/0.fp"), disk_index=0, virtual_bytes=size)
    table.write((700 << 30) // BLOCK_BYTES, np.full((1, 16), 7, np.uint8))
    read: list[int] = []
    with contextlib.closing(open_disk(files, DISK.with_suffix(".vhdx"), writable=True, clock=SYSTEM)) as disk:
        disk.write(b"x" * 4096, 300 << 30)
        seen: list[tuple[int, int, Any]] = []

        class Log:
            def append(self, extents: NDArray[np.int64], data: Buffer) -> None:
                seen.append((*extents[0].tolist(), bytes(data)[:1]))

            def append_zeroes(self, disk_offset: int, length: int) -> None:
                seen.append((disk_offset, length, b"\0"))

        changed = ComparedDisk(disk, table, workers=2).changes_into(Log(), on_read=read.append)
    assert sorted(seen) == [(300 << 30, 4096, b"x"), (700 << 30, 4096, b"\0")]
    assert changed == 8192
    assert sum(read) < 64 << 20


def test_compare_failure_in_a_worker_reaches_the_caller() -> None:
    files = files_with(bytes(SIZE - 1) + b"x")
    table = table_of(files, bytes(SIZE))
    files.fail("read", path="/p/0.fp", at=2)
    with pytest.raises(OSError, match=r"0\.fp"):
        compare(files, table, workers=3)


@given(
    st.lists(st.tuples(st.integers(0, 200 << 20), st.integers(1, 9 << 20)), max_size=8),
    st.integers(0, 20).map(lambda index: index * WINDOW_BYTES),
)
def test_windows_with_data_are_those_that_an_extent_touches(
    extents: list[tuple[int, int]], start: int
) -> None:
    end = (209 << 20) + 512

    def source(first: int, last: int) -> NDArray[np.int64]:
        rows = [
            (max(offset, first), min(offset + length, last) - max(offset, first))
            for offset, length in sorted(extents)
            if offset < last and offset + length > first
        ]
        return np.array(rows, np.int64).reshape(-1, 2)

    found = list(windows_with_data((source,), start, end))
    expected = [
        (max(at, start), min(at + WINDOW_BYTES, end) - max(at, start))
        for at in range(0, end, WINDOW_BYTES)
        if at + WINDOW_BYTES > start
        and any(
            offset < min(at + WINDOW_BYTES, end) and offset + length > max(at, start)
            for offset, length in extents
        )
    ]
    assert found == expected


@given(st.lists(st.booleans(), max_size=40))
def test_runs_of_gives_every_true_and_no_false(mask: list[bool]) -> None:
    again = np.zeros(len(mask), bool)
    for first, count in runs_of(np.array(mask, bool)):
        again[first : first + count] = True
    assert again.tolist() == mask


@settings(max_examples=max(settings.default.max_examples // 8, 1))
@given(seed=st.integers(0, 1 << 32))
def test_within_ranges_only_their_blocks_are_read(seed: int) -> None:
    rng = np.random.default_rng(seed)
    content = bytearray(rng.bytes(SIZE))
    with files_and_table(content) as (files, table):
        starts = np.sort(rng.integers(0, SIZE // 512, 24)) * 512
        rows = np.column_stack((starts, rng.choice([512, 4096, 9 * 512, WINDOW_BYTES], 24)))
        rows[:, 1] = np.minimum(rows[:, 1], np.append(starts[1:], SIZE) - starts)
        rows = rows[rows[:, 1] > 0]
        blocks = np.zeros(-(-SIZE // BLOCK_BYTES), bool)
        for start, length in rows.tolist():
            blocks[start // BLOCK_BYTES : -(-(start + length) // BLOCK_BYTES)] = True
            if rng.random() < 0.6:
                content[start : start + length] = bytes(length) if rng.random() < 0.3 else rng.bytes(length)
        with contextlib.closing(open_disk(files, DISK, writable=True, clock=SYSTEM)) as disk:
            disk.write(bytes(content), 0)
            sink, told = Sink(SIZE), []
            source = ComparedDisk(disk, table, workers=2, within=rows.astype(np.int64))
            changed = source.changes_into(sink, on_read=told.append)
        in_blocks = np.repeat(blocks, BLOCK_BYTES)[:SIZE]
        assert sum(told) == int(in_blocks.sum())
        assert not (sink.touched & ~in_blocks).any()
        assert changed == int(sink.touched.sum())
        assert bytes(np.where(sink.touched, np.frombuffer(sink.content, np.uint8), 0)) == bytes(
            np.where(sink.touched, np.frombuffer(content, np.uint8), 0)
        )
        new = native.fingerprints(bytes(content), BLOCK_BYTES)
        differs = (new != table.read(0, len(new))).any(axis=1)
        assert (np.repeat(differs, BLOCK_BYTES)[:SIZE] == sink.touched).all()


@contextlib.contextmanager
def files_and_table(content: bytearray) -> Iterator[tuple[FaultFiles, FingerprintTable]]:
    files = files_with(content)
    with contextlib.closing(table_of(files, content)) as table:
        yield files, table
