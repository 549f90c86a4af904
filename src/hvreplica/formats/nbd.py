"""The Network Block Device protocol after its handshake: constants, structures and limits, no sockets.

Numbers are big-endian. A client sends requests; each is answered by a simple reply, or by chunks where
structured replies were negotiated (formats/nbd_options.py). What is served of the protocol, and why the rest
is not, stands in docs/formats/nbd.md.

Spec: the NBD protocol, doc/proto.md of github.com/NetworkBlockDevice/nbd, by the names of its sections.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.errors import BadSignature, FieldOutOfRange
from hvreplica.formats.layout import Field, Layout
from hvreplica.units import MIB

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Buffer

REQUEST_MAGIC = 0x2560_9513
SIMPLE_REPLY_MAGIC = 0x6744_6698
CHUNK_MAGIC = 0x668E_33EF

TEXT_BYTES_MAX = 4096  # of any name, query or message: "Conventions"
PAYLOAD_BYTES_MAX = 32 * MIB  # of one read or write; what every client may rely on: "Size constraints"
DESCRIPTORS_MAX = 1 << 20  # in one block status chunk: "Structured reply types"
BASE_ALLOCATION_ID = 1  # ours to choose; chunks carry it

_TRANSMISSION = "NBD, Transmission"
_CHUNKS = "NBD, Structured reply types"


class TransmissionFlag(IntFlag):
    """What may be asked of an export."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Command(IntEnum):
    """The type of a request."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """How a request is meant."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class ChunkType(IntEnum):
    """What a chunk of a structured reply holds; errors have bit 15 set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


class ChunkFlag(IntFlag):
    """DONE: no other chunk of this reply follows."""

    DONE = 1 << 0


class BlockState(IntFlag):
    """What base:allocation says of an extent."""

    HOLE = 1 << 0
    ZERO = 1 << 1


class NbdError(IntEnum):
    """The only numbers that a reply may carry as an error."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


