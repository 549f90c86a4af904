"""What the process that owns a VM's state folder answers to others: cut, replicate, status, pause, resume.

Each verb is a method; its arguments come from outside and are checked here. What the answers mean stands in
results.py and status.py.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from hvreplica.capture.guest_agent import DEFAULT_FREEZE_LIMIT_S, FREEZE_LIMIT_MAX_S, GuestAgent
from hvreplica.clock import iso_time
from hvreplica.errors import FreezeFailed, InvalidTransition, ProtocolViolation, StateError, Unreachable
from hvreplica.formats.messages import PointPolicy  # noqa: TC001 - msgspec resolves the annotations
from hvreplica.replication.live import RecordedCut, cut_live
from hvreplica.replication.replica_folders import require_none_stopped
from hvreplica.replication.results import CutLog, CutResult
from hvreplica.replication.shape import removed_indexes
from hvreplica.replication.status import Cycles, NamedReplica, make_status
from hvreplica.replication.stopped import require_own_disks, require_running
from hvreplica.replication.work import CONNECTIONS_DEFAULT, CONNECTIONS_MAX, make_link

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hvreplica.capture.clients import ClientGate
    from hvreplica.replication.loop import CycleLoop, CycleRunner
    from hvreplica.replication.results import ReplicateResult
    from hvreplica.replication.status import ReplicationStatus
    from hvreplica.replication.work import Link, Work

    Tell = Callable[[object], None]

_RESTART_HINT = "stop it, then start it again with the disks of now; --remove-disk says which one is gone"
_NOTHING_FROZEN = (
    "the guest froze no file system, so the cut is what a power cut would leave: has it mounted any that its"
    " agent can freeze?"
)
_NO_COPY_YET = (
    "the replica has no copy of the VM yet: the first one holds what was cut, and no point shows it alone"
)
Text = Annotated[str, Meta(min_length=1, max_length=4096)]


class CutRequest(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """freeze: the Unix socket of the guest's agent, an absolute path.

    app_consistent: whether what runs in the guest was brought to rest by other means.
    """

    freeze: Text | None = None
    freeze_limit_s: Annotated[float, Meta(gt=0, le=FREEZE_LIMIT_MAX_S)] = DEFAULT_FREEZE_LIMIT_S
    app_consistent: bool = False


class ReplicateRequest(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """vm, disks, remove_disks: checked against the state where they are given.

    to, tls: None for the usual replica. points: None for what was said before. prepare: for a planned
    failover; force: although clients use the disks, which loses what they write after the cut.
    app_consistent: see CutRequest.
    """

    vm: Text | None = None
    disks: list[Text] = []
    to: Text | None = None
    tls: Text | None = None
    compression: Text = "auto"
    connections: Annotated[int, Meta(ge=1, le=CONNECTIONS_MAX)] = CONNECTIONS_DEFAULT
    resync: bool = False
    takeover: bool = False
    remove_disks: list[Text] = []
    points: PointPolicy | None = None
    prepare: bool = False
    force: bool = False
    app_consistent: bool = False


class CancelPrepareRequest(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """to, tls: None for the usual replica. force: do not ask it whether it was promoted."""

    to: Text | None = None
    tls: Text | None = None
    force: bool = False


class NoArguments(msgspec.Struct, forbid_unknown_fields=True):
    """Of a verb that has none."""


class Control:
    """Answers the verbs of one VM. Any thread may call.

    running: the name of the process's own verb. clients: who uses the disks, where it serves them. replicas:
    what answers for the VM's further ones, by name.
    """

    def __init__(
        self,
        runner: CycleRunner,
        loop: CycleLoop | None,
        *,
        running: str,
        clients: ClientGate | None = None,
        replicas: Mapping[str, Control] | None = None,
    ) -> None:
        self._replicas = dict(replicas or {})
        self._runner = runner
        self._loop = loop
        self._running = running
        self._clients = clients

    def handle(self, verb: str, arguments: dict[str, Any], tell: Tell) -> object:
        """Return the answer to a verb; tell(progress) while it runs. Raises: what stands in its way."""
        match verb:
            case "cut":
                return self.cut(_checked(arguments, CutRequest), tell)
            case "replicate":
                return self.replicate(_checked(arguments, ReplicateRequest), tell)
            case "cancel-prepare":
                self.cancel_prepare(_checked(arguments, CancelPrepareRequest))
                return self.status()
            case "status" | "pause" | "resume" | "reset-statistics":
                _checked(arguments, NoArguments)
                if verb == "pause":
                    self.pause()
                elif verb == "resume":
                    self.resume()
                elif verb == "reset-statistics":
                    self.reset()
                return self.status()
            case _:
                raise ProtocolViolation(
                    "no such verb", actual=verb, hint="both programs should be of one release"
                )

    def cut(self, request: CutRequest, tell: Tell) -> CutResult:
        """Cut all disks at one instant; tell {"instant": …} as soon as the guest may go on."""
        work = self._runner.work
        require_running(work.state, work.folder.folder)
        require_own_disks(work.state, work.folder.folder)
        if work.machine is None:
            if request.freeze is not None:
                raise StateError(
                    "no guest can be frozen: this process does not serve the VM's disks",
                    path=work.folder.folder,
                    hint="serve them with `hvreplica capture`",
                )
            return cut_result(work, self._runner.cut_compared(app_consistent=request.app_consistent))
        frozen: list[int] = []
        with contextlib.ExitStack() as held:

            def freeze() -> bool:
                if request.freeze is not None:
                    agent = GuestAgent(request.freeze, clock=work.clock)
                    frozen.append(held.enter_context(agent.frozen(limit_s=request.freeze_limit_s)))
                return request.app_consistent or any(frozen)

            def go_on() -> None:
                held.close()  # raises where the guest did not stand still until now
                tell({"instant": iso_time(work.clock.now_s())})

            try:
                recorded = cut_live(work, on_ready=freeze, on_instant=go_on)
            except (FreezeFailed, Unreachable):
                self._runner.book.freeze_failed()
                raise
        return cut_result(work, recorded, frozen=frozen[0] if frozen else None)

    def replicate(self, request: ReplicateRequest, tell: Tell) -> ReplicateResult:
        """Run one cycle now."""
        self._require_same(request)
        work = self._runner.work
        if request.prepare:
            require_own_disks(work.state, work.folder.folder)
            require_none_stopped(work.files, work.folder.folder)
            self._shut(force=request.force)
        try:
            result = self._runner.run(
                link=_link(request),
                with_resync=request.resync,
                takeover=request.takeover,
                points=request.points,
                prepare=request.prepare,
                app_consistent=request.app_consistent,
                on_progress=tell,
            )
        finally:
            if self._clients is not None and request.prepare and work.state.stopped is None:
                self._clients.open()  # it was refused before the VM was held
        if self._loop is not None:
            self._loop.mended()
        return result

    def cancel_prepare(self, request: CancelPrepareRequest) -> None:
        """Let the VM run here again."""
        self._runner.cancel_prepare(link=_link(request), force=request.force)
        work = self._runner.work
        require_none_stopped(work.files, work.folder.folder)  # else the VM may not start all the same
        if self._clients is not None:
            self._clients.open()
        if self._loop is not None:
            self._loop.resume()

    def _shut(self, *, force: bool) -> None:
        """Let no client in any more. Raises: InvalidTransition where one is inside and need not go."""
        count = 0 if self._clients is None else self._clients.shut(cut_off=force)
        if count:
            raise InvalidTransition(
                f"the VM seems to run: {count} clients use its disks",
                path=self._runner.work.folder.folder,
                hint="shut the VM down first; with --force they are cut off, and lose what is not flushed",
            )

    def status(self) -> ReplicationStatus:
        """Return how things stand."""
        work = self._runner.work
        cycles = None
        if self._loop is not None and self._runner.link is not None:
            cycles = Cycles(self._runner.link.address, self._loop.interval_s or 0.0, self._loop.wait_s())
        found = make_status(
            work.state,
            self._runner.book.record,
            now_s=work.clock.now_s(),
            tracking=() if work.machine is None else work.machine.status(),
            running=self._running,
            cycles=cycles,
            missed_bytes=0 if work.fan is None else work.fan.missed_bytes(work),
        )
        further = [NamedReplica(name, control.status()) for name, control in self._replicas.items()]
        return msgspec.structs.replace(found, replicas=further)

    def pause(self) -> None:
        """Begin no further cycle until resumed, in later processes too; durable on return."""
        self._set_paused(is_paused=True)

    def resume(self) -> None:
        """Go on with the next cycle now, also where an error had stopped them; durable on return."""
        self._set_paused(is_paused=False)
        if self._loop is not None:
            self._loop.resume()

    def reset(self) -> None:
        """Begin the statistics anew."""
        self._runner.book.reset()

    def _set_paused(self, *, is_paused: bool) -> None:
        work = self._runner.work
        with work.lock:
            work.state.paused = is_paused
            work.save()

    def _require_same(self, request: ReplicateRequest) -> None:
        state, folder = self._runner.work.state, self._runner.work.folder.folder
        if request.vm not in {None, state.vm}:
            raise StateError(
                "the state folder belongs to another VM", path=folder, expected=state.vm, actual=request.vm
            )
        known = [disk.path for disk in state.disks if disk.is_here]
        if request.disks and sorted(request.disks) != sorted(known):
            raise StateError(
                "the running process has other disks",
                path=folder,
                expected=", ".join(known),
                actual=", ".join(request.disks),
                hint=_RESTART_HINT,
            )
        for index in removed_indexes(state, request.remove_disks, folder):
            if state.disks[index].is_here:
                raise StateError(
                    "the running process has this disk",
                    path=folder,
                    actual=state.disks[index].path,
                    hint=_RESTART_HINT,
                )


def cut_result(work: Work, recorded: RecordedCut, *, frozen: int | None = None) -> CutResult:
    """Return what is told of a cut."""
    transfer = recorded.transfer
    is_early = work.state.phase == "new"
    logs = [] if transfer is None else transfer.logs
    paths = [work.folder.log_path(log.log_id) for log in logs]
    return CutResult(
        logs=[
            CutLog(log.disk_index, str(log.log_id), str(path), log.log_bytes, entries)
            for log, path, entries in zip(logs, paths, recorded.entries, strict=True)
        ],
        held_us=round(recorded.held_us, 1),
        instant=iso_time(recorded.instant_s),
        point=None if transfer is None or is_early else str(transfer.point_id),
        frozen=frozen,
        warnings=[_NOTHING_FROZEN] * (frozen == 0) + [_NO_COPY_YET] * is_early,
    )


def _link(request: ReplicateRequest | CancelPrepareRequest) -> Link | None:
    if request.to is None:
        return None
    if request.tls is None:
        message = "--to needs --tls"
        raise ValueError(message)
    if isinstance(request, CancelPrepareRequest):
        return make_link(request.to, request.tls, "auto", CONNECTIONS_DEFAULT)
    return make_link(request.to, request.tls, request.compression, request.connections)


def _checked(arguments: dict[str, Any], kind: type[Any]) -> Any:
    try:
        return msgspec.convert(arguments, type=kind)
    except msgspec.ValidationError as error:
        raise ProtocolViolation(f"the arguments are not those of the verb: {error}") from None
