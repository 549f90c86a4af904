"""Payload I/O through a block map, against a model of bytes; native and reference path do the same to a file."""

from __future__ import annotations

import errno
import os
import random  # noqa: TC003 - hypothesis reads the annotation
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hvreplica import native
from hvreplica.errors import Truncated
from hvreplica.files import OS_FILES
from hvreplica.native import extents as extents_module
from tests.native.payload_model import MIB, PassedFile, Scene, disk_image, extents_of, pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hvreplica.files import BlockFile

files_per_example = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
BLOCK_BYTES = 64 * 1024  # smaller than any VHDX block: more blocks per test, the arithmetic is the same
DISK_BLOCKS = 12
DISK_BYTES = BLOCK_BYTES * DISK_BLOCKS

offsets = st.one_of(
    st.integers(0, DISK_BYTES - 1),
    st.integers(0, DISK_BLOCKS - 1).map(lambda block: block * BLOCK_BYTES),
    st.integers(1, DISK_BLOCKS).map(lambda block: block * BLOCK_BYTES - 1),
)
lengths = st.one_of(st.integers(0, 5000), st.integers(0, 3).map(lambda count: count * BLOCK_BYTES))
rows_of_extents = st.lists(st.tuples(offsets, lengths), max_size=12).map(
    lambda rows: [(offset, min(length, DISK_BYTES - offset)) for offset, length in rows]
)
scenes = st.builds(
    Scene,
    places=st.permutations(range(DISK_BLOCKS)),
    absent=st.frozensets(st.integers(0, DISK_BLOCKS - 1)),
    chunk_ratio=st.sampled_from([0, 1, 3, 64]),
    block_bytes=st.just(BLOCK_BYTES),
    mapped=st.booleans(),
)


@pytest.fixture(params=["descriptor", "passed"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str, bytes], BlockFile]]:
    """Return what opens a file with the given bytes: with a descriptor, or as one whose fileno() is None."""
    made = []

    def open_with(name: str, data: bytes) -> BlockFile:
        (tmp_path / name).write_bytes(data)
        file = OS_FILES.open(tmp_path / name, writable=True)
        made.append(file)
        return file if request.param == "descriptor" else PassedFile(file)

    yield open_with
    for file in made:
        file.close()


Opened = "Callable[[str, bytes], BlockFile]"


@files_per_example
@given(scene=scenes, rows=rows_of_extents)
@example(scene=Scene.straight(DISK_BLOCKS, BLOCK_BYTES), rows=[(0, DISK_BYTES)])
@example(scene=Scene.straight(DISK_BLOCKS, BLOCK_BYTES), rows=[])
def test_read_extents_gives_the_bytes_of_the_disk(
    opened: Opened, scene: Scene, rows: list[tuple[int, int]]
) -> None:
    disk = scene.disk(pattern(DISK_BYTES))
    file = opened("disk", scene.container(disk))
    out = bytearray(b"\xee" * sum(length for _, length in rows))
    native.read_extents(file, scene.block_map(), extents_of(rows), out)
    assert out == b"".join(disk[offset : offset + length] for offset, length in rows)


@files_per_example
@given(scene=scenes, rows=rows_of_extents)
def test_write_extents_changes_those_bytes_alone(
    opened: Opened, scene: Scene, rows: list[tuple[int, int]]
) -> None:
    scene = scene.all_present()
    disk = bytearray(scene.disk(pattern(DISK_BYTES)))
    file = opened("disk", scene.container(bytes(disk)))
    data = pattern(sum(length for _, length in rows), start=77)
    native.write_extents(file, scene.block_map(), extents_of(rows), data)
    at = 0
    for offset, length in rows:
        disk[offset : offset + length] = data[at : at + length]
        at += length
    assert file.read(0, file.size()) == scene.container(bytes(disk))


