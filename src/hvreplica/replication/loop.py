"""Run cycles: one at a time, on a schedule or because somebody asks, until stopped.

One thread runs those that are due; others may ask for one between them. Pausing is part of the primary's
state and outlives the process; what went wrong and when to try again does not.
"""

from __future__ import annotations

import logging
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING

from hvreplica.errors import Fenced, HvReplicaError, InvalidTransition, StateError, StoreFull, kept
from hvreplica.progress import quiet
from hvreplica.replication.bookkeeping import FATAL
from hvreplica.replication.live import cut_compared
from hvreplica.replication.primary import Primary
from hvreplica.replication.replica_folders import require_none_stopped
from hvreplica.replication.results import make_result
from hvreplica.replication.schedule import Schedule
from hvreplica.replication.stopped import (
    is_told,
    mark_prepared,
    mark_running,
    require_running,
    suspect_promoted,
)
from hvreplica.replication.work import Tally

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from hvreplica.formats.messages import PointPolicy
    from hvreplica.progress import ProgressCallback
    from hvreplica.replication.bookkeeping import Bookkeeper
    from hvreplica.replication.live import RecordedCut
    from hvreplica.replication.results import ReplicateResult
    from hvreplica.replication.work import Link, Work

_JOINING_S = 1.0  # for which the copy of an added disk may hold up cycles back to back
_LOG = logging.getLogger("hvreplica.replicate")


