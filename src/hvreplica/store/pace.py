"""How fast a store is read for damage: a rate, an end, and a way to wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from hvreplica.clock import Clock
    from hvreplica.progress import ProgressCallback

STEP_BYTES_MAX = 64 << 20  # between two looks at whether to go on
_STEP_BYTES_MIN = 1 << 20
_GIVE_WAY_S = 60.0
_LOOK_EVERY_S = 0.1
_STEP_S = 0.25  # at a limited rate


class Stopped(Exception):
    """A verification was told to stop; the next one goes on where it was."""


class Pace:
    """Spends a rate. One thread at a time.

    rate_bytes_s: None for as fast as it goes. wait: sleeps for so many seconds and returns whether to stop.
    give_way: asked between two reads; as long as it says so nothing is read, but for _GIVE_WAY_S at most.
    """

    def __init__(
        self,
        clock: Clock,
        wait: Callable[[float], bool],
        *,
        rate_bytes_s: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        self.progress = progress
        self.give_way: Callable[[], bool] = lambda: False
        self.read_bytes = 0
        self._clock = clock
        self._wait = wait
        self._rate = rate_bytes_s
        self._paid_s = clock.monotonic_s()

    @property
    def step_bytes(self) -> int:
        """How much to read at once."""
        if self._rate is None:
            return STEP_BYTES_MAX
        return min(max(int(self._rate * _STEP_S), _STEP_BYTES_MIN), STEP_BYTES_MAX)

    def spend(self, count: int) -> None:
        """Say that bytes were read, and wait until more may be. Raises: Stopped where it was stopped."""
        self.read_bytes += count
        wait_s = 0.0
        if self._rate is not None:
            now_s = self._clock.monotonic_s()
            # What was not used before is not made up for: the rate is for those who share the disk.
            self._paid_s = max(self._paid_s, now_s - _STEP_S) + count / self._rate
            wait_s = max(self._paid_s - now_s, 0.0)
        self.pause(wait_s)
        for _ in range(int(_GIVE_WAY_S / _LOOK_EVERY_S)):
            if not self.give_way():
                break
            self.pause(_LOOK_EVERY_S)

    def pause(self, wait_s: float) -> None:
        """Wait. Raises: Stopped where it was stopped."""
        if self._wait(wait_s):
            raise Stopped
