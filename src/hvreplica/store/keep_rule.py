"""The rule that says which recovery points are kept: its text and its value.

    last 12, hourly 24, daily 7, weekly 4, app-consistent 3

Parts in any order, separated by commas, each word once. What they mean is said in store/retention.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hvreplica.errors import FieldOutOfRange

KEEP_MAX = 100_000  # points of one kind: beyond a year of points every five minutes
_WORDS = ("last", "hourly", "daily", "weekly", "app-consistent")
_SHAPE = f"{', '.join(f'{word} N' for word in _WORDS)}, or some of these"
_EXAMPLE = 'write for example "last 12, hourly 24, daily 7"'
_PART = re.compile(r"\s*([a-z]+(?:-[a-z]+)*)\s+([0-9]+)\s*")
_DIGITS_MAX = len(str(KEEP_MAX))  # int() of a long digit string is slow
_TEXT_CHARS_MAX = 255


@dataclass(frozen=True, slots=True)
class KeepRule:
    """How many points each part of the rule keeps; 0 where it does not name the part."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    app_consistent: int = 0

    def __str__(self) -> str:
        """Return the text that parse_keep_rule() reads back; "last 0" for a rule of nothing."""
        counts = (self.last, self.hourly, self.daily, self.weekly, self.app_consistent)
        parts = [f"{word} {count}" for word, count in zip(_WORDS, counts, strict=True) if count]
        return ", ".join(parts) or "last 0"


def parse_keep_rule(text: str) -> KeepRule:
    """Return the rule that `text` says.

    Raises: FieldOutOfRange, with the offset of the character where the text stops being a rule.
    """
    if len(text) > _TEXT_CHARS_MAX:
        raise _wrong("the rule is too long", 0, f"at most {_TEXT_CHARS_MAX} characters", str(len(text)))
    counts: dict[str, int] = {}
    start = 0
    for part in text.split(","):
        word, count = _parse_part(part, start)
        if word in counts:
            raise _wrong(f"the rule says {word!r} twice", start, "each word once", part.strip())
        counts[word] = count
        start += len(part) + 1
    return KeepRule(**{word.replace("-", "_"): count for word, count in counts.items()})


def _parse_part(part: str, start: int) -> tuple[str, int]:
    match = _PART.fullmatch(part)
    if match is None:
        raise _wrong(
            "this part of the rule is not a word and a number", start, _SHAPE, part.strip() or "nothing"
        )
    word, digits = match[1], match[2]
    if word not in _WORDS:
        raise _wrong(
            "the rule has an unknown word", start + match.start(1), f"one of {', '.join(_WORDS)}", word
        )
    if len(digits) > _DIGITS_MAX or int(digits) > KEEP_MAX:
        raise _wrong(
            f"the rule keeps too many points of the kind {word!r}",
            start + match.start(2),
            f"0 to {KEEP_MAX}",
            digits,
        )
    return word, int(digits)


def _wrong(message: str, offset: int, expected: str, actual: str) -> FieldOutOfRange:
    return FieldOutOfRange(
        message, offset=offset, field="keep", expected=expected, actual=actual, hint=_EXAMPLE
    )
