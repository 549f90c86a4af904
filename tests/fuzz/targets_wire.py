"""What arrives from the network: preamble, unit headers, frames, messages."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, TypeVar, cast

import msgspec
import numpy as np

from hvreplica.address import Address
from hvreplica.formats import messages, wire
from hvreplica.transport.channel import Channel
from hvreplica.transport.codec import CodecPolicy
from hvreplica.transport.frame import FrameDecoder, FrameEncoder
from hvreplica.transport.tls import PeerIdentity
from tests.fuzz.registry import Fuzzer
from tests.support.build import mixed_bytes
from tests.support.fakeclock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hvreplica.transport.pipe import TlsPipe

_T = TypeVar("_T")
_WINDOW_OFFSET = 1 << 20
_QUESTIONS = msgspec.msgpack.Decoder(messages.Question)
_ANSWERS = msgspec.msgpack.Decoder(messages.Answer)
_ENCODER = msgspec.msgpack.Encoder()


def _frame_seeds() -> list[bytes]:
    seeds: list[bytes] = []
    for name in ("none", "lz4", "zstd"):
        encoder = FrameEncoder(CodecPolicy(name), clock=FakeClock(tick_s=0.001))
        runs = np.array([[0, 4096], [8192, 12_288], [30_720, 512]], dtype=np.int64)
        runs[:, 0] += _WINDOW_OFFSET
        data = mixed_bytes(int(runs[:, 1].sum()), seed=len(seeds))
        for window, rows, payload in ((65_536, runs, data), (1 << 40, runs[:0], b"")):
            buffers = encoder.encode(
                sequence=len(seeds),
                target=1,
                window_offset=_WINDOW_OFFSET,
                window_bytes=window,
                runs=rows,
                data=payload,
            )
            seeds.append(b"".join(bytes(buffer) for buffer in buffers))
    return seeds


def _frame_repair(data: bytes) -> bytes:
    """Set the body's length and, where the data travels plain, the digest right."""
    top = wire.UNIT.size + wire.FRAME.size
    if len(data) < top:
        return data
    data = wire.pack_unit_header(wire.UnitKind.FRAME, len(data) - wire.UNIT.size) + data[wire.UNIT.size :]
    values = wire.FRAME.unpack(data, wire.UNIT.size)
    split = top + values["run_count"] * wire.RUN.size
    digest = wire.frame_digest(data[wire.UNIT.size : top], data[top:split], data[split:])
    at = wire.UNIT.size + wire.FRAME.offset_of("digest")
    return data[:at] + digest + data[at + len(digest) :]


def _attack_frame(data: bytes) -> None:
    frame = FrameDecoder().decode(data)
    assert int(frame.extents[:, 1].sum()) == len(frame.data)
    end = frame.window_offset
    for offset, length in frame.extents.tolist():
        assert offset >= end
        end = offset + length
    assert end <= frame.window_offset + frame.window_bytes


def _attack_unit(data: bytes) -> None:
    kind, body_bytes = wire.unpack_unit_header(data)
    assert wire.pack_unit_header(kind, body_bytes) == data[: wire.UNIT.size]
    assert body_bytes <= wire.FRAME_BODY_BYTES_MAX


def _attack_preamble(data: bytes) -> None:
    assert wire.WIRE_VERSION_MIN <= wire.choose_version(data) <= wire.WIRE_VERSION


_ID = str(uuid.UUID(int=3))
_SHAPE = {
    "index": 0,
    "virtual_bytes": 1 << 30,
    "logical_sector_bytes": 512,
    "physical_sector_bytes": 4096,
    "block_bytes": 2 << 20,
    "label": "web01.vhdx",
}
_LOG = {"disk_index": 0, "log_id": _ID, "previous_log_id": _ID, "log_bytes": 1 << 20}
_TRANSFER = {
    "transfer_id": _ID,
    "point_id": _ID,
    "previous_point_id": _ID,
    "instant_s": 1.5,
    "positions": [0],
}
_QUESTION_SEEDS = (
    {
        "is": "claim",
        "protocol": 1,
        "software": "hvreplica",
        "vm": "web01",
        "relationship_id": _ID,
        "generation": 1,
        "disks": [_SHAPE],
    },
    {"is": "fingerprints?", "disk_index": 0, "first_block": 0, "block_count": 9, "block_bytes": 65_536},
    {"is": "initial", **_TRANSFER},
    {"is": "logs", **_TRANSFER, "logs": [_LOG]},
    {"is": "times", "log_id": _ID, "data": bytes(96)},
    {"is": "attach", "session": bytes(16), "transfer_id": _ID},
    {"is": "end", "frame_count": 7},
    {"is": "checkpoint"},
)
_ANSWER_SEEDS = (
    {
        "is": "claimed",
        "protocol": 1,
        "software": "hvreplica",
        "session": bytes(16),
        "phase": "ready",
        "last_point": _ID,
        "transfer": None,
        "disks": [{"index": 0, "last_log_id": _ID}],
        "connections_max": 4,
    },
    {"is": "fingerprints", "data": bytes(32)},
    {"is": "durable", "watermark": 7},
    {"is": "refused", "error": "Fenced", "message": "another primary", "hint": "", "generation": 3},
    {"is": "working"},
)


def _packed(maps: Sequence[Mapping[str, object]]) -> list[bytes]:
    return [_ENCODER.encode(each) for each in maps]


class _Pipe:
    """What a Channel receives from: bytes, and then an end."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def set_timeout(self, timeout_s: float) -> None:
        """Bytes never wait."""

    def receive_into(self, view: memoryview) -> int:
        """Give what there is."""
        count = min(len(view), len(self._data))
        view[:count] = self._data[:count]
        self._data = self._data[count:]
        return count


def _channel(data: bytes, decoder: msgspec.msgpack.Decoder[_T]) -> Channel[_T]:
    peer = PeerIdentity(fingerprint_sha256="00" * 32, common_name="fuzz", not_after=0.0)
    pipe = cast("TlsPipe", _Pipe(data))
    return Channel(pipe, decoder=decoder, peer=peer, address=Address("fuzz", 1), clock=FakeClock())


def _attack_message(data: bytes, decoder: msgspec.msgpack.Decoder[_T]) -> None:
    body = data[: wire.MESSAGE_BYTES_MAX]
    unit = wire.pack_unit_header(wire.UnitKind.MESSAGE, len(body)) + body
    message = _channel(unit, decoder).receive_message()
    assert decoder.decode(_ENCODER.encode(message)) == message


def _attack_stream(data: bytes) -> None:
    """Take frames until the end or the first fault, as the replica does."""
    channel = _channel(data, _QUESTIONS)
    while channel.receive_frame() is not None:
        pass


FUZZERS = (
    Fuzzer("wire_preamble", lambda: [wire.pack_preamble()], _attack_preamble),
    Fuzzer("wire_unit", lambda: [wire.pack_unit_header(wire.UnitKind.FRAME, 4096)], _attack_unit),
    Fuzzer("wire_frame", _frame_seeds, _attack_frame, _frame_repair),
    Fuzzer("wire_stream", lambda: [b"".join(_frame_seeds())], _attack_stream),
    Fuzzer("question", lambda: _packed(_QUESTION_SEEDS), lambda data: _attack_message(data, _QUESTIONS)),
    Fuzzer("answer", lambda: _packed(_ANSWER_SEEDS), lambda data: _attack_message(data, _ANSWERS)),
)
