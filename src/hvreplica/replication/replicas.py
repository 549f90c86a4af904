"""The further replicas of a captured VM, each with a state folder of its own: STATE/replicas/NAME/.

Once a folder is there its replica is fed, named in the call or not: it must learn of every write, or miss it
knowingly. It ends when it is removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.errors import StateError
from hvreplica.progress import quiet
from hvreplica.replication.bookkeeping import Bookkeeper
from hvreplica.replication.cycle import drop_unfinished
from hvreplica.replication.fan import Fan, Target, mark_all_missed
from hvreplica.replication.joining import is_begun
from hvreplica.replication.loop import CycleLoop, CycleRunner
from hvreplica.replication.missed import Missed
from hvreplica.replication.opening import state_for
from hvreplica.replication.replica_folders import checked_name, replica_folder, replica_names
from hvreplica.replication.resident import Resident, interval_of
from hvreplica.replication.state import StateFolder
from hvreplica.replication.work import CONNECTIONS_DEFAULT, Tally, Work, make_link

if TYPE_CHECKING:
    import contextlib
    import os
    from collections.abc import Sequence

    from hvreplica.capture.clients import ClientGate
    from hvreplica.capture.machine import Machine
    from hvreplica.formats.messages import PointPolicy
    from hvreplica.replication.state import PrimaryState
    from hvreplica.replication.work import Link

REPLICAS_MAX = 16


@dataclass(frozen=True, slots=True)
class Replica:
    """One further replica of a captured VM.

    name: of its folder below the state folder: letters, digits, `-` and `_`. to, tls: as of Capture; tls: by
    default that of the call. interval_s, continuous, points, compression, connections: as of Capture.
    """

    name: str
    to: str
    tls: str | os.PathLike[str] | None = None
    interval_s: float | None = None
    continuous: bool = False
    points: PointPolicy | None = None
    compression: str = "auto"
    connections: int = CONNECTIONS_DEFAULT

    def link(self, tls: str | os.PathLike[str] | None) -> Link:
        """Return how it is reached; tls: where it names none. Raises: ValueError, AuthenticationFailed."""
        folder = self.tls or tls
        if folder is None:
            message = f"replica {self.name} needs certificates: name `tls`"
            raise ValueError(message)
        return make_link(self.to, folder, self.compression, self.connections)


def check_replicas(replicas: Sequence[Replica], tls: str | os.PathLike[str] | None) -> None:
    """Refuse what cannot be before anything is made. Raises: ValueError, AuthenticationFailed."""
    names = [replica.name for replica in replicas]
    for name in names:
        checked_name(name)
        if names.count(name) > 1:
            message = f"replica {name} is named twice"
            raise ValueError(message)
    if len(names) > REPLICAS_MAX:
        message = f"a VM has at most {REPLICAS_MAX} further replicas"
        raise ValueError(message)
    for replica in replicas:
        replica.link(tls)
        interval_of(replica.interval_s, continuous=replica.continuous)


class Replicas:
    """The further replicas of one capture. open() before there is a machine, then begin()."""

    def __init__(self, main: Work, replicas: Sequence[Replica], tls: str | os.PathLike[str] | None) -> None:
        self._main = main
        self._wanted = {replica.name: replica for replica in replicas}
        self._tls = tls
        self.works: dict[str, Work] = {}
        self.residents: dict[str, Resident] = {}

    def open(self, stack: contextlib.ExitStack) -> None:
        """Take the folder of each. Raises: Locked, StateError, TrackingLost, FormatError."""
        main, state = self._main, self._main.folder.folder
        for name in dict.fromkeys([*replica_names(main.files, state), *self._wanted]):
            folder = StateFolder(main.files, replica_folder(state, name), clock=main.clock)
            stack.callback(folder.release)
            wanted = self._wanted.get(name)
            work = Work(
                folder=folder,
                state=_state(main, folder),
                disks=main.disks,
                link=None,
                files=main.files,
                clock=main.clock,
                on_progress=quiet,
                tally=Tally("none", [0] * len(main.disks)),
                points=None if wanted is None else wanted.points,
                cutting=main.cutting,
            )
            drop_unfinished(work)
            self.works[name] = work

    def has_base(self, disk_index: int) -> bool:
        """Return whether any may hold something of a disk, so that no write to it may be forgotten."""
        return any(
            work.state.phase != "new" and is_begun(work.state, disk_index) for work in self.works.values()
        )

    def begin(self, machine: Machine) -> None:
        """Feed them, and the first replica, from one machine, where there are any."""
        self._main.machine = machine
        targets = []
        for work in [self._main, *self.works.values()]:
            work.save()
            work.machine = machine
            missed = Missed(work.files, work.folder.folder, clock=work.clock)
            # Without a record it was fed by nobody here: what it holds is of another time.
            is_strange = work is not self._main and work.state.phase != "new"
            sizes = {index: work.state.disks[index].virtual_bytes for index in work.indexes}
            missed.load(sizes, unless_there=is_strange)
            targets.append(Target(work, missed))
        if self.works:
            Fan(targets)
        else:
            mark_all_missed(targets[0])  # of a time when there were others

    def run(self, stack: contextlib.ExitStack, clients: ClientGate) -> None:
        """Make what runs the cycles of each and answers for it."""
        for name, work in self.works.items():
            wanted = self._wanted.get(name)
            link = None if wanted is None else wanted.link(self._tls)
            book = Bookkeeper(work.files, work.folder.folder, clock=work.clock)
            is_continuous = wanted is not None and wanted.continuous
            runner = CycleRunner(work, book, link=link, keep_session=is_continuous)
            loop = None
            if wanted is not None:
                interval_s = interval_of(wanted.interval_s, continuous=wanted.continuous)
                loop = CycleLoop(runner, interval_s=interval_s)
            resident = Resident(runner, loop, running="capture", metrics=None, clients=clients)
            stack.callback(resident.close)
            self.residents[name] = resident

    def start(self) -> None:
        """Begin with cycles and answers."""
        for resident in self.residents.values():
            resident.start()

    def stop(self) -> None:
        """Let what runs end soon; from any thread."""
        for resident in self.residents.values():
            resident.stop()


def _state(main: Work, folder: StateFolder) -> PrimaryState:
    """Return the state of a replica of the VM that `main` is, with the same disks at the same indexes."""
    known = folder.load()
    gone = [index for index, disk in enumerate(main.state.disks) if not disk.is_here]
    if known is not None and (known.phase != "new" or not all(disk.is_here for disk in known.disks)):
        gone = [index for index in gone if index < len(known.disks) and known.disks[index].is_here]
    state, ordered = state_for(folder, main.state.vm, list(main.disks), remove=gone, clock=main.clock)
    here = [index for index, disk in enumerate(state.disks) if disk.is_here]
    mine = [disk.path for disk in state.disks if disk.is_here]
    theirs = [disk.path for disk in main.state.disks if disk.is_here]
    if (here, mine) != (main.indexes, theirs) or [id(disk) for disk in ordered] != [
        id(disk) for disk in main.disks
    ]:
        raise StateError(
            "this replica of the VM numbers its disks otherwise",
            path=folder.folder,
            expected=", ".join(theirs),
            actual=", ".join(mine),
            hint="remove it with --remove-replica, and let it begin anew under the same name",
        )
    return state
