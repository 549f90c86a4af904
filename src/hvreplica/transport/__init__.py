"""Channels between the two sites: TLS 1.3 with mutual certificates, verified frames, a codec for each frame.

Only this package and capture/ know sockets. docs/formats/wire.md has the bytes, docs/tls.md the
certificates. Making certificates is transport.certificates, which nothing else needs.
"""

from hvreplica.address import Address, parse_address
from hvreplica.transport.channel import Channel
from hvreplica.transport.codec import COMPRESSIONS, CodecPolicy
from hvreplica.transport.connect import connect
from hvreplica.transport.frame import Frame, FrameDecoder, FrameEncoder
from hvreplica.transport.listen import Listener
from hvreplica.transport.tls import TRUST_FILE, PeerIdentity, client_context, server_context
from hvreplica.transport.trust import TrustEntry, TrustList, allow

__all__ = [
    "COMPRESSIONS",
    "TRUST_FILE",
    "Address",
    "Channel",
    "CodecPolicy",
    "Frame",
    "FrameDecoder",
    "FrameEncoder",
    "Listener",
    "PeerIdentity",
    "TrustEntry",
    "TrustList",
    "allow",
    "client_context",
    "connect",
    "parse_address",
    "server_context",
]
