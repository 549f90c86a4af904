"""One replicate call at the primary: what to do next, by what both sides hold.

    new ──> initial ──(every window durable, committed)──> ready
    ready: compare ──> logs closed ("cut") ──> shipped ("acknowledged") ──> fingerprints follow, logs go
           (or a cut of what live tracking knows)

Each step is written to the state folder before it is taken. A call that finds an unfinished step finishes it
first; killed anywhere, the next call goes on from there. A connection that breaks is made again a few times.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING

from hvreplica.clock import iso_time
from hvreplica.errors import Fenced, FormatError, HvReplicaError, Locked, LogError, ReplicaDiverged, kept
from hvreplica.formats import messages
from hvreplica.progress import Progress
from hvreplica.replication import cycle
from hvreplica.replication.initial import prepare_initial, replicate_initially, settle_initial
from hvreplica.replication.joining import send_joining
from hvreplica.replication.live import cut_live, drop_damaged
from hvreplica.replication.repair import repair
from hvreplica.replication.results import GonePoint
from hvreplica.replication.resync import resync
from hvreplica.replication.shape import agree, differs, leave_gap
from hvreplica.replication.state import NIL, shapes
from hvreplica.replication.stopped import confirm_prepared
from hvreplica.replication.version import SOFTWARE

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterator

    from hvreplica.replication.session import ReplicaSession
    from hvreplica.replication.work import Work

_LOG = logging.getLogger("hvreplica.replicate")
RETRY_AFTER_S = (1.0, 2.0, 4.0)  # a line that is gone for longer is for the next call
_DAMAGE = (FormatError, LogError, FileNotFoundError)  # what a log that is damaged on this side may raise
_RESYNC_HINT = "--resync compares both sides by fingerprints and sends only what differs"


class Primary:
    """Drives replicate calls. run() from one thread, one call after the other; abort() from any.

    with_resync: do not believe the tables; takeover: become the writer of another's VM; both for the first
    call. keep_session: leave the session open between calls. prepare: tell the replica at the end that this
    was all, for a planned failover. reverse: makes the tables of a VM that was failed over to this side.
    wait: called before a retry; whether to give up.
    """

    def __init__(
        self,
        work: Work,
        *,
        with_resync: bool = False,
        takeover: bool = False,
        keep_session: bool = False,
        prepare: bool = False,
        reverse: Callable[[Work, ReplicaSession, messages.Claimed], None] | None = None,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._work = work
        self._with_resync = with_resync or takeover
        self._takeover = takeover
        self._keep_session = keep_session
        self._prepare = prepare
        self._reverse = reverse
        self._wait = wait or threading.Event().wait
        self._met = False
        self._is_prepared = False
        self._session: ReplicaSession | None = None
        self._counted_bytes = 0  # of the session's wire_bytes, those that are in a tally
        self._applied: uuid.UUID | None = None
        self._damaged: list[int] = []
        self._is_cut = False
        self._is_aborted = False
        self._app_consistent = False

    def run(self, *, app_consistent: bool = False) -> None:
        """Bring the replica to what the disks hold now.

        app_consistent: whether the cut that is made may be called so. Raises: what stands in the way, once
        retries are used up.
        """
        waits = iter(RETRY_AFTER_S)
        durable_bytes, was_damaged = 0, False
        self._is_cut = self._is_prepared = False
        self._app_consistent = app_consistent
        while True:
            try:
                self._run_once()
                if self._prepare:
                    with self._in_session() as session:
                        confirm_prepared(self._work, session, is_whole=not differs(self._work.state))
            except BaseException as error:
                self.close()
                self._work.close_tables()
                if isinstance(error, _DAMAGE) and not was_damaged and drop_damaged(self._work):
                    was_damaged, self._is_cut = True, False  # the next cut has all that was dropped
                    kept(error)
                    continue
                if not isinstance(error, HvReplicaError):
                    raise
                if self._durable_bytes() > durable_bytes:
                    durable_bytes, waits = self._durable_bytes(), iter(RETRY_AFTER_S)  # it gets on, if slowly
                wait_s = next(waits, None) if error.retryable and self._met else None
                if wait_s is None:
                    raise
                _LOG.warning("%s; trying again in %g s", error, wait_s)
                if self._wait(wait_s):
                    raise
                kept(error)
            else:
                return

    def meet(self) -> None:
        """Agree with the replica on what it holds, as its VM's writer, and send nothing.

        Raises: Fenced where the VM was promoted there; what else stands in the way.
        """
        try:
            with self._in_session():
                pass
        finally:
            self.close()

    def close(self) -> None:
        """End the session, if one is open."""
        session, self._session = self._session, None
        if session is not None:
            self._count(session)
            session.close()

    def abort(self) -> None:
        """Make this call, and all later ones, fail soon; from any thread."""
        self._is_aborted = True
        session = self._session
        if session is not None:
            session.abort()

    def _run_once(self) -> None:
        """Do what is left of a call."""
        if self._work.machine is not None:
            with self._in_session() as session:
                if self._work.state.phase != "ready":
                    replicate_initially(self._work, session)
                self._deliver(session)
                if not self._is_cut:
                    cut_live(self._work, on_ready=lambda: self._app_consistent)
                    self._is_cut = True
                    self._deliver(session)
            return
        self._catch_up()
        if not self._is_cut and (self._work.tally.kind != "initial" or self._work.state.mixed):
            # The comparison may take hours: no connection is kept open meanwhile.
            changed = cycle.cut(self._work, "app" if self._app_consistent else "crash")
            self._is_cut = True
            if changed:
                self._catch_up()

    def _catch_up(self) -> None:
        """Finish in one session whatever is unfinished on either side."""
        with self._in_session() as session:
            # What waits was cut by whoever tracks the disks: a comparison would read them for nothing. Only
            # now, for a resync has dropped it.
            self._is_cut = self._is_cut or bool(self._work.state.pending)
            if self._work.state.phase == "ready":
                self._deliver(session)
            else:
                replicate_initially(self._work, session)

    def _durable_bytes(self) -> int:
        transfer = self._work.state.transfer
        return 0 if transfer is None else sum(transfer.positions)

    @contextlib.contextmanager
    def _in_session(self) -> Iterator[ReplicaSession]:
        """Yield the session in which both sides agree on what the replica holds."""
        if self._session is None:
            self._session = self._open_session()
        yield self._session
        self._count(self._session)
        if not self._keep_session:
            self.close()

    def _count(self, session: ReplicaSession) -> None:
        self._work.tally.wire_bytes += session.wire_bytes - self._counted_bytes
        self._counted_bytes = session.wire_bytes

    def _open_session(self) -> ReplicaSession:
        if not self._with_resync and not self._is_prepared:
            # What earlier calls sent is hashed again, before the session: the replica does not wait for that.
            prepare_initial(self._work)
            self._is_prepared = True
        may_outrun, was_fenced = self._takeover or self._is_reversing, False
        while True:
            try:
                return self._meet()
            except Fenced as error:
                if was_fenced or not may_outrun or error.generation < self._work.state.generation:
                    raise
                was_fenced, self._work.state.generation = True, error.generation
            except ReplicaDiverged as error:
                if not self._left_gap(error):
                    raise

    def _left_gap(self, error: ReplicaDiverged) -> bool:
        """Leave out an index that the replica says is that of a removed disk, for a state that was lost."""
        state, index = self._work.state, error.removed_disk
        if index is None or not self._takeover or state.phase != "new":
            return False
        if index >= len(state.disks) or len(state.disks) >= messages.DISKS_MAX:
            return False
        if self._work.machine is not None:  # its exports and journals have their indexes
            error.hint = f"stop capture, start it again with --remove-disk {index}, then take over"
            return False
        leave_gap(state, index)
        return True

    def _meet(self) -> ReplicaSession:
        session = self._work.session()
        self._session, self._counted_bytes, self._applied = session, 0, None
        self._damaged = []
        if self._is_aborted:
            session.abort()
        try:
            # Durable before it is used: a state folder that was copied or restored claims what is taken.
            state = self._work.state
            before, state.generation = state.generation, state.generation + 1
            self._work.save()
            removed = [index for index, disk in enumerate(state.disks) if not disk.is_here]
            try:
                is_reversing = self._is_reversing
                claimed = session.claim(
                    state,
                    shapes(state),
                    removed,
                    software=SOFTWARE,
                    points=self._work.points,
                    reverse=is_reversing,
                    resync=self._with_resync,
                )
            except Fenced:
                # It was not taken. A fenced primary that tries again and again must not count up past the one
                # that owns the VM, which would make it the owner by mere persistence.
                state.generation = before
                self._work.save()
                raise
            self._met = True
            if is_reversing and self._reverse is not None:
                self._reverse(self._work, session, claimed)
            elif self._with_resync:
                self._resync(session, claimed)
            else:
                self._agree(claimed)
        except BaseException:
            self.close()
            raise
        return session

    @property
    def _is_reversing(self) -> bool:
        """Whether the tables are still to be made for a VM that was failed over to this side."""
        stopped = self._work.state.stopped
        return self._reverse is not None and stopped is not None and stopped.kind == "reversing"

    def _agree(self, claimed: messages.Claimed) -> None:
        """Bring our record in line with what the replica says that it holds, or refuse to go on."""
        state = self._work.state
        transfer = state.transfer
        if transfer is not None and transfer.kind == "initial" and claimed.transfer == transfer.transfer_id:
            return  # an unfinished initial replication; what it replaces does not matter
        if claimed.damage:
            raise ReplicaDiverged(
                f"the replica's copy of this VM is damaged: {'; '.join(claimed.damage)}",
                path=self._work.required_link.address,
                hint="--resync sends a whole copy again and puts it in its place",
            )
        if transfer is not None and transfer.stage != "cutting" and claimed.last_point == transfer.point_id:
            # It was committed there, and the answer was lost on its way to us.
            if transfer.kind == "initial":
                settle_initial(self._work, transfer)
            else:
                transfer.stage = "acknowledged"
                self._work.save()
        elif claimed.last_point != state.last_point:
            raise self._diverged(claimed)
        if agree(state, claimed):
            self._work.save()

    def _diverged(self, claimed: messages.Claimed) -> ReplicaDiverged:
        address, last_point = self._work.required_link.address, self._work.state.last_point
        if claimed.last_point is None:
            return ReplicaDiverged(
                "the replica no longer has its copy of this VM",
                path=address,
                expected=f"point {last_point}",
                actual=f"phase {claimed.phase}",
                hint="is this the right replica? if so, --resync sends a whole copy again",
            )
        return ReplicaDiverged(
            "the replica is on another point than the one that this state folder sent last",
            path=address,
            expected=last_point or "no point",
            actual=claimed.last_point,
            hint=_RESYNC_HINT,
        )

    def _resync(self, session: ReplicaSession, claimed: messages.Claimed) -> None:
        """Forget what we believed: take the replica's fingerprints, or begin anew if it has nothing sound."""
        if claimed.last_point is not None and not claimed.damage:
            resync(self._work, session, claimed)
        else:
            with self._work.lock:
                state = self._work.state
                state.phase, state.last_point, state.transfer = "new", None, None
                self._work.save()
        self._with_resync = self._is_cut = False

    def _deliver(self, session: ReplicaSession) -> None:
        """Ship what was cut, oldest first, and have it applied."""
        work = self._work
        work.open_tables()
        work.check_tables()
        cycle.drop_unfinished(work)
        point_id = None
        while (transfer := work.next_transfer()) is not None:
            if transfer.stage == "cut":
                cycle.ship(work, session, transfer)
            point_id = None if work.state.pending else transfer.point_id
            with self._applying(session, point_id):
                cycle.settle(work, transfer)
        if point_id is None:
            with self._applying(session, work.state.last_point or NIL):
                pass
        damaged, self._damaged = self._damaged, []
        if damaged:
            repair(work, session, damaged)
        send_joining(work, session)

    @contextlib.contextmanager
    def _applying(self, session: ReplicaSession, point_id: uuid.UUID | None) -> Iterator[None]:
        """Let the replica apply a point while the block runs, which asks it nothing. None: nothing to do."""
        if point_id is None or self._applied == point_id:
            yield
            return
        work = self._work
        work.on_progress(Progress("apply", 0, 1))
        session.begin(messages.Apply(point_id))
        yield
        try:
            applied = session.finish(messages.Applied)
            self._damaged = applied.damaged
        except Locked as error:
            # An export holds the disks. The point is durable in the spool, further ones queue up behind it.
            _LOG.warning("the replica has the point and applies it later: %s", error)
            work.tally.waits_for = str(error)
        else:
            self._applied, work.tally.waits_for = point_id, None
            self._tell_gone(applied)
        work.on_progress(Progress("apply", 1, 1))

    def _tell_gone(self, applied: messages.Applied) -> None:
        """Say what the replica let go, and what it will: nothing goes silently."""
        for point in applied.gone:
            instant = iso_time(point.instant_s)
            self._work.tally.gone.append(GonePoint(str(point.point_id), instant, point.reason))
            _LOG.info("the replica let point %s of %s go: %s", point.point_id, instant, point.reason)
        self._work.tally.warning = applied.warning
        if applied.warning is not None:
            _LOG.warning("at the replica %s", applied.warning)
