"""The only source of time, GUIDs and randomness, so that a test can hold them.

Layers below replication take a Clock as an argument; SYSTEM is the real one.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import UTC, datetime
from typing import Protocol

HRL_EPOCH_S = 946_684_800  # 2000-01-01 00:00:00 UTC, the epoch of [MS-HRL] 2.2 and of VHD, in Unix seconds


class Clock(Protocol):
    """What the code may know of the world outside its files."""

    def now_s(self) -> float:
        """Return Unix time in seconds."""
        ...

    def monotonic_s(self) -> float:
        """Return a time in seconds that never runs backwards, for durations."""
        ...

    def guid(self) -> uuid.UUID:
        """Return a new random GUID, never the nil one."""
        ...

    def random_bytes(self, count: int) -> bytes:
        """Return `count` bytes fit for secrets."""
        ...


class SystemClock:
    """The machine's own clock and randomness."""

    def now_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()

    def guid(self) -> uuid.UUID:
        return uuid.uuid4()

    def random_bytes(self, count: int) -> bytes:
        return os.urandom(count)


SYSTEM: Clock = SystemClock()


def hrl_timestamp(unix_s: float) -> int:
    """Return the seconds since 2000-01-01 UTC, held within the 32 bits of the format. Spec: [MS-HRL] 2.2."""
    return min(max(int(unix_s) - HRL_EPOCH_S, 0), 0xFFFFFFFF)


def parse_iso(text: str) -> float:
    """Return the Unix seconds of an ISO 8601 time with its zone. Raises: ValueError, also without a zone."""
    moment = datetime.fromisoformat(text.strip())
    if moment.tzinfo is None:
        message = f"{text!r} does not say its zone; write Z behind it for UTC"
        raise ValueError(message)
    return moment.timestamp()


def iso_time(unix_s: float) -> str:
    """Return `unix_s` as ISO 8601 in UTC with milliseconds, for people and JSON."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def exact_time(unix_s: float) -> str:
    """Return `unix_s` as ISO 8601 in UTC with microseconds."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def instant_time(unix_s: float) -> str:
    """Return an instant as verbs take it: whole seconds, or, where it has parts of one, that very moment."""
    moment = datetime.fromtimestamp(unix_s, UTC)
    return moment.isoformat(timespec="microseconds" if moment.microsecond else "seconds").replace(
        "+00:00", "Z"
    )
