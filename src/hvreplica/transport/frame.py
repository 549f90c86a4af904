"""Turn a window of a target into the buffers of a frame, and back.

A frame defines its window completely: runs of data, zeros everywhere else. One encoder and one decoder for
each thread; buffers are kept from frame to frame, their size bounded by DATA_BYTES_MAX.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.formats import wire
from hvreplica.formats.wire import Codec, FrameHeader, UnitKind
from hvreplica.transport.codec import NONE, SAMPLE_BYTES, Choice, CodecPolicy, Codecs, worth_it

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Buffer

    from hvreplica.clock import Clock


@dataclass(frozen=True, slots=True)
class Frame:
    """A received, verified frame.

    extents: int64 (n, 2) of (offset in the target, length), sorted, disjoint, inside the window; may be
    empty. data: the runs one after the other; valid until the decoder's next frame. Everything else in the
    window is zeros.
    """

    sequence: int
    target: int
    window_offset: int
    window_bytes: int
    extents: npt.NDArray[np.int64]
    data: memoryview


class FrameEncoder:
    """Encode frames in one thread, with a policy that may be shared."""

    def __init__(self, policy: CodecPolicy, *, clock: Clock) -> None:
        self.policy = policy
        self._codecs = Codecs()
        self._clock = clock

    def encode(
        self,
        *,
        sequence: int,
        target: int,
        window_offset: int,
        window_bytes: int,
        runs: npt.NDArray[np.integer],
        data: Buffer,
    ) -> list[Buffer]:
        """Return the buffers of one frame, to be sent one after the other before `data` changes.

        runs: (n, 2) of (absolute offset in the target, length), sorted, disjoint, inside the window, at most
        RUN_COUNT_MAX; data: the bytes of all runs, at most DATA_BYTES_MAX. With codec none `data` itself is
        returned. Raises: FieldOutOfRange, Overlap for a frame that no receiver would take.
        """
        view = memoryview(data).cast("B")
        relative = np.array(runs, dtype=np.int64).reshape(-1, 2)
        relative[:, 0] -= window_offset
        wire.require(
            len(relative) == 0
            or (int(relative.min()) >= 0 and int(relative.max()) < wire.WINDOW_WITH_RUNS_BYTES_MAX),
            "offset",
            "inside the window",
            "outside",
        )
        header = FrameHeader(
            sequence=sequence,
            window_offset=window_offset,
            window_bytes=window_bytes,
            target=target,
            codec=Codec.NONE,
            run_count=len(relative),
            data_bytes=len(view),
            encoded_bytes=len(view),
            digest=bytes(wire.DIGEST_BYTES),
        )
        header.validate()
        table = relative.astype(wire.RUN_DTYPE)
        wire.validate_runs(table, header)
        codec, payload, payload_bytes = self._encode_data(view)
        header = replace(header, codec=codec, encoded_bytes=payload_bytes)
        run_table = table.tobytes()
        digest = wire.frame_digest(wire.pack_frame_header(header), run_table, view)
        head = wire.pack_frame_header(replace(header, digest=digest))
        body_bytes = len(head) + len(run_table) + payload_bytes
        front = wire.pack_unit_header(UnitKind.FRAME, body_bytes) + head + run_table
        return [front, payload] if payload_bytes else [front]

    def _encode_data(self, view: memoryview) -> tuple[Codec, Buffer, int]:
        if len(view) == 0:
            return Codec.NONE, view, 0
        choice, samples = self.policy.choose()
        for other in samples:
            middle = max(len(view) - SAMPLE_BYTES, 0) // 2
            self._timed(other, view[middle : middle + SAMPLE_BYTES])
        encoded = self._timed(choice, view)
        encoded_bytes = memoryview(encoded).nbytes
        if choice == NONE or not worth_it(encoded_bytes, len(view)):
            return Codec.NONE, view, len(view)
        return choice.codec, encoded, encoded_bytes

    def _timed(self, choice: Choice, view: memoryview) -> Buffer:
        if not self.policy.adaptive:
            return self._codecs.encode(choice, view)
        start_s = self._clock.monotonic_s()
        encoded = self._codecs.encode(choice, view)
        self.policy.observe_encode(
            choice,
            data_bytes=len(view),
            encoded_bytes=memoryview(encoded).nbytes,
            seconds=self._clock.monotonic_s() - start_s,
        )
        return encoded


class FrameDecoder:
    """Decode frames in one thread: begin() gives the buffers to fill, finish() the verified frame."""

    def __init__(self) -> None:
        self._codecs = Codecs()
        self._data = bytearray()
        self._encoded = bytearray()
        self._header: FrameHeader | None = None
        self._table = memoryview(b"")
        self._payload = memoryview(b"")
        self._packed = b""

    def begin(self, packed_header: Buffer, body_bytes: int) -> tuple[memoryview, memoryview]:
        """Return two writable views, for the run table and for the encoded data, after checking every length.

        packed_header: the first 56 bytes of the body. Ends the life of the last frame's data.
        Raises: Truncated, FieldOutOfRange, UnsupportedVersion.
        """
        self._header = None
        header = wire.unpack_frame_header(packed_header)
        header.validate()
        header.validate_within(body_bytes)
        self._packed = bytes(packed_header)
        self._table = memoryview(bytearray(header.run_count * wire.RUN.size))
        self._data = _grown(self._data, header.data_bytes)
        if header.codec == Codec.NONE:
            self._payload = memoryview(self._data)[: header.encoded_bytes]
        else:
            self._encoded = _grown(self._encoded, header.encoded_bytes)
            self._payload = memoryview(self._encoded)[: header.encoded_bytes]
        self._header = header
        return self._table, self._payload

    def finish(self) -> Frame:
        """Decode and verify what was filled in.

        Raises: FieldOutOfRange, Overlap, ChecksumMismatch; then nothing of the frame may be used.
        """
        header, self._header = self._header, None
        if header is None:
            message = "begin() comes first"
            raise TypeError(message)
        table = np.frombuffer(self._table, wire.RUN_DTYPE).reshape(-1, 2)
        extents = wire.validate_runs(table, header)
        data = memoryview(self._data)[: header.data_bytes]
        if header.codec != Codec.NONE:
            self._codecs.decode(Codec(header.codec), self._payload, data)
        wire.validate_digest(header, wire.frame_digest(self._packed, self._table, data))
        return Frame(
            sequence=header.sequence,
            target=header.target,
            window_offset=header.window_offset,
            window_bytes=header.window_bytes,
            extents=extents,
            data=data.toreadonly(),
        )

    def decode(self, buffer: Buffer) -> Frame:
        """Return the one frame that `buffer` holds, its unit header included.

        Raises: FormatError of the kind that fits; any bytes give a frame or an error.
        """
        view = memoryview(buffer).cast("B")
        kind, body_bytes = wire.unpack_unit_header(view)
        body = view[wire.UNIT.size :]
        wire.require(kind == UnitKind.FRAME, "kind", int(UnitKind.FRAME), int(kind))
        wire.require(len(body) == body_bytes, "body_bytes", len(body), body_bytes)
        table, payload = self.begin(body[: wire.FRAME.size], body_bytes)
        rest = body[wire.FRAME.size :]
        table[:] = rest[: len(table)]
        payload[:] = rest[len(table) :]
        return self.finish()


def _grown(buffer: bytearray, size_bytes: int) -> bytearray:
    """Return a buffer of at least `size_bytes`; the old one where it is large enough."""
    if len(buffer) >= size_bytes:
        return buffer
    return bytearray(min(max(size_bytes, 2 * len(buffer)), wire.DATA_BYTES_MAX))
