"""The verb `failover reverse`: the side that a VM was failed over to becomes its primary.

    record: reverse ──> state folder "reversing" ──> claim, tables ──> state folder in use ──> first cycle
                                                                                     record: mode Primary

Killed anywhere, the same call goes on. Once the state folder is in use, `capture` may serve the active disks
with it; what the first cycle has not shipped goes with the next one.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.errors import FailoverRefused, StateError
from hvreplica.files import OS_FILES
from hvreplica.progress import quiet
from hvreplica.replication.bookkeeping import Bookkeeper
from hvreplica.replication.primary import Primary
from hvreplica.replication.results import GonePoint, make_result
from hvreplica.replication.reverse import Reversal
from hvreplica.replication.state import VERSION, PrimaryState, StateFolder, Stopped, TrackedDisk, tracked_disk
from hvreplica.replication.verbs import replicate
from hvreplica.replication.work import CONNECTIONS_DEFAULT, Tally, Work, make_link
from hvreplica.store import Store
from hvreplica.store.failover import Intent, advance, begin
from hvreplica.store.policy import follow, policy_of, wish_of
from hvreplica.tracking.identity import disk_identity
from hvreplica.tracking.journal import IntentJournal

if TYPE_CHECKING:
    import os

    from hvreplica.clock import Clock
    from hvreplica.disk import Disk
    from hvreplica.files import FileSystem
    from hvreplica.formats.messages import PointPolicy
    from hvreplica.progress import ProgressCallback
    from hvreplica.replication.results import ReplicateResult
    from hvreplica.store.failover import Failover
    from hvreplica.store.home import VmHome

    PathLike = str | os.PathLike[str]


class ReverseResult(msgspec.Struct, frozen=True):
    """A VM whose primary is this side now.

    state: the state folder for `capture` and `replicate`. union_bytes: what either side wrote since the fork,
    None in a call that found this done. compared: disks that were compared as a whole, because one side does
    not know what it wrote. disks: to run the VM from. gone, warning: of the old site's points, by the rule of
    the VM, which counts there from now on. The rest: see ReplicateResult.
    """

    vm: str
    state: str
    disks: list[str]
    union_bytes: int | None
    compared: list[int]
    kind: str
    changed_bytes: int
    wire_bytes: int
    seconds: float
    point: str
    gone: list[GonePoint] = []
    warning: str | None = None


def failover_reverse(  # noqa: PLR0913 - a verb with its options, all but two by keyword
    store: PathLike,
    vm: str,
    *,
    to: str,
    tls: PathLike,
    state: PathLike | None = None,
    points: PointPolicy | None = None,
    compression: str = "auto",
    connections: int = CONNECTIONS_DEFAULT,
    progress: ProgressCallback | None = None,
    files: FileSystem = OS_FILES,
    clock: Clock = SYSTEM,
) -> ReverseResult:
    """Become the primary of a VM that was failed over here, and bring its old primary to what it holds now.

    to, tls: where `hvreplica serve` runs at the old site, on the store that `store adopt` made there. state:
    a folder for this side's memory; <vm folder>/primary in the store by default. points: what the old site is
    to keep of the VM's points from now on; what is left out is as it was here. The VM must be off for as
    long as this runs. On return the old site has a recovery point. After any failure the same call goes on.
    Raises: InvalidTransition for a VM that is not failed over here, FailoverRefused where the old primary's
    disks are no replica yet, Fenced, Locked, StateError for another VM's folder, HvReplicaError, OSError.
    """
    link = make_link(to, tls, compression, connections)
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(
            contextlib.closing(Store.open_reading(files, Path(store).absolute(), clock=clock))
        )
        home = opened.home(vm)
        path = home.paths.folder / "primary" if state is None else Path(state).absolute()
        record = home.failover()
        if record.mode == "Primary" and record.intent is None:
            options = {"compression": compression, "connections": connections, "points": points}
            options["progress"] = progress
            found = replicate(vm, to=to, tls=tls, state=path, files=files, clock=clock, **options)  # type: ignore[arg-type]
            return _result(home, path, found, None)
        record = _begin(home, path, files)
        folder = StateFolder(files, path, clock=clock)
        stack.callback(folder.release)
        disks = _opened(home, record, stack)
        work = Work(
            folder=folder,
            state=_state(home, record, disks, folder),
            disks=[disks[index] for index in sorted(disks)],
            link=link,
            files=files,
            clock=clock,
            on_progress=progress or quiet,
            tally=Tally("none", [0] * len(disks)),
            points=_policy(home, points),
        )
        stack.callback(work.close_tables)
        work.save()
        work.sweep_logs()
        reversal = Reversal(home)
        found = _cycle(work, reversal)
        _make_journals(work)
        with home.catalog.transaction():
            home.set_failover(
                advance(msgspec.structs.replace(home.failover(), generation=work.state.generation))
            )
        return _result(home, path, found, reversal)


def _policy(home: VmHome, wish: PointPolicy | None) -> PointPolicy | None:
    """Return what the old site is to keep; None where nobody has ever said."""
    if wish is None and home.row().policy is None:
        return None
    policy = policy_of(home)
    return wish_of(policy if wish is None else follow(policy, wish))


def _begin(home: VmHome, path: Path, files: FileSystem) -> Failover:
    """Record the intent, unless the folder cannot be the one for it."""
    with home.catalog.transaction():
        record = begin(home.name, home.failover(), "reverse", intent=Intent("reverse", "reverse"))
        if not record.active:
            raise FailoverRefused(f"VM {home.name!r} has no active disks here", path=home.paths.folder)
        files.make_directory(path)
        home.set_failover(record)
    return record


def _opened(home: VmHome, record: Failover, stack: contextlib.ExitStack) -> dict[int, Disk]:
    disks = {}
    for active in record.active:
        path = home.paths.active(active.disk)
        disks[active.disk] = open_disk(home.files, path, shared=True, clock=home.clock)
        stack.callback(disks[active.disk].close)
    return disks


def _state(home: VmHome, record: Failover, disks: dict[int, Disk], folder: StateFolder) -> PrimaryState:
    """Return the state that a call which was cut has left, or a new one."""
    owner = home.row().owner
    known = folder.load()
    if known is not None and (known.vm != home.name or known.relationship_id != owner.relationship_id):
        raise StateError(
            "the state folder belongs to another VM, or to another life of this one",
            path=folder.folder,
            expected=f"{home.name}, relationship {owner.relationship_id}",
            actual=f"{known.vm}, relationship {known.relationship_id}",
            hint="name another folder with --state, or none",
        )
    if known is not None and (known.stopped is None or known.stopped.kind == "reversing"):
        return known
    # What a folder of an earlier life holds is of no use any more.
    folder.remove_journals()
    generation = max(owner.generation, record.generation, 0 if known is None else known.generation)
    gone = TrackedDisk("", 512, 512, 512, 0, stage="removed")
    return PrimaryState(
        version=VERSION,
        vm=home.name,
        relationship_id=owner.relationship_id,
        generation=generation,
        phase="ready",
        disks=[
            tracked_disk(disks[index]) if index in disks else msgspec.structs.replace(gone)
            for index in range(max(disks) + 1)
        ],
        stopped=Stopped("reversing", home.clock.now_s()),
    )


def _cycle(work: Work, reversal: Reversal) -> ReplicateResult:
    """Meet the old primary's replica and ship what differs."""
    clock = work.clock
    book = Bookkeeper(work.files, work.folder.folder, clock=clock)
    primary = Primary(work, reverse=reversal.agree)
    start_s = clock.monotonic_s()
    try:
        primary.run()
        found = make_result(work, clock.monotonic_s() - start_s)
        book.succeeded(found)
    except Exception as error:
        book.failed(error)
        raise
    finally:
        primary.close()
        book.save()
    return found


def _make_journals(work: Work) -> None:
    """Tell the first `capture` that nothing has changed since: its first cut need not read the disks."""
    files, folder = work.files, work.folder.folder / "journal"
    files.make_directory(folder)
    for place in work.members:
        index, disk = work.indexes[place], work.disks[place]
        journal = IntentJournal.create(
            files,
            folder / f"{index}.ij",
            disk_index=index,
            virtual_bytes=disk.virtual_bytes,
            clock=work.clock,
        )
        with contextlib.closing(journal):
            identity = disk_identity(files, disk.path, data_write_guid=disk.data_write_guid)
            journal.record(identity, clean=True)


def _result(home: VmHome, path: Path, found: ReplicateResult, reversal: Reversal | None) -> ReverseResult:
    return ReverseResult(
        vm=home.name,
        state=str(path),
        disks=[disk.path for disk in found.disks],
        union_bytes=None if reversal is None else reversal.union_bytes,
        compared=[] if reversal is None else reversal.compared,
        kind=found.kind,
        changed_bytes=sum(disk.changed_bytes for disk in found.disks),
        wire_bytes=found.wire_bytes,
        seconds=found.seconds,
        point=found.point,
        gone=found.gone,
        warning=found.warning,
    )
