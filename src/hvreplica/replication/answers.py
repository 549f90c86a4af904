"""The replica's side of one session: questions answered in turn, frames put where they belong.

Threads: one answers questions (the control connection's own), one for each data connection receives frames,
and one for the answer that takes long, while the control thread says Working. A frame counts only when the
sink has it; the watermark is the number below which every frame counts.
"""

from __future__ import annotations

import logging
import threading
import uuid
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from hvreplica.errors import (
    Fenced,
    HvReplicaError,
    PeerClosed,
    ProtocolViolation,
    ReplicaDiverged,
    StateError,
    kept,
)
from hvreplica.formats import messages
from hvreplica.formats.ranges import pack_rows
from hvreplica.store import AlreadyHave, LogSink, LogSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from hvreplica.store import InitialSink, VmReplica
    from hvreplica.transport import Channel, Frame, PeerIdentity

    Sink = InitialSink | LogSink

_Done = TypeVar("_Done")
_LOG = logging.getLogger("hvreplica.serve")
_WORKING_EVERY_S = 5.0
_OUT_OF_ORDER_MAX = 4096  # frames ahead of a missing one; N connections are never that far apart


class AnswerSession:
    """One primary's session for one VM. answer_forever() runs in the control connection's thread."""

    def __init__(self, replica: VmReplica, channel: Channel[messages.Question], *, token: bytes) -> None:
        self.token = token
        self.peer: PeerIdentity = channel.peer
        self._replica = replica
        self._control = channel
        self._lock = threading.Lock()
        self._incoming: _Incoming | None = None
        self._aborted: HvReplicaError | None = None

    def answer_forever(self) -> None:
        """Answer until the primary closes. Raises: PeerClosed at the end, ProtocolViolation, FormatError."""
        while True:
            question = self._control.receive_message()
            try:
                answer = while_working(self._control, partial(self._answer, question))
            except (HvReplicaError, OSError) as error:
                _LOG.warning("%s: %s", self._control.address, error)
                answer = refusal(kept(error))
            except Exception as error:
                # A bug of ours must not leave the primary waiting, nor end the server for the other VMs.
                _LOG.exception("%s: cannot answer", self._control.address)
                answer = refusal(kept(error))
            self._control.send_message(answer)

    def receive(
        self, channel: Channel[messages.Question], transfer_id: uuid.UUID, *, connections_max: int
    ) -> None:
        """Take the frames of one data connection until its end.

        A failure is told on the control connection.
        """
        with self._lock:
            incoming = self._incoming
        if incoming is None or incoming.transfer_id != transfer_id:
            raise ProtocolViolation(
                "a data connection for a transfer that did not begin", actual=str(transfer_id)
            )
        incoming.enter(channel, connections_max)
        try:
            channel.send_message(messages.Attached())
            while (frame := channel.receive_frame()) is not None:
                incoming.write(frame)
        except (HvReplicaError, OSError) as error:
            incoming.fail(error)
            if not isinstance(error, (PeerClosed, Fenced)):
                _LOG.warning("%s: %s", channel.address, error)
        except Exception as error:
            incoming.fail(error)
            _LOG.exception("%s: cannot take a frame", channel.address)
        finally:
            incoming.leave(channel)

    def abort(self, reason: HvReplicaError) -> None:
        """End the session from any thread; its questions and frames fail with `reason`."""
        with self._lock:
            self._aborted = self._aborted or kept(reason)
        self._fail_incoming(reason)
        self._control.abort()

    def close(self) -> None:
        """Give the VM back once the control connection has ended; waits for what is being written."""
        self._fail_incoming(PeerClosed("the control connection ended"))
        self._replica.close()

    def _fail_incoming(self, reason: HvReplicaError) -> None:
        with self._lock:
            incoming = self._incoming
        if incoming is not None:
            incoming.fail(reason)

    def _answer(self, question: messages.Question) -> messages.Message:
        if self._aborted is not None:
            raise kept(self._aborted)
        match question:
            case messages.BeginInitial():
                return self._begin_initial(question)
            case messages.BeginLogs():
                return self._begin_logs(question)
            case messages.Checkpoint():
                return messages.Durable(self._current().checkpoint())
            case messages.EndTransfer():
                return self._end(question)
            case messages.Apply():
                return self._apply(question)
            case _:
                return self._answer_aside(question)

    def _answer_aside(self, question: messages.Question) -> messages.Message:
        """Answer what does not belong to the usual way of a transfer."""
        match question:
            case messages.LogTimes():
                self._current().take_times(question)
                return messages.Noted()
            case messages.Prepare():
                return messages.Prepared(self._replica.prepare(question.point_id))
            case messages.ChangesRequest():
                rows, is_last = self._replica.changes(question.disk_index, question.disk_offset)
                return messages.Changes(pack_rows(rows), is_last)
            case messages.FingerprintsRequest():
                return self._fingerprints(question)
            case messages.RepairBlocks():
                self._replica.repair(question.disk_index, question.blocks, question.data)
                return messages.Repaired(whole=False)
            case messages.RepairEnd():
                whole = self._replica.end_repair(question.disk_index, is_proven=question.proven)
                return messages.Repaired(whole)
            case _:
                raise ProtocolViolation("this question does not belong here", actual=type(question).__name__)

    def _begin_initial(self, question: messages.BeginInitial) -> messages.Message:
        sink = self._replica.begin_initial(
            question.transfer_id,
            point_id=question.point_id,
            instant_s=question.instant_s,
            consistent=question.consistent,
            consistency=question.consistency,
            joining=question.joining,
        )
        return self._begin(question, sink)

    def _begin_logs(self, question: messages.BeginLogs) -> messages.Message:
        sink = self._replica.begin_logs(
            question.transfer_id,
            point_id=question.point_id,
            previous_point_id=question.previous_point_id,
            instant_s=question.instant_s,
            logs=[
                LogSpec(log.disk_index, log.log_id, log.previous_log_id, log.log_bytes, log.is_ordered)
                for log in question.logs
            ],
            disks={disk.index: disk.virtual_bytes for disk in question.disks} or None,
            nature=(question.kind, question.consistency),
        )
        return self._begin(question, sink)

    def _begin(
        self, question: messages.BeginInitial | messages.BeginLogs, sink: Sink | AlreadyHave
    ) -> messages.Message:
        if isinstance(sink, AlreadyHave):
            return messages.AlreadyHave(question.point_id)
        targets = sorted(sink.targets)
        if len(targets) != len(question.positions):
            raise ProtocolViolation(
                "a transfer needs one position for each of its targets",
                field="positions",
                expected=len(targets),
                actual=len(question.positions),
            )
        positions = [
            min(position, sink.position(target))
            for target, position in zip(targets, question.positions, strict=True)
        ]
        for target, position in zip(targets, positions, strict=True):
            sink.resume_from(target, position)
        with self._lock:
            older, self._incoming = self._incoming, _Incoming(question.transfer_id, question.point_id, sink)
        if older is not None:
            older.fail(ProtocolViolation("another transfer began in this session"))
        return messages.Ready(positions)

    def _current(self) -> _Incoming:
        if self._incoming is None:
            raise ProtocolViolation("no transfer is under way")
        return self._incoming

    def _end(self, question: messages.EndTransfer) -> messages.Message:
        incoming = self._current()
        incoming.wait_complete(question.frame_count)
        incoming.sink.commit()
        self._incoming = None
        _LOG.info(
            "%s: VM %r: point %s received in %d frames",
            self._control.address,
            self._replica.vm,
            incoming.point_id,
            question.frame_count,
        )
        return messages.Committed(incoming.point_id)

    def _apply(self, question: messages.Apply) -> messages.Message:
        point_id = self._replica.apply()
        if point_id != question.point_id:
            raise StateError("the replica is on another point", expected=question.point_id, actual=point_id)
        retained = self._replica.retained
        gone = [
            messages.GonePoint(uuid.UUID(point.id), point.instant_s, point.reason[: messages.TEXT_CHARS_MAX])
            for point in retained.gone[: messages.GONE_MAX]
        ]
        return messages.Applied(point_id, gone, retained.warning, self._replica.damaged_disks)

    def _fingerprints(self, question: messages.FingerprintsRequest) -> messages.Fingerprints:
        data = self._replica.fingerprints(
            question.disk_index, question.first_block, question.block_count, question.block_bytes
        )
        return messages.Fingerprints(data if any(data) else b"")


