"""The times beside a log, which come over the wire and stand in files that may be damaged."""

from __future__ import annotations

import uuid

import numpy as np

from hvreplica.formats.times import HEADER, pack_times, unpack_times
from hvreplica.native import crc32c
from hvreplica.store.moment import choose_moment
from tests.fuzz.registry import Fuzzer
from tests.support.times import times_of_history

_LOG_ID = uuid.UUID(int=9)
_CHECKSUM = HEADER.offset_of("checksum")


def _seeds() -> list[bytes]:
    histories: list[tuple[list[int], list[int], int]] = [
        ([5], [], 1000),
        ([1_000, 1_500, 2_500, 9_999, 10_000], [900, 1_600, 10_000], 1000),
        (list(range(0, 40_000, 700)), list(range(100, 40_000, 3_001)), 200),
    ]
    return [
        pack_times(times_of_history(_LOG_ID, stamps, flushes, slot_us=slot_us))
        for stamps, flushes, slot_us in histories
    ]


def _repair(data: bytes) -> bytes:
    """Set the checksum right, and the log's id."""
    repaired = bytearray(data)
    if len(data) >= HEADER.size:
        at = HEADER.offset_of("log_id")
        repaired[at : at + 16] = _LOG_ID.bytes_le
        repaired[_CHECKSUM : _CHECKSUM + 4] = bytes(4)
        repaired[_CHECKSUM : _CHECKSUM + 4] = crc32c(repaired).to_bytes(4, "little")
    return bytes(repaired)


def _attack(data: bytes) -> None:
    """Whatever is read says the same when it is written, and each moment of it lies in the log."""
    times = unpack_times(data, log_id=_LOG_ID)
    assert pack_times(times) == data
    for wanted_us in {0, times.ended_us // 2, times.ended_us, times.ended_us + 10**6}:
        newest = -1
        for flush in (True, False):
            moment = choose_moment([times], wanted_us, flush=flush)
            if moment is None:
                continue
            assert moment.entries is not None
            assert 0 <= moment.entries[_LOG_ID] <= times.entry_count
            assert newest <= moment.time_us <= wanted_us
            newest = moment.time_us
    counts = [
        times.entries_before(int(at)) for at in np.sort(times.ticks[:, 1] // times.slot_us * times.slot_us)
    ]
    assert counts == sorted(counts)


FUZZERS = (Fuzzer("times", _seeds, _attack, repair=_repair, hot=lambda: (0, _CHECKSUM, HEADER.size)),)
