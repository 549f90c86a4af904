"""Change bytes as damage and malice do, the same way for the same seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

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


def mutate(data: bytes, rng: random.Random, others: list[bytes], hot: Sequence[int] = (0,)) -> bytes:
    """Return `data` after one to six changes.

    others: donors of foreign pieces. hot: where structures begin, near which most changes fall.
    """
    changed = bytearray(data)
    for _ in range(min(rng.randint(1, 6), rng.randint(1, 6))):
        start = min(rng.choice(hot), len(changed))
        width = min(_HOT_BYTES, len(changed) - start) if rng.random() < 0.7 else len(changed) - start
        place = _Place(start, max(width, 1), rng)
        rng.choice(_CHANGES)(changed, place, others)
    return bytes(changed)


class _Place:
    """Where one change may fall, and the randomness for it."""

    def __init__(self, start: int, width: int, rng: random.Random) -> None:
        self._start = start
        self._width = width
        self.rng = rng

    def draw(self) -> int:
        """Return an offset; the first bytes of a structure more often than the rest."""
        return self._start + int(self._width * self.rng.random() ** 2)


def _flip_bit(data: bytearray, place: _Place, others: list[bytes]) -> None:
    del others
    at = place.draw()
    if at < len(data):
        data[at] ^= 1 << place.rng.randrange(8)


def _set_byte(data: bytearray, place: _Place, others: list[bytes]) -> None:
    del others
    at = place.draw()
    if at < len(data):
        data[at] = place.rng.randrange(256)


def _set_number(data: bytearray, place: _Place, others: list[bytes]) -> None:
    """Put an interesting value, or the old one give or take a little, into an aligned field."""
    del others
    width = place.rng.choice((2, 4, 4, 8, 8))
    at = place.draw() // width * width
    if at + width > len(data):
        return
    bits = 8 * width
    if place.rng.random() < 0.5:
        value = place.rng.choice(_INTERESTING) + place.rng.choice((0, 0, 0, -1, 1))
    else:
        value = int.from_bytes(data[at : at + width], "little") + place.rng.choice(
            (-4096, -512, -1, 1, 512, 4096, 1 << 20)
        )
    data[at : at + width] = (value % (1 << bits)).to_bytes(
        width, place.rng.choice(("little", "little", "big"))
    )


def _cut(data: bytearray, place: _Place, others: list[bytes]) -> None:
    del others
    if place.rng.random() < 0.3:
        del data[place.draw() :]


def _erase(data: bytearray, place: _Place, others: list[bytes]) -> None:
    del others
    at = place.draw()
    count = max(min(place.rng.choice((4, 8, 32, 512, 4096)), len(data) - at), 0)
    data[at : at + count] = bytes([place.rng.choice((0, 0, 0xFF))]) * count


def _remove(data: bytearray, place: _Place, others: list[bytes]) -> None:
    del others
    at = place.draw()
    del data[at : at + place.rng.choice((1, 4, 8, 32))]


def _repeat(data: bytearray, place: _Place, others: list[bytes]) -> None:
    del others
    at = place.draw()
    piece = data[at : at + place.rng.choice((1, 8, 32, 64))]
    data[at:at] = piece


def _move(data: bytearray, place: _Place, others: list[bytes]) -> None:
    """Copy a piece over another place: a table row twice, a block of the same file elsewhere."""
    del others
    source, target = place.draw(), place.draw()
    piece = data[source : source + place.rng.choice((4, 8, 32, 4096))]
    data[target : target + len(piece)] = piece[: max(len(data) - target, 0)]


def _splice(data: bytearray, place: _Place, others: list[bytes]) -> None:
    donor = place.rng.choice(others) if others else b""
    if donor:
        at = min(place.draw(), len(donor))
        piece = donor[at : at + place.rng.choice((8, 32, 4096))]
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
