"""Every variant of every kernel gives the reference's answer, on vectors of others and around every vector width."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hvreplica import native
from hvreplica.native import reference

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from hvreplica.native.kernels import Kernels

per_variant = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

# Around each width of the kernels: words, vectors of 16 to 64 bytes, unrolled steps, CRC stretches, XXH3's branches.
EDGES = sorted(
    {
        size + step
        for size in (8, 16, 32, 64, 128, 240, 256, 512, 768, 1024, 2048, 4096, 6144, 8192)
        for step in (-1, 0, 1)
    }
    | {0, 1, 2, 3, 4, 5, 6, 9, 12, 13, 97, 100, 6144 + 768, 3 * 6144 + 5 * 768 + 13, 65_537}
)
sparse_bytes = st.lists(
    st.one_of(
        st.integers(0, 700).map(bytes),
        st.binary(min_size=1, max_size=40),
        st.integers(0, 300).map(lambda n: b"\xff" * n),
    ),
    max_size=12,
).map(b"".join)
grains = st.sampled_from([1, 2, 7, 8, 16, 64, 100, 512, 4096])


def noise(rng: random.Random, length: int) -> bytes:
    return rng.randbytes(length)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (
            bytes.fromhex(
                "01c00000" + "00" * 12 + "14000000" + "00000400" + "00000014" + "00000018" + "28" + "00" * 7
            )
            + bytes.fromhex("02" + "00" * 7),
            0xD9963A56,
        ),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_crc32c_of_rfc_3720_vectors_is_theirs(kernels: Kernels, data: bytes, expected: int) -> None:
    # B.4 of RFC 3720 prints the CRC as it goes on the wire, least significant byte first.
    assert kernels.crc32c(data) == expected
    assert reference.crc32c(data) == expected


def test_crc32c_at_every_edge_and_alignment_equals_the_reference(
    kernels: Kernels, rng: random.Random
) -> None:
    data = noise(rng, max(EDGES) + 64)
    for length in EDGES:
        for start in (0, 1, 7, 33):
            piece = memoryview(data)[start : start + length]
            assert kernels.crc32c(piece) == reference.crc32c(piece), (start, length)


def test_crc32c_in_pieces_equals_crc32c_at_once(kernels: Kernels, rng: random.Random) -> None:
    data = noise(rng, 20_000)
    for cut in EDGES[:-2]:
        assert kernels.crc32c(data[cut:], kernels.crc32c(data[:cut])) == kernels.crc32c(data), cut
    assert kernels.crc32c(data[:500], 0xFFFFFFFF) == reference.crc32c(data[:500], 0xFFFFFFFF)


def test_crc32c_refuses_a_value_beyond_32_bits(kernels: Kernels) -> None:
    with pytest.raises(OverflowError):
        kernels.crc32c(b"x", 1 << 32)


def test_byte_sum_at_every_edge_equals_the_reference(kernels: Kernels, rng: random.Random) -> None:
    data = noise(rng, max(EDGES) + 64)
    for length in EDGES:
        piece = memoryview(data)[3 : 3 + length]
        assert kernels.byte_sum(piece) == reference.byte_sum(piece), length
        assert kernels.byte_sum(b"\xff" * length) == 255 * length, length


def test_byte_sum_wraps_at_32_bits(kernels: Kernels) -> None:
    length = (1 << 32) // 255 + 1000
    assert kernels.byte_sum(np.full(length, 255, np.uint8)) == 255 * length - (1 << 32)


@per_variant
@given(lengths=st.lists(st.integers(0, 300), max_size=20), first=st.integers(0, 255))
def test_byte_sums_equal_the_sum_of_each_piece(kernels: Kernels, lengths: list[int], first: int) -> None:
    data = bytes((first + 7 * index) % 256 for index in range(sum(lengths)))
    sums = kernels.byte_sums(data, np.array(lengths, np.int64))
    assert sums.dtype == np.uint32
    assert sums.tolist() == reference.byte_sums(data, np.array(lengths, np.int64)).tolist()


@pytest.mark.parametrize("lengths", [[3, 3], [3, 5], [], [-1, 8], [1 << 63, 1 << 63, 7]])
def test_byte_sums_refuse_lengths_that_do_not_add_up(kernels: Kernels, lengths: list[int]) -> None:
    array = np.array(lengths, np.int64 if min(lengths, default=0) < 0 else np.uint64)
    with pytest.raises(ValueError, match="add up"):
        kernels.byte_sums(bytes(7), array)


def test_fingerprints_of_all_lengths_to_5000_are_those_of_xxhash(
    kernels: Kernels, rng: random.Random
) -> None:
    data = noise(rng, 5001)
    for length in range(1, 5001):
        start = length % 2
        block = data[start : start + length]
        assert kernels.fingerprints(block, length).tobytes() == xxhash.xxh3_128_digest(block), length


def test_fingerprints_of_big_blocks_are_those_of_xxhash(kernels: Kernels, rng: random.Random) -> None:
    data = noise(rng, 3_000_001)
    for _ in range(40):
        start, length = rng.randrange(1000), rng.randrange(5000, 2_999_000)
        block = memoryview(data)[start : start + length]
        assert kernels.fingerprints(block, length).tobytes() == xxhash.xxh3_128_digest(block), (start, length)


@per_variant
@given(data=sparse_bytes, block_bytes=st.sampled_from([1, 3, 16, 64, 250, 512, 4096]))
@example(data=bytes(5000), block_bytes=4096)
def test_fingerprints_equal_the_reference(kernels: Kernels, data: bytes, block_bytes: int) -> None:
    rows = kernels.fingerprints(data, block_bytes)
    assert rows.shape == (-(-len(data) // block_bytes), 16)
    assert (rows == reference.fingerprints(data, block_bytes)).all()
    out = np.full_like(rows, 0xEE)
    assert kernels.fingerprints(data, block_bytes, out=out) is out
    assert (out == rows).all()


def test_fingerprints_of_zeros_are_zero_and_of_one_bit_are_not(kernels: Kernels) -> None:
    block = bytearray(8192)
    assert not kernels.fingerprints(block, 4096).any()
    block[-1] = 0x80
    rows = kernels.fingerprints(block, 4096)
    assert not rows[0].any()
    assert rows[1].any()


@pytest.mark.parametrize(
    "out",
    [
        np.empty((2, 16), np.uint8),
        np.empty((3, 15), np.uint8),
        np.empty((3, 16), np.int8),
        np.empty((3, 32), np.uint8)[:, ::2],
    ],
)
def test_fingerprints_refuse_an_unfit_target(kernels: Kernels, out: np.ndarray) -> None:
    with pytest.raises(ValueError, match="shape"):
        kernels.fingerprints(bytes(12), 4, out=out)


def test_is_zero_sees_one_bit_anywhere(kernels: Kernels) -> None:
    for length in EDGES[:-4]:
        block = bytearray(length)
        assert kernels.is_zero(block)
        for place in {0, 1, length // 2, length - 2, length - 1} & set(range(length)):
            block[place] = 1 << (place % 8)
            assert not kernels.is_zero(block), (length, place)
            block[place] = 0


@per_variant
@given(data=sparse_bytes, grain_bytes=grains)
@example(data=bytes(4096) + b"a" * 5000, grain_bytes=4096)
def test_data_runs_equal_the_reference(kernels: Kernels, data: bytes, grain_bytes: int) -> None:
    runs = kernels.data_runs(data, grain_bytes)
    assert runs.dtype == np.int64
    assert runs.tolist() == reference.data_runs(data, grain_bytes).tolist()


def test_data_runs_of_alternating_grains_has_room_for_each(kernels: Kernels) -> None:
    for count in (1, 2, 3, 1000, 1001):
        data = b"a\0" * count
        assert len(kernels.data_runs(data, 1)) == count
        assert len(kernels.data_runs(data[:-1], 1)) == count


def test_first_difference_finds_every_place(kernels: Kernels, rng: random.Random) -> None:
    for length in EDGES[:-4]:
        first = bytearray(noise(rng, length))
        second = bytearray(first)
        assert kernels.first_difference(first, second) == -1
        for place in {0, 1, 63, length // 2, length - 2, length - 1} & set(range(length)):
            second[place] ^= 0x10
            assert kernels.first_difference(first, second) == place, (length, place)
            second[place] ^= 0x10


@per_variant
@given(data=sparse_bytes, flips=st.lists(st.integers(0, 1 << 20), max_size=8), grain_bytes=grains)
def test_changed_runs_equal_the_reference(
    kernels: Kernels, data: bytes, flips: list[int], grain_bytes: int
) -> None:
    other = bytearray(data)
    for flip in flips:
        if other:
            other[flip % len(other)] ^= 1 + flip % 255
    assert kernels.changed_runs(data, other, grain_bytes).tolist() == (
        reference.changed_runs(data, other, grain_bytes).tolist()
    )
    assert kernels.first_difference(data, other) == reference.first_difference(data, other)


@pytest.mark.parametrize("call", ["first_difference", "changed_runs", "bitmap_merge"])
def test_two_buffers_of_unequal_length_are_refused(kernels: Kernels, call: str) -> None:
    arguments = (bytearray(8), bytes(9)) + ((4,) if call == "changed_runs" else ())
    for side in (kernels, reference):
        with pytest.raises(ValueError, match="equal length"):
            getattr(side, call)(*arguments)


@pytest.mark.parametrize("size", [0, -1])
def test_grains_and_blocks_must_have_a_size(kernels: Kernels, size: int) -> None:
    calls: list[Callable[[], object]] = [
        lambda: kernels.data_runs(bytes(8), size),
        lambda: kernels.changed_runs(bytes(8), bytes(8), size),
        lambda: kernels.fingerprints(bytes(8), size),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="above 0"):
            call()


bitmaps = st.lists(
    st.one_of(
        st.integers(0, 90).map(bytes),
        st.integers(0, 90).map(lambda n: b"\xff" * n),
        st.binary(min_size=1, max_size=20),
    ),
    min_size=1,
    max_size=8,
).map(b"".join)


@per_variant
@given(bitmap=bitmaps, cut=st.integers(0, 70))
@example(bitmap=b"\xff" * 64, cut=0)
@example(bitmap=b"\xff" * 64 + bytes(8), cut=63)
@example(bitmap=bytes(200) + b"\x80", cut=0)
def test_bitmap_runs_equal_the_reference(kernels: Kernels, bitmap: bytes, cut: int) -> None:
    bit_count = max(len(bitmap) * 8 - cut, 0)
    runs = kernels.bitmap_runs(bitmap, bit_count)
    assert runs.dtype == np.int64
    assert runs.tolist() == reference.bitmap_runs(bitmap, bit_count).tolist()
    assert kernels.bitmap_count(bitmap) == reference.bitmap_count(bitmap)


def test_bitmap_runs_beyond_one_batch_are_all_there(kernels: Kernels) -> None:
    for byte, per_byte in ((0x55, 4), (0xAA, 4), (0x81, 1)):
        bitmap = bytes([byte]) * 5000
        runs = kernels.bitmap_runs(bitmap, len(bitmap) * 8)
        assert runs.tolist() == reference.bitmap_runs(bitmap, len(bitmap) * 8).tolist()
        assert len(runs) >= 5000 * per_byte


@per_variant
@given(
    bitmap=bitmaps,
    first=st.integers(0, 2000),
    count=st.integers(0, 2000),
    name=st.sampled_from(["bitmap_set", "bitmap_clear"]),
)
def test_bitmap_set_and_clear_equal_the_reference(
    kernels: Kernels, bitmap: bytes, first: int, count: int, name: str
) -> None:
    mine, theirs = bytearray(bitmap), bytearray(bitmap)
    if first + count > len(bitmap) * 8:
        for side in (kernels, reference):
            with pytest.raises(IndexError):
                getattr(side, name)(mine, first, count)
        assert mine == bitmap
    else:
        getattr(kernels, name)(mine, first, count)
        getattr(reference, name)(theirs, first, count)
        assert mine == theirs


@pytest.mark.parametrize(
    ("first", "count"), [(-1, 1), (0, -1), (0, 65), (64, 1), (65, 0), (1 << 64, 1), (1, 1 << 64)]
)
def test_bitmap_change_outside_is_an_error_and_changes_nothing(
    kernels: Kernels, first: int, count: int
) -> None:
    bitmap = bytearray(b"\x0f" * 8)
    for side in (kernels, reference):
        for name in ("bitmap_set", "bitmap_clear"):
            with pytest.raises(IndexError):
                getattr(side, name)(bitmap, first, count)
    assert bitmap == b"\x0f" * 8


@pytest.mark.parametrize("bit_count", [-1, 65, 1 << 64])
def test_bitmap_runs_outside_are_an_error(kernels: Kernels, bit_count: int) -> None:
    for side in (kernels, reference):
        with pytest.raises(IndexError):
            side.bitmap_runs(bytes(8), bit_count)


def test_bitmap_merge_and_count_at_every_edge_equal_the_reference(
    kernels: Kernels, rng: random.Random
) -> None:
    for length in EDGES[:-2]:
        target, other = bytearray(noise(rng, length)), noise(rng, length)
        expected = bytearray(target)
        kernels.bitmap_merge(target, other)
        reference.bitmap_merge(expected, other)
        assert target == expected, length
        assert kernels.bitmap_count(target) == reference.bitmap_count(target), length


def test_kernels_write_only_into_writable_buffers(kernels: Kernels) -> None:
    with pytest.raises(BufferError):
        kernels.bitmap_set(bytes(8), 0, 1)
    with pytest.raises(BufferError):
        kernels.bitmap_merge(bytes(8), bytes(8))


def test_buffers_may_be_arrays_of_any_type_but_must_be_contiguous(kernels: Kernels) -> None:
    words = np.arange(100, dtype=np.uint64)
    assert kernels.crc32c(words) == kernels.crc32c(words.tobytes())
    with pytest.raises(ValueError, match="contiguous"):
        kernels.crc32c(words[::2])


def test_module_functions_are_those_of_the_chosen_variant() -> None:
    assert native.kernel_variant() in native.available_variants()
    assert native.available_variants()[0] == "scalar"
    assert native.crc32c(b"123456789") == 0xE3069283
    assert all(hasattr(native, name) for name in native.__all__)
