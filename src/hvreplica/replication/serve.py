"""The replica's server: takes sessions of primaries, checks who may write what, and feeds the store.

One process serves one store. Each connection has a thread of its own; a session is one control connection and
its data connections. A newer session of the same VM ends the older one: a primary that comes back after a cut
line must not wait for the old connection to time out.
"""

from __future__ import annotations

import logging
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec

from hvreplica.clock import SYSTEM
from hvreplica.errors import (
    AuthorizationRefused,
    Fenced,
    HvReplicaError,
    PeerClosed,
    ProtocolViolation,
    UnsupportedVersion,
    kept,
)
from hvreplica.files import OS_FILES
from hvreplica.formats import messages
from hvreplica.replication.answers import AnswerSession, refusal, while_working
from hvreplica.replication.presser import Presser
from hvreplica.replication.verifier import Verifier
from hvreplica.replication.version import SOFTWARE
from hvreplica.store import DiskSpec, Store
from hvreplica.transport import TRUST_FILE, Listener, TrustList, server_context

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem
    from hvreplica.store import DiskRow, VmReplica
    from hvreplica.transport import Channel

_LOG = logging.getLogger("hvreplica.serve")
_QUESTIONS = msgspec.msgpack.Decoder(messages.Question)
_CONNECTIONS_MAX = 64
_DATA_CONNECTIONS_MAX = 16
_FIRST_MESSAGE_S = 10.0
_DATA_SILENCE_S = 3600.0  # a slow disk is no dead primary: that one is found on the control connection
_CONTROL_SILENCE_S = 300.0  # the longest a primary thinks between two questions


