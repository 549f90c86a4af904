"""The server of the capture benchmark: one VHDX on a Unix socket, cut now and then, its logs written over.

`python -m bench.e2e.capture_server MODE DISK SOCKET STATE SECONDS [COPY]`. MODE: off tracks nothing, map logs
nothing, log logs all but long writes. SECONDS: between two
cuts; one more comes at the end. COPY: a raw file that follows every cut. Prints one JSON line at its
end: the longest time that writes were held by a cut, in microseconds, and the number of cuts.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import uuid
from contextlib import ExitStack
from pathlib import Path

from hvreplica.capture.export import ExportInfo
from hvreplica.capture.listen import NbdListener
from hvreplica.capture.machine import Machine, Slot
from hvreplica.capture.service import DiskService
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES
from hvreplica.hrl import apply_log
from hvreplica.native.live import Gate

LOG_BUDGET_BYTES = 4 << 30  # no mode may fall back to another one


class Cutter:
    """Cuts, lets the copy follow, and gives the logs back to be written over."""

    def __init__(self, machine: Machine, copy: Path | None) -> None:
        self._machine = machine
        self._copy = copy
        self._previous = [uuid.UUID(int=0)]
        self.held_us: list[float] = []

    def cut(self) -> None:
        """Do one cycle."""
        cut = self._machine.cut(self._previous)
        self.held_us.append(cut.held_us)
        self._machine.settle(cut)
        for log in cut.logs:
            self._previous = [log.log_id]
            if self._copy is not None:
                with open_disk(OS_FILES, self._copy, writable=True, format="raw", clock=SYSTEM) as copy:
                    apply_log(OS_FILES, log.path, copy)
        self._machine.recycle(log.path for log in cut.logs)


def main(mode: str, disk_path: str, address: str, state: str, seconds: str, copy: str | None = None) -> None:
    """Serve until SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    disk = open_disk(OS_FILES, disk_path, writable=True, clock=SYSTEM)
    cutter = None
    with ExitStack() as stack:
        if mode == "off":
            stack.callback(disk.close)
            service = DiskService(disk, Gate(), None, read_only=False, clock=SYSTEM)
        else:
            budget = LOG_BUDGET_BYTES if mode == "log" else 0
            machine = Machine(
                OS_FILES, Path(state), [Slot(0, disk, has_base=False)], clock=SYSTEM, log_budget_bytes=budget
            )
            stack.callback(machine.close)
            service = machine.services[0]
            cutter = Cutter(machine, Path(copy) if copy else None)
        with NbdListener(
            Path(address),
            lambda: [ExportInfo("0", disk.virtual_bytes)],
            lambda client: service.serve(
                client.socket.fileno(),
                structured=client.structured,
                base_allocation=client.base_allocation,
            ),
        ):
            while not stop.wait(float(seconds)):
                if cutter is not None:
                    cutter.cut()
        if cutter is not None:
            cutter.cut()
    held = cutter.held_us if cutter is not None else []
    print(json.dumps({"cuts": len(held), "held_us_max": max(held, default=0.0)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