REQUEST = Layout(
    "request",
    spec=_TRANSMISSION,
    size=28,
    endian=">",
    fields=(
        Field("magic", "I", "0x25609513"),
        Field("flags", "H", "1 FUA, 2 NO_HOLE, 4 DF, 8 REQ_ONE, 16 FAST_ZERO"),
        Field(
            "command",
            "H",
            "0 READ, 1 WRITE, 2 DISC, 3 FLUSH, 4 TRIM, 5 CACHE, 6 WRITE_ZEROES, 7 BLOCK_STATUS",
        ),
        Field("cookie", "Q", "the client's own, given back in the reply"),
        Field("disk_offset", "Q", "guest bytes"),
        Field("length", "I", "bytes; as many follow a WRITE"),
    ),
)
SIMPLE_REPLY = Layout(
    "simple reply",
    spec=_TRANSMISSION,
    size=16,
    endian=">",
    fields=(
        Field("magic", "I", "0x67446698"),
        Field("error", "I", "0, or one of the error values"),
        Field("cookie", "Q", "of the request"),
    ),
)
CHUNK = Layout(
    "chunk header",
    spec=_TRANSMISSION,
    size=20,
    endian=">",
    fields=(
        Field("magic", "I", "0x668e33ef"),
        Field("flags", "H", "1 DONE: the last chunk of its reply"),
        Field(
            "type",
            "H",
            "0 NONE, 1 OFFSET_DATA, 2 OFFSET_HOLE, 5 BLOCK_STATUS, 0x8001 ERROR, 0x8002 ERROR_OFFSET",
        ),
        Field("cookie", "Q", "of the request"),
        Field("payload_bytes", "I", "what follows"),
    ),
)
OFFSET_DATA = Layout(
    "payload of OFFSET_DATA",
    spec=_CHUNKS,
    size=8,
    endian=">",
    fields=(Field("disk_offset", "Q", "where the data begins that follows"),),
)
OFFSET_HOLE = Layout(
    "payload of OFFSET_HOLE",
    spec=_CHUNKS,
    size=12,
    endian=">",
    fields=(
        Field("disk_offset", "Q", "where the zeros begin"),
        Field("length", "I", "bytes of zeros, at least 1"),
    ),
)
CHUNK_ERROR = Layout(
    "payload of ERROR",
    spec=_CHUNKS,
    size=6,
    endian=">",
    fields=(
        Field("error", "I", "one of the error values, never 0"),
        Field("message_bytes", "H", "of the sentence for people that follows; at most 4096"),
    ),
)
CONTEXT_ID = Layout(
    "metadata context id",
    spec=_CHUNKS,
    size=4,
    endian=">",
    fields=(Field("context_id", "I", "1 for base:allocation; 0 in the answer to LIST_META_CONTEXT"),),
)
DESCRIPTOR = Layout(
    "block status descriptor",
    spec=_CHUNKS,
    size=8,
    endian=">",
    fields=(
        Field("length", "I", "bytes, at least 1; descriptors follow each other without a gap"),
        Field("state", "I", "1 HOLE, 2 ZERO"),
    ),
)
DESCRIPTOR_DTYPE = np.dtype(">u4")


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the transmission phase. command and flags are as the client sent them, unchecked."""

    command: int
    flags: int
    cookie: int
    disk_offset: int
    length: int


def pack_text(text: str) -> bytes:
    """Return `text` as UTF-8 of at most TEXT_BYTES_MAX bytes; what cannot be encoded becomes "?"."""
    packed = text.replace("\0", "?").encode("utf-8", "replace")
    return packed[:TEXT_BYTES_MAX].decode("utf-8", "ignore").encode("utf-8")


def pack_request(request: Request) -> bytes:
    """Return a request as a client sends it, without the data of a write."""
    return REQUEST.pack(
        magic=REQUEST_MAGIC,
        flags=request.flags,
        command=request.command,
        cookie=request.cookie,
        disk_offset=request.disk_offset,
        length=request.length,
    )


def unpack_request(buffer: Buffer, at: int = 0) -> Request:
    """Return the request at `at`, with only its magic checked. Raises: Truncated, BadSignature."""
    values = REQUEST.unpack(buffer, at)
    require_magic("request", REQUEST_MAGIC, values.pop("magic"))
    return Request(**values)


def pack_simple_reply(cookie: int, error: int = 0) -> bytes:
    """Return a simple reply; the data of a read that succeeded follows it."""
    return SIMPLE_REPLY.pack(magic=SIMPLE_REPLY_MAGIC, error=error, cookie=cookie)


def unpack_simple_reply(buffer: Buffer, at: int = 0) -> tuple[int, int]:
    """Return (cookie, error). Raises: Truncated, BadSignature."""
    values = SIMPLE_REPLY.unpack(buffer, at)
    require_magic("simple reply", SIMPLE_REPLY_MAGIC, values["magic"])
    return int(values["cookie"]), int(values["error"])


def pack_chunk_header(cookie: int, kind: ChunkType, payload_bytes: int, *, is_last: bool) -> bytes:
    """Return the header of a chunk, before its payload."""
    flags = ChunkFlag.DONE if is_last else ChunkFlag(0)
    return CHUNK.pack(magic=CHUNK_MAGIC, flags=flags, type=kind, cookie=cookie, payload_bytes=payload_bytes)


def unpack_chunk_header(buffer: Buffer, at: int = 0) -> tuple[int, int, int, bool]:
    """Return (cookie, type, payload_bytes, is_last). Raises: Truncated, BadSignature."""
    values = CHUNK.unpack(buffer, at)
    require_magic("chunk", CHUNK_MAGIC, values["magic"])
    is_last = bool(values["flags"] & ChunkFlag.DONE)
    return int(values["cookie"]), int(values["type"]), int(values["payload_bytes"]), is_last


def pack_error_chunk(cookie: int, error: NbdError, message: str = "") -> bytes:
    """Return a whole reply that says what went wrong, with a sentence for people."""
    text = pack_text(message)
    payload = CHUNK_ERROR.pack(error=error, message_bytes=len(text)) + text
    return pack_chunk_header(cookie, ChunkType.ERROR, len(payload), is_last=True) + payload


def pack_block_status(cookie: int, descriptors: npt.NDArray[np.int64]) -> bytes:
    """Return a whole reply to BLOCK_STATUS for base:allocation.

    descriptors: (n, 2) of (length in bytes, BlockState), from the request's offset on; 1 to DESCRIPTORS_MAX
    rows. Raises: FieldOutOfRange for no or too many rows, and for a length that 32 bits do not hold.
    """
    count = len(descriptors)
    expected = f"1 to {DESCRIPTORS_MAX}"
    require(1 <= count <= DESCRIPTORS_MAX, "descriptors", expected, count, _CHUNKS)
    shortest, longest = int(descriptors[:, 0].min()), int(descriptors[:, 0].max())
    require(shortest >= 1, "length", "at least 1", shortest, _CHUNKS)
    require(longest < 1 << 32, "length", "below 2^32", longest, _CHUNKS)
    payload = CONTEXT_ID.pack(context_id=BASE_ALLOCATION_ID) + descriptors.astype(DESCRIPTOR_DTYPE).tobytes()
    return pack_chunk_header(cookie, ChunkType.BLOCK_STATUS, len(payload), is_last=True) + payload


def unpack_descriptors(payload: Buffer) -> npt.NDArray[np.int64]:
    """Return the rows of a BLOCK_STATUS payload, int64 (n, 2) of (length, BlockState).

    Raises: Truncated, FieldOutOfRange if the payload is not an id and whole rows, at least one.
    """
    CONTEXT_ID.unpack(payload)
    view = memoryview(payload)[CONTEXT_ID.size :]
    require(
        len(view) > 0 and len(view) % DESCRIPTOR.size == 0,
        "payload_bytes",
        f"{CONTEXT_ID.size} and a multiple of {DESCRIPTOR.size}",
        CONTEXT_ID.size + len(view),
        _CHUNKS,
    )
    return np.frombuffer(view, DESCRIPTOR_DTYPE).reshape(-1, 2).astype(np.int64)


_ERRORS = {
    errno.EPERM: NbdError.EPERM,
    errno.EACCES: NbdError.EPERM,
    errno.EROFS: NbdError.EPERM,
    errno.ENOMEM: NbdError.ENOMEM,
    errno.EINVAL: NbdError.EINVAL,
    errno.ENOSPC: NbdError.ENOSPC,
    errno.EDQUOT: NbdError.ENOSPC,
    errno.EFBIG: NbdError.ENOSPC,
}


def nbd_error(os_error: int) -> NbdError:
    """Return what a client is told for an errno of ours; EIO for all that it could do nothing about."""
    return _ERRORS.get(os_error, NbdError.EIO)


def require_magic(what: str, expected: bytes | int, actual: bytes | int) -> None:
    """Raise BadSignature naming what was expected unless the two are equal."""
    if actual != expected:
        raise BadSignature(
            f"what arrived is no {what} of NBD",
            field="magic",
            expected=expected if isinstance(expected, bytes) else f"{expected:#x}",
            actual=actual if isinstance(actual, bytes) else f"{actual:#x}",
            spec=_TRANSMISSION,
        )


def require(condition: bool, field: str, expected: object, actual: object, spec: str) -> None:  # noqa: FBT001
    """Raise FieldOutOfRange naming the field unless `condition` holds."""
    if not condition:
        raise FieldOutOfRange(
            "what arrived breaks the NBD protocol", field=field, expected=expected, actual=actual, spec=spec
        )
