"""The times of a captured log, held to a guest that looks at the clock itself before and after each request."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.clock import HRL_EPOCH_S
from hvreplica.files import OS_FILES
from hvreplica.formats.times import Times, unpack_times
from hvreplica.hrl import LogReader, times_path
from hvreplica.native import live
from hvreplica.units import GIB, MIB
from tests.support.live import FLUSH, FUA, Guest, Site

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.capture.machine import ClosedLog, Cut, Machine

SECTOR = 512


@dataclass(frozen=True)
class Write:
    """A write of one sector: on which disk, at which offset, and when it was sent and answered."""

    disk: int
    offset: int
    sent_us: int
    answered_us: int


def now_us() -> int:
    return time.time_ns() // 1000


class Diarist:
    """A guest with a connection to each of two disks: what it sends waits for the answer to the last."""

    def __init__(self, machine: Machine, number: int, seed: int) -> None:
        self.guests = [Guest(service) for service in machine.services]
        self.rng = random.Random(f"{seed} {number}")
        self.next_offset = number * MIB
        self.writes: list[Write] = []
        self.flushes: list[tuple[int, int]] = []

    def act(self, count: int) -> None:
        for _ in range(count):
            disk = self.rng.randrange(2)
            kind = self.rng.random()
            sent_us = now_us()
            if kind < 0.1:
                self.guests[disk].ask(FLUSH, 0, 0)
                self.flushes.append((sent_us, now_us()))
                continue
            flags = FUA if kind < 0.15 else 0
            self.guests[disk].write(self.next_offset, self.rng.randbytes(SECTOR), flags)
            self.writes.append(Write(disk, self.next_offset, sent_us, now_us()))
            self.next_offset += SECTOR

    def close(self) -> None:
        for guest in self.guests:
            guest.close()


def read(log: ClosedLog) -> tuple[Times, list[int], list[int]]:
    """Return the times of a log, and the offsets and stamps of its entries."""
    times = unpack_times(times_path(log.path).read_bytes(), log_id=log.log_id)
    with LogReader(OS_FILES, log.path) as reader:
        tables = list(reader.entries())
    offsets = [int(at) for table in tables for at in table["byte_offset"]]
    assert times.entry_count == len(offsets)
    return times, offsets, [int(at) for table in tables for at in table["time_stamp"]]


def check(cut: Cut, diarists: list[Diarist]) -> None:
    writes = [write for each in diarists for write in each.writes]
    found = {log.disk_index: read(log) for log in cut.logs}
    flushed = [set(times.flushes[:, 1].tolist()) for times, _, _ in found.values()]
    assert len(found) == 2
    assert flushed[0] == flushed[1], "each flush is one moment of all disks"
    assert {times.ended_us for times, _, _ in found.values()} == {round(cut.instant_s * 1e6)}
    slot_us = max(times.slot_us for times, _, _ in found.values())
    first_us = min(write.sent_us for write in writes) // slot_us * slot_us
    for moment_us in range(first_us, max(write.answered_us for write in writes) + 2 * slot_us, slot_us):
        inside = {
            (disk, at)
            for disk, (times, offsets, _) in found.items()
            for at in offsets[: times.entries_before(moment_us)]
        }
        for write in writes:
            if (write.disk, write.offset) in inside:
                assert write.sent_us < moment_us, "sent later, and in it"
            else:
                assert write.answered_us >= moment_us, "answered before, and not in it"
    asked = sorted((sent, done) for each in diarists for sent, done in each.flushes)
    for moment_us in sorted(flushed[0]):
        inside = {
            (disk, at)
            for disk, (times, offsets, _) in found.items()
            for at in offsets[: times.entries_at_flush(moment_us)]
        }
        for write in writes:
            if (write.disk, write.offset) in inside:
                assert write.sent_us <= moment_us
            else:
                assert write.answered_us >= moment_us
    for sent_us, done_us in asked:
        # A flush that finds nothing new is as good as the one before it.
        last = max((at for at in flushed[0] if at <= done_us), default=None)
        assert last is not None
        has = {
            (disk, at)
            for disk, (times, offsets, _) in found.items()
            for at in offsets[: times.entries_at_flush(last)]
        }
        assert all((w.disk, w.offset) in has for w in writes if w.answered_us < sent_us)
    for times, _, stamps in found.values():
        for place, (entries, time_us) in enumerate(times.ticks.tolist()):
            end = times.ticks[place + 1, 0] if place + 1 < len(times.ticks) else len(stamps)
            seconds = {stamp + HRL_EPOCH_S for stamp in stamps[entries:end]}
            assert seconds == {time_us // 1_000_000}, "slots do not cross seconds, nor do stamps"


def test_each_instant_has_what_was_answered_and_nothing_that_was_sent_later(
    tmp_path: Path, seed: int
) -> None:
    site = Site(tmp_path, sizes=[16 * MIB, 16 * MIB])
    with site.running(has_times=True) as machine:
        diarists = [Diarist(machine, number, seed) for number in range(2)]
        for _ in range(2):
            threads = [threading.Thread(target=each.act, args=(150,)) for each in diarists]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            cut = machine.cut(site.previous)
            site.follow(cut)
            check(cut, diarists)
            machine.settle(cut)
            machine.recycle(log.path for log in cut.logs)
            assert not list((tmp_path / "state" / "logs").iterdir()), "times go with their logs"
            for each in diarists:
                each.writes.clear()
                each.flushes.clear()
        for each in diarists:
            each.close()


def test_logs_that_are_not_in_order_have_no_times(tmp_path: Path) -> None:
    site = Site(tmp_path, sizes=[16 * MIB])
    with site.running(has_times=True) as machine, Guest(machine.services[0]) as guest:
        guest.write(0, b"1" * SECTOR)
        guest.trim(0, SECTOR)
        [log] = site.cycle(machine).logs
        assert not log.is_ordered
    with site.running() as machine, Guest(machine.services[0]) as guest:
        guest.write(0, b"2" * SECTOR)
        cut = machine.cut(site.previous)
        assert not times_path(cut.logs[0].path).exists(), "nobody asked for times"
        machine.give_back(cut)


def test_cut_that_is_given_back_leaves_no_times(tmp_path: Path) -> None:
    site = Site(tmp_path, sizes=[16 * MIB])
    with site.running(has_times=True) as machine, Guest(machine.services[0]) as guest:
        guest.write(0, b"1" * SECTOR)
        machine.give_back(machine.cut(site.previous))
        assert not list((tmp_path / "state" / "logs").iterdir())


def test_times_that_cannot_be_written_cost_the_log_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(tmp_path, sizes=[16 * MIB])
    with site.running(has_times=True) as machine, Guest(machine.services[0]) as guest:
        guest.write(0, b"1" * SECTOR)

        def fail(*_: object) -> bytes:
            raise OSError(28, "full")

        monkeypatch.setattr("hvreplica.capture.log_folder.pack_times", fail)
        cut = site.cycle(machine)
        assert [log.entries for log in cut.logs] == [1]
        assert site.copy_of(0) == site.disk_of(machine, 0)
    assert "the times of a log are not kept" in caplog.text


@pytest.mark.parametrize("count", [4, 5, 64])
def test_long_logs_keep_fewer_moments_and_each_is_exact(tmp_path: Path, count: int) -> None:
    """With little room slots become longer; what they say stays what a log with much room says."""
    with (tmp_path / "log").open("w+b") as few_file, (tmp_path / "more").open("w+b") as more_file:
        gate, tracks = live.Gate(), []
        for file, room in ((few_file, count), (more_file, 4096)):
            epoch = live.Epoch(GIB)
            epoch.open_log(file.fileno(), position=8192, last_block=4096, limit=GIB, write_bytes_max=MIB)
            epoch.note_moments(tick_count=room, flush_count=room, slot_us=1)
            tracks.append(live.Track(gate, epoch, np.full(len(epoch.touched), 0xFF, np.uint8), GIB))
        noter = live.FlushNoter(gate, tracks)
        old = [track.epoch for track in tracks]
        for number in range(700):
            for track in tracks:
                with gate.writing(0, SECTOR):
                    track.write(0, bytes(SECTOR), 0)
            if number % 3 == 0:
                noter.note()
        live.cut(gate, tracks, [live.Epoch(GIB), live.Epoch(GIB)])
    few, more = (epoch.moments() for epoch in old)
    assert few is not None
    assert more is not None
    assert len(more.flushes) == 234
    assert 1 <= len(few.ticks) <= count
    assert 1 <= len(few.flushes) <= count
    assert set(few.flushes.tolist()) <= set(more.flushes.tolist())
    assert few.flushes[-1] == more.flushes[-1]
    assert few.ticks[0]["entries"] == 0
    # The slot of the flushes is not told: the last one of each is there, whatever it is.
    assert few.slot_us >= more.slot_us


def test_clock_that_is_set_back_leaves_no_times() -> None:
    epoch = live.Epoch(GIB)
    epoch.note_moments(tick_count=4, flush_count=4, slot_us=1000)
    epoch.c.log.last_us = 1 << 61
    epoch.c.ended_us = 1 << 60
    assert epoch.moments() is None