class Server:
    """Serve one store.

    serve_forever() in a thread of the caller's; stop() from anywhere; close() at the end.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        *,
        listen: str = "127.0.0.1:8084",
        tls: str | os.PathLike[str],
        files: FileSystem = OS_FILES,
        clock: Clock = SYSTEM,
        verify_every_s: float | None = None,
        verify_rate: int | None = None,
    ) -> None:
        """Open the store, finish what a crash cut off, and bind the address.

        verify_every_s: read each VM again that often, at no more than `verify_rate` bytes a second.
        Raises: StoreError, Locked, AuthenticationFailed for certificates that cannot be used, FormatError for
        a damaged trust list, OSError for an address that cannot be bound.
        """
        self._files = files
        self._clock = clock
        self._trust_path = Path(tls) / TRUST_FILE
        context = server_context(Path(tls))
        TrustList.load(files, self._trust_path)
        self._store = Store.create_or_open(files, Path(store), clock=clock)
        try:
            self._store.recover()
            self._listener = Listener(
                listen, context, self._handle, decoder=_QUESTIONS, connections_max=_CONNECTIONS_MAX
            )
        except BaseException:
            self._store.close()
            raise
        self._verifier = None
        if verify_every_s is not None:
            self._verifier = Verifier(
                self._store, every_s=verify_every_s, rate_bytes_s=verify_rate, clock=clock
            )
            self._verifier.start()
        self._presser = Presser(self._store, clock=clock)
        self._presser.start()
        self._lock = threading.Lock()
        self._claiming: dict[str, threading.Lock] = {}
        self._by_vm: dict[str, AnswerSession] = {}
        self._by_token: dict[bytes, AnswerSession] = {}

    @property
    def address(self) -> tuple[str, int]:
        """Where the server listens; a port of 0 is resolved."""
        return (self._listener.address.host, self._listener.address.port)

    def serve_forever(self) -> None:
        """Take connections until stop()."""
        self._listener.serve_forever()

    def stop(self) -> None:
        """Stop taking connections and cut the open ones;

        what they had not committed goes on in the next session.
        """
        self._listener.stop()
        with self._lock:
            sessions = list(self._by_token.values())
        for session in sessions:
            session.abort(PeerClosed("the server was stopped"))

    def close(self) -> None:
        """Stop, wait for the sessions to end, and close the store."""
        self.stop()
        self._listener.close()
        if self._verifier is not None:
            self._verifier.close()
        self._presser.close()
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _handle(self, channel: Channel[messages.Question]) -> None:
        """Own one connection from its first message to its end."""
        # A peer that trickles bytes must not hold a place: the timeout of a channel is for silence only.
        deadline = threading.Timer(_FIRST_MESSAGE_S, channel.abort)
        deadline.start()
        try:
            try:
                question = channel.receive_message()
            finally:
                deadline.cancel()
            if isinstance(question, messages.Claim):
                self._control(channel, question)
            elif isinstance(question, messages.Attach):
                self._data(channel, question)
            else:
                raise ProtocolViolation(
                    "a connection begins with a claim or an attach", actual=type(question).__name__
                )
        except PeerClosed as error:
            _LOG.info("%s: %s", channel.address, error.message)
        except (HvReplicaError, OSError) as error:
            _LOG.warning("%s (%s): %s", channel.address, channel.peer.common_name, error)
            _refuse(channel, kept(error))

    def _control(self, channel: Channel[messages.Question], claim: messages.Claim) -> None:
        if claim.protocol != messages.PROTOCOL_VERSION:
            raise UnsupportedVersion(
                "the primary speaks another version of the protocol",
                field="protocol",
                expected=messages.PROTOCOL_VERSION,
                actual=claim.protocol,
                hint=f"the replica runs {SOFTWARE}, the primary {claim.software}: update the older one",
            )
        self._authorise(channel, claim.vm)
        with self._lock:
            claiming = self._claiming.setdefault(claim.vm, threading.Lock())
        with claiming:  # sessions must be registered in the order in which the store took their claims
            # A claim waits for what the session before it is writing: that may take long.
            replica = while_working(channel, partial(self._claim, channel, claim))
            session = AnswerSession(replica, channel, token=self._clock.random_bytes(messages.SESSION_BYTES))
            self._register(claim.vm, session)
        try:
            channel.send_message(_claimed(replica, session.token))
            channel.set_idle_timeout(_CONTROL_SILENCE_S)
            _LOG.info("%s: session for VM %r by %s", channel.address, claim.vm, channel.peer.common_name)
            session.answer_forever()
        finally:
            self._forget(claim.vm, session)
            session.close()

    def _claim(self, channel: Channel[messages.Question], claim: messages.Claim) -> VmReplica:
        replica = self._store.claim(
            claim.vm,
            relationship_id=claim.relationship_id,
            generation=claim.generation,
            certificate=f"{channel.peer.common_name} sha256:{channel.peer.fingerprint_sha256}",
            disks=[DiskSpec(**msgspec.structs.asdict(shape)) for shape in claim.disks],
            removed=claim.removed,
            policy=claim.policy,
            reverse=claim.reverse,
        )
        if claim.resync:
            replica.drop_unreadable()
        return replica

    def _authorise(self, channel: Channel[messages.Question], vm: str) -> None:
        # Read anew for each session: an entry that is taken away must hold at once.
        if not TrustList.load(self._files, self._trust_path).allows(channel.peer, vm):
            raise AuthorizationRefused(
                f"the trust list does not let certificate {channel.peer.common_name!r}"
                f" (sha256:{channel.peer.fingerprint_sha256}) write VM {vm!r}",
                path=self._trust_path.name,
                hint="on the replica's host: hvreplica tls trust DIR --certificate … --vm …",
            )

    def _register(self, vm: str, session: AnswerSession) -> None:
        with self._lock:
            older = self._by_vm.get(vm)
            self._by_vm[vm] = session
            self._by_token[session.token] = session
        if older is not None:
            older.abort(Fenced("a newer session took over"))

    def _forget(self, vm: str, session: AnswerSession) -> None:
        with self._lock:
            self._by_token.pop(session.token, None)
            if self._by_vm.get(vm) is session:
                del self._by_vm[vm]

    def _data(self, channel: Channel[messages.Question], attach: messages.Attach) -> None:
        with self._lock:
            session = self._by_token.get(attach.session)
        if session is None or session.peer != channel.peer:
            raise Fenced("a data connection for a session that has ended; a newer one may have taken over")
        channel.set_idle_timeout(_DATA_SILENCE_S)
        session.receive(channel, attach.transfer_id, connections_max=_DATA_CONNECTIONS_MAX)


def _claimed(replica: VmReplica, token: bytes) -> messages.Claimed:
    return messages.Claimed(
        protocol=messages.PROTOCOL_VERSION,
        software=SOFTWARE,
        session=token,
        phase=replica.phase,
        last_point=replica.last_point,
        transfer=replica.transfer,
        disks=[_disk_state(disk, replica.last_sizes) for disk in replica.disks],
        damage=[sentence[: messages.TEXT_CHARS_MAX] for sentence in replica.damage],
        connections_max=_DATA_CONNECTIONS_MAX,
        revision=messages.REVISION,
        adopted=_adopted(replica),
    )


def _adopted(replica: VmReplica) -> messages.Adopted | None:
    record = replica.adopted
    return None if record is None else messages.Adopted(record.known, record.is_known)


def _disk_state(disk: DiskRow, sizes: dict[int, int]) -> messages.DiskState:
    index, held_bytes = disk.spec.index, disk.spec.virtual_bytes if disk.is_held else 0
    return messages.DiskState(index, disk.last_log_id, sizes.get(index, held_bytes), index in sizes)


def _refuse(channel: Channel[messages.Question], error: HvReplicaError | OSError) -> None:
    """Tell the other side why, as far as the connection still carries it."""
    try:
        channel.send_message(refusal(error))
    except (HvReplicaError, OSError):
        _LOG.info("%s: the refusal did not get through", channel.address)
