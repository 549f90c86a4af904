"""Change bytes as damage and malice do, the same way for the same seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

_INTERESTING = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x1000,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    1 << 63,
    (1 << 64) - 1,
)
_HOT_BYTES = 512  # most structures keep their fields near the start


def mutate(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Return `data` after one to six changes; `others` are donors of foreign pieces."""
    changed = bytearray(data)
    for _ in range(min(rng.randint(1, 6), rng.randint(1, 6))):
        rng.choice(_CHANGES)(changed, rng, others)
    return bytes(changed)


def _place(data: bytearray, rng: random.Random) -> int:
    size = len(data)
    return rng.randrange(min(size, _HOT_BYTES) if rng.random() < 0.6 else size) if size else 0


def _flip_bit(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    del others
    if data:
        data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _set_byte(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    del others
    if data:
        data[_place(data, rng)] = rng.randrange(256)


def _set_number(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    """Put an interesting value, or the old one give or take a little, into an aligned field."""
    del others
    width = rng.choice((2, 4, 4, 8, 8))
    at = _place(data, rng) // width * width
    if at + width > len(data):
        return
    bits = 8 * width
    if rng.random() < 0.5:
        value = rng.choice(_INTERESTING) + rng.choice((0, 0, 0, -1, 1))
    else:
        value = int.from_bytes(data[at : at + width], "little") + rng.choice(
            (-4096, -512, -1, 1, 512, 4096, 1 << 20)
        )
    data[at : at + width] = (value % (1 << bits)).to_bytes(width, rng.choice(("little", "little", "big")))


def _cut(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    del others
    if rng.random() < 0.3:
        del data[_place(data, rng) :]


def _erase(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    del others
    at = _place(data, rng)
    count = min(rng.choice((4, 8, 32, 512, 4096)), len(data) - at)
    data[at : at + count] = bytes([rng.choice((0, 0, 0xFF))]) * count


def _remove(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    del others
    at = _place(data, rng)
    del data[at : at + rng.choice((1, 4, 8, 32))]


def _repeat(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    del others
    at = _place(data, rng)
    piece = data[at : at + rng.choice((1, 8, 32, 64))]
    data[at:at] = piece


def _move(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    """Copy a piece over another place: a table row twice, a block of the same file elsewhere."""
    del others
    source, target = _place(data, rng), _place(data, rng)
    piece = data[source : source + rng.choice((4, 8, 32, 4096))]
    data[target : target + len(piece)] = piece[: max(len(data) - target, 0)]


def _splice(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    donor = rng.choice(others) if others else b""
    if donor:
        at = rng.randrange(min(len(donor), len(data)) + 1)
        piece = donor[at : at + rng.choice((8, 32, 4096))]
        data[at : at + len(piece)] = piece


_CHANGES = (
    _flip_bit,
    _set_byte,
    _set_number,
    _set_number,
    _set_number,
    _cut,
    _erase,
    _remove,
    _repeat,
    _move,
    _splice,
)
