"""TLS contexts for both sides: TLS 1.3 only, each side proves itself with a certificate of the same CA.

A folder holds ca.pem, primary.pem and primary-key.pem (used by the client, the host that replicates) and
replica.pem and replica-key.pem (used by the server). Our own files are checked before any connection, so that
an error names the file. docs/tls.md tells how to make such a folder.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from hvreplica.clock import SYSTEM, iso_time
from hvreplica.errors import AuthenticationFailed
from hvreplica.files import OS_FILES
from hvreplica.units import MIB

if TYPE_CHECKING:
    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem

CA_FILE = "ca.pem"
CA_KEY_FILE = "ca-key.pem"
TRUST_FILE = "trust.toml"
PRIMARY = "primary"  # the client
REPLICA = "replica"  # the server
_PEM_BYTES_MAX = 1 * MIB
_INIT_HINT = "make a folder for a first try with `hvreplica tls init DIR`"
# AES-128 first: 128 bits are enough and cost less. Where Python cannot set the order, OpenSSL's own stays.
_CIPHERSUITES = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """Who the other side proved to be.

    fingerprint_sha256: 64 hex digits over the DER; not_after: Unix seconds.
    """

    fingerprint_sha256: str
    common_name: str
    not_after: float


def certificate_file(role: str) -> str:
    """Return the name of a role's certificate."""
    return f"{role}.pem"


def key_file(role: str) -> str:
    """Return the name of a role's private key."""
    return f"{role}-key.pem"


def identify(der: bytes) -> PeerIdentity:
    """Return the identity in a certificate that TLS has verified.

    Raises: AuthenticationFailed if it is not readable.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return PeerIdentity(
            fingerprint_sha256=certificate.fingerprint(hashes.SHA256()).hex(),
            common_name=str(names[0].value) if names else "",
            not_after=certificate.not_valid_after_utc.timestamp(),
        )
    except (ValueError, TypeError) as error:
        raise AuthenticationFailed(f"the other side's certificate cannot be read: {error}") from None


def server_context(folder: Path, *, files: FileSystem = OS_FILES, clock: Clock = SYSTEM) -> ssl.SSLContext:
    """Return the context of the replica's side, which asks each client for a certificate.

    Raises: AuthenticationFailed naming the file that is missing, unreadable, expired, not yet valid or of
    another key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # a resumed session would save nothing: connections live long
    return _prepared(context, files, folder, REPLICA, clock)


def client_context(folder: Path, *, files: FileSystem = OS_FILES, clock: Clock = SYSTEM) -> ssl.SSLContext:
    """Return the context of the primary's side, which checks the server's name.

    Raises: AuthenticationFailed naming the file that is missing, unreadable, expired, not yet valid or of
    another key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = True
    return _prepared(context, files, folder, PRIMARY, clock)


def _prepared(
    context: ssl.SSLContext, files: FileSystem, folder: Path, role: str, clock: Clock
) -> ssl.SSLContext:
    folder = Path(folder)
    certificate, key, ca = folder / certificate_file(role), folder / key_file(role), folder / CA_FILE
    for path in (ca, certificate):
        _check_validity(files, path, clock)
    read_pem(files, key)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    if hasattr(context, "set_ciphersuites"):
        context.set_ciphersuites(_CIPHERSUITES)
    try:
        # An empty answer instead of None, or OpenSSL would ask for a password on the terminal.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except ssl.SSLError as error:
        raise _bad_key(error, certificate, key) from None
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise AuthenticationFailed(
            f"no CA certificate can be read from it: {error.reason}", path=ca
        ) from None
    return context


def _bad_key(error: ssl.SSLError, certificate: Path, key: Path) -> AuthenticationFailed:
    if error.reason == "KEY_VALUES_MISMATCH":
        return AuthenticationFailed(
            f"the private key does not belong to the certificate {certificate}",
            path=key,
            hint="put the key beside the certificate that was made with it, or issue both again",
        )
    return AuthenticationFailed(
        f"no private key can be read from it: {error.reason or error}",
        path=key,
        hint="it must be a PEM file with an unencrypted private key",
    )


def _check_validity(files: FileSystem, path: Path, clock: Clock) -> None:
    try:
        certificate = x509.load_pem_x509_certificate(read_pem(files, path))
    except ValueError as error:
        raise AuthenticationFailed(
            f"no certificate can be read from it: {error}", path=path, hint="it must be a PEM file"
        ) from None
    now = datetime.fromtimestamp(clock.now_s(), UTC)
    if now > certificate.not_valid_after_utc:
        when = iso_time(certificate.not_valid_after_utc.timestamp())
        raise AuthenticationFailed(f"this certificate expired at {when}", path=path, hint="issue a new one")
    if now < certificate.not_valid_before_utc:
        when = iso_time(certificate.not_valid_before_utc.timestamp())
        raise AuthenticationFailed(
            f"this certificate is not valid before {when}", path=path, hint="is this host's clock right?"
        )


def read_pem(files: FileSystem, path: Path) -> bytes:
    """Return the content of a small file.

    Raises: AuthenticationFailed saying what is wrong with which file.
    """
    try:
        file = files.open(path)
    except FileNotFoundError:
        raise AuthenticationFailed("the file is missing", path=path, hint=_INIT_HINT) from None
    except PermissionError:
        raise AuthenticationFailed(
            "the file may not be read by this user", path=path, hint="run as the user whom the keys belong to"
        ) from None
    except OSError as error:
        raise AuthenticationFailed(f"the file cannot be read: {error.strerror}", path=path) from None
    try:
        size_bytes = file.size()
        if size_bytes > _PEM_BYTES_MAX:
            raise AuthenticationFailed(
                "the file is too large for a certificate or key", path=path, actual=size_bytes
            )
        return file.read(0, size_bytes)
    finally:
        file.close()
