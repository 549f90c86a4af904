"""Encode and decode the data of a frame, and choose how.

A Codecs object belongs to one thread: compressor contexts must never be shared. A CodecPolicy is shared by
all threads of a transfer. For `auto` it compares, per byte of data, what each candidate costs:

    cost = time to encode  +  share that is left after encoding * time to send one byte

from what the threads observe, and takes a candidate only when it is clearly better than the one in use.
Candidates that are not in use are timed on small samples, seldom.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lz4.block  # type: ignore[import-untyped]
import zstandard

from hvreplica.errors import FieldOutOfRange
from hvreplica.formats.wire import DATA_BYTES_MAX, SPEC, Codec
from hvreplica.units import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

COMPRESSIONS = ("auto", "zstd", "lz4", "none")

_WINDOW_LOG = (
    21  # a whole 2 MiB frame within reach: over 1 % fewer bytes than the 512 KiB of level 1, at no time
)
_WINDOW_BYTES_MAX = DATA_BYTES_MAX  # a hostile frame cannot ask for a larger window
_GAIN_SIXTYFOURTHS_MIN = 2  # encoded data that saves less is not worth decoding
SAMPLE_BYTES = 128 * KIB  # of a frame, to time a candidate that is not in use
_SAMPLE_EVERY_FRAMES = 16
_SLOW_SAMPLE_EVERY_FRAMES = 2  # a link that takes _SLOW_WIRE_NS for a byte leaves the CPU idle anyway
_SLOW_WIRE_NS = 4.0
_SWITCH_COST_MAX = 0.9  # a new choice must cost at most this share of the present one
_WIRE_MEMORY_BYTES = 4 * MIB  # about what a socket buffer holds: shorter sends say little about the link
_ENCODE_MEMORY_BYTES = 256 * KIB


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to encode. level: of zstd, else 0."""

    codec: Codec
    level: int = 0


NONE = Choice(Codec.NONE)
LZ4 = Choice(Codec.LZ4)
ZSTD = Choice(Codec.ZSTD, 1)
ZSTD_3 = Choice(Codec.ZSTD, 3)
CANDIDATES = (NONE, LZ4, ZSTD, ZSTD_3)
_FIXED = {"none": NONE, "lz4": LZ4, "zstd": ZSTD}


class Codecs:
    """Compressor contexts of one thread."""

    def __init__(self) -> None:
        self._compressors: dict[int, zstandard.ZstdCompressor] = {}
        self._decompressor: zstandard.ZstdDecompressor | None = None

    def encode(self, choice: Choice, data: memoryview) -> Buffer:
        """Return the encoded `data`, or `data` itself for none. The result may be larger than `data`."""
        if choice.codec == Codec.LZ4:
            encoded: bytes = lz4.block.compress(data, store_size=False)
            return encoded
        if choice.codec == Codec.ZSTD:
            return self._compressor(choice.level).compress(data)
        return data

    def decode(self, codec: Codec, encoded: memoryview, out: memoryview) -> None:
        """Decode `encoded` into `out`, which it must fill exactly; never writes or allocates beyond len(out).

        Raises: FieldOutOfRange if the bytes do not decode or decode to another length.
        """
        try:
            if codec == Codec.LZ4:
                data = lz4.block.decompress(encoded, uncompressed_size=len(out))
                length = len(data)
                if length == len(out):
                    out[:] = data
            elif codec == Codec.ZSTD:
                length = self._decode_zstd(encoded, out)
            else:
                length = len(encoded)
                if length == len(out):
                    out[:] = encoded
        except (zstandard.ZstdError, lz4.block.LZ4BlockError, MemoryError, ValueError) as error:
            raise FieldOutOfRange(
                f"the data of a frame does not decode: {error}",
                field="data",
                expected=f"{codec.name.lower()}",
                spec=SPEC,
            ) from None
        if length != len(out):
            raise FieldOutOfRange(
                "the data of a frame decodes to another length",
                field="data_bytes",
                expected=len(out),
                actual=f"{length}" if length < len(out) else "more",
                spec=SPEC,
            )

    def _decode_zstd(self, encoded: memoryview, out: memoryview) -> int:
        # A reader writes straight into `out`; decompress() would allocate what the frame claims to hold.
        if self._decompressor is None:
            self._decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES_MAX)
        with self._decompressor.stream_reader(encoded, read_size=max(len(encoded), 1)) as reader:
            done = 0
            while done < len(out):
                count = reader.readinto(out[done:])
                if count == 0:
                    return done
                done += count
            return done + len(reader.read(1))

    def _compressor(self, level: int) -> zstandard.ZstdCompressor:
        compressor = self._compressors.get(level)
        if compressor is None:
            parameters = zstandard.ZstdCompressionParameters.from_level(
                level, window_log=_WINDOW_LOG, write_checksum=False, write_content_size=True
            )
            compressor = zstandard.ZstdCompressor(compression_params=parameters)
            self._compressors[level] = compressor
        return compressor


