"""Replica logs: whole files, and the recovery of unclosed ones."""

from __future__ import annotations

import functools
import random
import uuid
from pathlib import Path

import numpy as np

from hvreplica.formats import hrl
from hvreplica.hrl import LogReader, LogWriter, recover_log, verify_log
from tests.fuzz.registry import Fuzzer
from tests.support.build import random_extents
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

_LOG = Path("/d/1.hrl")
_DISK_BYTES = 1 << 30


@functools.cache
def _seeds(*, closed: bool) -> list[bytes]:
    seeds = []
    for number, count in enumerate((0, 1, 9, 140)):
        files = FaultFiles("/d")
        clock = FakeClock(seed=number)
        writer = LogWriter.create(
            files,
            _LOG,
            log_id=uuid.UUID(int=number + 1),
            previous_log_id=uuid.UUID(int=number),
            data_write_guid=uuid.UUID(int=99),
            clock=clock,
        )
        extents = random_extents(count, disk_bytes=_DISK_BYTES, seed=number, length_bytes_max=2048).astype(
            np.int64
        )
        writer.append(extents, random.Random(number).randbytes(int(extents[:, 1].sum())))
        if closed:
            writer.close()
        else:
            writer.flush()
        seeds.append(files.content_of(_LOG))
    return seeds


def _repair(data: bytes) -> bytes:
    """Set the checksums of the header and of the last metadata block right."""
    if len(data) < hrl.HEADER_BYTES:
        return data
    header = hrl.LogHeader.unpack(data)
    data = header.sealed().pack() + data[hrl.HEADER_BYTES :]
    at = header.eol_location - header.metadata_size
    if 0 < at <= len(data) - hrl.METADATA_HEADER_BYTES:
        block = hrl.MetadataHeader.unpack(data, at)
        sealed = hrl.MetadataHeader.sealed(
            previous_metadata_location=block.previous_metadata_location,
            valid_metadata_entries=block.valid_metadata_entries,
        ).pack()
        data = data[:at] + sealed + data[at + len(sealed) :]
    return data


def _attack_reader(data: bytes) -> None:
    files = FaultFiles()
    files.load(_LOG, data)
    with LogReader(files, _LOG) as reader:
        total = 0
        for entries in reader.entries(1000, disk_bytes=_DISK_BYTES):
            total += len(entries)
            ends = entries["byte_offset"] + entries["data_length"].astype(np.uint64)
            assert int(ends.max(initial=0)) <= _DISK_BYTES
    report = verify_log(files, _LOG, disk_bytes=_DISK_BYTES)
    assert report.entries == total
    assert files.content_of(_LOG) == data


def _attack_recovery(data: bytes) -> None:
    files = FaultFiles()
    files.load(_LOG, data)
    report = recover_log(files, _LOG)
    assert verify_log(files, _LOG).entries == report.entries


FUZZERS = (
    Fuzzer("hrl_file", lambda: _seeds(closed=True), _attack_reader, _repair),
    Fuzzer("hrl_recovery", lambda: _seeds(closed=False) + _seeds(closed=True), _attack_recovery, _repair),
)
