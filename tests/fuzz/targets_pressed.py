"""Pressed undo parts, in a store whose disk may have changed them."""

from __future__ import annotations

import functools
import random
import uuid
from pathlib import Path

import numpy as np

from hvreplica.clock import SYSTEM
from hvreplica.formats.hrl import FILE_TYPE_UNDO
from hvreplica.formats.pressed import FRAME_BYTES_MAX, HEADER, ROW_BYTES
from hvreplica.hrl import LogReader, LogWriter
from hvreplica.native import crc32c
from hvreplica.store.pace import Pace
from hvreplica.store.part_check import check_part
from hvreplica.store.part_files import PartFiles, PressedFile
from hvreplica.store.press import _Writer
from tests.fuzz.registry import Fuzzer
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

_FOLDER = Path("/d")
_PART, _PRESSED = _FOLDER / "1.hru", _FOLDER / "2.hru"
_PART_ID = uuid.UUID(int=2)
_READ_BYTES_MAX = 1 << 20


@functools.cache
def _seeds() -> list[bytes]:
    seeds = []
    for count in (0, 3, 140):
        rng, files = random.Random(count), FaultFiles(_FOLDER)
        with LogWriter.create_undo(
            files,
            _PART,
            part_id=uuid.UUID(int=1),
            log_id=None,
            data_write_guid=None,
            clock=FakeClock(seed=count),
        ) as writer:
            for number in range(count):
                extent = np.array([[number * 8192, 4096]], np.int64)
                writer.append(extent, rng.randbytes(8) * 512 if number % 3 else rng.randbytes(4096))
            writer.append_zeroes(1 << 30, 256 << 10)
        with LogReader(files, _PART, file_type=FILE_TYPE_UNDO) as reader:
            file = files.open(_PRESSED, create=True)
            _Writer(reader, _PART_ID, lambda: None).write(file)
            file.close()
        seeds.append(files.content_of(_PRESSED))
    return seeds


def _repair(data: bytes) -> bytes:
    """Let the table end where the file does, and set its checksum right."""
    repaired = bytearray(data)
    if len(data) < HEADER.size:
        return data
    at, count = HEADER.offset_of("table_offset"), HEADER.offset_of("frame_count")
    rows = min(int.from_bytes(data[count : count + 4], "little"), (len(data) - HEADER.size) // ROW_BYTES)
    repaired[count : count + 4] = rows.to_bytes(4, "little")
    table_offset = len(data) - rows * ROW_BYTES
    repaired[at : at + 8] = table_offset.to_bytes(8, "little")
    repaired[12:16] = bytes(4)
    value = crc32c(bytes(repaired[table_offset:]), crc32c(bytes(repaired[: HEADER.size])))
    repaired[12:16] = value.to_bytes(4, "little")
    return bytes(repaired)


def _attack(data: bytes) -> None:
    """Whatever opens is as long as it says, and its check says what can be read of it."""
    files = FaultFiles(_FOLDER)
    files.load(_PRESSED, data)
    check_part(files, _PRESSED, Pace(SYSTEM, lambda _: False), part_id=_PART_ID, file_bytes=len(data))
    file = PartFiles(files).open(_PRESSED)
    if not isinstance(file, PressedFile):
        return
    damaged = file.damaged()
    for start in (0, file.size() // 2, max(file.size() - _READ_BYTES_MAX, 0)):
        length = min(_READ_BYTES_MAX, file.size() - start)
        is_damaged = bool(((damaged[:, 0] < start + length) & (damaged[:, 1] > start)).any())
        assert len(file.read(start, length)) == length
        assert not is_damaged, "what its checksum refuses was given out"
    assert file.stored_bytes <= len(data)
    assert FRAME_BYTES_MAX <= _READ_BYTES_MAX


FUZZERS = (Fuzzer("pressed_part", _seeds, _attack, repair=_repair, hot=lambda: (0, 12, 40, 48, HEADER.size)),)
