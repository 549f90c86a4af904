"""The process that owns a VM's state folder while it lives: cycles, control, measurements, all in one place.

It holds the folder's lock; other processes ask it over the socket in the folder. `capture` is one, and so is
`replicate` without --once.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.progress import quiet
from hvreplica.replication.bookkeeping import Bookkeeper
from hvreplica.replication.control import Control
from hvreplica.replication.loop import CycleLoop, CycleRunner
from hvreplica.replication.metrics import exposition
from hvreplica.replication.opening import check_start, check_vm, disk_paths, opened_disks, state_for
from hvreplica.replication.shape import follow
from hvreplica.replication.state import SOCKET_NAME, StateFolder
from hvreplica.replication.work import CONNECTIONS_DEFAULT, Tally, Work, make_link
from hvreplica.transport.exposition import PageServer
from hvreplica.transport.local import LocalServer

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from hvreplica.capture.clients import ClientGate
    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem
    from hvreplica.formats.messages import PointPolicy

    PathLike = str | os.PathLike[str]

INTERVAL_DEFAULT_S = 300.0
INTERVAL_MAX_S = 1e9


class Resident:
    """Serves the cycles, the control socket and the measurements of one VM. One owner; stop() from anywhere.

    loop: None where cycles run only when asked for. metrics: HOST:PORT of the page of measurements.
    """

    def __init__(
        self,
        runner: CycleRunner,
        loop: CycleLoop | None,
        *,
        running: str,
        metrics: str | None,
        clients: ClientGate | None = None,
        replicas: Mapping[str, Resident] | None = None,
    ) -> None:
        """Bind. replicas: the VM's further ones, by name.

        Raises: Unreachable where `metrics` cannot be listened on, OSError.
        """
        work = runner.work
        self.runner = runner
        self._loop = loop
        self._stopped = threading.Event()
        further: dict[str, Control] = {name: each.control for name, each in (replicas or {}).items()}
        self.control: Control = Control(runner, loop, running=running, clients=clients, replicas=further)
        with contextlib.ExitStack() as stack:
            self._page = None
            if metrics is not None:
                self._page = PageServer(metrics, lambda: exposition(self.control.status()))
                stack.callback(self._page.close)
            self._local = LocalServer(
                work.folder.folder / SOCKET_NAME, self.control.handle, files=work.files, clock=work.clock
            )
            stack.pop_all()

    @property
    def metrics_address(self) -> str | None:
        """Where the page of measurements is served; a port of 0 is resolved."""
        return None if self._page is None else str(self._page.address)

    def start(self) -> None:
        """Answer others, and begin with the cycles."""
        self._local.start()
        if self._page is not None:
            self._page.start()
        if self._loop is not None:
            self._loop.start()

    def wait(self) -> None:
        """Return once stop() was called."""
        self._stopped.wait()

    def stop(self) -> None:
        """End wait(), and a cycle that runs; from any thread."""
        self._stopped.set()
        self.runner.stop()

    def close(self) -> None:
        """Stop, wait for everything that runs, and let go of the folder's socket. May be called twice."""
        self.stop()
        if self._loop is not None:
            self._loop.stop()
        self._local.close()
        if self._page is not None:
            self._page.close()
        self.runner.close()


def interval_of(interval_s: float | None, *, continuous: bool) -> float | None:
    """Return the interval of a loop, None for back to back. Raises: ValueError."""
    if continuous and interval_s is not None:
        message = "give either an interval or `continuous`"
        raise ValueError(message)
    if interval_s is not None and not 0 < interval_s <= INTERVAL_MAX_S:
        message = f"an interval is a number of seconds above 0, not {interval_s}"
        raise ValueError(message)
    return None if continuous else interval_s or INTERVAL_DEFAULT_S


class CycleProcess:
    """What has a state folder, and runs its cycles until it is told to end.

    serve_forever() in a thread of the caller's; stop() from anywhere; close() at the end.
    """

    _resident: Resident
    _closing: contextlib.ExitStack

    @property
    def metrics_address(self) -> str | None:
        """Where measurements are served; a port of 0 is resolved."""
        return self._resident.metrics_address

    def serve_forever(self) -> None:
        """Run cycles until stop()."""
        self._resident.start()
        self._resident.wait()

    def stop(self) -> None:
        """End serve_forever(), and a cycle that runs; what it had sent is gone on with later."""
        self._resident.stop()

    def close(self) -> None:
        """Stop, wait for the cycle, and give the state folder back. May be called twice."""
        self._resident.close()
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Replicator(CycleProcess):
    """Compare and replicate a VM's disks again and again.

    serve_forever() in a thread of the caller's; stop() from anywhere; close() at the end.
    """

    def __init__(  # noqa: PLR0913 - a verb with its options, all but two by keyword
        self,
        vm: str,
        disks: Sequence[PathLike],
        *,
        to: str,
        tls: PathLike,
        state: PathLike,
        interval_s: float | None = None,
        continuous: bool = False,
        remove_disks: Sequence[str | int] = (),
        points: PointPolicy | None = None,
        compression: str = "auto",
        connections: int = CONNECTIONS_DEFAULT,
        metrics: str | None = None,
        files: FileSystem = OS_FILES,
        clock: Clock = SYSTEM,
    ) -> None:
        """Take the state folder.

        The disks are opened for each cycle and must not change while it compares them. Arguments as of
        replicate(); interval_s: seconds between the beginnings of two cycles, or `continuous`; metrics:
        HOST:PORT to serve measurements. Raises: Locked where another process has the folder; as replicate().
        """
        check_vm(vm, disks)
        interval_s = interval_of(interval_s, continuous=continuous)
        link = make_link(to, tls, compression, connections)
        check_start(files, Path(state).absolute(), disks)
        with contextlib.ExitStack() as stack:
            folder = StateFolder(files, Path(state).absolute(), clock=clock)
            stack.callback(folder.release)
            paths = disk_paths(folder, disks, remove=remove_disks)
            with opened_disks(files, paths, clock=clock) as opened:
                known, _ = state_for(folder, vm, opened, remove=remove_disks, clock=clock)
            work = Work(
                folder=folder,
                state=known,
                disks=[],
                link=link,
                files=files,
                clock=clock,
                on_progress=quiet,
                tally=Tally("none", []),
                points=points,
            )
            work.save()

            @contextlib.contextmanager
            def ready() -> Iterator[None]:
                with opened_disks(files, paths, clock=clock) as now:
                    with work.lock:
                        work.disks = follow(work.state, vm, now, folder.folder)
                        work.save()
                    try:
                        yield
                    finally:
                        work.close_tables()
                        work.disks = []

            book = Bookkeeper(files, folder.folder, clock=clock)
            runner = CycleRunner(work, book, link=link, ready=ready)
            loop = CycleLoop(runner, interval_s=interval_s)
            self._resident = Resident(runner, loop, running="replicate", metrics=metrics)
            self._closing = stack.pop_all()