def while_working(channel: Channel[messages.Question], work: Callable[[], _Done]) -> _Done:
    """Return what `work` returns, telling the primary on `channel` meanwhile that we live.

    Runs in the thread that owns the channel. Raises: what `work` raises; the channel's error, once `work` is
    done.
    """
    outcome: list[_Done] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # carried to the channel's thread below
            failure.append(kept(error))

    thread = threading.Thread(target=run, name="answer")
    thread.start()
    thread.join(_WORKING_EVERY_S)
    while thread.is_alive():
        try:
            channel.send_message(messages.Working())
        except HvReplicaError:
            thread.join()  # the work must end before its store is closed under it
            raise
        thread.join(_WORKING_EVERY_S)
    if failure:
        raise failure.pop()
    return outcome.pop()


class _Incoming:
    """The transfer that is under way: which frames the sink has, who is sending, and what went wrong."""

    def __init__(self, transfer_id: uuid.UUID, point_id: uuid.UUID, sink: Sink) -> None:
        self.transfer_id = transfer_id
        self.point_id = point_id
        self.sink = sink
        self._targets = sorted(sink.targets)  # a frame names a place in it
        self._changed = threading.Condition()
        self._watermark = 0
        self._ahead: set[int] = set()
        self._channels: list[Channel[messages.Question]] = []
        self._failure: BaseException | None = None

    def enter(self, channel: Channel[messages.Question], connections_max: int) -> None:
        """Let one more connection send. Raises: the failure that ended the transfer, ProtocolViolation."""
        with self._changed:
            if self._failure is not None:
                raise kept(self._failure)
            if len(self._channels) >= connections_max:
                raise ProtocolViolation("too many data connections", expected=f"at most {connections_max}")
            self._channels.append(channel)

    def leave(self, channel: Channel[messages.Question]) -> None:
        """Take note that a connection has ended."""
        with self._changed:
            self._channels.remove(channel)
            self._changed.notify_all()

    def write(self, frame: Frame) -> None:
        """Give a frame to the sink, then count it. Raises: whatever the sink raises, ProtocolViolation."""
        with self._changed:
            if self._failure is not None:
                raise kept(self._failure)
            if frame.sequence < self._watermark or frame.sequence in self._ahead:
                raise ProtocolViolation("a frame came twice", field="sequence", actual=frame.sequence)
        if frame.target >= len(self._targets):
            raise ProtocolViolation(
                "a frame for a target that the transfer does not have",
                field="target",
                expected=f"below {len(self._targets)}",
                actual=frame.target,
            )
        target = self._targets[frame.target]
        self.sink.write(target, frame.window_offset, frame.window_bytes, frame.extents, frame.data)
        with self._changed:
            self._ahead.add(frame.sequence)
            while self._watermark in self._ahead:
                self._ahead.remove(self._watermark)
                self._watermark += 1
            if len(self._ahead) > _OUT_OF_ORDER_MAX:
                raise ProtocolViolation("frames are missing", field="sequence", expected=self._watermark)
            self._changed.notify_all()

    def take_times(self, question: messages.LogTimes) -> None:
        """Give the times of a log to the sink. Raises: ProtocolViolation for a transfer of disks."""
        if not isinstance(self.sink, LogSink):
            raise ProtocolViolation("times belong to a transfer of logs")
        self.sink.take_times(question.log_id, question.data)

    def checkpoint(self) -> int:
        """Return the watermark of what is durable. Raises: the failure that ended the transfer."""
        with self._changed:
            if self._failure is not None:
                raise kept(self._failure)
            watermark = self._watermark
        self.sink.flush()
        return watermark

    def wait_complete(self, frame_count: int) -> None:
        """Return when the sink has `frame_count` frames.

        Raises: the failure that ended the transfer, PeerClosed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure is not None or self._watermark >= frame_count or not self._channels
            )
            if self._failure is not None:
                raise kept(self._failure)
            if self._watermark != frame_count:
                raise PeerClosed(
                    "the data connections ended before all frames were there",
                    field="frame_count",
                    expected=frame_count,
                    actual=self._watermark,
                )

    def fail(self, failure: BaseException) -> None:
        """End the transfer; the first reason stays. Wakes every connection of it."""
        failure = kept(failure)
        with self._changed:
            self._failure = self._failure or failure
            channels = list(self._channels)
            self._changed.notify_all()
        for channel in channels:
            channel.abort()


def refusal(error: BaseException) -> messages.Refused:
    """Return what the primary is told of `error`."""
    limit = messages.TEXT_CHARS_MAX
    if isinstance(error, HvReplicaError):
        return messages.Refused(
            type(error).__name__,
            str(error)[:limit],
            (error.hint or "")[:limit],
            generation=error.generation if isinstance(error, Fenced) else 0,
            removed_disk=error.removed_disk if isinstance(error, ReplicaDiverged) else None,
        )
    return messages.Refused(
        "StoreError", f"the replica's host reports: {error}"[:limit], "see the replica's log"
    )
