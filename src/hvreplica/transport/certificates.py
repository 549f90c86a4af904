"""Make a small CA of one's own, and certificates for the two sides.

For a first try and for sites without a PKI: the CA's key stays in a folder, readable by its owner alone. Any
CA serves as well, if its certificates carry both extended key usages and the names under which hosts connect.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hvreplica.errors import AuthenticationFailed
from hvreplica.files import write_durably
from hvreplica.transport.tls import (
    CA_FILE,
    CA_KEY_FILE,
    PRIMARY,
    REPLICA,
    TRUST_FILE,
    certificate_file,
    key_file,
    read_pem,
)
from hvreplica.transport.trust import trust_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem

CA_DAYS = 3650
LEAF_DAYS = 825  # the longest that common verifiers accept
_BACKDATE = timedelta(hours=1)  # the other host's clock may be behind
_PRIVATE = 0o600
NBD_FOLDER = "nbd"
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """What issue() made. fingerprint_sha256: 64 hex digits, as trust.toml names a certificate."""

    certificate: Path
    key: Path
    fingerprint_sha256: str
    not_after: float


def init_tls(
    files: FileSystem,
    folder: Path,
    *,
    clock: Clock,
    names: Sequence[str] = (),
    days: int = LEAF_DAYS,
) -> list[Path]:
    """Make a CA, certificates for both sides and a trust list in `folder`, and return the paths that were
    written.

    names: host names and IP addresses under which the hosts are reached, besides this host's own and
    loopback. Every file is durable on return; keys are created readable by their owner alone. trust.toml is
    written last, so that a folder cut off half-way serves nobody. Raises: FileExistsError if any of the files
    is there already.
    """
    folder = Path(folder)
    files.make_directory(folder)
    leaves = [name for role in (PRIMARY, REPLICA) for name in (certificate_file(role), key_file(role))]
    paths = [folder / name for name in (CA_FILE, CA_KEY_FILE, *leaves, TRUST_FILE)]
    _refuse_existing(files, paths)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"hvreplica CA {clock.random_bytes(4).hex()}")])
    builder = _builder(name, name, key.public_key(), clock, until=_days_from_now(clock, CA_DAYS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    write_durably(files, folder / CA_KEY_FILE, _pem_key(key), clock=clock, mode=_PRIVATE)
    write_durably(files, folder / CA_FILE, certificate.public_bytes(serialization.Encoding.PEM), clock=clock)
    primary = issue(files, folder, PRIMARY, PRIMARY, clock=clock, names=names, days=days)
    issue(files, folder, REPLICA, REPLICA, clock=clock, names=names, days=days)
    write_durably(files, folder / TRUST_FILE, trust_text(primary.fingerprint_sha256).encode(), clock=clock)
    return paths


def issue(
    files: FileSystem,
    folder: Path,
    role: str,
    name: str,
    *,
    clock: Clock,
    names: Sequence[str] = (),
    days: int = LEAF_DAYS,
) -> IssuedCertificate:
    """Make `<role>.pem` and `<role>-key.pem` in `folder`, signed by the CA there.

    name: the common name, 1 to 64 characters. names: as for init_tls(). The certificate never outlives the
    CA. Raises: FileExistsError; AuthenticationFailed if the CA in the folder cannot be used; ValueError for a
    bad name.
    """
    if not 1 <= len(name) <= 64 or not name.isprintable():
        message = f"{name!r} cannot be the name in a certificate; use 1 to 64 printable characters"
        raise ValueError(message)
    folder = Path(folder)
    paths = (folder / certificate_file(role), folder / key_file(role))
    _refuse_existing(files, paths)
    certificate, key = _issued(_load_ca(files, folder), name, names, days, clock)
    write_durably(files, paths[1], key, clock=clock, mode=_PRIVATE)
    write_durably(files, paths[0], certificate.public_bytes(serialization.Encoding.PEM), clock=clock)
    return IssuedCertificate(
        certificate=paths[0],
        key=paths[1],
        fingerprint_sha256=certificate.fingerprint(hashes.SHA256()).hex(),
        not_after=certificate.not_valid_after_utc.timestamp(),
    )


def issue_nbd(
    files: FileSystem, folder: Path, *, clock: Clock, names: Sequence[str] = (), days: int = LEAF_DAYS
) -> list[Path]:
    """Make `folder`/nbd, with what an NBD server of ours and its clients need; return the paths written.

    The server's files have our names, those of clients the names that QEMU and libnbd look for. Both
    certificates are of the CA in `folder`, and in no trust list. names: as for init_tls(), of the server's
    host. Raises: as issue().
    """
    folder = Path(folder)
    ca = _load_ca(files, folder)
    target = folder / NBD_FOLDER
    authority = ca[0].public_bytes(serialization.Encoding.PEM)
    content: list[tuple[str, bytes, int]] = [(name, authority, 0o644) for name in (CA_FILE, "ca-cert.pem")]
    for name, certificate_name, key_name in (
        ("nbd-server", certificate_file(REPLICA), key_file(REPLICA)),
        ("nbd-client", "client-cert.pem", "client-key.pem"),
    ):
        certificate, key = _issued(ca, name, names, days, clock)
        content.append((key_name, key, _PRIVATE))
        content.append((certificate_name, certificate.public_bytes(serialization.Encoding.PEM), 0o644))
    paths = [target / name for name, _, _ in content]
    _refuse_existing(files, paths)
    files.make_directory(target)
    for path, (_, data, mode) in zip(paths, content, strict=True):
        write_durably(files, path, data, clock=clock, mode=mode)
    return paths


def _issued(
    authority: tuple[x509.Certificate, ec.EllipticCurvePrivateKey],
    name: str,
    names: Sequence[str],
    days: int,
    clock: Clock,
) -> tuple[x509.Certificate, bytes]:
    """Return a new certificate and its key, as it stands in a file."""
    ca, ca_key = authority
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    until = min(_days_from_now(clock, days), ca.not_valid_after_utc)
    builder = _builder(subject, ca.subject, key.public_key(), clock, until=until)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    ca_identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(_alternative_names(names)), critical=False)
        .add_extension(ca_identifier, critical=False)
    )
    return builder.sign(ca_key, hashes.SHA256()), _pem_key(key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    clock: Clock,
    *,
    until: datetime,
) -> x509.CertificateBuilder:
    serial = int.from_bytes(clock.random_bytes(19), "big") | 1  # positive and below the 20 bytes of RFC 5280
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(datetime.fromtimestamp(clock.now_s(), UTC) - _BACKDATE)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _days_from_now(clock: Clock, days: int) -> datetime:
    return datetime.fromtimestamp(clock.now_s(), UTC) + timedelta(days=days)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(names: Sequence[str]) -> list[x509.GeneralName]:
    result: list[x509.GeneralName] = []
    for name in dict.fromkeys((*_LOCAL_NAMES, socket.gethostname(), *names)):
        try:
            result.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            try:
                result.append(x509.DNSName(name.encode("idna").decode("ascii")))
            except (UnicodeError, ValueError):
                message = f"{name!r} is neither a host name nor an IP address"
                raise ValueError(message) from None
    return result


def _load_ca(files: FileSystem, folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    path = folder / CA_KEY_FILE
    try:
        key = serialization.load_pem_private_key(read_pem(files, path), password=None)
    except (ValueError, TypeError) as error:
        raise AuthenticationFailed(f"no private key can be read from it: {error}", path=path) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AuthenticationFailed("not an elliptic curve key", path=path)
    path = folder / CA_FILE
    try:
        certificate = x509.load_pem_x509_certificate(read_pem(files, path))
    except ValueError as error:
        raise AuthenticationFailed(f"no certificate can be read from it: {error}", path=path) from None
    if certificate.public_key() != key.public_key():
        raise AuthenticationFailed(f"{CA_KEY_FILE} does not belong to this certificate", path=path)
    return certificate, key


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _refuse_existing(files: FileSystem, paths: Sequence[Path]) -> None:
    for path in paths:
        if files.exists(path):
            message = f"{path} exists already and is not overwritten; choose an empty folder"
            raise FileExistsError(message)
