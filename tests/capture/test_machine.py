"""A machine under capture: what guests write is served, tracked, cut at one instant, and survives a stop."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hvreplica.capture.machine import ORDERED_WRITE_BYTES_MAX
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.errors import StateError
from hvreplica.files import OS_FILES
from hvreplica.units import KIB, MIB
from tests.support.live import FUA, NO_HOLE, READ, WRITE, ZEROES, Guest, GuestError, Site, random_data

if TYPE_CHECKING:
    from pathlib import Path

FORMS = ("vhdx", "vhd", "raw")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("budget", [None, 0, 64 * KIB], ids=["log", "no-log", "small-log"])
def test_cut_brings_the_copy_to_the_disk(tmp_path: Path, form: str, budget: int | None) -> None:
    site = Site(tmp_path, sizes=[32 * MIB], form=form)
    rng = random.Random(f"{form} {budget}")
    model = bytearray(32 * MIB)
    with site.running(log_budget_bytes=budget) as machine, Guest(machine.services[0]) as guest:
        for _ in range(4):
            for _ in range(60):
                _change(rng, guest, model)
            site.cycle(machine)
            assert site.copy_of(0) == bytes(model) == site.disk_of(machine, 0)
            length = rng.randrange(1, 64 * KIB)
            at = rng.randrange(len(model) - length)
            assert guest.read(at, length) == model[at : at + length]
        assert not site.cycle(machine).logs, "nothing was written since the cut"


def test_what_is_known_is_left_out_only_where_the_log_has_nothing_of_it(tmp_path: Path) -> None:
    """A block that is written, and then is again what the copy has, must not stay as the log says."""
    site = Site(tmp_path, sizes=[16 * MIB])
    old = random_data(512 * KIB)
    with site.running() as machine, Guest(machine.services[0]) as guest:
        guest.write(0, old)
        guest.write(8 * MIB, old)
        site.cycle(machine, known=True)
        guest.write(0, random_data(4096))
        guest.write(0, old)  # long: the map's alone
        guest.write(4 * MIB, random_data(4096))
        guest.trim(4 * MIB, MIB)  # zeros, as before
        guest.write(8 * MIB, old)  # never anything else
        cut = site.cycle(machine, known=True)
        assert site.copy_of(0) == site.disk_of(machine, 0)
        assert cut.logs[0].changed_bytes < 4 * 64 * KIB, "what is known and in no log is left out"


@pytest.mark.parametrize("form", FORMS)
def test_cuts_with_known_tables_bring_the_copy_to_the_disk(tmp_path: Path, form: str) -> None:
    site = Site(tmp_path, sizes=[16 * MIB], form=form)
    rng = random.Random(f"known {form}")
    model = bytearray(16 * MIB)
    values = [rng.randbytes(512 * KIB) for _ in range(2)]
    with site.running(log_budget_bytes=256 * KIB) as machine, Guest(machine.services[0]) as guest:
        for _ in range(6):
            for _ in range(25):
                at = rng.randrange(31) * 512 * KIB
                length = rng.choice([4096, 4096, 64 * KIB, 512 * KIB])
                if rng.random() < 0.3:
                    guest.trim(at, length)
                    model[at : at + length] = bytes(length)
                else:
                    guest.write(at, rng.choice(values)[:length])
                    model[at : at + length] = guest.read(at, length)
            site.cycle(machine, known=True)
            assert site.copy_of(0) == bytes(model)


def test_guest_may_write_what_the_cut_has_to_read_at_the_cuts_instant(tmp_path: Path) -> None:
    """A guest that thaws writes its superblock, and waits for it, before it says that it thawed."""
    site = Site(tmp_path, sizes=[16 * MIB])
    with site.running(log_budget_bytes=0) as machine, Guest(machine.services[0]) as guest:
        guest.write(0, b"old" + random_data(4093))
        cut = machine.cut(site.previous, on_instant=lambda: guest.write(0, b"new" + bytes(4093)))
        site.follow(cut)
        machine.settle(cut)
        assert site.copy_of(0)[:3] == b"old"
        assert guest.read(0, 3) == b"new"


def test_stop_ends_a_cut_that_is_being_read_and_gives_it_back(tmp_path: Path) -> None:
    site = Site(tmp_path, sizes=[48 * MIB])
    reads = []
    with site.running(log_budget_bytes=0) as machine, Guest(machine.services[0]) as guest:
        for at in range(0, 48 * MIB, 4 * MIB):
            guest.write(at, random_data(4 * MIB))
        disk = machine.disks[0]
        real = disk.read_into

        def read_into(buffer: Any, disk_offset: int) -> None:
            reads.append(disk_offset)
            machine.stop()
            real(buffer, disk_offset)

        disk.read_into = read_into  # type: ignore[method-assign]
        with pytest.raises(StateError, match="being stopped"):
            machine.cut(site.previous)
        assert len(reads) == 1, "what was left was not read"
        disk.read_into = real  # type: ignore[method-assign]
        guest.write(0, random_data(4096))
    with site.running() as machine:
        assert machine.status()[0].dirty_bytes == 48 * MIB
        site.cycle(machine)
        assert site.copy_of(0) == site.disk_of(machine, 0)


def test_cut_that_is_unsettled_at_the_end_is_not_forgotten(tmp_path: Path) -> None:
    site = Site(tmp_path, sizes=[16 * MIB])
    with site.running() as machine, Guest(machine.services[0]) as guest:
        guest.write(4096, random_data(4096))
        machine.cut(site.previous)
    with site.running() as machine:
        site.cycle(machine)
        assert site.copy_of(0) == site.disk_of(machine, 0)


def test_logs_that_cannot_be_put_away_cost_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, sizes=[8 * MIB, 8 * MIB])
    with site.running() as machine, Guest(machine.services[0]) as one, Guest(machine.services[1]) as two:
        for guest in (one, two):
            guest.write(4096, random_data(4096))
        with monkeypatch.context() as patch:
            patch.setattr(machine._tracked[0], "finish", _fail)
            patch.setattr(machine._folder, "_size", _fail)
            with pytest.raises(OSError, match="no space"):
                machine.cut(site.previous)
        site.cycle(machine)
        for index in (0, 1):
            assert site.copy_of(index) == site.disk_of(machine, index)


def _change(rng: random.Random, guest: Guest, model: bytearray) -> None:
    kind = rng.choice(["small", "small", "small", "any", "long", "zero", "trim", "keep", "flush"])
    unit = 1 if kind == "any" else 512
    longest = {"long": 3 * MIB, "zero": 4 * MIB, "trim": 4 * MIB}.get(kind, 16 * KIB)
    length = rng.randrange(1, longest // unit) * unit
    at = rng.randrange((len(model) - length) // unit) * unit
    if kind == "flush":
        guest.flush()
        return
    if kind in {"zero", "keep", "trim"}:
        {"zero": guest.zero, "trim": guest.trim, "keep": lambda o, n: guest.zero(o, n, NO_HOLE)}[kind](
            at, length
        )
        model[at : at + length] = bytes(length)
        return
    data = bytes(length) if rng.random() < 0.1 else rng.randbytes(length)
    guest.write(at, data, rng.choice([0, 0, FUA]))
    model[at : at + length] = data


def test_cut_is_one_instant_of_two_disks_while_two_guests_write(tmp_path: Path) -> None:
    """Each guest writes rising numbers, first to disk 0 and then to disk 1: no cut may see a number on disk 1
    that is not on disk 0, in whatever way log, map and copy-before-write share the work.
    """
    site = Site(tmp_path, sizes=[16 * MIB, 16 * MIB])
    stop = threading.Event()
    failures: list[BaseException] = []

    def write(place: int, machine: object, length: int) -> None:
        try:
            with Guest(machine.services[0]) as first, Guest(machine.services[1]) as second:
                number = 0
                while not stop.is_set():
                    number += 1
                    data = struct.pack("<Q", number) * (length // 8)
                    first.write(place, data)
                    second.write(place, data)
        except BaseException as error:
            failures.append(error)

    # 4 KiB goes through the log, 512 KiB stays in the map and is read at the cut.
    places = [(0, 4 * KIB), (1 * MIB, 512 * KIB), (8 * MIB, 4 * KIB)]
    with site.running() as machine:
        threads = [threading.Thread(target=write, args=(at, machine, length)) for at, length in places]
        for thread in threads:
            thread.start()
        seen = []
        try:
            for _ in range(25):
                cut = site.cycle(machine)
                assert cut.held_us < 1_000_000
                copies = [site.copy_of(0), site.copy_of(1)]
                for at, length in places:
                    numbers = [
                        {n for (n,) in struct.iter_unpack("<Q", copy[at : at + length])} for copy in copies
                    ]
                    assert max(numbers[1]) <= min(numbers[0]) or length > 64 * KIB, (at, numbers)
                    # A long write may be cut in the middle, as a power cut would; but only between two numbers.
                    assert max(numbers[0]) - min(numbers[0]) <= 1
                    assert 0 <= max(numbers[0]) - min(numbers[1]) <= 2
                seen.append(max(numbers[0]))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not failures
        assert seen == sorted(seen)
        site.cycle(machine)
        assert [site.copy_of(i) for i in (0, 1)] == [site.disk_of(machine, i) for i in (0, 1)]


@pytest.mark.parametrize("form", FORMS)
def test_abandoned_machine_finds_what_changed(tmp_path: Path, form: str) -> None:
    site = Site(tmp_path, sizes=[64 * MIB], form=form)
    with site.running() as machine, Guest(machine.services[0]) as guest:
        guest.write(MIB, random_data(64 * KIB))
        site.cycle(machine)
    machine = site.start()
    assert machine.status()[0].dirty_bytes == 0, machine.status()
    with Guest(machine.services[0]) as guest:
        guest.write(20 * MIB + 4096, random_data(4096))
        guest.flush()
        guest.write(40 * MIB, random_data(512))
        guest.zero(MIB, 4096)
    machine.abandon()
    machine = site.start()
    status = machine.status()[0]
    assert status.dirty_bytes == status.unlogged_bytes == 3 * 4 * MIB, "the three regions of the journal"
    site.cycle(machine)
    assert site.copy_of(0) == site.disk_of(machine, 0)
    machine.close()
    machine = site.start()
    assert machine.status()[0].dirty_bytes == 0
    machine.close()


@pytest.mark.parametrize("form", FORMS)
def test_answered_writes_survive_the_death_of_the_process_without_a_flush(tmp_path: Path, form: str) -> None:
    """A client that connects again asks for unanswered requests only, and a later flush must mean all the others."""
    site = Site(tmp_path, sizes=[32 * MIB], form=form, block_bytes=MIB if form == "vhdx" else None)
    rng = random.Random(11)
    model = bytearray(32 * MIB)
    for _ in range(6):
        machine = site.start()
        with Guest(machine.services[0]) as guest:
            for _ in range(20):
                length = rng.choice([512, 4096, 3 * MIB])
                at = rng.randrange((len(model) - length) // 512) * 512
                data = bytes(length) if rng.random() < 0.4 else rng.randbytes(length)
                if rng.random() < 0.2:
                    guest.trim(at, length)  # says nothing of what is read there, until it is written
                if any(data):
                    guest.write(at, data)
                else:
                    guest.zero(at, length)
                model[at : at + length] = data
        machine.abandon()
        with open_disk(OS_FILES, site.paths[0], clock=SYSTEM) as disk:
            held = bytearray(len(model))
            disk.read_into(held, 0)
        assert held == model


def test_disk_changed_by_another_program_is_compared_as_a_whole(tmp_path: Path) -> None:
    site = Site(tmp_path, sizes=[16 * MIB])
    with site.running() as machine, Guest(machine.services[0]) as guest:
        guest.write(0, random_data(4096))
        site.cycle(machine)
    with open_disk(OS_FILES, site.paths[0], writable=True, clock=SYSTEM) as disk:
        disk.write(random_data(512), 5 * MIB)
    with site.running() as machine:
        assert "another program" in machine.status()[0].judgement
        site.cycle(machine)
        assert site.copy_of(0) == site.disk_of(machine, 0)


def test_cut_that_was_not_recorded_is_given_back(tmp_path: Path) -> None:
    site = Site(tmp_path, sizes=[16 * MIB])
    with site.running() as machine, Guest(machine.services[0]) as guest:
        data = random_data(8192)
        guest.write(4096, data)
        cut = machine.cut(site.previous)
        guest.write(8 * MIB, data)
        with pytest.raises(StateError, match="neither"):
            machine.cut(site.previous)
        machine.give_back(cut)
        assert not cut.logs[0].path.exists()
        cut = site.cycle(machine)
        assert site.copy_of(0) == site.disk_of(machine, 0)
        assert site.copy_of(0)[4096 : 4096 + len(data)] == data
        with pytest.raises(StateError):
            machine.settle(cut)


@pytest.mark.parametrize("broken", ["prepare", "finish"])
@pytest.mark.parametrize("disk_index", [0, 1])
def test_cut_that_fails_on_one_disk_loses_nothing_of_any(
    tmp_path: Path, broken: str, disk_index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, sizes=[8 * MIB, 8 * MIB])
    with site.running() as machine, Guest(machine.services[0]) as one, Guest(machine.services[1]) as two:
        for guest in (one, two):
            guest.write(4096, random_data(4096))
            guest.write(2 * MIB, random_data(MIB))
        with monkeypatch.context() as patch:
            patch.setattr(machine._tracked[disk_index], broken, _fail)
            with pytest.raises(OSError, match="no space"):
                machine.cut(site.previous)
        assert not list((tmp_path / "state" / "logs").iterdir())
        for guest in (one, two):
            guest.write(6 * MIB, random_data(4096))
        site.cycle(machine)
        for index in (0, 1):
            assert site.copy_of(index) == site.disk_of(machine, index)
        one.write(0, random_data(512))
        site.cycle(machine)
        assert site.copy_of(0) == site.disk_of(machine, 0)


def _fail(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


def test_recycled_log_is_read_as_new(tmp_path: Path) -> None:
    site = Site(tmp_path, sizes=[16 * MIB])
    with site.running() as machine, Guest(machine.services[0]) as guest:
        for round_number in range(6):
            for index in range(300 if round_number % 2 else 20):
                guest.write(index * 8192, random_data(4096))
            guest.zero(4 * MIB, 2 * MIB)
            guest.write(5 * MIB, random_data(4096))
            guest.zero(5 * MIB, 64 * KIB)
            site.cycle(machine)
            assert site.copy_of(0) == site.disk_of(machine, 0)
        assert list((tmp_path / "state" / "spare").iterdir())


def test_requests_that_are_wrong_are_refused_and_the_next_is_served(tmp_path: Path) -> None:
    site = Site(tmp_path, sizes=[MIB])
    with site.running() as machine, Guest(machine.services[0]) as guest:
        cases = [
            (READ, MIB, 512, b"", 0, errno.EINVAL),
            (READ, 1 << 63, 512, b"", 0, errno.EINVAL),
            (READ, 0, 33 * MIB, b"", 0, errno.EINVAL),
            (WRITE, MIB - 512, 1024, bytes(1024), 0, errno.ENOSPC),
            (WRITE, 1 << 62, 300_000, bytes(300_000), 0, errno.ENOSPC),
            (ZEROES, MIB, 1, b"", 0, errno.ENOSPC),
            (99, 0, 0, b"", 0, errno.EINVAL),
            (ZEROES, 0, 512, b"", 0x100, errno.EINVAL),
        ]
        for command, at, length, data, flags, expected in cases:
            with pytest.raises(GuestError) as caught:
                guest.ask(command, at, length, data, flags)
            assert caught.value.args[0] == expected, (command, at, length)
            guest.write(0, b"x" * 512)
            assert guest.read(0, 512) == b"x" * 512
        guest.write(0, b"")
        assert guest.read(0, 0) == b""


def test_pipelined_requests_are_answered_each(tmp_path: Path) -> None:
    site = Site(tmp_path, sizes=[16 * MIB])
    rng = random.Random(7)
    with site.running() as machine, Guest(machine.services[0]) as guest:
        model = bytearray(16 * MIB)
        for _ in range(10):
            waiting = {}
            places = rng.sample(range(0, 16 * MIB, 64 * KIB), 40)
            for place in places:
                data = rng.randbytes(rng.choice([512, 4096, 40 * KIB]))
                waiting[guest.send(WRITE, place, len(data), data, rng.choice([0, 0, 0, FUA]))] = None
                model[place : place + len(data)] = data
            while waiting:
                error, cookie, _ = guest.reply()
                assert error == 0
                del waiting[cookie]
        site.cycle(machine)
        assert site.copy_of(0) == bytes(model)


def test_mark_that_meets_a_cut_stays_in_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut between the arming and the marking clears the region, for nothing was written to it yet."""
    site = Site(tmp_path, sizes=[32 * MIB], form="raw")
    machine = site.start()
    site.cycle(machine)
    tracked = machine._tracked[0]
    arm = tracked.journal.arm
    pending = [1]

    def arm_and_cut(extents: np.ndarray) -> None:
        arm(extents)
        if pending:
            pending.clear()
            site.cycle(machine)

    monkeypatch.setattr(tracked.journal, "arm", arm_and_cut)
    machine.mark(0, np.array([[20 * MIB, 64 * KIB]], np.int64))
    for _ in range(3):  # what lapsed is forgotten by now
        tracked.journal.settle()
    assert tracked.journal.regions().tolist() == [[20 * MIB, 4 * MIB]]
    machine.abandon()


