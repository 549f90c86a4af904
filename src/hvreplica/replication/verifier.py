"""Read a served store again on a schedule, one VM at a time, and log what is damaged.

A VM is due when one of its disks was last read longer ago than the interval. What was cut, by the end of the
server or of its host, is gone on with. A VM that cannot be read now is tried again later.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from hvreplica.errors import HvReplicaError
from hvreplica.store.pace import Pace, Stopped

if TYPE_CHECKING:
    from hvreplica.clock import Clock
    from hvreplica.store import Store, VmVerdict

_LOG = logging.getLogger("hvreplica.verify")
_LOOK_EVERY_S = 60.0  # for VMs that came
_RETRY_AFTER_S = 3600.0


class Verifier:
    """start() once, close() at the end, from one thread."""

    def __init__(self, store: Store, *, every_s: float, rate_bytes_s: int | None, clock: Clock) -> None:
        self._store = store
        self._every_s = every_s
        self._rate_bytes_s = rate_bytes_s
        self._clock = clock
        self._stop = threading.Event()
        self._tried_s: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="verify", daemon=True)

    def start(self) -> None:
        """Begin with what is due."""
        self._thread.start()

    def close(self) -> None:
        """Stop soon, and wait for that; what was being read is gone on with by the next one."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def next_due(self) -> tuple[float, str] | None:
        """Return when the next VM is due, in Unix seconds, and which; None where there is no VM."""
        due = [
            (max(ended_s + self._every_s, self._tried_s.get(vm, 0.0)), vm)
            for vm, ended_s in self._store.verified_s().items()
        ]
        return min(due, default=None)

    def _run(self) -> None:
        while not self._stop.is_set():
            due = self.next_due()
            wait_s = _LOOK_EVERY_S if due is None else min(due[0] - self._clock.now_s(), _LOOK_EVERY_S)
            if due is not None and wait_s <= 0:
                self.verify(due[1])
            elif self._stop.wait(max(wait_s, 0.1)):
                return

    def verify(self, vm: str) -> None:
        """Read one VM again and log what is found; nothing is raised."""
        self._tried_s[vm] = self._clock.now_s() + _RETRY_AFTER_S
        pace = Pace(self._clock, self._stop.wait, rate_bytes_s=self._rate_bytes_s)
        try:
            found = self._store.verify(vm, pace, since_s=self._clock.now_s() - self._every_s)
        except Stopped:
            return
        except (HvReplicaError, OSError) as error:
            _LOG.warning("VM %r could not be verified, which is tried again: %s", vm, error)
            return
        except Exception:
            _LOG.exception("VM %r could not be verified", vm)
            return
        for verdict in found.vms:
            _tell(verdict)


def _tell(verdict: VmVerdict) -> None:
    if not verdict.is_damaged:
        _LOG.info(
            "VM %r: %d points are sound, %d bytes read", verdict.vm, len(verdict.points), verdict.read_bytes
        )
        return
    for sentence in verdict.damage:
        _LOG.error("VM %r: DAMAGED: %s", verdict.vm, sentence)
    for point in verdict.points:
        if point.state == "damaged":
            _LOG.error("VM %r: point %s cannot be had: %s", verdict.vm, point.id, point.reason)