@files_per_example
@given(
    scene=scenes,
    rows=rows_of_extents,
    sources=st.lists(st.integers(0, 300_000), min_size=12, max_size=12),
    window_bytes=st.sampled_from([1, 777, 65_536, MIB]),
)
@example(
    scene=Scene.straight(DISK_BLOCKS, BLOCK_BYTES),
    rows=[(0, 4096), (4096, 4096), (4096, 100)],
    sources=[8192, 0, 4096] + [0] * 9,
    window_bytes=MIB,
)
def test_copy_extents_puts_each_range_in_its_place_in_order(
    opened: Opened, scene: Scene, rows: list[tuple[int, int]], sources: list[int], window_bytes: int
) -> None:
    if window_bytes < 777:
        rows = [(offset, min(length, 500)) for offset, length in rows]
    scene = scene.all_present()
    disk = bytearray(scene.disk(pattern(DISK_BYTES)))
    log = pattern(300_000 + 3 * BLOCK_BYTES, start=99)
    file, source = opened("disk", scene.container(bytes(disk))), opened("log", log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extents_module, "WINDOW_BYTES", window_bytes)
        native.copy_extents(
            source, np.array(sources[: len(rows)], np.uint64), file, scene.block_map(), extents_of(rows)
        )
    for (offset, length), start in zip(rows, sources, strict=False):
        disk[offset : offset + length] = log[start : start + length]
    assert file.read(0, file.size()) == scene.container(bytes(disk))


def test_neighbours_in_the_file_around_an_absent_block_are_read_apart(opened: Opened) -> None:
    # Blocks 0 and 2 follow each other in the file, and the zeros of block 1 stand between them in the answer.
    scene = Scene([0, 9, 1, 2], frozenset({1}), 0, MIB, mapped=True)
    disk = scene.disk(pattern(4 * MIB))
    file = opened("disk", scene.container(disk))
    out = bytearray(b"\xee" * (4 * MIB))
    native.read_extents(file, scene.block_map(), extents_of([(0, 4 * MIB)]), out)
    assert out == disk


def test_copy_extents_of_more_pieces_than_one_batch_holds(opened: Opened) -> None:
    rng = np.random.default_rng(42)
    count = 3000
    disk, log = disk_image(count * 16), pattern(count * 16, start=5)
    source_offsets = rng.permutation(count).astype(np.uint64) * np.uint64(16)
    target_offsets = rng.permutation(count).astype(np.int64) * 16
    file, source = opened("disk", disk), opened("log", log)
    extents = np.stack((target_offsets, np.full(count, 16)), axis=1)
    native.copy_extents(source, source_offsets, file, None, extents)
    expected = bytearray(disk)
    for target, start in zip(target_offsets.tolist(), source_offsets.tolist(), strict=True):
        expected[target : target + 16] = log[start : start + 16]
    assert file.read(0, len(disk)) == expected


def test_reading_past_the_end_names_the_first_missing_byte(opened: Opened) -> None:
    file = opened("disk", disk_image(10_000))
    for rows, missing in (
        ([(9000, 2000)], 10_000),
        ([(0, 4096), (4096, 8192)], 10_000),
        ([(20_000, 5)], 20_000),
    ):
        with pytest.raises(Truncated) as caught:
            native.read_extents(file, None, extents_of(rows), bytearray(sum(length for _, length in rows)))
        assert caught.value.offset == missing
        assert Path(str(caught.value.path)).name == "disk"


def test_a_block_that_points_past_the_end_of_its_file_is_truncated(opened: Opened) -> None:
    scene = Scene.straight(2, BLOCK_BYTES)
    file = opened("disk", scene.container(bytes(2 * BLOCK_BYTES))[:-100])
    with pytest.raises(Truncated) as caught:
        native.read_extents(
            file, scene.block_map(), extents_of([(0, 2 * BLOCK_BYTES)]), bytearray(2 * BLOCK_BYTES)
        )
    assert caught.value.offset == file.size()


def test_copying_from_a_short_source_names_the_source(opened: Opened) -> None:
    file, source = opened("disk", disk_image(10_000)), opened("log", disk_image(5000))
    with pytest.raises(Truncated) as caught:
        native.copy_extents(source, np.array([4000], np.uint64), file, None, extents_of([(0, 2000)]))
    assert Path(str(caught.value.path)).name == "log"
    assert caught.value.offset == 5000
    assert file.read(0, 10_000) == disk_image(10_000)


def test_an_absent_block_refuses_a_write_before_anything_is_written(opened: Opened) -> None:
    scene = Scene.straight(4, BLOCK_BYTES).without({2})
    before = scene.container(scene.disk(pattern(4 * BLOCK_BYTES)))
    file, source = opened("disk", before), opened("log", pattern(4 * BLOCK_BYTES, start=9))
    extents = extents_of([(0, 2 * BLOCK_BYTES), (2 * BLOCK_BYTES, 512)])
    with pytest.raises(native.BlockAbsent) as caught:
        native.write_extents(file, scene.block_map(), extents, bytes(2 * BLOCK_BYTES + 512))
    assert caught.value.block == 2
    with pytest.raises(native.BlockAbsent):
        native.copy_extents(source, np.array([0, 0], np.uint64), file, scene.block_map(), extents)
    assert file.read(0, file.size()) == before


