"""Disks under capture in a process of their own, for tests that kill it, cut its power or let its calls fail.

Run as a program it serves NBD on a Unix socket, obeys lines on stdin and answers each with a line of JSON:

    cut          a cut that is recorded durably in STATE/cuts.json and settled
    cut lost     a cut that cannot be recorded and is given back
    status       what is tracked
    stop         a clean end

Host starts that program and talks to it. The clock runs a thousand times faster than the real one, so that
what happens "every few seconds" happens at every cut.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

import msgspec

from hvreplica.capture.export import ExportInfo
from hvreplica.capture.listen import NbdListener
from hvreplica.capture.log_folder import LogFolder
from hvreplica.capture.machine import Machine, Slot
from hvreplica.capture.service import DiskService
from hvreplica.capture.tracked import TrackedDisk
from hvreplica.clock import SYSTEM, SystemClock
from hvreplica.disk import open_disk
from hvreplica.errors import HvReplicaError, kept
from hvreplica.files import OS_FILES, OsBlockFile, write_durably
from tests.support.nbd_client import Connection

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hvreplica.capture.handshake import Negotiated
    from hvreplica.capture.machine import Cut

NIL = UUID(int=0)
_ROOT = Path(__file__).parents[2]
_CLOCK_RATE = 1000


class FastClock(SystemClock):
    """A clock whose durations are a thousand times longer than they are."""

    def monotonic_s(self) -> float:
        return super().monotonic_s() * _CLOCK_RATE


class Settings(msgspec.Struct, frozen=True):
    """What a host is started with. log_budget_bytes, write_bytes_max: as of Machine.

    mistake: one of MISTAKES, made on purpose, for tests that must find it.
    """

    state: str
    socket: str
    disks: list[str]
    has_base: bool = True
    log_budget_bytes: int | None = None
    write_bytes_max: int = 256 << 10
    mistake: str = ""


class Cuts(msgspec.Struct):
    """The cuts that are recorded, oldest first: for each, the logs as (disk index, log id, file name)."""

    cuts: list[list[tuple[int, str, str]]] = []

    def previous(self, disk_count: int) -> list[UUID]:
        """Return the log that the next one of each disk follows."""
        last = [NIL] * disk_count
        for cut in self.cuts:
            for index, log_id, _ in cut:
                last[index] = UUID(log_id)
        return last


def read_cuts(state: Path) -> Cuts:
    """Return what is recorded in a state folder."""
    path = state / "cuts.json"
    return msgspec.json.decode(path.read_bytes(), type=Cuts) if path.exists() else Cuts()


def open_machine(settings: Settings) -> Machine:
    """Return the machine of a host, in this process."""
    slots = [
        Slot(index, open_disk(OS_FILES, Path(path), writable=True, clock=SYSTEM), settings.has_base)
        for index, path in enumerate(settings.disks)
    ]
    return Machine(
        OS_FILES,
        Path(settings.state),
        slots,
        clock=FastClock(),
        log_budget_bytes=settings.log_budget_bytes,
        write_bytes_max=settings.write_bytes_max,
    )


def abandon_machine(machine: Machine) -> None:
    """Let go of a machine as if its process had died, descriptors included."""
    machine.abandon()
    for tracked in machine._tracked:
        if tracked._writer is not None:
            tracked._writer.abort()


def record_cut(machine: Machine, settings: Settings) -> Cut:
    """Cut, record the cut durably, and settle it."""
    state = Path(settings.state)
    cuts = read_cuts(state)
    cut = machine.cut(cuts.previous(len(settings.disks)))
    cuts.cuts.append([(log.disk_index, str(log.log_id), log.path.name) for log in cut.logs])
    write_durably(OS_FILES, state / "cuts.json", msgspec.json.encode(cuts), clock=SYSTEM)
    machine.settle(cut)
    return cut


def lose_cut(machine: Machine, settings: Settings) -> Cut:
    """Cut, and give the cut back."""
    cut = machine.cut(read_cuts(Path(settings.state)).previous(len(settings.disks)))
    machine.give_back(cut)
    return cut


MISTAKES = (
    "journal is not synced",
    "closed log is not synced",
    "name of a closed log is not synced",
    "flush is not done",
    "zeroes are not tracked",
    "cut given back is forgotten",
)


def make_mistake(name: str) -> None:
    """Break this process's copy of the product in one place."""
    if name == "journal is not synced":
        _skip_syncs_of(".ij")
    elif name == "closed log is not synced":
        _skip_syncs_of(".hrl")
    elif name == "name of a closed log is not synced":
        LogFolder.sync = lambda _: None  # type: ignore[assignment,method-assign]
    elif name == "flush is not done":
        DiskService.flush = lambda _: None  # type: ignore[assignment,method-assign]
    elif name == "zeroes are not tracked":
        DiskService._zero_window = (  # type: ignore[method-assign]
            lambda service, offset, length, **_: service.disk.write_zeroes(offset, length)
        )
    elif name == "cut given back is forgotten":
        TrackedDisk.give_back = lambda tracked, _: tracked._unguard()  # type: ignore[assignment,method-assign]
    elif name:
        raise ValueError(name)


