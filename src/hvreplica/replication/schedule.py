"""When the next cycle begins: pure, over a time in seconds that never runs backwards.

due ── begin ── end       in time: the next one is due one interval after this one was
                end late  every time at which one was due meanwhile is missed, the next begins at once
                error     again after 1, 2, 4, 8, 10 minutes, then every 30; what is due meanwhile is missed
                          (back to back: after 1, 2, 4, 8, 15, 30 seconds, then every minute)
                no room   at the replica: again every minute (back to back: every half a minute), for room
                          comes back without a sign
                fatal     never, until somebody resumes
"""

from __future__ import annotations

CONTINUOUS_PAUSE_S = 0.2  # between the beginnings of two cycles, where no interval is set
RETRY_AFTER_S = (60.0, 120.0, 240.0, 480.0, 600.0)
RETRY_EVERY_S = 1800.0
# Where a point is meant to be a second old, a line that blinked must not cost a minute.
CONTINUOUS_RETRY_AFTER_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
CONTINUOUS_RETRY_EVERY_S = 60.0
ROOM_RETRY_S = 60.0
CONTINUOUS_ROOM_RETRY_S = 30.0


class Schedule:
    """One VM's cycles. begin() and then end() or fail() for each. interval_s: None for back to back."""

    def __init__(self, interval_s: float | None, *, now_s: float) -> None:
        """Begin with a cycle that is due now."""
        self._interval_s = interval_s
        self._due_s = now_s
        self._retry_s: float | None = None
        self._failure_count = 0
        self.is_stopped = False

    @property
    def start_s(self) -> float:
        """When the next cycle begins."""
        return self._due_s if self._retry_s is None else self._retry_s

    @property
    def is_failing(self) -> bool:
        """Whether the last cycle failed."""
        return self._failure_count > 0

    def begin(self, now_s: float) -> int:
        """Begin a cycle; return how many were missed while an error was waited out."""
        if self._interval_s is None:
            self._due_s = now_s
            return 0
        count = max(int((now_s - self._due_s) // self._interval_s), 0)
        self._due_s += count * self._interval_s
        self._due_s = min(self._due_s, now_s)  # a retry may come before its time: the next one counts from it
        return count

    def end(self, now_s: float) -> int:
        """Take note that the cycle ended well; return how many were missed while it ran."""
        self._failure_count, self._retry_s, self.is_stopped = 0, None, False
        count = self._advance(now_s)
        if count:
            self._due_s = now_s
        return count

    def fail(self, now_s: float, *, is_fatal: bool, waits_for_room: bool = False) -> int:
        """Take note that the cycle failed; return how many were missed while it ran."""
        self.is_stopped = is_fatal
        self._retry_s = now_s + self._wait_s(waits_for_room=waits_for_room)
        self._failure_count = 1 if waits_for_room else self._failure_count + 1
        return self._advance(now_s)

    def resume(self, now_s: float) -> None:
        """Forget what went wrong; the next cycle is due now, and none was missed."""
        self._failure_count, self._retry_s, self.is_stopped = 0, None, False
        self._due_s = now_s

    def _wait_s(self, *, waits_for_room: bool) -> float:
        is_continuous = self._interval_s is None
        if waits_for_room:
            return CONTINUOUS_ROOM_RETRY_S if is_continuous else ROOM_RETRY_S
        ladder: tuple[float, ...] = CONTINUOUS_RETRY_AFTER_S if is_continuous else RETRY_AFTER_S
        every_s = CONTINUOUS_RETRY_EVERY_S if is_continuous else RETRY_EVERY_S
        return ladder[self._failure_count] if self._failure_count < len(ladder) else every_s

    def _advance(self, now_s: float) -> int:
        if self._interval_s is None:
            self._due_s = max(now_s, self._due_s + CONTINUOUS_PAUSE_S)
            return 0
        count = int((now_s - self._due_s) // self._interval_s)
        self._due_s += (count + 1) * self._interval_s
        return count
