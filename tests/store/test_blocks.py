"""Fingerprints of a replica: those of xxhash over the same bytes, zeros for zeros, nothing read that is not there."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any

import pytest
import xxhash

from hvreplica.errors import FieldOutOfRange, NoSuchPoint
from hvreplica.store import Store
from hvreplica.store.blocks import BlockReader
from tests.store.world import MIB, Primary, guid, ram_folder, small_disk
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.store import VmReplica

SIZE = 9 * MIB - 3 * 512


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def files(root: Path) -> FaultFiles:
    return FaultFiles(root)


@pytest.fixture
def store(files: FaultFiles, root: Path) -> Iterator[Store]:
    with Store.create_or_open(files, root, clock=FakeClock(seed=9)) as opened:
        yield opened


@pytest.fixture
def primary() -> Primary:
    made = Primary(FakeClock(seed=1), [dataclasses.replace(small_disk(0), virtual_bytes=SIZE)])
    rng = random.Random(3)
    made.write(0, MIB + 512, rng.randbytes(5 * MIB))
    made.write(0, 2 * MIB, bytes(MIB))
    made.write(0, SIZE - 512, b"end." * 128)
    return made


@pytest.fixture
def replica(store: Store, primary: Primary) -> VmReplica:
    return primary.replicate(store)


def expected(content: bytes, block_bytes: int) -> bytes:
    rows = []
    for start in range(0, len(content), block_bytes):
        block = content[start : start + block_bytes]
        rows.append(xxhash.xxh3_128_digest(block) if any(block) else bytes(16))
    return b"".join(rows)


@pytest.mark.parametrize("block_bytes", [512, 4096, 64 << 10, 1 << 20, 1536])
def test_fingerprints_are_those_of_xxhash(primary: Primary, replica: VmReplica, block_bytes: int) -> None:
    wanted = expected(primary.image()[0], block_bytes)
    blocks = len(wanted) // 16
    assert replica.fingerprints(0, 0, blocks, block_bytes) == wanted
    for first, count in ((0, 1), (blocks - 1, 1), (blocks // 3, blocks // 3)):
        part = wanted[first * 16 : (first + count) * 16]
        assert replica.fingerprints(0, first, count, block_bytes) == part


def test_only_what_may_hold_data_is_read(replica: VmReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    read = BlockReader._read

    def counted(self: BlockReader, disk_offset: int, length: int) -> Any:
        reads.append((disk_offset, length))
        return read(self, disk_offset, length)

    monkeypatch.setattr(BlockReader, "_read", counted)
    assert replica.fingerprints(0, 0, 256, 4096) == bytes(256 * 16)  # the first block was never allocated
    assert reads == []
    assert any(replica.fingerprints(0, 0, 2304, 4096))
    assert all(offset >= MIB and length <= 4 * MIB for offset, length in reads)
    assert sum(length for _, length in reads) <= 7 * MIB


def test_waiting_points_are_applied_first(primary: Primary, replica: VmReplica) -> None:
    primary.write(0, 0, b"new!" * 1024)
    primary.ship(replica, primary.cut())
    assert replica.fingerprints(0, 0, 16, 4096) == expected(primary.image()[0][: 16 * 4096], 4096)


def test_disk_is_held_while_it_is_read_and_let_go_by_the_next_step(
    primary: Primary, replica: VmReplica
) -> None:
    before = replica.fingerprints(0, 0, 16, 4096)
    primary.write(0, 0, b"new!" * 1024)
    cycle = primary.cut()
    primary.ship(replica, cycle)
    assert replica.apply() == cycle.point_id
    after = replica.fingerprints(0, 0, 16, 4096)
    assert before != after
    replica.close()


def test_next_data_leads_through_the_disk(primary: Primary, replica: VmReplica) -> None:
    content = primary.image()[0]
    position, found = 0, bytearray(len(content))
    while (start := replica.next_data(0, position)) < SIZE:
        assert not any(content[position:start])
        position = min(start + 64 * 1024, SIZE)
        found[start:position] = content[start:position]
    assert bytes(found) == content
    assert replica.next_data(0, SIZE) == SIZE


@pytest.mark.parametrize(
    ("first", "count", "block_bytes"),
    [
        (-1, 1, 4096),
        (0, 0, 4096),
        (0, 1 << 40, 4096),
        (1 << 62, 1, 4096),
        (0, 40_000, 512),
        (0, 1, 0),
        (0, 1, -4096),
        (0, 1, 1000),
        (0, 1, 1 << 30),
        (2305, 1, 4096),
    ],
)
def test_impossible_blocks_are_refused(replica: VmReplica, first: int, count: int, block_bytes: int) -> None:
    with pytest.raises(FieldOutOfRange):
        replica.fingerprints(0, first, count, block_bytes)


def test_unknown_disk_and_empty_replica_are_refused(store: Store, replica: VmReplica) -> None:
    with pytest.raises(NoSuchPoint):
        replica.fingerprints(1, 0, 1, 4096)
    empty = Primary(FakeClock(), [small_disk()], vm="web02", relationship_id=guid(2)).claim(store)
    with pytest.raises(NoSuchPoint):
        empty.fingerprints(0, 0, 1, 4096)