class CycleRunner:
    """Runs one cycle after the other for one VM. Any thread may call run(); they wait for each other.

    link: to the replica of the cycles that are due, None where each call says it. keep_session: keep its
    session open between cycles. ready: entered around each cycle, to open the disks where they are not.
    """

    def __init__(
        self,
        work: Work,
        book: Bookkeeper,
        *,
        link: Link | None,
        keep_session: bool = False,
        ready: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.work = work
        self.book = book
        self.link = link
        self._keep_session = keep_session
        self._ready = ready
        self._turn = threading.Lock()
        self._stopping = threading.Event()
        self._standing: Primary | None = None
        self._running: Primary | None = None

    def run(
        self,
        *,
        link: Link | None = None,
        with_resync: bool = False,
        takeover: bool = False,
        points: PointPolicy | None = None,
        prepare: bool = False,
        app_consistent: bool = False,
        is_due: Callable[[], bool] = lambda: False,
        on_progress: ProgressCallback = quiet,
    ) -> ReplicateResult:
        """Bring the replica up to date and count it.

        link: instead of the usual one. points: what the replica shall keep from now on. prepare: for a
        planned failover: the VM cannot start from then on. app_consistent: of the cut that is made. is_due:
        whether the copy of an added disk has to make room for the next cycle, which goes on with it. Raises:
        InvalidTransition while paused or held; StateError without a link and when stopped; else as
        replicate().
        """
        with self._turn:
            self._check(link, prepare=prepare)
            if points is not None and points != self.work.points:
                self.work.points = points
                self._close_standing()  # it is told with the claim that begins a session
            primary = self._primary(link, with_resync=with_resync, takeover=takeover, prepare=prepare)
            if prepare:
                self._hold()
            self._running = primary
            if self._stopping.is_set():
                primary.abort()
            self.work.on_progress, self.work.is_due = on_progress, is_due
            start_s = self.work.clock.monotonic_s()
            try:
                with self._ready():
                    self.work.tally = Tally("none", [0] * len(self.work.disks))
                    primary.run(app_consistent=app_consistent)
                    result = make_result(self.work, self.work.clock.monotonic_s() - start_s, prepared=prepare)
            except Exception as error:
                if prepare and isinstance(error, Fenced):
                    suspect_promoted(self.work)
                if not self._stopping.is_set():
                    self.book.failed(error)
                raise
            finally:
                self._running, self.work.on_progress = None, quiet
                if primary is not self._standing:
                    primary.close()
            self.book.succeeded(result)
            return result

    def cut_compared(self, *, app_consistent: bool = False) -> RecordedCut:
        """Cut disks at rest, between two cycles."""
        with self._turn:
            self._check_running()
            with self._ready():
                return cut_compared(self.work, app_consistent=app_consistent)

    def cancel_prepare(self, *, link: Link | None = None, force: bool = False) -> None:
        """Let the VM run here again, once the replica says that it was not promoted; durable on return.

        force: do not ask it. Raises: Fenced, FailoverRefused where it was; StateError without a link.
        """
        with self._turn:
            self._check_running()
            state = self.work.state
            if state.stopped is not None and state.stopped.kind != "prepared":
                require_running(state, self.work.folder.folder)
            if is_told(state) and not force:
                self._check_link(link)
                self._ask_promoted(link)
            elif state.stopped is not None and state.phase == "ready" and not force:
                self._ask_promoted_if_there(link)
            mark_running(self.work)

    def _ask_promoted_if_there(self, link: Link | None) -> None:
        """Ask a replica that was told nothing; it may have failed over unplanned. Raises: Fenced."""
        if link is None and self.link is None:
            return
        try:
            self._ask_promoted(link)
        except Fenced:
            raise
        except HvReplicaError as error:
            _LOG.warning("the replica does not say whether it was promoted: %s", kept(error))

    def _ask_promoted(self, link: Link | None) -> None:
        """Meet the replica, which refuses once it was promoted. Raises: Fenced, what stands in the way."""
        with self._ready():
            primary = self._primary(link, prepare=True)
            self._running = primary
            try:
                primary.meet()
            finally:
                self._running = None

    def stop(self) -> None:
        """Make a cycle or a cut that runs fail soon, and refuse all others; from any thread."""
        self._stopping.set()
        if self.work.machine is not None:
            self.work.machine.stop()
        running = self._running
        if running is not None:
            running.abort()

    @property
    def is_stopping(self) -> bool:
        """Whether stop() was called: what fails now is no failure."""
        return self._stopping.is_set()

    def close(self) -> None:
        """Stop, wait for the cycle that runs, and end the session."""
        self.stop()
        with self._turn:
            self._close_standing()
            self.work.close_tables()
            self.book.save()

    def _check_running(self) -> None:
        if self._stopping.is_set():
            raise StateError("the process is being stopped", hint="call again when it runs again")

    def _check(self, link: Link | None, *, prepare: bool) -> None:
        self._check_running()
        require_running(self.work.state, self.work.folder.folder, prepare=prepare)
        if self.work.state.paused:
            raise InvalidTransition(
                "replication of this VM is paused",
                path=self.work.folder.folder,
                hint="go on with `hvreplica resume --state DIR`",
            )
        self._check_link(link)

    def _check_link(self, link: Link | None) -> None:
        if link is None and self.link is None:
            raise StateError(
                "it is not known where the replica is", hint="say so with --to HOST:PORT and --tls DIR"
            )

    def _hold(self) -> None:
        """Let the VM start no more. Raises: InvalidTransition where another of its replicas may run it."""
        work, was_held = self.work, self.work.state.stopped is not None
        mark_prepared(work)
        try:
            # After the mark: of two calls at once, for two replicas, each sees the other's, and none goes on.
            require_none_stopped(work.files, work.folder.folder)
        except InvalidTransition:
            if not was_held:
                mark_running(work)
            raise

    def _primary(
        self, link: Link | None, *, with_resync: bool = False, takeover: bool = False, prepare: bool = False
    ) -> Primary:
        chosen = link or self.link
        assert chosen is not None
        self.work.link = chosen
        is_usual = (link is None or link == self.link) and not (with_resync or takeover or prepare)
        if is_usual and self._standing is not None:
            return self._standing
        self._close_standing()  # or the new session would find the old one in its way
        primary = Primary(
            self.work,
            with_resync=with_resync,
            takeover=takeover,
            keep_session=is_usual and self._keep_session,
            prepare=prepare,
            wait=self._stopping.wait,
        )
        if is_usual:
            self._standing = primary
        return primary

    def _close_standing(self) -> None:
        standing, self._standing = self._standing, None
        if standing is not None:
            standing.close()


class CycleLoop:
    """Runs the cycles that are due. start() makes its thread; step() is one turn of it.

    interval_s: between the beginnings of cycles; None for back to back. passing: errors that are over by
    themselves here, so that they do not stop it for good.
    """

    def __init__(
        self,
        runner: CycleRunner,
        *,
        interval_s: float | None,
        passing: tuple[type[HvReplicaError], ...] = (),
    ) -> None:
        self._runner = runner
        self._passing = passing
        self._work = runner.work
        self._clock = runner.work.clock
        self._lock = threading.Lock()
        self._schedule = Schedule(interval_s, now_s=self._clock.monotonic_s())
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="hvreplica cycles", daemon=True)
        self.interval_s = interval_s

    def start(self) -> None:
        """Begin with the first cycle now."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the caller stops the runner first."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()

    def resume(self) -> None:
        """Run the next cycle now, whatever went wrong before."""
        with self._lock:
            self._schedule.resume(self._clock.monotonic_s())
        self._wake.set()

    def mended(self) -> None:
        """Take note that a cycle that somebody asked for went well: nothing is to be waited out any more."""
        with self._lock:
            is_failing = self._schedule.is_failing
        if is_failing:
            self.resume()

    def wait_s(self) -> float | None:
        """Return the seconds until the next cycle begins; None while none will."""
        with self._lock:
            state = self._work.state
            if self._schedule.is_stopped or state.paused or state.stopped is not None:
                return None
            return max(self._schedule.start_s - self._clock.monotonic_s(), 0.0)

    def step(self) -> float | None:
        """Run a cycle if one is due; return wait_s()."""
        wait_s = self.wait_s()
        if wait_s is None or wait_s > 0:
            return wait_s
        with self._lock:
            count = self._schedule.begin(self._clock.monotonic_s())
        self._runner.book.missed(count)
        try:
            until_s = self._clock.monotonic_s() + (self.interval_s or _JOINING_S)
            result = self._runner.run(is_due=lambda: self._clock.monotonic_s() >= until_s)
        except Exception as error:
            state = self._work.state
            is_held = state.paused or state.stopped is not None
            is_pause = isinstance(error, InvalidTransition) and is_held
            if not (is_pause or self._stopping or self._runner.is_stopping):
                self._failed(kept(error))
        else:
            self._tell(result)
            with self._lock:
                count = self._schedule.end(self._clock.monotonic_s())
            self._runner.book.missed(count)
        return self.wait_s()

    def _tell(self, result: ReplicateResult) -> None:
        """Log a cycle that went well; those of disks that are tracked may be several a second."""
        changed_bytes = sum(disk.changed_bytes for disk in result.disks)
        _LOG.log(
            logging.DEBUG if self._work.machine is not None else logging.INFO,
            "%s: %s in %.1f s, %d bytes changed, %d sent, recovery point %s",
            result.vm,
            {"initial": "first copy", "delta": "changes replicated"}.get(result.kind, "nothing changed"),
            result.seconds,
            changed_bytes,
            result.wire_bytes,
            result.point,
        )

    def _failed(self, error: Exception) -> None:
        is_fatal = isinstance(error, FATAL) and not isinstance(error, self._passing)
        is_full = isinstance(error, StoreFull)
        with self._lock:
            now_s = self._clock.monotonic_s()
            count = self._schedule.fail(now_s, is_fatal=is_fatal, waits_for_room=is_full)
        self._runner.book.missed(count)
        wait_s = self.wait_s()
        if is_full:
            _LOG.error("replication waits for room at the replica, again in %.0f s: %s", wait_s or 0, error)
        elif isinstance(error, (HvReplicaError, OSError)):
            again = "it stopped until it is resumed" if wait_s is None else f"again in {wait_s:.0f} s"
            _LOG.error("replication failed, %s: %s", again, error)
        else:
            _LOG.error("replication failed by a bug in hvreplica", exc_info=error)

    def _run(self) -> None:
        while not self._stopping:
            wait_s = self.step()
            self._wake.wait(wait_s)
            self._wake.clear()