def _skip_syncs_of(suffix: str) -> None:
    sync = OsBlockFile.sync

    def sync_others(file: OsBlockFile) -> None:
        if file.path.suffix != suffix:
            sync(file)

    OsBlockFile.sync = sync_others  # type: ignore[assignment,method-assign]


class Host:
    """A running host; as a context it is killed at the end unless it was stopped."""

    def __init__(self, settings: Settings, environment: Mapping[str, str] | None = None) -> None:
        """Start it and wait until it serves. environment: what is added to ours."""
        self.settings = settings
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.capture_host", msgspec.json.encode(settings).decode()],
                cwd=_ROOT,
                env={**os.environ, **(environment or {}), "PYTHONPATH": f"{_ROOT}:{_ROOT / 'src'}"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._answer()

    @property
    def log(self) -> Path:
        """What it says to people."""
        return Path(self.settings.socket + ".log")

    def connect(self, disk: int = 0) -> Connection:
        """Return a new client."""
        return Connection(Path(self.settings.socket), str(disk))

    def connections(self, count: int) -> list[tuple[int, Connection]]:
        """Return clients in turn to all disks, each with its disk."""
        disks = [place % len(self.settings.disks) for place in range(count)]
        return [(disk, self.connect(disk)) for disk in disks]

    def tell(self, line: str) -> dict[str, Any]:
        """Give an order and return the answer; {"error"} holds what was raised."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End it as SIGTERM would; the process is gone on return."""
        answer = self.tell("stop")
        assert "error" not in answer, answer
        assert self.process.wait(60) == 0
        self._close()

    def kill(self) -> None:
        """End it as kill -9 does."""
        self.process.kill()
        self.process.wait(60)
        self._close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            message = f"the host ended with {self.process.wait(60)}: {self.log.read_text()[-2000:]}"
            raise ConnectionError(message)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.kill()


def main(arguments: Sequence[str]) -> None:
    """Serve until told to stop."""
    settings = msgspec.json.decode(arguments[0], type=Settings)
    make_mistake(settings.mistake)
    logging.basicConfig(format="%(message)s")
    machine = open_machine(settings)

    def exports() -> list[ExportInfo]:
        return [ExportInfo(str(index), disk.virtual_bytes) for index, disk in enumerate(machine.disks)]

    def serve(client: Negotiated) -> None:
        service = machine.services[client.export_index]
        service.serve(
            client.socket.fileno(), structured=client.structured, base_allocation=client.base_allocation
        )

    listener = NbdListener(Path(settings.socket), exports, serve)
    listener.start()
    _say({"serving": True})
    for line in sys.stdin:
        order = line.strip()
        try:
            _say(_obey(order, machine, settings, listener))
        except (OSError, HvReplicaError) as error:
            _say({"error": f"{type(error).__name__}: {error}"})
            kept(error)
        if order == "stop":
            return


def _obey(order: str, machine: Machine, settings: Settings, listener: NbdListener) -> dict[str, Any]:
    if order in {"cut", "cut lost"}:
        cut = (record_cut if order == "cut" else lose_cut)(machine, settings)
        return {"logs": [[log.disk_index, log.entries, log.changed_bytes] for log in cut.logs]}
    if order == "status":
        return {"disks": msgspec.to_builtins(machine.status())}
    if order == "stop":
        listener.close()
        machine.close()
        return {"stopped": True}
    return {"error": f"no such order: {order}"}


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
