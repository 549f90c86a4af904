"""The verb `extend`: a replica feeds a further one, at a third site. The primary neither knows nor pays."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hvreplica.clock import SYSTEM
from hvreplica.errors import Fenced, InvalidTransition, NoSuchPoint, StateError
from hvreplica.files import OS_FILES
from hvreplica.progress import Progress, quiet
from hvreplica.replication.bookkeeping import Bookkeeper
from hvreplica.replication.control import ReplicateRequest
from hvreplica.replication.extended import ExtendedSource, require_replica
from hvreplica.replication.loop import CycleLoop, CycleRunner
from hvreplica.replication.resident import CycleProcess, Resident, interval_of
from hvreplica.replication.results import ReplicateResult
from hvreplica.replication.state import SOCKET_NAME, VERSION, PrimaryState, StateFolder, load_state
from hvreplica.replication.work import CONNECTIONS_DEFAULT, Tally, Work, make_link
from hvreplica.store import Store
from hvreplica.store.feeds import HOLD_DEFAULT_S
from hvreplica.transport.local import Owner

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem
    from hvreplica.formats.messages import PointPolicy
    from hvreplica.progress import ProgressCallback
    from hvreplica.replication.work import Link
    from hvreplica.store.home import VmHome

    PathLike = str | os.PathLike[str]

FOLDER_NAME = "extended"  # in the VM's folder of the store, where no other is named


def extend(  # noqa: PLR0913 - a verb with its options, all but two by keyword
    store: PathLike,
    vm: str,
    *,
    to: str,
    tls: PathLike,
    state: PathLike | None = None,
    hold_s: float = HOLD_DEFAULT_S,
    compression: str = "auto",
    connections: int = CONNECTIONS_DEFAULT,
    resync: bool = False,
    takeover: bool = False,
    points: PointPolicy | None = None,
    progress: ProgressCallback | None = None,
    files: FileSystem = OS_FILES,
    clock: Clock = SYSTEM,
) -> ReplicateResult:
    """Bring the replica of `vm` at `to` to the newest point that `store` has of it: a whole copy first, then
    what changed.

    store: of this site, also while it is served and replicated to. to, tls: where `hvreplica serve` runs at
    the further site, and the folder with ca.pem, primary.pem and primary-key.pem. state: what is remembered
    between calls, a folder of its own for each further site; <vm folder>/extended by default. hold_s: how
    long the store keeps the point that was shipped last for the next call; without it that one may have to
    read whole disks. compression, connections, resync, takeover, points: see replicate(); of the further
    replica.

    The point made there has the instant and the consistency of the one here. Nothing new here ships nothing:
    kind "none". After any failure the next call goes on from there. Raises: InvalidTransition while the VM is
    failed over to this site, NoSuchPoint, StateError for another VM's folder, Fenced, Locked, HvReplicaError,
    OSError, ValueError.
    """
    link = make_link(to, tls, compression, connections)
    root = Path(store).absolute()
    with contextlib.ExitStack() as stack:
        home = _home(root, vm, files, clock, stack)
        path = _state_path(home, state)
        owner = Owner.find(path / SOCKET_NAME)
        if owner is not None:
            request = ReplicateRequest(
                vm=vm,
                to=to,
                tls=str(Path(tls).absolute()),
                compression=compression,
                connections=connections,
                resync=resync,
                takeover=takeover,
                points=points,
            )
            return _asked(owner, request, progress or quiet)
        source = ExtendedSource(home, store=root, hold_s=hold_s)
        runner = _runner(source, path, link, points, stack)
        stack.callback(runner.close)
        result = runner.run(with_resync=resync, takeover=takeover, on_progress=progress or quiet)
        while source.has_more:
            result = runner.run(on_progress=progress or quiet)
        return result


class Extender(CycleProcess):
    """Ships a VM's newest point again and again. Used as Replicator is."""

    def __init__(  # noqa: PLR0913 - a verb with its options, all but two by keyword
        self,
        store: PathLike,
        vm: str,
        *,
        to: str,
        tls: PathLike,
        state: PathLike | None = None,
        hold_s: float = HOLD_DEFAULT_S,
        interval_s: float | None = None,
        continuous: bool = False,
        points: PointPolicy | None = None,
        compression: str = "auto",
        connections: int = CONNECTIONS_DEFAULT,
        metrics: str | None = None,
        files: FileSystem = OS_FILES,
        clock: Clock = SYSTEM,
    ) -> None:
        """Take the state folder. Arguments as of extend() and Replicator. Raises: as these."""
        interval_s = interval_of(interval_s, continuous=continuous)
        link = make_link(to, tls, compression, connections)
        root = Path(store).absolute()
        with contextlib.ExitStack() as stack:
            home = _home(root, vm, files, clock, stack)
            source = ExtendedSource(home, store=root, hold_s=hold_s)
            runner = _runner(source, _state_path(home, state), link, points, stack)
            # It is failed over, here or there, or has no point yet.
            passing = (InvalidTransition, NoSuchPoint, Fenced)
            loop = CycleLoop(runner, interval_s=interval_s, passing=passing)
            self._resident = Resident(runner, loop, running="extend", metrics=metrics)
            self._closing = stack.pop_all()


