"""Sizes, alignment, and the two kinds of offset that must never be mixed."""

from __future__ import annotations

import re
from typing import NewType

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

DiskOffset = NewType("DiskOffset", int)  # bytes from the start of the guest's disk
FileOffset = NewType("FileOffset", int)  # bytes from the start of the file that holds it

_SUFFIXES = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB, "P": 1 << 50}
_SIZE = re.compile(r"(\d+)(?:\.(\d+))?\s*([BKMGTP]?)(?:I?B)?", re.IGNORECASE)
_SECONDS = {"S": 1, "M": 60, "H": 3600, "D": 86_400, "W": 604_800}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([SMHDW])", re.IGNORECASE)
_DIGITS_MAX = 20  # more cannot be a size, and int() of a long digit string is slow


def parse_size(text: str) -> int:
    """Return the bytes that `text` names: "10G", "1.5M", "4096".

    Powers of 1024; "G", "GB" and "GiB" mean the same.

    Raises: ValueError if it is not a size or not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or len(match[1]) > _DIGITS_MAX or len(match[2] or "") > _DIGITS_MAX:
        message = f"{text!r} is not a size; write for example 512, 64K, 2M, 10G or 1.5T"
        raise ValueError(message)
    whole, fraction, suffix = match[1], match[2] or "", match[3].upper()
    numerator = int(whole + fraction) * _SUFFIXES[suffix]
    denominator: int = 10 ** len(fraction)
    value, rest = divmod(numerator, denominator)
    if rest:
        message = f"{text!r} is not a whole number of bytes"
        raise ValueError(message)
    return value


def parse_duration(text: str) -> float:
    """Return the seconds that `text` names: "90s", "15m", "12h", "7d", "2w".

    Raises: ValueError if it is no duration.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None or len(match[1]) > _DIGITS_MAX:
        message = f"{text!r} is not a duration; write for example 90s, 15m, 12h, 7d or 2w"
        raise ValueError(message)
    return float(match[1]) * _SECONDS[match[2].upper()]


def format_size(size_bytes: float) -> str:
    """Return `size_bytes` with a binary unit and at most one decimal, for people."""
    value = float(size_bytes)
    if abs(value) < 1024:
        return f"{value:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if abs(value) < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} PiB"


def align_up(value: int, alignment: int) -> int:
    """Return the smallest multiple of `alignment` that is not below `value`."""
    return -(-value // alignment) * alignment


def align_down(value: int, alignment: int) -> int:
    """Return the largest multiple of `alignment` that is not above `value`."""
    return value // alignment * alignment