def test_disk_that_was_put_back_from_a_copy_after_a_crash_is_compared(tmp_path: Path) -> None:
    """The copy was made while the disk was in use: its DataWriteGuid is the recorded one."""
    site = Site(tmp_path, sizes=[16 * MIB])
    machine = site.start()
    with Guest(machine.services[0]) as guest:
        guest.flush()
        copy = tmp_path / "put-back.vhdx"
        copy.write_bytes(site.paths[0].read_bytes())
        guest.write(8 * MIB, random_data(4096))
        site.cycle(machine)
    machine.abandon()
    copy.replace(site.paths[0])
    with site.running() as machine:
        assert "another file" in machine.status()[0].judgement
        site.cycle(machine)
        assert site.copy_of(0) == site.disk_of(machine, 0)


def test_structures_of_a_vhdx_have_their_blocks_before_a_guest_writes(tmp_path: Path) -> None:
    site = Site(tmp_path, sizes=[16 * MIB])
    with site.running():
        descriptor = os.open(site.paths[0], os.O_RDONLY)
        try:
            for start in (1 * MIB, 3 * MIB):  # the log, and the BAT
                assert os.lseek(descriptor, start, os.SEEK_HOLE) >= start + MIB
        finally:
            os.close(descriptor)


def test_logs_are_not_kept_where_room_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, sizes=[16 * MIB])
    with site.running() as machine, Guest(machine.services[0]) as guest:
        monkeypatch.setattr(machine._folder._files, "free_bytes", lambda _: 4096, raising=False)
        for _ in range(3):
            guest.write(0, random_data(64 * KIB))
            site.cycle(machine)
        assert not list((tmp_path / "state" / "spare").iterdir())


