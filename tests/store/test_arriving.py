"""Digests that are known when a first copy is: those of its bytes, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.native import PAGE_BYTES
from hvreplica.store.arriving import ArrivingDigests
from hvreplica.store.digest import Digest
from tests.store.world import data_extents

if TYPE_CHECKING:
    import random

MIB = 1 << 20


def add_windows(digests: ArrivingDigests, content: bytes, window_bytes: int, rng: random.Random) -> None:
    starts = list(range(0, len(content), window_bytes))
    rng.shuffle(starts)
    for start in starts:
        digests.add(0, *data_extents(content[start : start + window_bytes], start))


@pytest.mark.parametrize("window_bytes", [PAGE_BYTES, 256 << 10, MIB])
def test_windows_in_any_order_give_the_digest(window_bytes: int, rng: random.Random) -> None:
    content = bytearray(2 * MIB + 1536)
    content[MIB - 5000 : MIB + 90_000] = rng.randbytes(95_000)
    content[-700:] = rng.randbytes(700)
    digests = ArrivingDigests([0, 1])
    add_windows(digests, content, window_bytes, rng)
    whole = np.array([[0, len(content)]])
    assert digests.result() == {0: Digest.of_extents(content, whole), 1: Digest()}


@pytest.mark.parametrize("rows", [[[512, 512]], [[0, 512], [4096, 512]], [[0, 4096], [4608, 512]]])
def test_pages_in_pieces_are_not_known(rows: list[list[int]]) -> None:
    digests = ArrivingDigests([0])
    table = np.array(rows, np.int64)
    digests.add(0, table, bytes(int(table[:, 1].sum())))
    assert digests.result() == {}
    digests.add(0, np.array([[8192, 4096]], np.int64), bytes(4096))
    assert digests.result() == {}