@pytest.mark.parametrize(
    "row",
    [(4 * BLOCK_BYTES, 1), (4 * BLOCK_BYTES - 1, 2), ((1 << 63) - 1, 1), (1 << 63, 0), ((1 << 64) - 1, 1)],
)
def test_an_extent_outside_of_the_map_is_refused_before_anything_is_written(
    opened: Opened, row: tuple[int, int]
) -> None:
    scene = Scene.straight(4, BLOCK_BYTES)
    before = scene.container(pattern(4 * BLOCK_BYTES))
    file, source = opened("disk", before), opened("log", pattern(BLOCK_BYTES))
    extents = np.array([(0, 512), row], np.uint64)
    with pytest.raises(IndexError):
        native.read_extents(file, scene.block_map(), extents, bytearray(512 + row[1]))
    with pytest.raises(IndexError):
        native.write_extents(file, scene.block_map(), extents, bytes(512 + row[1]))
    with pytest.raises(IndexError):
        native.copy_extents(source, np.array([0, 0], np.uint64), file, scene.block_map(), extents)
    assert file.read(0, file.size()) == before


def test_negative_offsets_are_out_of_range(opened: Opened) -> None:
    file = opened("disk", disk_image(1000))
    with pytest.raises(IndexError):
        native.read_extents(file, None, np.array([[-512, 512]], np.int64), bytearray(512))
    with pytest.raises(IndexError):
        native.copy_extents(file, np.array([-1], np.int64), file, None, extents_of([(0, 5)]))


def test_a_chunk_ratio_that_leads_past_the_table_is_out_of_range(opened: Opened) -> None:
    block_map = native.BlockMap(np.full(4, (1 << 20) | 6, np.uint64), BLOCK_BYTES, 1)
    file = opened("disk", bytes(MIB + BLOCK_BYTES))
    native.read_extents(file, block_map, extents_of([(BLOCK_BYTES, 512)]), bytearray(512))
    with pytest.raises(IndexError):
        native.read_extents(file, block_map, extents_of([(2 * BLOCK_BYTES, 512)]), bytearray(512))


def test_a_block_whose_place_is_beyond_63_bits_is_out_of_range(opened: Opened) -> None:
    file = opened("disk", bytes(1000))
    block_map = native.BlockMap(
        np.array([0xFFFF_FFFF_FFF0_0006, 0x7FFF_FFFF_FFF0_0006], np.uint64), 2 * MIB, 0
    )
    for row in ((0, 512), (2 * MIB, 2 * MIB)):
        with pytest.raises(IndexError):
            native.read_extents(file, block_map, extents_of([row]), bytearray(row[1]))


def test_extents_that_do_not_fit_their_buffer_are_refused(opened: Opened) -> None:
    file = opened("disk", disk_image(1000))
    for rows, length in (([(0, 10)], 9), ([(0, 10)], 11), ([], 1), ([(0, 1 << 62)] * 4, 0)):
        with pytest.raises(ValueError, match="add up"):
            native.read_extents(file, None, extents_of(rows), bytearray(length))
        with pytest.raises(ValueError, match="add up"):
            native.write_extents(file, None, extents_of(rows), bytes(length))
    with pytest.raises(ValueError, match="as many"):
        native.copy_extents(file, np.zeros(2, np.uint64), file, None, extents_of([(0, 10)]))
    assert file.read(0, 1000) == disk_image(1000)


def test_tables_of_the_wrong_type_are_refused(opened: Opened) -> None:
    file = opened("disk", disk_image(1000))
    for extents in (
        np.zeros((1, 2), np.int32),
        np.zeros((1, 3), np.int64),
        np.zeros(2, np.int64),
        np.zeros((1, 2)),
    ):
        with pytest.raises(TypeError):
            native.read_extents(file, None, extents, bytearray(0))
    for entries in (
        np.zeros(4, np.int64),
        np.zeros((2, 2), np.uint64),
        np.zeros(8, np.uint64)[::2],
        np.zeros(4, ">u8"),
    ):
        with pytest.raises(TypeError):
            native.BlockMap(entries, BLOCK_BYTES, 0)
    for block_bytes, chunk_ratio in ((0, 0), (-1, 0), (BLOCK_BYTES, -1)):
        with pytest.raises(ValueError, match="block map"):
            native.BlockMap(np.zeros(4, np.uint64), block_bytes, chunk_ratio)