def test_what_a_cut_holds_counts_as_changed_until_it_is_recorded(tmp_path: Path) -> None:
    site = Site(tmp_path, sizes=[8 * MIB])
    with site.running() as machine, Guest(machine.services[0]) as guest:
        told: list[int] = []

        def look() -> None:
            told.append(machine.status()[0].dirty_bytes)

        guest.write(0, random_data(4096))
        for end in (machine.give_back, machine.settle):
            look()
            cut = machine.cut(site.previous, on_instant=look)
            look()
            end(cut)
        look()
    assert told == [65_536] * 6 + [0]


def test_log_is_ordered_only_where_nothing_is_read_for_it(tmp_path: Path) -> None:
    site = Site(tmp_path, sizes=[16 * MIB])
    with site.running() as machine, Guest(machine.services[0]) as guest:
        guest.write(0, random_data(4096))
        assert site.cycle(machine).logs[0].is_ordered
        guest.write(0, random_data(4096))
        guest.write(MIB, random_data(512 * KIB))  # long: read at the cut
        assert not site.cycle(machine).logs[0].is_ordered
        guest.write(0, random_data(4096))
        guest.trim(0, 4096)
        assert not site.cycle(machine).logs[0].is_ordered
        machine.mark(0, np.array([[0, 4096]], np.int64))
        assert not site.cycle(machine).logs[0].is_ordered
    with site.running(log_budget_bytes=64 * KIB) as machine, Guest(machine.services[0]) as guest:
        for at in range(32):
            guest.write(at * MIB // 4, random_data(4096))
        assert not site.cycle(machine).logs[0].is_ordered, "the log was full"
    with site.running(log_budget_bytes=0) as machine, Guest(machine.services[0]) as guest:
        guest.write(0, random_data(4096))
        assert not site.cycle(machine).logs[0].is_ordered, "there was no log"


def test_long_writes_are_logged_where_logs_are_to_be_ordered(tmp_path: Path) -> None:
    site = Site(tmp_path, sizes=[64 * MIB])
    with (
        site.running(write_bytes_max=ORDERED_WRITE_BYTES_MAX, log_budget_bytes=32 * MIB) as machine,
        Guest(machine.services[0]) as guest,
    ):
        guest.write(0, random_data(4096))
        guest.write(MIB, random_data(4 * MIB))
        guest.write(2 * MIB, random_data(512))
        assert site.cycle(machine).logs[0].is_ordered
        assert site.copy_of(0) == site.disk_of(machine, 0)
