"""The verb `capture`: serve a VM's disks over NBD, know every write, and replicate while the VM runs.

Start: lock of the state folder, state, disks, tracking, sockets. A client is served only when all of it
stands, so that no write can pass unseen. Stop: clients first, then cycles, then tracking, which leaves a
clean journal for the next start. Killed anywhere, the journal tells the next start what it has to look at.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from hvreplica.address import parse_address
from hvreplica.capture.clients import ClientGate
from hvreplica.capture.export import ExportInfo
from hvreplica.capture.listen import NbdListener
from hvreplica.capture.log_folder import remove_loose_logs
from hvreplica.capture.machine import ORDERED_WRITE_BYTES_MAX, WRITE_BYTES_MAX, Machine, Slot
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.errors import FormatError
from hvreplica.files import OS_FILES
from hvreplica.hrl import log_info
from hvreplica.progress import quiet
from hvreplica.replication.bookkeeping import Bookkeeper
from hvreplica.replication.cycle import drop_unfinished
from hvreplica.replication.joining import is_begun
from hvreplica.replication.loop import CycleLoop, CycleRunner
from hvreplica.replication.opening import check_start, check_vm, disk_paths, state_for
from hvreplica.replication.replica_folders import remove_replica, require_none_stopped
from hvreplica.replication.replicas import Replicas, check_replicas
from hvreplica.replication.resident import Resident, interval_of
from hvreplica.replication.state import StateFolder
from hvreplica.replication.work import CONNECTIONS_DEFAULT, Tally, Work, make_link
from hvreplica.transport import server_context

if TYPE_CHECKING:
    import os
    import ssl
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from hvreplica.address import Address
    from hvreplica.capture.handshake import Negotiated
    from hvreplica.clock import Clock
    from hvreplica.disk import Disk
    from hvreplica.files import FileSystem
    from hvreplica.formats.messages import PointPolicy
    from hvreplica.replication.replicas import Replica
    from hvreplica.replication.state import CutLog
    from hvreplica.replication.work import Link

    PathLike = str | os.PathLike[str]

_LOG = logging.getLogger("hvreplica.capture")
_PREFERRED_BLOCK_BYTES = 4096


class Capture:
    """Serve and track the disks of one VM.

    serve_forever() in a thread of the caller's; stop() from anywhere; close() at the end.
    """

    def __init__(  # noqa: PLR0913 - a verb with its options, all but two by keyword
        self,
        vm: str,
        disks: Sequence[PathLike],
        *,
        state: PathLike,
        socket: PathLike | None = None,
        tcp: str | None = None,
        nbd_tls: PathLike | None = None,
        to: str | None = None,
        tls: PathLike | None = None,
        interval_s: float | None = None,
        continuous: bool = False,
        remove_disks: Sequence[str | int] = (),
        points: PointPolicy | None = None,
        replicas: Sequence[Replica] = (),
        remove_replicas: Sequence[str] = (),
        compression: str = "auto",
        connections: int = CONNECTIONS_DEFAULT,
        log_budget_bytes: int | None = None,
        metrics: str | None = None,
        files: FileSystem = OS_FILES,
        clock: Clock = SYSTEM,
    ) -> None:
        """Take state folder and disks, and bind the sockets; clients wait until serve_forever().

        vm, disks, state: as of replicate(). socket: path of the Unix socket for NBD clients; tcp: HOST:PORT
        for them, too or instead; nbd_tls: a folder as `tls init` makes it, without which TCP is not
        encrypted. to, tls: the replica, to which cycles run every interval_s seconds or back to back
        (`continuous`); without them cycles run only when asked for. log_budget_bytes: of each disk's log, a
        quarter of the disk by default; 0 keeps no log, and each cut reads what changed from the disk.
        points: as of replicate(); where logs are to be kept, long writes are logged too, so that logs hold
        all of them in order. replicas: further ones, each with a state folder of its own below this one;
        those of before that are not named are fed too, until they are named in remove_replicas. metrics:
        HOST:PORT to serve measurements. Raises: Locked where state, a disk or a socket is another process's;
        Unreachable, HvReplicaError, OSError, ValueError.
        """
        check_vm(vm, disks)
        places = _places(socket, tcp)
        check_replicas(replicas, tls)
        link, interval_s = _standing(
            to, tls, (compression, connections), interval_s, continuous=continuous, shares_tls=bool(replicas)
        )
        context = None if nbd_tls is None else server_context(Path(nbd_tls))
        check_start(files, Path(state).absolute(), disks)
        require_none_stopped(files, Path(state).absolute())
        with contextlib.ExitStack() as stack:
            folder = StateFolder(files, Path(state).absolute(), clock=clock)
            stack.callback(folder.release)
            work = _open(vm, disks, remove_disks, folder, stack, files=files, clock=clock)
            self._indexes = work.indexes
            for name in remove_replicas:
                remove_replica(files, folder.folder, name, clock=clock)
            self._replicas = Replicas(work, replicas, tls)
            self._replicas.open(stack)
            keeps_logs = _keeps_logs([points, *(replica.points for replica in replicas)])
            machine = _track(work, self._replicas, stack, log_budget_bytes, keeps_logs=keeps_logs)
            work.machine = self.machine = machine
            work.points = points
            self._replicas.begin(machine)
            for each in (work, *self._replicas.works.values()):
                forget_lost_cuts(each)
                each.sweep_logs()
            runner = CycleRunner(
                work, Bookkeeper(files, work.folder.folder, clock=clock), link=link, keep_session=continuous
            )
            loop = None if link is None else CycleLoop(runner, interval_s=interval_s)
            self._clients = ClientGate()
            self._replicas.run(stack, self._clients)
            self._resident = Resident(
                runner,
                loop,
                running="capture",
                metrics=metrics,
                clients=self._clients,
                replicas=self._replicas.residents,
            )
            stack.callback(self._resident.close)
            self._listeners = [
                self._listener(place, context, stack, files=files, clock=clock) for place in places
            ]
            self._closing = stack.pop_all()

    @property
    def addresses(self) -> list[Path | Address]:
        """Where NBD clients connect; a port of 0 is resolved."""
        return [listener.address for listener in self._listeners]

    @property
    def metrics_address(self) -> str | None:
        """Where measurements are served; a port of 0 is resolved."""
        return self._resident.metrics_address

    def serve_forever(self) -> None:
        """Serve clients, and run cycles, until stop()."""
        for listener in self._listeners:
            listener.start()
        self._resident.start()
        self._replicas.start()
        self._resident.wait()

    def stop(self) -> None:
        """End serve_forever(), and a cycle that runs; what it had sent is gone on with later."""
        self._replicas.stop()
        self._resident.stop()

    def close(self) -> None:
        """Let clients go, then stop cycles and tracking in good order. May be called twice."""
        self._replicas.stop()
        self._resident.stop()
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _listener(
        self,
        place: Path | Address,
        context: ssl.SSLContext | None,
        stack: contextlib.ExitStack,
        *,
        files: FileSystem,
        clock: Clock,
    ) -> NbdListener:
        listener = NbdListener(
            place,
            self._exports,
            self._serve,
            tls_context=None if isinstance(place, Path) else context,
            files=files,
            clock=clock,
        )
        stack.callback(listener.close)
        return listener

    def _exports(self) -> list[ExportInfo]:
        return [
            ExportInfo(
                name=str(index),
                size_bytes=disk.virtual_bytes,
                minimum_block_bytes=disk.logical_sector_bytes,
                preferred_block_bytes=max(_PREFERRED_BLOCK_BYTES, disk.logical_sector_bytes),
                description=disk.path.name,
            )
            for index, disk in zip(self._indexes, self.machine.disks, strict=True)
        ]

    def _serve(self, client: Negotiated) -> None:
        service = self.machine.services[client.export_index]
        try:
            with self._clients.client(client.socket):
                service.serve(
                    client.socket.fileno(),
                    structured=client.structured,
                    base_allocation=client.base_allocation,
                )
        except ConnectionError as error:
            _LOG.info("%s", error)


def forget_lost_cuts(work: Work) -> None:
    """Drop cuts that wait from the first on whose log is not there, and count the whole disks as changed.

    So it is where recording a cut failed after its state had reached the disk: the cut was given back then,
    and its log may have been written over.
    """
    for number, transfer in enumerate(work.state.pending):
        lost = [log for log in transfer.logs if not _is_there(work, log)]
        if lost:
            path = work.folder.log_path(lost[0].log_id)
            _LOG.warning("%s is lost: the next cut looks at the whole disks", path)
            assert work.machine is not None
            for index, disk in zip(work.indexes, work.disks, strict=True):
                work.mark(index, np.array([[0, disk.virtual_bytes]], np.int64))
            with work.lock:
                del work.state.pending[number:]
                work.save()
            return


def _is_there(work: Work, log: CutLog) -> bool:
    """Return whether the file of a log is that log, closed, with the end that was recorded."""
    try:
        found = log_info(work.files, work.folder.log_path(log.log_id))
    except (FileNotFoundError, FormatError):
        return False
    is_whole = found.closed and found.file_bytes >= found.log_bytes
    return is_whole and (found.log_id, found.log_bytes) == (str(log.log_id), log.log_bytes)


def _places(socket: PathLike | None, tcp: str | None) -> list[Path | Address]:
    places: list[Path | Address] = []
    if socket is not None:
        places.append(Path(socket).absolute())
    if tcp is not None:
        places.append(parse_address(tcp))
    if not places:
        message = "name a Unix socket or a TCP port for NBD clients"
        raise ValueError(message)
    return places


def _standing(
    to: str | None,
    tls: PathLike | None,
    settings: tuple[str, int],
    interval_s: float | None,
    *,
    continuous: bool,
    shares_tls: bool = False,
) -> tuple[Link | None, float | None]:
    """Return the link and the interval of the cycles that run by themselves.

    shares_tls: whether `tls` may be there for other replicas alone.
    """
    if to is None and (tls is None or shares_tls) and interval_s is None and not continuous:
        return None, None
    if to is None or tls is None:
        message = "`to` and `tls` belong together, and cycles need both"
        raise ValueError(message)
    return make_link(to, tls, *settings), interval_of(interval_s, continuous=continuous)


def _open(
    vm: str,
    disks: Sequence[PathLike],
    remove: Sequence[str | int],
    folder: StateFolder,
    stack: contextlib.ExitStack,
    *,
    files: FileSystem,
    clock: Clock,
) -> Work:
    """Open state and disks; the disks are the machine's to close once it has them."""
    opened: list[Disk] = []
    stack.push(_abandoned(opened))
    paths = disk_paths(folder, disks, remove=remove)
    opened.extend(open_disk(files, path, writable=True, clock=clock) for path in paths)
    known, ordered = state_for(folder, vm, opened, remove=remove, clock=clock)
    work = Work(
        folder=folder,
        state=known,
        disks=ordered,
        link=None,
        files=files,
        clock=clock,
        on_progress=quiet,
        tally=Tally("none", [0] * len(ordered)),
    )
    drop_unfinished(work)
    return work


