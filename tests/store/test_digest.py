"""The digest of a disk: the same in any pieces, of any size, and known from what a change touched."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hvreplica.disk import create_disk, open_disk
from hvreplica.errors import FieldOutOfRange
from hvreplica.native import PAGE_BYTES, reference
from hvreplica.store import digest as digest_module
from hvreplica.store.digest import Digest, DigestReader, digest_of, pages_of
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hvreplica.disk import Disk

MIB = 1 << 20
SIZE = 9 * MIB - 3 * 512
words = st.integers(0, (1 << 64) - 1)
digests = st.builds(Digest, words, words)


def expected(content: bytes | bytearray) -> Digest:
    return Digest(*reference.page_digest(content, 0))


@contextlib.contextmanager
def filled_disk(content: bytes) -> Iterator[Disk]:
    """Yield an open VHDX that holds `content`, with places only for blocks that are not zeros."""
    files, path = FaultFiles("/d"), Path("/d/disk.vhdx")
    create_disk(
        files, path, virtual_bytes=len(content), format="vhdx", block_bytes=MIB, clock=FakeClock(seed=1)
    )
    with open_disk(files, path, writable=True, format="vhdx", clock=FakeClock(seed=2)) as disk:
        for start in range(0, len(content), 64 << 10):
            piece = content[start : start + (64 << 10)]
            if any(piece):
                disk.write(piece, start)
        disk.flush()
        yield disk


def content_of(rng: random.Random) -> bytearray:
    content = bytearray(SIZE)
    content[MIB + 512 : 3 * MIB] = rng.randbytes(2 * MIB - 512)
    content[5 * MIB : 5 * MIB + 4096] = rng.randbytes(4096)
    content[-1] = 7
    return content


@given(first=digests, second=digests)
@example(first=Digest(), second=Digest(1, 1))
def test_digests_add_subtract_and_are_text(first: Digest, second: Digest) -> None:
    assert (first + second) - second == first
    assert first + (-first) == Digest()
    assert first + second == second + first
    assert Digest.of_hex(first.hex()) == first
    assert len(first.hex()) == 32
    assert bool(first) == (first != Digest())


def test_the_text_of_a_digest_has_its_high_word_first() -> None:
    assert Digest(low=0x1F, high=0xA0 << 56).hex() == "a0" + "00" * 14 + "1f"


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "G" + "0" * 31, "A" + "0" * 31, "0" * 31 + "\n"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(FieldOutOfRange, match="no digest"):
        Digest.of_hex(text)


def test_the_digest_of_a_disk_is_that_of_its_bytes(rng: random.Random) -> None:
    content = content_of(rng)
    with filled_disk(content) as disk:
        assert digest_of(disk) == expected(content)
        reader = DigestReader(disk)
        for _ in range(20):
            cut = rng.randrange(0, SIZE // PAGE_BYTES + 1) * PAGE_BYTES
            assert reader.of_range(0, cut) + reader.of_range(cut, SIZE) == expected(content), cut


def test_only_what_may_hold_data_is_read(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    content = content_of(rng)
    with filled_disk(content) as disk:
        read: list[int] = []
        taken = type(disk).read_extents
        monkeypatch.setattr(
            type(disk),
            "read_extents",
            lambda self, extents, out: (read.append(int(extents[:, 1].sum())), taken(self, extents, out)),
        )
        assert digest_of(disk) == expected(content)
        assert sum(read) <= 4 * MIB


def test_small_windows_change_nothing(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    monkeypatch.setattr(digest_module, "_WINDOW_BYTES", 3 * PAGE_BYTES)
    monkeypatch.setattr(digest_module, "_SEARCH_BYTES", MIB)
    monkeypatch.setattr(digest_module, "_LONG_BYTES", 5 * PAGE_BYTES)
    content = content_of(rng)
    with filled_disk(content) as disk:
        assert digest_of(disk) == expected(content)
        assert DigestReader(disk).of_extents(np.array([[0, SIZE]])) == expected(content)


@given(data=st.data())
def test_a_change_is_the_new_pages_less_the_old_ones(data: st.DataObject) -> None:
    size = 40 * PAGE_BYTES - 512
    offsets = st.integers(0, size // 512 - 1).map(lambda sector: sector * 512)
    rows = data.draw(st.lists(st.tuples(offsets, st.sampled_from([512, 1024, 4096, 9216])), max_size=6))
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))
    before = bytearray(rng.randbytes(size))
    after = bytearray(before)
    for offset, length in rows:
        end = min(offset + length, size)
        after[offset:end] = bytes(end - offset) if rng.random() < 0.3 else rng.randbytes(end - offset)
    extents = np.array(sorted(rows), np.int64).reshape(-1, 2)
    with filled_disk(before) as old, filled_disk(after) as new:
        change = DigestReader(new).of_extents(extents) - DigestReader(old).of_extents(extents)
        assert digest_of(old) + change == digest_of(new) == expected(after)


def test_a_disk_that_grows_keeps_its_digest_and_one_that_shrinks_loses_what_was_cut(
    rng: random.Random,
) -> None:
    content = content_of(rng)
    short = content[: 2 * MIB + 512]
    with filled_disk(content) as whole, filled_disk(short) as cut, filled_disk(short + bytes(MIB)) as grown:
        assert digest_of(cut) == digest_of(grown)
        lost = np.array([[len(short), SIZE - len(short)]])
        change = DigestReader(cut).of_extents(lost) - DigestReader(whole).of_extents(lost)
        assert digest_of(whole) + change == digest_of(cut)


def test_extents_become_whole_pages_once_each() -> None:
    rows = [[512, 512], [4000, 1000], [12288, 0], [20000, 4096], [20480, 512], [40960, 9000], [1 << 40, 5]]
    assert pages_of(np.array(rows, np.uint64), 45000).tolist() == [[0, 8192], [16384, 8192], [40960, 4040]]
    assert pages_of(np.empty((0, 2), np.int64), 45000).tolist() == []
