"""Whole disks whose structures are attacked: opened, replayed, mapped, read through their parents, written."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk import map_disk, open_disk
from hvreplica.units import MIB
from tests.fuzz import scenes_vhd, scenes_vhdx
from tests.fuzz.damage import ONLY_READ, stored
from tests.fuzz.registry import Fuzzer
from tests.support.fakeclock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hvreplica.disk import Disk
    from tests.fuzz.damage import Scene
    from tests.support.faultfile import FaultFiles

_LOOKED_AT_BYTES = 32 * MIB
_MAPPED_BYTES_MAX = 1 << 40  # a map of all blocks of the largest disks takes longer than an attack may
_PLACES = tuple(block * MIB + 512 for block in (0, 3, 5, 6, 8))
_PIECE_BYTES = 4096
_MARK = b"\x55" * _PIECE_BYTES


def _attack(scene: Scene, data: bytes) -> None:
    """Damage the scene, read its first disk, write to it, and read again what another process would find."""
    world = scene.damaged(data)
    path = scene.paths[0]
    shown = _show(world, path)
    if data[1:2] and data[1] & ONLY_READ:
        return
    written = _write(world, path, shown)
    again = _show(world, path)
    for place, piece in written.items():
        assert again[place] == piece, f"what was written at {place} is not what was read after a close"


def _show(world: FaultFiles, path: Path) -> dict[int, bytes]:
    """Read a disk in every way there is; return some of its bytes."""
    with open_disk(world, path, clock=FakeClock()) as disk:
        end = min(disk.virtual_bytes, _LOOKED_AT_BYTES)
        extents = disk.extents(0, end)
        assert (extents >= 0).all()
        assert extents.size == 0 or int(extents.sum(axis=1).max()) <= disk.virtual_bytes
        disk.info()
        if disk.virtual_bytes <= _MAPPED_BYTES_MAX:
            _check_map(disk)
        pieces = _pieces(disk)
        for place, piece in pieces.items():
            covered = any(
                start < place + len(piece) and place < start + length for start, length in extents.tolist()
            )
            assert covered or not any(piece), f"data at {place} that no extent covers"
        return pieces


def _check_map(disk: Disk) -> None:
    position = 0
    for entry in itertools.islice(map_disk(disk), 1000):
        assert entry.start == position
        assert entry.length > 0
        position += entry.length
        assert position <= disk.virtual_bytes


def _pieces(disk: Disk) -> dict[int, bytes]:
    lengths = [max(min(disk.virtual_bytes - place, _PIECE_BYTES), 0) for place in _PLACES]
    rows = [(place, length) for place, length in zip(_PLACES, lengths, strict=True) if length]
    data = bytearray(sum(lengths))
    disk.read_extents(np.array(rows, np.int64).reshape(-1, 2), data)
    ends = itertools.accumulate(lengths)
    return {
        place: bytes(data[end - length : end])
        for place, length, end in zip(_PLACES, lengths, ends, strict=True)
    }


def _write(world: FaultFiles, path: Path, shown: dict[int, bytes]) -> dict[int, bytes]:
    """Write, zero and flush; return what must be there from now on."""
    with open_disk(world, path, writable=True, clock=FakeClock()) as disk:
        assert _pieces(disk) == shown, "a writer's replay shows other bytes than a reader's"
        place, zeroed = _PLACES[1], _PLACES[2]
        written = _MARK[: len(shown[place])]
        if written:
            disk.write(written, place)
            disk.flush()
        if shown[zeroed]:
            disk.write_zeroes(zeroed, len(shown[zeroed]))
        expected = {**shown, place: written, zeroed: bytes(len(shown[zeroed]))}
        assert _pieces(disk) == expected, "not what was written"
        return expected


def _fuzzer(name: str, scene: Callable[[], Scene]) -> Fuzzer:
    return Fuzzer(name, lambda: scene().seeds(), lambda data: _attack(scene(), data))


def _attack_replay(data: bytes) -> None:
    """Replay a damaged log in memory and in place: both show the same, and only a writer changes the file."""
    scene = scenes_vhdx.chain_scene()
    world = scene.damaged(data)
    path = scene.paths[0]
    before = stored(world, path)
    try:
        with open_disk(world, path, clock=FakeClock()) as disk:
            shown = _pieces(disk)
            if disk.format != "vhdx":  # without its signature it is a raw disk, and those have no log
                return
    finally:
        assert stored(world, path) == before, "a reader changed the file"
    open_disk(world, path, writable=True, clock=FakeClock()).abandon()
    with open_disk(world.after_kill(), path, clock=FakeClock()) as disk:
        assert disk.info().log == "clean"
        assert _pieces(disk) == shown


FUZZERS = (
    _fuzzer("vhdx_file", scenes_vhdx.dynamic_scene),
    _fuzzer("vhdx_chain", scenes_vhdx.chain_scene),
    _fuzzer("vhd_file", scenes_vhd.dynamic_scene),
    _fuzzer("vhd_fixed", scenes_vhd.fixed_scene),
    _fuzzer("vhd_chain", scenes_vhd.chain_scene),
    Fuzzer("vhdx_replay", lambda: scenes_vhdx.chain_scene().seeds(), _attack_replay),
)
