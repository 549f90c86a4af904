"""The primary's side of a session: ask, be answered, and learn precisely why not.

One control connection, questions and answers in strict turn (formats/messages.py). One owner thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, TypeVar

import msgspec

from hvreplica import errors
from hvreplica.errors import (
    Fenced,
    HvReplicaError,
    ProtocolViolation,
    ReplicaDiverged,
    TransportError,
    UnsupportedVersion,
)
from hvreplica.formats import messages
from hvreplica.transport import connect

if TYPE_CHECKING:
    import ssl
    import uuid
    from types import TracebackType

    from hvreplica.replication.state import PrimaryState
    from hvreplica.transport import Channel

ANSWER_TIMEOUT_S = 60.0  # a replica that works says so every few seconds; longer silence is a dead peer
_ANSWERS = msgspec.msgpack.Decoder(messages.Answer)
_Answer = TypeVar("_Answer", bound=messages.Message)


class ReplicaSession:
    """A connection to a replica server. claim() first, then the rest; close() or `with` at the end."""

    def __init__(self, address: str, context: ssl.SSLContext) -> None:
        self._address = address
        self._context = context
        self._token = b""
        self._claimed: messages.Claimed | None = None
        self.connections_max = 1
        self._control = self._connect()
        self._channels = [self._control]
        self._closed_wire_bytes = 0
        self._is_aborted = False

    def claim(
        self,
        state: PrimaryState,
        shapes: list[messages.DiskShape],
        removed: list[int],
        *,
        software: str,
        points: messages.PointPolicy | None = None,
        reverse: bool = False,
        resync: bool = False,
    ) -> messages.Claimed:
        """Become the VM's writer.

        points: what is to be kept of its points, None for what was said before. reverse: of a replica alone
        that was made of the VM's old primary.

        Raises: UnsupportedVersion for a replica that keeps no older points and is asked to; Fenced,
        AuthorizationRefused, ReplicaDiverged, … as the replica says.
        """
        question = messages.Claim(
            protocol=messages.PROTOCOL_VERSION,
            software=software,
            vm=state.vm,
            relationship_id=state.relationship_id,
            generation=state.generation,
            disks=shapes,
            removed=removed,
            policy=points,
            reverse=reverse,
            resync=resync,
        )
        claimed = self.ask(question, messages.Claimed)
        if [disk.index for disk in claimed.disks] != [shape.index for shape in shapes]:
            raise ProtocolViolation(
                "the replica answered for other disks than it was asked for", path=self._address
            )
        self._token = claimed.session
        self._claimed = claimed
        self.connections_max = claimed.connections_max
        if points is not None:
            self.require_revision(3, "recovery points")
        return claimed

    def require_revision(self, revision: int, what: str) -> None:
        """Refuse to send what an older replica takes for something else. Raises: UnsupportedVersion."""
        claimed = self._claimed
        if claimed is not None and claimed.revision < revision:
            raise UnsupportedVersion(
                f"the replica's hvreplica is too old for {what}",
                path=self._address,
                field="revision",
                expected=f"at least {revision}",
                actual=claimed.revision,
                hint=f"update the replica, which runs {claimed.software}",
            )

    @property
    def revision(self) -> int:
        """What the replica understands; 1 before the claim."""
        return 1 if self._claimed is None else self._claimed.revision

    def attach(self, transfer_id: uuid.UUID) -> Channel[messages.Answer]:
        """Open one data connection of the session; the caller gives it back with detach()."""
        channel = self._connect()
        try:
            channel.send_message(messages.Attach(session=self._token, transfer_id=transfer_id))
            self._expect(channel, messages.Attached)
        except BaseException:
            channel.close()
            raise
        self._channels.append(channel)
        if self._is_aborted:
            channel.abort()
        return channel

    def detach(self, channel: Channel[messages.Answer]) -> None:
        """Close a data connection."""
        channel.close()
        self._channels.remove(channel)
        self._closed_wire_bytes += channel.wire_bytes_sent

    def ask(self, question: messages.Question, answer: type[_Answer]) -> _Answer:
        """Send a question and return its answer, waiting as long as the replica says that it works."""
        self.begin(question)
        return self.finish(answer)

    def begin(self, question: messages.Question) -> None:
        """Send a question; finish() takes its answer before anything else is asked."""
        self._control.send_message(question)

    def finish(self, answer: type[_Answer]) -> _Answer:
        """Return the answer to what begin() has sent, waiting as ask() does."""
        return self._expect(self._control, answer)

    def ask_either(self, question: messages.Question, *kinds: type[messages.Message]) -> messages.Message:
        """Send a question and return the answer, which is of one of `kinds`."""
        self._control.send_message(question)
        return self._answer(self._control, kinds)

    @property
    def wire_bytes(self) -> int:
        """What this side has put on the network so far, on all connections of the session."""
        return self._closed_wire_bytes + sum(channel.wire_bytes_sent for channel in list(self._channels))

    def close(self) -> None:
        """End the session. What is not committed goes on in the next one."""
        self._control.close()

    def abort(self) -> None:
        """Make every wait of the session fail with PeerClosed; from any thread."""
        self._is_aborted = True
        for channel in list(self._channels):
            channel.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self) -> Channel[messages.Answer]:
        return connect(self._address, self._context, decoder=_ANSWERS, idle_timeout_s=ANSWER_TIMEOUT_S)

    def _expect(self, channel: Channel[messages.Answer], kind: type[_Answer]) -> _Answer:
        answer = self._answer(channel, (kind,))
        assert isinstance(answer, kind)  # _answer() checked it; this tells the type checker
        return answer

    def _answer(
        self, channel: Channel[messages.Answer], kinds: tuple[type[messages.Message], ...]
    ) -> messages.Message:
        while True:
            answer = channel.receive_message()
            if isinstance(answer, messages.Working):
                continue
            if isinstance(answer, messages.Refused):
                raise refusal_error(answer, self._address)
            if isinstance(answer, kinds):
                return answer
            raise ProtocolViolation(
                "the replica gave another answer than the question has",
                path=self._address,
                expected=" or ".join(kind.__name__ for kind in kinds),
                actual=type(answer).__name__,
            )


def refusal_error(refusal: messages.Refused, address: str) -> HvReplicaError:
    """Return the error that the replica named, as one of ours; an unknown name becomes a TransportError."""
    kind = getattr(errors, refusal.error, None)
    if not (isinstance(kind, type) and issubclass(kind, HvReplicaError)):
        kind = TransportError
    error = kind(f"the replica refused: {refusal.message}", path=address, hint=refusal.hint or None)
    if isinstance(error, Fenced):
        error.generation = refusal.generation
    elif isinstance(error, ReplicaDiverged):
        error.removed_disk = refusal.removed_disk
    return error
