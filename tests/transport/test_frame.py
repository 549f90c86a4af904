"""Frames survive the way there and back; damaged or hostile ones give an error, in bounded memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import lz4.block
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.clock import SYSTEM
from hvreplica.errors import ChecksumMismatch, FieldOutOfRange, FormatError, Overlap, UnsupportedVersion
from hvreplica.formats import wire
from hvreplica.formats.wire import Codec, FrameHeader, UnitKind
from hvreplica.transport import CodecPolicy, Frame, FrameDecoder, FrameEncoder
from tests.transport.support import random_frame

COMPRESSIONS = ("none", "lz4", "zstd", "auto")
TEXT = b"the same words again and again, " * 4000


def packed(compression: str = "none", **values: Any) -> bytearray:
    fields: dict[str, Any] = {
        "sequence": 1,
        "target": 2,
        "window_offset": 4096,
        "window_bytes": len(TEXT) + 8192,
        "runs": np.array([[4096, 1000], [9000, len(TEXT) - 1000]]),
        "data": TEXT,
    }
    encoder = FrameEncoder(CodecPolicy(compression), clock=SYSTEM)
    return bytearray(b"".join(bytes(buffer) for buffer in encoder.encode(**(fields | values))))


def facts(frame: Frame) -> tuple[object, ...]:
    """Return everything that a frame says, comparable and alive after the next one."""
    place = (frame.sequence, frame.target, frame.window_offset, frame.window_bytes)
    return (*place, frame.extents.tolist(), bytes(frame.data))


def forged(codec: Codec, encoded: bytes, data_bytes: int) -> bytes:
    """Return a frame whose header claims `data_bytes`, with any encoded data."""
    header = FrameHeader(
        sequence=0,
        window_offset=0,
        window_bytes=1 << 23,
        target=0,
        codec=codec,
        run_count=1,
        data_bytes=data_bytes,
        encoded_bytes=len(encoded),
        digest=bytes(16),
    )
    table = np.array([[0, data_bytes]], wire.RUN_DTYPE).tobytes()
    body = wire.pack_frame_header(header) + table + encoded
    return wire.pack_unit_header(UnitKind.FRAME, len(body)) + body


@given(seed=st.integers(0, 1 << 32), compression=st.sampled_from(COMPRESSIONS))
def test_frame_round_trips(seed: int, compression: str) -> None:
    generator = np.random.default_rng(seed)
    encoder, decoder = FrameEncoder(CodecPolicy(compression), clock=SYSTEM), FrameDecoder()
    for sequence in range(3):
        fields = random_frame(generator)
        frame = decoder.decode(
            b"".join(bytes(buffer) for buffer in encoder.encode(sequence=sequence, **fields))
        )
        assert (frame.sequence, frame.target) == (sequence, fields["target"])
        assert (frame.window_offset, frame.window_bytes) == (fields["window_offset"], fields["window_bytes"])
        assert np.array_equal(frame.extents, fields["runs"])
        assert bytes(frame.data) == fields["data"].tobytes()


@pytest.mark.parametrize(
    ("compression", "codec"), [("zstd", Codec.ZSTD), ("lz4", Codec.LZ4), ("none", Codec.NONE)]
)
def test_compression_named_is_the_codec_used(compression: str, codec: Codec) -> None:
    frame = packed(compression)
    header = wire.unpack_frame_header(frame, wire.UNIT.size)
    assert header.codec == codec
    assert (header.encoded_bytes < header.data_bytes // 10) == (codec != Codec.NONE)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_incompressible_data_travels_as_it_is(compression: str) -> None:
    noise = np.random.default_rng(1).bytes(100_000)
    frame = packed(compression, data=noise, runs=np.array([[4096, len(noise)]]))
    assert wire.unpack_frame_header(frame, wire.UNIT.size).codec == Codec.NONE


def test_hole_of_a_terabyte_costs_64_bytes() -> None:
    empty = np.empty((0, 2), np.int64)
    frame = packed(runs=empty, data=b"", window_offset=0, window_bytes=1 << 40)
    assert len(frame) == 64
    decoded = FrameDecoder().decode(frame)
    assert (decoded.window_bytes, len(decoded.extents), len(decoded.data)) == (1 << 40, 0, 0)


def test_largest_frame_round_trips() -> None:
    count = wire.RUN_COUNT_MAX
    data = np.random.default_rng(2).bytes(wire.DATA_BYTES_MAX)
    runs = np.stack([np.arange(count) * 1024, np.full(count, 512)], axis=1)
    frame = FrameDecoder().decode(packed(data=data, runs=runs, window_offset=0, window_bytes=count * 1024))
    assert bytes(frame.data) == data
    assert np.array_equal(frame.extents, runs)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"runs": np.array([[0, len(TEXT)]])}, FieldOutOfRange),  # before the window
        ({"runs": np.array([[1 << 60, len(TEXT)]])}, FieldOutOfRange),
        ({"runs": np.array([[4096, 1000], [5000, len(TEXT) - 1000]])}, Overlap),
        ({"runs": np.array([[4096, 1000]])}, FieldOutOfRange),  # fewer bytes than data
        ({"data": bytes(wire.DATA_BYTES_MAX + 1)}, FieldOutOfRange),
        ({"window_bytes": 100}, FieldOutOfRange),
        ({"window_offset": -1, "runs": np.array([[0, len(TEXT)]])}, FieldOutOfRange),
    ],
)
def test_encoder_refuses_what_no_receiver_would_take(change: dict[str, Any], kind: type[FormatError]) -> None:
    with pytest.raises(kind):
        packed(**change)


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_every_flipped_bit_is_noticed_or_changes_nothing(compression: str) -> None:
    text = TEXT[:1500]
    frame = packed(compression, data=text, runs=np.array([[4096, 500], [9000, 1000]]))
    decoder = FrameDecoder()
    whole = facts(decoder.decode(frame))
    harmless = 0
    for bit in range(len(frame) * 8):
        frame[bit // 8] ^= 1 << bit % 8
        try:
            assert facts(decoder.decode(frame)) == whole
            harmless += 1
        except FormatError:
            pass
        frame[bit // 8] ^= 1 << bit % 8
    # Codecs have several encodings of the same data; what is not encoded has no such freedom.
    assert harmless == 0 if compression == "none" else harmless < 40


@given(st.binary(max_size=200))
def test_any_bytes_give_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        FrameDecoder().decode(data)


@given(st.integers(0, 1 << 32), st.integers(1, 40))
def test_damaged_frame_never_decodes_to_other_data(seed: int, flips: int) -> None:
    generator = np.random.default_rng(seed)
    fields = random_frame(generator, data_bytes_max=5000)
    compression = COMPRESSIONS[seed % 4]
    encoder = FrameEncoder(CodecPolicy(compression), clock=SYSTEM)
    frame = bytearray(b"".join(bytes(buffer) for buffer in encoder.encode(sequence=0, **fields)))
    whole = bytes(frame)
    for _ in range(flips):
        frame[int(generator.integers(0, len(frame)))] ^= int(generator.integers(1, 256))
    cut = frame[: int(generator.integers(0, len(frame) + 1))] if seed % 3 == 0 else frame
    try:
        decoded = facts(FrameDecoder().decode(cut))
    except FormatError:
        return
    assert decoded == facts(FrameDecoder().decode(whole))


@pytest.mark.parametrize("codec", [Codec.LZ4, Codec.ZSTD])
@pytest.mark.parametrize("claimed", [100, 99_999, 100_001, 1 << 22])
def test_data_of_another_length_is_refused(codec: Codec, claimed: int) -> None:
    data = bytes(100_000)
    compress = {
        Codec.LZ4: lambda: lz4.block.compress(data, store_size=False),
        Codec.ZSTD: lambda: zstandard.compress(data),
    }
    encoded = compress[codec]()
    if len(encoded) > claimed:
        encoded = encoded[:claimed]
    with pytest.raises(FieldOutOfRange) as caught:
        FrameDecoder().decode(forged(codec, encoded, claimed))
    assert caught.value.field in {"data", "data_bytes"}


def test_right_length_with_a_wrong_digest_is_a_checksum_mismatch() -> None:
    with pytest.raises(ChecksumMismatch):
        FrameDecoder().decode(forged(Codec.ZSTD, zstandard.compress(bytes(100_000)), 100_000))


def test_decoder_is_of_use_after_an_error() -> None:
    decoder = FrameDecoder()
    with pytest.raises(FormatError):
        decoder.decode(forged(Codec.ZSTD, b"\x28\xb5\x2f\xfd" + bytes(50), 1000))
    assert bytes(decoder.decode(packed("zstd")).data) == TEXT


@pytest.mark.parametrize("window_log", [23, 27, 31])
def test_decompression_bomb_and_huge_window_stay_within_the_buffers(window_log: int) -> None:
    # 2^28 zeros in a few kilobytes, and a window that a careless decoder would allocate.
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, compression_level=1)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    bomb = b"".join([*(stream.compress(bytes(1 << 22)) for _ in range(64)), stream.flush()])
    decoder = FrameDecoder()
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            decoder.decode(forged(Codec.ZSTD, bomb, 1 << 22))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 16 << 20


def test_window_larger_than_any_frame_is_refused_before_it_is_allocated() -> None:
    def with_window(window_log: int) -> bytes:
        parameters = zstandard.ZstdCompressionParameters(window_log=window_log, write_content_size=False)
        stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        return stream.compress(bytes(1000)) + stream.flush()

    with pytest.raises(ChecksumMismatch):  # all is well but the digest
        FrameDecoder().decode(forged(Codec.ZSTD, with_window(22), 1000))
    with pytest.raises(FieldOutOfRange, match="too much memory"):
        FrameDecoder().decode(forged(Codec.ZSTD, with_window(23), 1000))


def test_zstd_content_size_that_lies_allocates_nothing() -> None:
    # A frame header that promises 2^60 bytes: single segment, 8-byte content size.
    lie = b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + bytes(20)
    with pytest.raises(FieldOutOfRange):
        FrameDecoder().decode(forged(Codec.ZSTD, lie, 1 << 20))


def test_claimed_length_alone_allocates_nothing() -> None:
    frame = bytearray(packed())
    at = wire.UNIT.size + wire.FRAME.offset_of("data_bytes")
    frame[at : at + 4] = (0xFFFFFFF0).to_bytes(4, "little")
    tracemalloc.start()
    try:
        with pytest.raises(FieldOutOfRange):
            FrameDecoder().decode(frame)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_unknown_codec_names_the_version_problem() -> None:
    frame = packed()
    frame[wire.UNIT.size + wire.FRAME.offset_of("codec")] = 9
    with pytest.raises(UnsupportedVersion):
        FrameDecoder().decode(frame)


def test_data_of_a_frame_cannot_be_written() -> None:
    assert FrameDecoder().decode(packed()).data.readonly
