"""Compacting: what is moved where, what stays, and what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, map_disk, open_disk
from hvreplica.disk.compact import compact_disk
from hvreplica.disk.moves import plan_moves
from hvreplica.disk.resize import resize_disk
from hvreplica.errors import InvalidTransition, Locked
from hvreplica.files import OS_FILES
from hvreplica.formats.vhdx_bat import BitmapState, PayloadState
from hvreplica.units import GIB, KIB, MIB
from tests.support.tools import run_tool
from tests.support.vhdx_surgery import Patient

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.progress import Progress


def plan(movable: list[tuple[int, int]], pinned: list[tuple[int, int]], floor: int = 0) -> dict[int, int]:
    """Return source: target of the moves."""
    rows = np.array(movable, np.int64).reshape(-1, 2)
    moves = plan_moves(rows, np.array(pinned, np.int64).reshape(-1, 2), floor=floor, aligned=lambda at: at)
    return dict(zip(rows[moves.parts, 0].tolist(), moves.targets.tolist(), strict=True))


@pytest.mark.parametrize(
    ("movable", "pinned", "expected"),
    [
        pytest.param([], [(0, 1)], {}, id="nothing"),
        pytest.param([(1, 2), (3, 2)], [(0, 1)], {}, id="dense"),
        pytest.param([(3, 2)], [(0, 1)], {3: 1}, id="one gap"),
        pytest.param([(2, 2)], [(0, 1)], {}, id="gap too small"),
        pytest.param([(1, 2), (7, 2), (9, 2)], [(0, 1)], {7: 3, 9: 5}, id="in order"),
        pytest.param([(5, 2), (9, 2)], [(0, 1), (11, 1)], {}, id="a structure ends the file"),
        pytest.param([(5, 2), (12, 2)], [(0, 1), (9, 1)], {12: 1}, id="only what is behind the structure"),
        pytest.param([(3, 2), (5, 1)], [(0, 1)], {5: 1}, id="what does not fit ends the file"),
        pytest.param([(2, 1), (6, 2)], [(0, 1)], {6: 3}, id="nothing that makes the file no shorter"),
    ],
)
def test_plan(
    movable: list[tuple[int, int]], pinned: list[tuple[int, int]], expected: dict[int, int]
) -> None:
    assert plan(movable, pinned) == expected


def test_nothing_goes_below_the_floor() -> None:
    assert plan([(8, 2)], [(0, 1)], floor=5) == {8: 5}


def test_no_target_was_in_use(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(300):
        lengths = rng.choice([1, 4], 40)
        starts = np.cumsum(lengths + rng.choice([0, 0, 1, 5], 40)) - lengths + 1
        rows = np.column_stack((starts, lengths))
        pinned = rng.random(40) < 0.1
        movable = rows[~pinned]
        moves = plan_moves(
            movable, np.concatenate(([[0, 1]], rows[pinned])), floor=0, aligned=lambda at: at + at % 2
        )
        used = np.zeros(400, bool)
        for start, length in [(0, 1), *rows.tolist()]:
            used[start : start + length] = True
        for part, target in zip(moves.parts.tolist(), moves.targets.tolist(), strict=True):
            start, length = movable[part].tolist()
            assert target < start
            assert not used[target : target + length].any()
            used[target : target + length] = True


def fill(path: Path, sizes: list[int]) -> None:
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        for index, length in enumerate(sizes):
            if length:
                disk.write(bytes([index + 1]) * length, index * disk.block_bytes)
                disk.flush()


@pytest.mark.parametrize("name", ["a.vhdx", "a.vhd"])
def test_zeros_lose_their_places_and_the_file_is_cut(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    kind = name.split(".")[1]
    create_disk(OS_FILES, path, virtual_bytes=16 * MIB, format=kind, block_bytes=2 * MIB, clock=SYSTEM)
    empty = path.stat().st_size
    fill(path, [2 * MIB] * 8)
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        for index in (0, 2, 3, 6):
            disk.write(bytes(2 * MIB), index * 2 * MIB)
        before = disk.info()
    seen: list[Progress] = []
    report = compact_disk(OS_FILES, path, clock=SYSTEM, progress=seen.append)
    assert (report.released_blocks, report.file_bytes_before) == (4, before.file_bytes)
    assert report.won_bytes == before.file_bytes - path.stat().st_size >= 8 * MIB
    assert path.stat().st_size <= empty + 4 * (2 * MIB + 4096)
    assert {each.phase for each in seen} == {"look", "move"}
    assert all(each.done_bytes <= each.total_bytes for each in seen)
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        after = disk.info()
        buffer = bytearray(16 * MIB)
        disk.read_into(buffer, 0)
    assert buffer == b"".join(
        bytes([0 if index in (0, 2, 3, 6) else index + 1]) * 2 * MIB for index in range(8)
    )
    assert (after.data_write_guid, after.disk_id) == (before.data_write_guid, before.disk_id)
    again = compact_disk(OS_FILES, path, clock=SYSTEM)
    assert (again.won_bytes, again.released_blocks, again.moved_bytes) == (0, 0, 0)
    run_tool("qemu-img", "check", "-f", "vhdx" if kind == "vhdx" else "vpc", path, expected=(0, 63))


def test_blocks_that_windows_trimmed_lose_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    create_disk(OS_FILES, path, virtual_bytes=8 * MIB, block_bytes=MIB, clock=SYSTEM)
    fill(path, [MIB] * 8)
    patient = Patient(path)
    for index in (0, 1, 2):
        entry = patient.entry(index)
        patient.set_entry(index, entry - PayloadState.PAYLOAD_BLOCK_FULLY_PRESENT + 3)
    report = compact_disk(OS_FILES, path, clock=SYSTEM)
    assert (report.released_blocks, report.won_bytes) == (3, 3 * MIB)
    assert [patient.entry(index) for index in (0, 1, 2)] == [PayloadState.PAYLOAD_BLOCK_ZERO] * 3


def test_sector_bitmaps_move_and_go(tmp_path: Path) -> None:
    base, path = tmp_path / "base.vhdx", tmp_path / "a.avhdx"
    create_disk(OS_FILES, base, virtual_bytes=5 * GIB, block_bytes=MIB, clock=SYSTEM)
    create_disk(OS_FILES, path, block_bytes=MIB, parent=base, clock=SYSTEM)
    place = 4 * GIB + MIB
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        disk.write(bytes([1]) * 4096, 0)
        disk.write(bytes([2]) * 4096, place)
        disk.flush()
        disk.write(bytes(4096), 0)
    patient = Patient(path)
    first, second = 4096, 2 * 4097 - 1  # the entries of both chunks' sector bitmaps
    before = patient.entry(second)
    assert patient.entry(first) & 7 == BitmapState.SB_BLOCK_PRESENT
    report = compact_disk(OS_FILES, path, clock=SYSTEM)
    assert (report.released_blocks, report.won_bytes, report.moved_bytes) == (1, 2 * MIB, 2 * MIB)
    assert patient.entry(first) == BitmapState.SB_BLOCK_NOT_PRESENT
    assert patient.entry(second) < before
    assert patient.entry(second) & 7 == BitmapState.SB_BLOCK_PRESENT
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        buffer = bytearray(8192)
        disk.read_into(buffer, place)
        assert buffer == bytes([2]) * 4096 + bytes(4096)


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_vhd_whose_blocks_are_on_no_page_is_compacted_too(tmp_path: Path, kind: str) -> None:
    """Places as far apart as they are long leave no room to align what moves there."""
    path, raw = tmp_path / "a.vhd", tmp_path / "a.raw"
    raw.write_bytes(b"".join(bytes([index + 1]) * 2 * MIB for index in range(4)))
    run_tool("qemu-img", "convert", "-O", "vpc", "-o", f"subformat={kind},force_size=on", raw, path)
    if kind == "fixed":
        with pytest.raises(InvalidTransition):
            compact_disk(OS_FILES, path, clock=SYSTEM)
        return
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        disk.write(bytes(2 * MIB), 2 * MIB)
        places = [entry.offset for entry in map_disk(disk) if entry.offset is not None]
    assert any(place % 4096 for place in places)
    assert compact_disk(OS_FILES, path, clock=SYSTEM).won_bytes == 2 * MIB + 512
    raw.write_bytes(raw.read_bytes()[: 2 * MIB] + bytes(2 * MIB) + raw.read_bytes()[4 * MIB :])
    run_tool("qemu-img", "compare", "-f", "vpc", "-F", "raw", path, raw)


@pytest.mark.parametrize(("name", "kind"), [("a.vhdx", "fixed"), ("a.vhd", "fixed"), ("a.raw", "dynamic")])
def test_disks_that_keep_their_space_are_refused_and_not_touched(
    tmp_path: Path, name: str, kind: str
) -> None:
    path = tmp_path / name
    create_disk(OS_FILES, path, virtual_bytes=4 * MIB, format=name.split(".")[1], type=kind, clock=SYSTEM)
    before = path.read_bytes()
    with pytest.raises(InvalidTransition) as caught:
        compact_disk(OS_FILES, path, clock=SYSTEM)
    assert caught.value.hint is not None
    assert path.read_bytes() == before


def test_disk_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    create_disk(OS_FILES, path, virtual_bytes=4 * MIB, clock=SYSTEM)
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM), pytest.raises(Locked):
        compact_disk(OS_FILES, path, clock=SYSTEM)


def test_places_of_unallocated_tail_stay_small(tmp_path: Path) -> None:
    """A last block of which the disk has little moves as a whole, or as much of it as the file has."""
    path = tmp_path / "a.vhd"
    create_disk(
        OS_FILES, path, virtual_bytes=3 * 512 * KIB + 4096, format="vhd", block_bytes=512 * KIB, clock=SYSTEM
    )
    fill(path, [512 * KIB, 512 * KIB, 512 * KIB, 4096])
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        disk.write(bytes(512 * KIB), 0)
    compact_disk(OS_FILES, path, clock=SYSTEM)
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        buffer = bytearray(disk.virtual_bytes)
        disk.read_into(buffer, 0)
    assert buffer[-4096:] == bytes([4]) * 4096
    assert not any(buffer[: 512 * KIB])


@pytest.mark.parametrize("name", ["a.vhdx", "a.vhd"])
def test_table_goes_from_the_end_into_a_gap_that_holds_garbage(tmp_path: Path, name: str) -> None:
    path, kind = tmp_path / name, name.split(".")[1]
    block = MIB if kind == "vhdx" else 512 * KIB
    create_disk(OS_FILES, path, virtual_bytes=16 * block, format=kind, block_bytes=block, clock=SYSTEM)
    fill(path, [block] * 16)
    table = Patient(path).entry_at(0) if kind == "vhdx" else 1536
    entry_bytes = 8 if kind == "vhdx" else 4
    Patient(path).write(table + entry_bytes, (b"\0" if kind == "vhdx" else b"\xff") * (12 * entry_bytes))
    resize_disk(OS_FILES, path, 300 * GIB, clock=SYSTEM)
    before = path.stat().st_size
    report = compact_disk(OS_FILES, path, clock=SYSTEM)
    assert before - 13 * (block + 4096) < report.file_bytes <= before - 5 * block
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        found = disk.extents(0, disk.virtual_bytes)
        assert int(found[:, 1].sum()) == 4 * block
        for index in (0, 13, 14, 15):
            buffer = bytearray(block)
            disk.read_into(buffer, index * block)
            assert buffer == bytes([index + 1]) * block
    run_tool("qemu-img", "check", "-f", "vhdx" if kind == "vhdx" else "vpc", path, expected=(0, 63))