def test_a_block_map_is_read_anew_by_each_call(opened: Opened) -> None:
    entries = np.zeros(1, np.uint64)
    block_map = native.BlockMap(entries, BLOCK_BYTES, 0)
    file = opened("disk", bytes(MIB) + b"a" * BLOCK_BYTES)
    out = bytearray(b"\xee" * 4)
    native.read_extents(file, block_map, extents_of([(0, 4)]), out)
    assert out == bytes(4)
    entries[0] = (1 << 20) | 6
    native.read_extents(file, block_map, extents_of([(0, 4)]), out)
    assert out == b"aaaa"


def test_rows_of_a_larger_table_and_reversed_rows_are_understood(opened: Opened) -> None:
    file = opened("disk", disk_image(1000))
    table = np.array([[0, 5, 77], [10, 5, 77], [100, 5, 77]], np.int64)
    out = bytearray(15)
    native.read_extents(file, None, table[::-1, :2], out)
    assert out == b"".join(disk_image(1000)[at : at + 5] for at in (100, 10, 0))


def test_an_error_of_the_system_names_file_operation_and_offset(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(disk_image(1000))
    file = OS_FILES.open(tmp_path / "disk")
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        native.write_extents(file, None, extents_of([(512, 4)]), b"data")
    assert caught.value.errno == errno.EBADF
    assert caught.value.filename == os.fspath(tmp_path / "disk")
    assert caught.value.__notes__ == [f"write {tmp_path / 'disk'} at offset 512"]
    file.close()
    with pytest.raises(ValueError, match="closed"):
        native.read_extents(file, None, extents_of([(0, 4)]), bytearray(4))


@files_per_example
@given(
    rows=st.lists(st.tuples(st.integers(-1, 300_000), st.integers(0, 5000)), max_size=12),
    order=st.randoms(use_true_random=False),
)
def test_read_pieces_fills_each_place_of_the_buffer(
    opened: Opened, rows: list[tuple[int, int]], order: random.Random
) -> None:
    content = pattern(310_000)
    file = opened("disk", content)
    pieces, expected, at = [], bytearray(), 0
    for file_offset, length in rows:
        pieces.append((file_offset, length, at))
        expected += bytes(length) if file_offset < 0 else content[file_offset : file_offset + length]
        at += length
    order.shuffle(pieces)
    out = bytearray(b"\xee" * at)
    native.read_pieces(file, np.array(pieces, np.int64).reshape(-1, 3), out)
    assert out == expected


def test_read_pieces_refuses_what_leaves_buffer_or_file(opened: Opened) -> None:
    file = opened("disk", pattern(8192))
    out = bytearray(b"\xee" * 4096)
    for piece in ((0, 4096, 1), (0, 4097, 0), (0, 1, 1 << 62), ((1 << 63) - 1, 2, 0), (-2, 16, 0)):
        with pytest.raises(IndexError):
            native.read_pieces(file, np.array([(0, 16, 0), piece], np.int64), out)
    assert out == b"\xee" * 4096
    with pytest.raises(Truncated) as caught:
        native.read_pieces(file, np.array([(8000, 300, 0)], np.int64), out)
    assert caught.value.offset == 8192


def test_a_partial_block_is_written_in_its_place_and_read_as_absent(opened: Opened) -> None:
    file = opened("disk", bytes(3 * MIB))
    block_map = native.BlockMap(np.array([(2 << 20) | 7], np.uint64), BLOCK_BYTES, 0)
    native.write_extents(file, block_map, extents_of([(512, 4)]), b"data")
    assert file.read(2 * MIB + 512, 4) == b"data"
    out = bytearray(b"\xee" * 4)
    native.read_extents(file, block_map, extents_of([(512, 4)]), out)
    assert out == bytes(4)


def test_an_offset_mask_finds_blocks_on_sectors(opened: Opened) -> None:
    file = opened("disk", pattern(BLOCK_BYTES + 8192))
    block_map = native.BlockMap(np.array([4608 | 6], np.uint64), BLOCK_BYTES, 0, ~0x1FF & (1 << 64) - 1)
    out = bytearray(1000)
    native.read_extents(file, block_map, extents_of([(24, 1000)]), out)
    assert out == pattern(BLOCK_BYTES + 8192)[4632:5632]