def _abandoned(disks: list[Disk]) -> Callable[..., None]:
    def leave(kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for disk in disks:
                disk.abandon()

    return leave


def _keeps_logs(policies: Sequence[PointPolicy | None]) -> bool:
    """Return whether any replica keeps logs: they should hold each write in order, and its time.

    What is read at the cut has neither.
    """
    return any(points and points.keep_logs_s for points in policies)


def _track(
    work: Work,
    replicas: Replicas,
    stack: contextlib.ExitStack,
    log_budget_bytes: int | None,
    *,
    keeps_logs: bool,
) -> Machine:
    remove_loose_logs(work.files, work.folder.folder)
    known = work.folder.load()
    # Where the folder knows the VM, something may be built upon what the disks were when it was left.
    has_base = known is not None and known.relationship_id == work.state.relationship_id
    work.save()
    machine = Machine(
        work.files,
        work.folder.folder,
        [
            Slot(index, disk, (has_base and is_begun(work.state, index)) or replicas.has_base(index))
            for index, disk in zip(work.indexes, work.disks, strict=True)
        ],
        clock=work.clock,
        log_budget_bytes=log_budget_bytes,
        write_bytes_max=ORDERED_WRITE_BYTES_MAX if keeps_logs else WRITE_BYTES_MAX,
        has_times=keeps_logs,
    )
    stack.callback(machine.close)
    return machine