def worth_it(encoded_bytes: int, data_bytes: int) -> bool:
    """Return whether the encoded form saves enough to be sent."""
    return encoded_bytes * 64 <= data_bytes * (64 - _GAIN_SIXTYFOURTHS_MIN)


@dataclass(slots=True)
class _Observed:
    """Running means for one candidate. A candidate that nobody timed has encode_ns None."""

    encode_ns: float | None = None  # per byte of data
    share: float = 1.0  # encoded bytes per byte of data


class CodecPolicy:
    """Choose the codec of each frame. Thread-safe; one for each transfer."""

    def __init__(self, name: str = "auto", candidates: Sequence[Choice] = CANDIDATES) -> None:
        """name: one of COMPRESSIONS; all but auto always give the same choice. Raises: ValueError."""
        if name not in COMPRESSIONS:
            message = f"{name!r} is not a compression; choose one of {', '.join(COMPRESSIONS)}"
            raise ValueError(message)
        self.name = name
        self.adaptive = name == "auto"
        self._lock = threading.Lock()
        self._current = _FIXED.get(name, NONE)
        self._observed = {choice: _Observed() for choice in candidates}
        self._observed[NONE] = _Observed(0.0, 1.0)
        self._wire_ns: float | None = None
        self._frames = 0

    @property
    def current(self) -> Choice:
        """What the next frame gets."""
        return self._current

    def choose(self) -> tuple[Choice, Sequence[Choice]]:
        """Return the choice for the next frame, and the candidates of which a sample is to be timed."""
        if not self.adaptive:
            return self._current, ()
        with self._lock:
            self._frames += 1
            others = [choice for choice in self._observed if choice not in (NONE, self._current)]
            if self._frames == 1:
                return self._current, others
            is_slow = self._wire_ns is not None and self._wire_ns >= _SLOW_WIRE_NS
            turn, rest = divmod(self._frames, _SLOW_SAMPLE_EVERY_FRAMES if is_slow else _SAMPLE_EVERY_FRAMES)
            if rest or not others:
                return self._current, ()
            return self._current, (others[turn % len(others)],)

    def observe_encode(self, choice: Choice, *, data_bytes: int, encoded_bytes: int, seconds: float) -> None:
        """Tell what it took to encode `data_bytes`."""
        if not self.adaptive or data_bytes <= 0 or choice == NONE:
            return
        with self._lock:
            seen = self._observed[choice]
            encode_ns, share = seconds * 1e9 / data_bytes, min(encoded_bytes / data_bytes, 1.0)
            if seen.encode_ns is None:
                seen.encode_ns, seen.share = encode_ns, share
            else:
                weight = data_bytes / (data_bytes + _ENCODE_MEMORY_BYTES)
                seen.encode_ns += (encode_ns - seen.encode_ns) * weight
                seen.share += (share - seen.share) * weight
                if not worth_it(encoded_bytes, data_bytes):
                    self._expect_no_gain(weight)
            self._decide()

    def observe_send(self, *, wire_bytes: int, seconds: float, receiver_s: float = 0.0) -> None:
        """Tell what it took to send. receiver_s: the part of it in which the receiver, not the link, was too
        slow.

        That part is left out: fewer bytes would not make the receiver faster.
        """
        if not self.adaptive or wire_bytes <= 0:
            return
        wire_ns = max(seconds - receiver_s, 0.0) * 1e9 / wire_bytes
        with self._lock:
            if self._wire_ns is None:
                self._wire_ns = wire_ns
            else:
                weight = wire_bytes / (wire_bytes + _WIRE_MEMORY_BYTES)
                self._wire_ns += (wire_ns - self._wire_ns) * weight
            self._decide()

    def _expect_no_gain(self, weight: float) -> None:
        """Learn for all candidates from data that one of them could not shrink: no other one will."""
        for choice, seen in self._observed.items():
            if choice != NONE:
                seen.share += (1.0 - seen.share) * weight

    def _decide(self) -> None:
        if self._wire_ns is None:
            return
        costs = {
            choice: seen.encode_ns + seen.share * self._wire_ns
            for choice, seen in self._observed.items()
            if seen.encode_ns is not None
        }
        best = min(costs, key=costs.__getitem__)
        # Only the way to a codec has to pay off clearly; the way back to none costs nothing.
        limit = 1.0 if best == NONE else _SWITCH_COST_MAX
        if costs[best] < costs.get(self._current, costs[best]) * limit:
            self._current = best