def _home(root: Path, vm: str, files: FileSystem, clock: Clock, stack: contextlib.ExitStack) -> VmHome:
    """Return the VM of a store that can be shipped on, before anything is made for it."""
    opened = stack.enter_context(contextlib.closing(Store.open_reading(files, root, clock=clock)))
    home = opened.home(vm)
    require_replica(home)
    return home


def _state_path(home: VmHome, state: PathLike | None) -> Path:
    return home.paths.folder / FOLDER_NAME if state is None else Path(state).absolute()


def _runner(
    source: ExtendedSource,
    path: Path,
    link: Link,
    points: PointPolicy | None,
    stack: contextlib.ExitStack,
) -> CycleRunner:
    """Return what runs the cycles, with the state folder taken for as long as the stack stands."""
    home = source.home
    files, clock = home.files, home.clock
    _checked(load_state(files, path), home.name, path)  # before a lock is made in a folder of something else
    folder = StateFolder(files, path, clock=clock)
    stack.callback(folder.release)
    known = _checked(folder.load(), home.name, path)
    work = Work(
        folder=folder,
        state=known or PrimaryState(VERSION, home.name, clock.guid(), 0, "new", []),
        disks=[],
        link=link,
        files=files,
        clock=clock,
        on_progress=quiet,
        tally=Tally("none", []),
        points=points,
    )

    @contextlib.contextmanager
    def ready() -> Iterator[None]:
        with source.opened(work):
            yield

    return CycleRunner(work, Bookkeeper(files, path, clock=clock), link=link, ready=ready)


def _checked(known: PrimaryState | None, vm: str, folder: Path) -> PrimaryState | None:
    """Refuse a folder that is not that of an extended replication of this VM. Raises: StateError."""
    if known is None:
        return None
    if known.vm != vm:
        raise StateError(
            "the state folder belongs to another VM",
            path=folder,
            expected=vm,
            actual=known.vm,
            hint="give each VM, and each further site, a folder of its own",
        )
    if not known.store:
        raise StateError(
            "the state folder is that of a VM that runs here, not of an extended replication",
            path=folder,
            hint="give each further site a folder of its own",
        )
    return known


def _asked(owner: Owner, request: ReplicateRequest, progress: ProgressCallback) -> ReplicateResult:
    """Have the process that owns the state folder run the cycle."""
    answer = owner.ask(
        "replicate",
        msgspec.to_builtins(request),
        on_progress=lambda report: progress(msgspec.convert(report, type=Progress)),
    )
    result: ReplicateResult = msgspec.convert(answer, type=ReplicateResult)
    return result
