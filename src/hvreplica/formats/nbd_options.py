"""The handshake of the Network Block Device protocol, fixed newstyle: structures and limits, no sockets.

The server sends a greeting, the client its flags and then options, one at a time; each is answered by
replies, the last of which ends it. EXPORT_NAME and GO lead to transmission (formats/nbd.py). Numbers are
big-endian. Every length is checked before anything is sized by it.

Spec: the NBD protocol, doc/proto.md of github.com/NetworkBlockDevice/nbd, by the names of its sections.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING

from hvreplica.errors import FieldOutOfRange
from hvreplica.formats.layout import Field, Layout
from hvreplica.formats.nbd import CONTEXT_ID, TEXT_BYTES_MAX, pack_text, require, require_magic
from hvreplica.units import KIB

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Buffer

    from hvreplica.formats.nbd import TransmissionFlag

GREETING_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003_E889_0455_65A9

OPTION_BYTES_MAX = 64 * KIB  # our own bound: an export name and a dozen queries of the longest kind
MINIMUM_BLOCK_BYTES_MAX = 64 * KIB  # "Size constraints"
PREFERRED_BLOCK_BYTES_MIN = 512  # "Size constraints"
EXPORT_NAME_PADDING_BYTES = 124  # behind the reply to EXPORT_NAME, for clients without NO_ZEROES

BASE_ALLOCATION = "base:allocation"
BASE_WILDCARD = "base:"

_HANDSHAKE = "NBD, Handshake"
_OPTIONS = "NBD, Option types"
_REPLIES = "NBD, Option reply types"


class HandshakeFlag(IntFlag):
    """What the server can do in the handshake."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    """What the client does; any other bit ends the connection."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    """What a client asks in the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    """What the server answers to an option; errors have bit 31 set and may carry a sentence for people."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9


class Info(IntEnum):
    """What a client may want to know of an export with INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


GREETING = Layout(
    "greeting",
    spec=_HANDSHAKE,
    size=18,
    endian=">",
    fields=(
        Field("magic", "8s", '"NBDMAGIC"'),
        Field("option_magic", "8s", '"IHAVEOPT": newstyle'),
        Field("flags", "H", "bit 0 fixed newstyle, bit 1 no zeroes; both are set"),
    ),
)
CLIENT_FLAGS = Layout(
    "client flags",
    spec=_HANDSHAKE,
    size=4,
    endian=">",
    fields=(Field("flags", "I", "bit 0 fixed newstyle, bit 1 no zeroes; any other bit ends the connection"),),
)
OPTION = Layout(
    "option header",
    spec=_OPTIONS,
    size=16,
    endian=">",
    fields=(
        Field("magic", "8s", '"IHAVEOPT"'),
        Field("option", "I", "1 to 10 are known; the reply to any other is ERR_UNSUP"),
        Field("data_bytes", "I", "what follows, at most 64 KiB here"),
    ),
)
OPTION_REPLY = Layout(
    "option reply header",
    spec=_REPLIES,
    size=20,
    endian=">",
    fields=(
        Field("magic", "Q", "0x0003e889045565a9"),
        Field("option", "I", "the option that is answered"),
        Field("reply", "I", "1 ACK, 2 SERVER, 3 INFO, 4 META_CONTEXT; an error with bit 31 set"),
        Field("data_bytes", "I", "what follows"),
    ),
)
EXPORT_NAME_REPLY = Layout(
    "reply to EXPORT_NAME",
    spec=_OPTIONS,
    size=10,
    endian=">",
    fields=(
        Field("size_bytes", "Q", "of the export"),
        Field("flags", "H", "transmission flags; 124 zero bytes follow unless both sides said no zeroes"),
    ),
)
INFO_EXPORT = Layout(
    "NBD_INFO_EXPORT",
    spec=_REPLIES,
    size=12,
    endian=">",
    fields=(
        Field("info", "H", "0"),
        Field("size_bytes", "Q", "of the export"),
        Field("flags", "H", "transmission flags"),
    ),
)
INFO_BLOCK_SIZE = Layout(
    "NBD_INFO_BLOCK_SIZE",
    spec=_REPLIES,
    size=14,
    endian=">",
    fields=(
        Field("info", "H", "3"),
        Field("minimum_bytes", "I", "a power of two, at most 64 KiB; the disk's logical sector"),
        Field("preferred_bytes", "I", "a power of two, at least 512 and minimum_bytes"),
        Field("payload_bytes_max", "I", "32 MiB"),
    ),
)


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """The data of INFO and GO."""

    name: str
    infos: frozenset[int]


@dataclass(frozen=True, slots=True)
class ContextRequest:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...]


def pack_greeting() -> bytes:
    """Return the 18 bytes that the server sends first."""
    flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
    return GREETING.pack(magic=GREETING_MAGIC, option_magic=OPTION_MAGIC, flags=flags)


def unpack_client_flags(buffer: Buffer) -> ClientFlag:
    """Return what the client answers to the greeting. Raises: Truncated, FieldOutOfRange (unknown bits)."""
    flags = int(CLIENT_FLAGS.unpack(buffer)["flags"])
    known = int(
        ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES
    )  # as a number: ~ of flags drops unknown bits
    require(flags & ~known == 0, "flags", f"no bits but {known:#x}", f"{flags:#x}", _HANDSHAKE)
    return ClientFlag(flags)


