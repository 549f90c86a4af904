"""Bugs that are planted so that a run which would find nothing is not believed."""

from __future__ import annotations

from tests.fuzz.registry import Fuzzer


def canary() -> Fuzzer:
    """Return a fuzzer with a bug of the kind that mutation of seeds must find: a length that is trusted."""

    def target(data: bytes) -> None:
        if data[:4] == b"CANA" and len(data) >= 16:
            length = int.from_bytes(data[8:12], "little")
            _ = data[12 + length - 1] if length < 1 << 16 else 0

    return Fuzzer("canary", lambda: [b"CANARY..\x04\0\0\0data", bytes(32)], target)


def guided_canary() -> Fuzzer:
    """Return a fuzzer whose bug lies behind eight bytes, each compared alone and in disguise.

    Chance needs 2**64 rounds; whoever keeps each input that came one comparison further needs thousands.
    """
    return Fuzzer("guided_canary", lambda: [bytes(8)], _nested)


def _nested(data: bytes) -> None:
    if len(data) < 8:
        return
    # Each comparison is a branch of its own, so that coverage tells them apart.
    if _disguised(data[0]) != 0x5E:
        return
    if _disguised(data[1]) != 0xC2:
        return
    if _disguised(data[2]) != 0x17:
        return
    if _disguised(data[3]) != 0x8B:
        return
    _deeper(data)


def _deeper(data: bytes) -> None:
    if _disguised(data[4]) != 0x3D:
        return
    if _disguised(data[5]) != 0xF0:
        return
    if _disguised(data[6]) != 0x99:
        return
    if _disguised(data[7]) == 0x24:
        raise IndexError("the planted bug")


def _disguised(octet: int) -> int:
    """Return another byte for each: a comparison must not tell the fuzzer what to write."""
    return (octet * 167 + 13) & 0xFF
