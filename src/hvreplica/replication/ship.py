"""Move the windows of a source over N one-way connections, and learn what the replica made durable.

Each connection has one thread that takes a window, loads it, encodes it and sends it: nothing is queued
between threads, so memory is N windows. The caller's thread asks for checkpoints and records the positions.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from hvreplica.errors import PeerClosed, TransportError, kept
from hvreplica.formats import messages
from hvreplica.progress import Progress
from hvreplica.replication.sources import new_buffer
from hvreplica.transport import CodecPolicy, FrameEncoder

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Sequence

    from hvreplica.clock import Clock
    from hvreplica.progress import ProgressCallback
    from hvreplica.replication.session import ReplicaSession
    from hvreplica.replication.sources import FrameSource
    from hvreplica.transport import Channel

_CONNECTION_BYTES = 8 << 20
_TICK_S = 0.2  # how often progress is told
_CHECKPOINT_S = 5.0  # at most this much time, or
_CHECKPOINT_BYTES = 1 << 30  # this much data has to be sent again after a break; each checkpoint costs a sync


class Shipment:
    """One transfer of one source within a session. Used once, by one thread."""

    def __init__(
        self,
        session: ReplicaSession,
        source: FrameSource,
        *,
        compression: str,
        connections: int,
        on_progress: ProgressCallback,
        clock: Clock,
    ) -> None:
        self._session = session
        self._source = source
        self._policy = CodecPolicy(compression)
        self._connections = connections
        self._on_progress = on_progress
        self._clock = clock
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._running = 0
        self._failure: BaseException | None = None
        self._covered_bytes = sum(source.positions)
        self._data_bytes = 0

    def run(self, transfer_id: uuid.UUID, *, phase: str, record: Callable[[], None]) -> bool:
        """Send everything, then wait until the replica has committed it; return whether it has.

        It has not where the source says that something else is due: then what was sent is durable there.

        record: called after each checkpoint, when the source's positions have moved; must make them durable.
        Raises: whatever the replica refused with, or TransportError.
        """
        with contextlib.ExitStack() as stack:
            channels = []
            for _ in range(self._connection_count()):
                channels.append(self._session.attach(transfer_id))
                stack.callback(self._session.detach, channels[-1])
            threads = [
                threading.Thread(target=self._send, args=(channel,), name=f"ship-{index}")
                for index, channel in enumerate(channels)
            ]
            self._running = len(threads)
            for thread in threads:
                thread.start()
                stack.callback(thread.join)
            try:
                self._watch(phase, record)
                # After the commit our record is all that says what the replica holds: it must not be younger.
                self._source.sync()
                if self._source.is_whole:
                    end = messages.EndTransfer(frame_count=self._source.count)
                    self._session.ask(end, messages.Committed)
                else:
                    self._pause(channels, record)
            except BaseException:
                with self._lock:
                    self._failure = self._failure or TransportError("the transfer was given up")
                for channel in channels:
                    channel.abort()
                raise
        self._report(phase)
        return self._source.is_whole

    def _pause(self, channels: Sequence[Channel[messages.Answer]], record: Callable[[], None]) -> None:
        """Have all that was sent made durable, and recorded: the replica has it when it ends its side."""
        for channel in channels:
            with contextlib.suppress(PeerClosed):
                channel.receive_message()
        self._checkpoint(record)

    def _connection_count(self) -> int:
        """Return how many connections what is left is worth: each one costs a handshake."""
        left_bytes = self._source.total_bytes - self._covered_bytes
        return min(self._connections, self._session.connections_max, 1 + left_bytes // _CONNECTION_BYTES)

    def _watch(self, phase: str, record: Callable[[], None]) -> None:
        checkpoint_s = self._clock.monotonic_s()
        checkpoint_bytes = 0
        while True:
            with self._lock:
                if self._running and self._failure is None:
                    self._ended.wait(_TICK_S)
                running, failure, data_bytes = self._running, self._failure, self._data_bytes
            self._report(phase)
            if failure is not None:
                self._explain(failure)
            if not running:
                return
            now_s = self._clock.monotonic_s()
            if now_s - checkpoint_s >= _CHECKPOINT_S or data_bytes - checkpoint_bytes >= _CHECKPOINT_BYTES:
                self._checkpoint(record)
                checkpoint_s, checkpoint_bytes = self._clock.monotonic_s(), data_bytes

    def _checkpoint(self, record: Callable[[], None]) -> None:
        durable = self._session.ask(messages.Checkpoint(), messages.Durable)
        self._source.confirm(durable.watermark)
        self._source.sync()
        record()

    def _explain(self, failure: BaseException) -> None:
        """Raise the replica's own reason where it has one: a closed data connection alone says little."""
        if isinstance(failure, (TransportError, OSError)):
            self._session.ask(messages.Checkpoint(), messages.Durable)
        raise kept(failure)

    def _send(self, channel: Channel[messages.Answer]) -> None:
        buffer = new_buffer()
        encoder = FrameEncoder(self._policy, clock=self._clock)
        try:
            while self._failure is None:
                window = self._source.next_window()
                if window is None:
                    break
                loaded = self._source.load(window, buffer)
                frame = encoder.encode(
                    sequence=window.sequence,
                    target=window.target,
                    window_offset=window.offset,
                    window_bytes=window.length,
                    runs=loaded.runs,
                    data=loaded.data,
                )
                channel.send_frame(frame, self._policy)
                with self._lock:
                    self._covered_bytes += window.length
                    self._data_bytes += len(loaded.data)
            # Others may need long for their last windows: an idle connection must not pass for a dead one.
            channel.finish_sending()
        except BaseException as failure:
            ended = kept(failure)
            with self._lock:
                self._failure = self._failure or ended
        finally:
            with self._lock:
                self._running -= 1
                self._ended.notify_all()

    def _report(self, phase: str) -> None:
        self._on_progress(
            Progress(
                phase,
                done_bytes=min(self._covered_bytes, self._source.total_bytes),
                total_bytes=self._source.total_bytes,
                raw_bytes=self._data_bytes,
                wire_bytes=self._session.wire_bytes,
            )
        )
