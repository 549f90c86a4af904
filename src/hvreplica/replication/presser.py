"""Compress the undo parts of a served store that are old enough, one at a time, when nobody waits for it.

It has the lowest priority, gives way while a point is applied, and what was cut off begins again. Which parts
are old enough is said by each VM's policy: see store/press.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import TYPE_CHECKING

from hvreplica.errors import HvReplicaError
from hvreplica.store.pace import Pace, Stopped
from hvreplica.units import format_size

if TYPE_CHECKING:
    from hvreplica.clock import Clock
    from hvreplica.store import Store

_LOG = logging.getLogger("hvreplica.serve")
_LOOK_EVERY_S = 60.0
_LOWEST_PRIORITY = 19


class Presser:
    """start() once, close() at the end, from one thread."""

    def __init__(self, store: Store, *, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="press", daemon=True)

    def start(self) -> None:
        """Look for the first time in a minute, when what waited at the start has been done."""
        self._thread.start()

    def close(self) -> None:
        """Stop soon, and wait for that."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def press(self) -> None:
        """Look at all VMs once; nothing is raised."""
        try:
            for vm in self._store.names():
                pace = Pace(self._clock, self._stop.wait)
                done = self._store.press(vm, pace)
                if done.parts:
                    freed = format_size(done.freed_bytes)
                    _LOG.info("VM %r: %d undo parts were compressed, %s freed", vm, done.parts, freed)
        except Stopped:
            return
        except (HvReplicaError, OSError) as error:
            _LOG.warning("undo parts could not be compressed, which is tried again: %s", error)
        except Exception:
            _LOG.exception("undo parts could not be compressed")

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        while not self._stop.wait(_LOOK_EVERY_S):
            self.press()
