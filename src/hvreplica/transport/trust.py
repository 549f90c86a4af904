"""Which certificate may write which virtual machine: trust.toml, read by the server.

    [[allow]]
    certificate = "sha256:0123…"     # or the common name of the certificate
    vm = ["web*", "db01"]            # * any characters, ? one; upper and lower case differ

A certificate of our CA that no entry names may write nothing.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from hvreplica.errors import AuthorizationRefused, FieldOutOfRange
from hvreplica.files import write_durably
from hvreplica.units import MIB

if TYPE_CHECKING:
    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem
    from hvreplica.transport.tls import PeerIdentity

_TRUST_BYTES_MAX = 1 * MIB
_ENTRIES_MAX = 10_000
_PATTERN_CHARS_MAX = 200
_FINGERPRINT_PREFIX = "sha256:"
_FINGERPRINT_DIGITS = 64
_NOT_HEX = re.compile(r"[^0-9a-f]")
_HINT = "make one with `hvreplica tls init DIR`, or write [[allow]] entries as docs/tls.md shows"

_HEADER = """\
# Which certificate may write which virtual machine.
# certificate: "sha256:" and the fingerprint, or the common name.
# vm: names; * stands for any characters, ? for one.
# A certificate that is not named here may write nothing.
"""

Pattern = Annotated[str, msgspec.Meta(min_length=1, max_length=_PATTERN_CHARS_MAX)]


class TrustEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One certificate and the VM names that it may write."""

    certificate: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    vm: Annotated[list[Pattern], msgspec.Meta(min_length=1, max_length=_ENTRIES_MAX)]

    def names(self, identity: PeerIdentity) -> bool:
        """Return whether this entry is about that certificate."""
        if self.certificate.lower().startswith(_FINGERPRINT_PREFIX):
            return normal_fingerprint(self.certificate) == identity.fingerprint_sha256
        return identity.common_name != "" and self.certificate == identity.common_name


class _TrustFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    allow: Annotated[list[TrustEntry], msgspec.Meta(max_length=_ENTRIES_MAX)] = []


class TrustList:
    """The entries of a trust.toml; immutable, usable from many threads."""

    def __init__(self, entries: list[TrustEntry]) -> None:
        self.entries = tuple(entries)

    @classmethod
    def load(cls, files: FileSystem, path: Path) -> TrustList:
        """Read and check `path`.

        Raises: AuthorizationRefused if it is missing; FieldOutOfRange, naming the file and field, if it is
        not valid.
        """
        data = _read(files, Path(path))
        if data is None:
            raise AuthorizationRefused("no trust list, so nobody may write here", path=path, hint=_HINT)
        return cls(_parse(data, Path(path)))

    def allows(self, identity: PeerIdentity, vm: str) -> bool:
        """Return whether the certificate may write the VM of this name."""
        return any(
            entry.names(identity) and any(matches(vm, pattern) for pattern in entry.vm)
            for entry in self.entries
        )


def allow(files: FileSystem, path: Path, *, certificate: str, vm: list[str], clock: Clock) -> None:
    """Add an entry at the end of the trust list at `path`, keeping what stands there; durable on return.

    Raises: FieldOutOfRange if the file or the new entry is not valid, FileNotFoundError naming a missing
    folder; then nothing is changed.
    """
    path = Path(path)
    if not files.exists(path.parent):
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    data = (_read(files, path) or _HEADER.encode()) + entry_text(certificate, vm).encode()
    _parse(data, path)
    write_durably(files, path, data, clock=clock)


def trust_text(fingerprint_sha256: str) -> str:
    """Return a trust list that lets one certificate write every VM."""
    return _HEADER + entry_text(_FINGERPRINT_PREFIX + fingerprint_sha256, ["*"])


def entry_text(certificate: str, vm: list[str]) -> str:
    """Return one entry as TOML, whose basic strings are escaped as in JSON."""
    patterns = msgspec.json.encode(vm).decode()
    return f"\n[[allow]]\ncertificate = {msgspec.json.encode(certificate).decode()}\nvm = {patterns}\n"


def normal_fingerprint(text: str) -> str:
    """Return 64 lower-case hex digits for "sha256:AB:CD:…" or "sha256:abcd…". Raises: FieldOutOfRange."""
    digits = text.lower().removeprefix(_FINGERPRINT_PREFIX).replace(":", "").strip()
    if len(digits) != _FINGERPRINT_DIGITS or _NOT_HEX.search(digits):
        raise FieldOutOfRange(
            "a certificate in the trust list is not a SHA-256 fingerprint",
            field="allow.certificate",
            expected="sha256: and 64 hex digits",
            actual=text[:100],
        )
    return digits


def matches(name: str, pattern: str) -> bool:
    """Return whether `name` fits `pattern`, in which * stands for any characters and ? for exactly one.

    Greedy with one point to fall back to: len(name) * len(pattern) steps at most, whatever the pattern.
    """
    at, wanted, star, mark = 0, 0, -1, 0
    while at < len(name):
        if wanted < len(pattern) and pattern[wanted] == "*":
            star, mark = wanted, at
            wanted += 1
        elif wanted < len(pattern) and pattern[wanted] in ("?", name[at]):
            at += 1
            wanted += 1
        elif star >= 0:
            mark += 1
            at, wanted = mark, star + 1
        else:
            return False
    return pattern[wanted:].strip("*") == ""


def _read(files: FileSystem, path: Path) -> bytes | None:
    """Return the content, None where there is no such file."""
    try:
        file = files.open(path)
    except FileNotFoundError:
        return None
    try:
        size_bytes = file.size()
        if size_bytes > _TRUST_BYTES_MAX:
            raise FieldOutOfRange(
                "the trust list is too long",
                path=path,
                expected=f"at most {_TRUST_BYTES_MAX}",
                actual=size_bytes,
            )
        return file.read(0, size_bytes)
    finally:
        file.close()


def _parse(data: bytes, path: Path) -> list[TrustEntry]:
    try:
        entries = msgspec.toml.decode(data, type=_TrustFile).allow
        for entry in entries:
            if entry.certificate.lower().startswith(_FINGERPRINT_PREFIX):
                normal_fingerprint(entry.certificate)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FieldOutOfRange(f"the trust list is not valid: {error}", path=path, hint=_HINT) from None
    except FieldOutOfRange as error:
        raise error.at(path) from None
    return entries
