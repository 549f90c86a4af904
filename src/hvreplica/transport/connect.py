"""Open a channel to the other site, and tell clearly why it cannot be."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, TypeVar

from hvreplica.address import Address, parse_address
from hvreplica.clock import SYSTEM
from hvreplica.errors import HvReplicaError, Unreachable
from hvreplica.transport.channel import DEFAULT_TIMEOUT_S, Channel
from hvreplica.transport.pipe import TlsPipe
from hvreplica.transport.tls import identify

if TYPE_CHECKING:
    import ssl

    import msgspec

    from hvreplica.clock import Clock

CONNECT_TIMEOUT_S = 10.0

MessageT = TypeVar("MessageT")


def connect(
    address: Address | str,
    context: ssl.SSLContext,
    *,
    decoder: msgspec.msgpack.Decoder[MessageT],
    timeout_s: float = CONNECT_TIMEOUT_S,
    idle_timeout_s: float = DEFAULT_TIMEOUT_S,
    clock: Clock = SYSTEM,
) -> Channel[MessageT]:
    """Return a channel to the server at `address`, after both sides accepted each other's certificate.

    decoder: of what the server sends. timeout_s: for the connection and again for the handshake;
    idle_timeout_s: the channel's longest silence. Raises: Unreachable, AuthenticationFailed, PeerClosed,
    ProtocolViolation, FormatError; ValueError for a text that is no address.
    """
    target = parse_address(address) if isinstance(address, str) else address
    try:
        connection = socket.create_connection((target.host, target.port), timeout=timeout_s)
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise Unreachable(
            f"no connection: {reason}",
            path=str(target),
            hint="is `hvreplica serve` running there, and does the firewall let it through?",
        ) from None
    try:
        pipe = TlsPipe(connection, context, server_name=target.host)
    except BaseException:
        connection.close()
        raise
    try:
        pipe.handshake(timeout_s=timeout_s, clock=clock)
        channel = Channel(
            pipe,
            decoder=decoder,
            peer=identify(pipe.peer_certificate()),
            address=target,
            clock=clock,
            timeout_s=timeout_s,
        )
        channel.exchange_preamble(first=False)
        channel.set_idle_timeout(idle_timeout_s)
    except BaseException as error:
        with contextlib.suppress(OSError):
            pipe.close()
        if isinstance(error, HvReplicaError):
            error.at(str(target))
        raise
    return channel
