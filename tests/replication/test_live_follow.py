"""Fingerprints that follow a log of a guest's own writes: right, or said to be not known; never wrong."""

from __future__ import annotations

import random
import uuid
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica import native
from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.formats.fingerprint import UNKNOWN
from hvreplica.hrl import LogWriter
from hvreplica.replication import follow
from hvreplica.replication.follow import follow_log
from hvreplica.tracking.fingerprints import BLOCK_BYTES, FingerprintTable

if TYPE_CHECKING:
    from pathlib import Path

DISK_BYTES = 3 * (1 << 20) + 1024  # its last block is short


@pytest.mark.parametrize("form", ["blocks", "sectors", "mixed"])
def test_table_follows_any_log(tmp_path: Path, seed: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(f"{form} {seed}")
    monkeypatch.setattr(follow, "_GAP_BLOCKS", 3)
    monkeypatch.setattr(follow, "_TABLE_WINDOW_BLOCKS", 64)
    monkeypatch.setattr(follow, "_ROWS_MAX", 50)
    model = bytearray(DISK_BYTES)
    table = FingerprintTable.create(OS_FILES, tmp_path / "0.fp", disk_index=0, virtual_bytes=DISK_BYTES)
    unknown: set[int] = set()
    for number in range(6):
        path = tmp_path / f"{number}.hrl"
        with LogWriter.create(
            OS_FILES, path, log_id=uuid.uuid4(), previous_log_id=None, data_write_guid=None, clock=SYSTEM
        ) as writer:
            for _ in range(rng.randrange(1, 400)):
                start, end = extent(rng, form)
                data = bytes(end - start) if rng.random() < 0.2 else rng.randbytes(end - start)
                if rng.random() < 0.1:
                    data = bytes(end - start)
                    writer.append_zeroes(start, end - start)
                else:
                    writer.append(np.array([[start, end - start]], np.int64), data)
                model[start:end] = data
                follow_model(unknown, start, end)
        for _ in range(2):  # done again it gives the same
            follow_log(OS_FILES, path, table)
        held = table.read(0, table.header.block_count)
        real = native.fingerprints(np.frombuffer(bytes(model), np.uint8), BLOCK_BYTES)
        for block in range(len(real)):
            expected = UNKNOWN if block in unknown else real[block].tobytes()
            assert held[block].tobytes() == expected, f"block {block} after log {number}, seed {seed}"
    assert bool(unknown) == (form != "blocks")
    table.close()


def extent(rng: random.Random, form: str) -> tuple[int, int]:
    unit = BLOCK_BYTES if form == "blocks" or (form == "mixed" and rng.random() < 0.5) else 512
    start = rng.randrange(DISK_BYTES // unit + (DISK_BYTES % unit > 0)) * unit
    return start, min(start + rng.choice([1, 1, 2, 3, 40]) * unit, DISK_BYTES)


def follow_model(unknown: set[int], start: int, end: int) -> None:
    for block in range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
        first, last = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, DISK_BYTES)
        if start <= first and end >= last:
            unknown.discard(block)
        else:
            unknown.add(block)


def test_table_of_a_sparse_disk_stays_sparse(tmp_path: Path) -> None:
    table = FingerprintTable.create(OS_FILES, tmp_path / "0.fp", disk_index=0, virtual_bytes=1 << 40)
    path = tmp_path / "a.hrl"
    with LogWriter.create(
        OS_FILES, path, log_id=uuid.uuid4(), previous_log_id=None, data_write_guid=None, clock=SYSTEM
    ) as writer:
        for number in range(50):
            writer.append(np.array([[number << 33, 4096]], np.int64), b"x" * 4096)
    follow_log(OS_FILES, path, table)
    table.close()
    assert (tmp_path / "0.fp").stat().st_blocks * 512 < 1 << 20
