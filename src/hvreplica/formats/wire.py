"""What travels between the two sites: preamble, messages, frames. Byte layouts and limits, no sockets.

Each side of a connection sends one preamble, the replica first, then units. A unit is a header of 8 bytes and
its body:

    message   msgpack, at most 1 MiB; formats/messages.py says what it means
    frame     frame header · run table · encoded data

A frame defines a whole window of its target: the runs hold data, everything else in the window is zeros; a
frame without runs makes a hole of any length. The digest covers the header before it, the run table and the
decoded data. All numbers are little-endian. Every limit is checked before anything is sized by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from hvreplica.errors import BadSignature, ChecksumMismatch, FieldOutOfRange, Overlap, UnsupportedVersion
from hvreplica.formats.layout import Field, Layout
from hvreplica.units import MIB

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Buffer

SPEC = "docs/formats/wire.md"
MAGIC = b"HVRWIRE\0"
WIRE_VERSION = 1  # the newest that we speak
WIRE_VERSION_MIN = 1  # the oldest that we still speak

MESSAGE_BYTES_MAX = 1 * MIB  # bounds what a peer can make us hold for one message
DATA_BYTES_MAX = 4 * MIB  # decoded data of a frame: two 2 MiB VHDX blocks; bounds the buffers of a connection
RUN_COUNT_MAX = DATA_BYTES_MAX // 512  # no run is shorter than a sector, but for an odd end of a log
TARGET_MAX = 0xFFFF
WINDOW_END_MAX = (1 << 63) - 1  # offsets are signed where files and numpy hold them
WINDOW_WITH_RUNS_BYTES_MAX = 1 << 32  # the run table counts in 32 bits

PREAMBLE = Layout(
    "preamble",
    spec=SPEC,
    size=16,
    fields=(
        Field("magic", "8s", '"HVRWIRE" and a zero byte'),
        Field("version", "H", "the newest version that the sender speaks"),
        Field("version_min", "H", "the oldest that it still speaks, at most version"),
        Field("flags", "I", "0; a receiver ignores bits that it does not know"),
    ),
)

UNIT = Layout(
    "unit header",
    spec=SPEC,
    size=8,
    fields=(
        Field("kind", "B", "1 message, 2 frame"),
        Field("reserved_1", "3s", "0"),
        Field("body_bytes", "I", "what follows; bounded by the kind"),
    ),
)

FRAME = Layout(
    "frame header",
    spec=SPEC,
    size=56,
    fields=(
        Field("sequence", "Q", "number of the frame in its session"),
        Field("window_offset", "Q", "bytes from the start of the target"),
        Field("window_bytes", "Q", "at least 1; the window ends below 2^63; at most 2^32 with runs"),
        Field("target", "H", "which disk or log of the transfer"),
        Field("codec", "B", "of the data: 0 none, 1 lz4 block, 2 one zstd frame"),
        Field("reserved_1", "B", "0"),
        Field("run_count", "I", "rows of the run table, at most 8192; 0 only without data"),
        Field("data_bytes", "I", "decoded data, at most 4 MiB, the sum of all runs"),
        Field("encoded_bytes", "I", "as it travels; never above data_bytes, and equal with codec none"),
        Field("digest", "16s", "XXH3-128, canonical: frame header before it, run table, decoded data"),
    ),
)

RUN = Layout(
    "run",
    spec=SPEC,
    size=8,
    fields=(
        Field("offset", "I", "bytes from the start of the window; not below the end of the run before"),
        Field("length", "I", "bytes, at least 1; the run ends inside the window"),
    ),
)

LAYOUTS = (PREAMBLE, UNIT, FRAME, RUN)
RUN_DTYPE = np.dtype("<u4")
DIGEST_BYTES = 16
FRAME_BODY_BYTES_MAX = FRAME.size + RUN_COUNT_MAX * RUN.size + DATA_BYTES_MAX
_DIGESTED_BYTES = FRAME.size - DIGEST_BYTES


class UnitKind(IntEnum):
    """What a unit carries."""

    MESSAGE = 1
    FRAME = 2


class Codec(IntEnum):
    """How the data of a frame is encoded."""

    NONE = 0
    LZ4 = 1
    ZSTD = 2


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """A frame header after validate(); lengths in bytes. Use unpack() for bytes from outside."""

    sequence: int
    window_offset: int
    window_bytes: int
    target: int
    codec: int
    run_count: int
    data_bytes: int
    encoded_bytes: int
    digest: bytes

    def validate(self) -> None:
        """Check every field against its own limits. Raises: FieldOutOfRange, UnsupportedVersion (codec)."""
        if self.codec not in (Codec.NONE, Codec.LZ4, Codec.ZSTD):
            raise UnsupportedVersion(
                "a frame uses a codec that this version does not know",
                field="codec",
                expected="0, 1 or 2",
                actual=self.codec,
                spec=SPEC,
                hint="update this side; the other one is newer",
            )
        require(0 <= self.sequence < 1 << 62, "sequence", "below 2^62", self.sequence)
        require(0 <= self.target <= TARGET_MAX, "target", f"at most {TARGET_MAX}", self.target)
        require(self.window_bytes >= 1, "window_bytes", "at least 1", self.window_bytes)
        end = self.window_offset + self.window_bytes
        require(self.window_offset >= 0 and end <= WINDOW_END_MAX, "window_offset", "an end below 2^63", end)
        require(self.run_count <= RUN_COUNT_MAX, "run_count", f"at most {RUN_COUNT_MAX}", self.run_count)
        require(self.data_bytes <= DATA_BYTES_MAX, "data_bytes", f"at most {DATA_BYTES_MAX}", self.data_bytes)
        require(
            self.data_bytes >= self.run_count and (self.run_count > 0 or self.data_bytes == 0),
            "data_bytes",
            f"data for each of {self.run_count} runs",
            self.data_bytes,
        )
        require(
            self.run_count == 0 or self.window_bytes <= WINDOW_WITH_RUNS_BYTES_MAX,
            "window_bytes",
            "at most 2^32 with runs",
            self.window_bytes,
        )
        self._validate_encoded()

    def _validate_encoded(self) -> None:
        if self.codec == Codec.NONE:
            expected, fits = f"{self.data_bytes}", self.encoded_bytes == self.data_bytes
        else:
            expected, fits = f"1 to {self.data_bytes}", 1 <= self.encoded_bytes <= self.data_bytes
        require(fits, "encoded_bytes", expected, self.encoded_bytes)

    def validate_within(self, body_bytes: int) -> None:
        """Check that the parts fill the body of the unit exactly. Raises: FieldOutOfRange."""
        parts = FRAME.size + self.run_count * RUN.size + self.encoded_bytes
        require(body_bytes == parts, "body_bytes", parts, body_bytes)


def unpack_frame_header(buffer: Buffer, at: int = 0) -> FrameHeader:
    """Return the frame header at `at`, with only its reserved byte checked; call validate() next.

    Raises: Truncated, FieldOutOfRange.
    """
    values = FRAME.unpack(buffer, at)
    require(values.pop("reserved_1") == 0, "reserved_1", 0, "a set bit")
    return FrameHeader(**values)


def pack_frame_header(header: FrameHeader) -> bytes:
    """Return the 56 bytes of a header."""
    return FRAME.pack(
        sequence=header.sequence,
        window_offset=header.window_offset,
        window_bytes=header.window_bytes,
        target=header.target,
        codec=header.codec,
        run_count=header.run_count,
        data_bytes=header.data_bytes,
        encoded_bytes=header.encoded_bytes,
        digest=header.digest,
    )


def validate_runs(runs: npt.NDArray[np.uint32], header: FrameHeader) -> npt.NDArray[np.int64]:
    """Return the run table as absolute extents of the target, int64 (n, 2) of (offset, length).

    runs: (n, 2) of (offset in the window, length). Rows may touch; they are sorted and disjoint. Raises:
    FieldOutOfRange for an empty run, a run outside the window or a sum other than data_bytes; Overlap.
    """
    extents = runs.astype(np.int64)
    if len(extents) == 0:
        return extents
    starts, lengths = extents[:, 0], extents[:, 1]
    ends = starts + lengths
    require(int(lengths.min()) >= 1, "length", "at least 1", 0)
    if (starts[1:] < ends[:-1]).any():
        index = int(np.argmax(starts[1:] < ends[:-1])) + 1
        raise Overlap(
            f"run {index} of a frame begins inside the run before",
            field="offset",
            expected=f"at least {int(ends[index - 1])}",
            actual=int(starts[index]),
            spec=SPEC,
        )
    require(
        int(ends[-1]) <= header.window_bytes, "offset", f"an end within {header.window_bytes}", int(ends[-1])
    )
    total = int(lengths.sum())
    require(total == header.data_bytes, "data_bytes", f"{total}, the sum of the runs", header.data_bytes)
    starts += header.window_offset  # cannot overflow: validate() keeps the window's end below 2^63
    return extents


def frame_digest(packed_header: Buffer, run_table: Buffer, data: Buffer) -> bytes:
    """Return the digest of a frame. packed_header: 56 bytes, whose own digest field is left out."""
    state = xxhash.xxh3_128()
    state.update(memoryview(packed_header)[:_DIGESTED_BYTES])
    state.update(run_table)
    state.update(data)
    return state.digest()


def validate_digest(header: FrameHeader, actual: bytes) -> None:
    """Compare what was received with what was sent. Raises: ChecksumMismatch."""
    if actual != header.digest:
        raise ChecksumMismatch(
            f"frame {header.sequence} does not hold what was sent",
            field="digest",
            expected=header.digest.hex(),
            actual=actual.hex(),
            spec=SPEC,
            hint="send it again; if it happens again, test the memory of both hosts",
        )


def pack_unit_header(kind: UnitKind, body_bytes: int) -> bytes:
    """Return the 8 bytes before a body."""
    return UNIT.pack(kind=kind, body_bytes=body_bytes)


def unpack_unit_header(buffer: Buffer, at: int = 0) -> tuple[UnitKind, int]:
    """Return (kind, body_bytes), bounded by the kind. Raises: Truncated, FieldOutOfRange."""
    values = UNIT.unpack(buffer, at)
    kind, body_bytes = values["kind"], values["body_bytes"]
    require(kind in (UnitKind.MESSAGE, UnitKind.FRAME), "kind", "1 or 2", kind)
    require(values["reserved_1"] == bytes(3), "reserved_1", 0, values["reserved_1"].hex())
    if kind == UnitKind.MESSAGE:
        low, high = 1, MESSAGE_BYTES_MAX
    else:
        low, high = FRAME.size, FRAME_BODY_BYTES_MAX
    require(low <= body_bytes <= high, "body_bytes", f"{low} to {high}", body_bytes)
    return UnitKind(kind), body_bytes


def pack_preamble() -> bytes:
    """Return the 16 bytes that each side sends first."""
    return PREAMBLE.pack(magic=MAGIC, version=WIRE_VERSION, version_min=WIRE_VERSION_MIN)


def choose_version(buffer: Buffer) -> int:
    """Return the wire version that both sides speak, from the other side's preamble.

    Raises: Truncated, BadSignature, UnsupportedVersion.
    """
    values = PREAMBLE.unpack(buffer)
    if values["magic"] != MAGIC:
        raise BadSignature(
            "the other side does not speak this protocol",
            field="magic",
            expected=MAGIC,
            actual=values["magic"],
            spec=SPEC,
        )
    version = min(WIRE_VERSION, int(values["version"]))
    if version < max(WIRE_VERSION_MIN, int(values["version_min"])):
        raise UnsupportedVersion(
            "no version of the protocol is spoken by both sides",
            field="version",
            expected=f"{WIRE_VERSION_MIN} to {WIRE_VERSION}",
            actual=f"{values['version_min']} to {values['version']}",
            spec=SPEC,
            hint="update the older side",
        )
    return version


def require(condition: bool, field: str, expected: object, actual: object) -> None:  # noqa: FBT001
    """Raise FieldOutOfRange naming the field unless `condition` holds."""
    if not condition:
        raise FieldOutOfRange(
            "what arrived breaks the protocol", field=field, expected=expected, actual=actual, spec=SPEC
        )
