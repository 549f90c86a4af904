"""A Clock that only moves when told, with GUIDs and random bytes that repeat per seed."""

from __future__ import annotations

import random
import threading
import uuid


class FakeClock:
    """Thread-safe. Time stands still but for `tick_s` added at each reading, and advance()."""

    def __init__(self, *, now_s: float = 1_735_689_600.0, tick_s: float = 0.0, seed: int = 0) -> None:
        self._lock = threading.Lock()
        self._now_s = now_s
        self._monotonic_s = 1000.0
        self._tick_s = tick_s
        self._random = random.Random(seed)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        with self._lock:
            self._now_s += seconds
            self._monotonic_s += seconds

    def set_now(self, now_s: float) -> None:
        """Set the wall clock alone, backwards too, as an administrator may; durations do not notice."""
        with self._lock:
            self._now_s = now_s

    def now_s(self) -> float:
        """Return Unix time in seconds."""
        with self._lock:
            self._now_s += self._tick_s
            self._monotonic_s += self._tick_s
            return self._now_s

    def monotonic_s(self) -> float:
        """Return a time that never runs backwards."""
        with self._lock:
            self._now_s += self._tick_s
            self._monotonic_s += self._tick_s
            return self._monotonic_s

    def guid(self) -> uuid.UUID:
        """Return the next GUID of the seed, a valid version 4 one."""
        return uuid.UUID(bytes=self.random_bytes(16), version=4)

    def random_bytes(self, count: int) -> bytes:
        """Return the next bytes of the seed."""
        with self._lock:
            return self._random.randbytes(count)
