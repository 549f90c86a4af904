"""Certificates of every kind, a listener for the length of a test, and messages of our own."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import shutil
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hvreplica.transport import Channel, Listener, client_context, connect, server_context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BOTH_USAGES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
JOIN_TIMEOUT_S = 30


class Ask(msgspec.Struct, tag="ask"):
    text: str


class Tell(msgspec.Struct, tag="tell"):
    number: int


DECODER: msgspec.msgpack.Decoder[Ask | Tell] = msgspec.msgpack.Decoder(Ask | Tell)


def write_leaf(
    folder: Path,
    role: str,
    *,
    usages: tuple[x509.ObjectIdentifier, ...] = BOTH_USAGES,
    names: tuple[str, ...] = ("127.0.0.1",),
    valid_days: tuple[float, float] = (-1, 30),
) -> None:
    """Replace a role's certificate and key in `folder` by ones of its CA; valid_days: from and until, from now."""
    ca = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    ca_key = serialization.load_pem_private_key((folder / "ca-key.pem").read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    alternatives = [
        x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() else x509.DNSName(name)
        for name in names
    ]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, role)]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=valid_days[0]))
        .not_valid_after(now + timedelta(days=valid_days[1]))
        .add_extension(x509.ExtendedKeyUsage(list(usages)), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    (folder / f"{role}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / f"{role}-key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def copy_folder(folder: Path, target: Path) -> Path:
    """Copy a TLS folder, to be damaged."""
    shutil.copytree(folder, target)
    return target


def raw_client_context(folder: Path, *, with_certificate: bool = True) -> ssl.SSLContext:
    """Return a client context that checks nothing of our own certificate before it is used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / "ca.pem")
    if with_certificate:
        context.load_cert_chain(folder / "primary.pem", folder / "primary-key.pem")
    return context


def raw_server_context(folder: Path) -> ssl.SSLContext:
    """Return a server context that checks nothing of our own certificate before it is used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(folder / "ca.pem")
    context.load_cert_chain(folder / "replica.pem", folder / "replica-key.pem")
    return context


@contextlib.contextmanager
def serving(
    context: ssl.SSLContext | Path, handler: Callable[[Channel[Any]], object], **options: Any
) -> Iterator[Listener[Any]]:
    """Run a listener on a free port of loopback until the block ends."""
    made = context if isinstance(context, ssl.SSLContext) else server_context(context)
    listener: Listener[Any] = Listener("127.0.0.1:0", made, handler, decoder=DECODER, **options)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    try:
        yield listener
    finally:
        listener.stop()
        thread.join(JOIN_TIMEOUT_S)
        assert not thread.is_alive(), "serve_forever() did not return"
        listener.close()


def connected(listener: Listener[Any], folder: Path, **options: Any) -> Channel[Any]:
    """Return a channel to a listener with the primary's certificate in `folder`."""
    return connect(listener.address, client_context(folder), decoder=DECODER, **options)


def wait_for(event: threading.Event) -> None:
    """Wait for what another thread does; a test that gets stuck fails here."""
    assert event.wait(JOIN_TIMEOUT_S), "it did not happen"


@contextlib.contextmanager
def warned() -> Iterator[list[str]]:
    """Collect the listener's log within the block, which ends when there is at least one message."""
    messages: list[str] = []
    there = threading.Event()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())
            there.set()

    handler, log = Handler(), logging.getLogger("hvreplica.transport")
    log.addHandler(handler)
    try:
        yield messages
        wait_for(there)
    finally:
        log.removeHandler(handler)


def raw_connection(listener: Listener[Any]) -> socket.socket:
    """Return a plain TCP connection to a listener."""
    return socket.create_connection((listener.address.host, listener.address.port), timeout=JOIN_TIMEOUT_S)


def random_frame(generator: np.random.Generator, *, data_bytes_max: int = 300_000) -> dict[str, Any]:
    """Return the arguments of a frame: random window, runs and data of mixed compressibility."""
    count = int(generator.integers(0, 20))
    cuts = (
        np.sort(generator.choice(data_bytes_max, 2 * count, replace=False))
        if count
        else np.empty(0, np.int64)
    )
    offset = int(generator.integers(0, 1 << 50))
    runs = np.stack([cuts[0::2], cuts[1::2] - cuts[0::2]], axis=1).astype(np.int64)
    length = int(runs[:, 1].sum())
    noise = generator.integers(0, 256, length, dtype=np.uint8)
    data = noise if generator.random() < 0.3 else noise // 64
    runs[:, 0] += offset
    return {
        "target": int(generator.integers(0, 4)),
        "window_offset": offset,
        "window_bytes": data_bytes_max + int(generator.integers(0, 100)),
        "runs": runs,
        "data": data,
    }