def pack_option(option: int, data: bytes = b"") -> bytes:
    """Return an option as a client sends it."""
    return OPTION.pack(magic=OPTION_MAGIC, option=option, data_bytes=len(data)) + data


def unpack_option_header(buffer: Buffer) -> tuple[int, int]:
    """Return (option, data_bytes), the second bounded by OPTION_BYTES_MAX.

    Raises: Truncated, BadSignature, FieldOutOfRange.
    """
    values = OPTION.unpack(buffer)
    require_magic("option", OPTION_MAGIC, values["magic"])
    data_bytes = int(values["data_bytes"])
    expected = f"at most {OPTION_BYTES_MAX}"
    require(data_bytes <= OPTION_BYTES_MAX, "data_bytes", expected, data_bytes, _OPTIONS)
    return int(values["option"]), data_bytes


def pack_option_reply(option: int, reply: OptionReply, data: bytes = b"") -> bytes:
    """Return one reply to an option."""
    header = OPTION_REPLY.pack(magic=OPTION_REPLY_MAGIC, option=option, reply=reply, data_bytes=len(data))
    return header + data


def unpack_option_reply_header(buffer: Buffer) -> tuple[int, int, int]:
    """Return (option, reply, data_bytes). Raises: Truncated, BadSignature."""
    values = OPTION_REPLY.unpack(buffer)
    require_magic("option reply", OPTION_REPLY_MAGIC, values["magic"])
    return int(values["option"]), int(values["reply"]), int(values["data_bytes"])


def pack_export_name_reply(size_bytes: int, flags: TransmissionFlag, *, padded: bool) -> bytes:
    """Return the answer to EXPORT_NAME, which has no header. padded: with the 124 zero bytes."""
    reply = EXPORT_NAME_REPLY.pack(size_bytes=size_bytes, flags=flags)
    return reply + bytes(EXPORT_NAME_PADDING_BYTES if padded else 0)


def pack_server(name: str, description: str) -> bytes:
    """Return the data of a SERVER reply: one export of the list."""
    packed = pack_text(name)
    return len(packed).to_bytes(4, "big") + packed + pack_text(description)


def pack_info_text(info: Info, text: str) -> bytes:
    """Return the data of an INFO reply of kind NAME or DESCRIPTION."""
    return info.to_bytes(2, "big") + pack_text(text)


def pack_context(context_id: int, name: str) -> bytes:
    """Return the data of a META_CONTEXT reply."""
    return CONTEXT_ID.pack(context_id=context_id) + pack_text(name)


def unpack_text(data: bytes, field: str) -> str:
    """Return a string from outside. Raises: FieldOutOfRange if it is too long, not UTF-8 or holds a NUL."""
    require(len(data) <= TEXT_BYTES_MAX, field, f"at most {TEXT_BYTES_MAX} bytes", len(data), _OPTIONS)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FieldOutOfRange(
            "what arrived is no text",
            field=field,
            expected="UTF-8",
            actual=f"{error.reason} at byte {error.start}",
            spec=_OPTIONS,
        ) from None
    require("\0" not in text, field, "no NUL", "a NUL", _OPTIONS)
    return text


def pack_export_request(name: str, infos: Sequence[int] = ()) -> bytes:
    """Return the data of INFO and GO."""
    parts = [_counted(name), len(infos).to_bytes(2, "big"), *(info.to_bytes(2, "big") for info in infos)]
    return b"".join(parts)


def unpack_export_request(data: bytes) -> ExportRequest:
    """Return the data of INFO and GO. Raises: FieldOutOfRange."""
    reader = _Reader(data)
    name = reader.text("name")
    count = reader.number("info_count", 2)
    infos = frozenset(reader.number("info", 2) for _ in range(count))
    reader.end()
    return ExportRequest(name, infos)


def pack_context_request(name: str, queries: Iterable[str]) -> bytes:
    """Return the data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    packed = [_counted(query) for query in queries]
    return b"".join([_counted(name), len(packed).to_bytes(4, "big"), *packed])


def unpack_context_request(data: bytes) -> ContextRequest:
    """Return the data of LIST_META_CONTEXT and SET_META_CONTEXT. Raises: FieldOutOfRange."""
    reader = _Reader(data)
    name = reader.text("name")
    count = reader.number("query_count", 4)
    expected = f"at most {reader.left // 4} in {reader.left} bytes"
    require(count <= reader.left // 4, "query_count", expected, count, _OPTIONS)
    queries = tuple(reader.text("query") for _ in range(count))
    reader.end()
    return ContextRequest(name, queries)


class _Reader:
    """Takes counted fields from the data of an option; nothing is read beyond its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, field: str, count: int) -> bytes:
        require(count <= self.left, field, f"{count} bytes", f"{self.left} bytes", _OPTIONS)
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, field: str, size_bytes: int) -> int:
        return int.from_bytes(self.take(field, size_bytes), "big")

    def text(self, field: str) -> str:
        return unpack_text(self.take(field, self.number(f"{field}_bytes", 4)), field)

    def end(self) -> None:
        require(self.left == 0, "data_bytes", f"{self._at}", len(self._data), _OPTIONS)


def _counted(text: str) -> bytes:
    packed = pack_text(text)
    return len(packed).to_bytes(4, "big") + packed
