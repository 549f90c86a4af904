"""A log that another program wrote becomes a cut: shipped without a comparison, in its place in the chain, or refused."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.errors import (
    ChainBroken,
    ChecksumMismatch,
    FieldOutOfRange,
    InvalidTransition,
    Locked,
    LogError,
    NotClosed,
    StateError,
)
from hvreplica.files import OS_FILES
from hvreplica.hrl import LogWriter, verify_log
from hvreplica.replication import cycle
from hvreplica.replication.state import StateFolder
from tests.replication.sites import DISK, MIB, STATE, VM, Guest, Served
from tests.support.crash import crash_states

if TYPE_CHECKING:
    from hvreplica.replication.log_import import LogImport
    from hvreplica.replication.state import PrimaryState

FOREIGN = Path("/primary/foreign")
NO_ID = uuid.UUID(int=0)


class Hypervisor:
    """Another program that logs what the guest writes, in a chain of its own."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.last_id = uuid.uuid4()
        self.count = 0
        guest.files.make_directory(FOREIGN)

    def log(self, *, close: bool = True, **header: Any) -> Path:
        """Let the guest write, at sectors of its own choosing, and log it; some places are written twice."""
        guest, path = self.guest, FOREIGN / f"{self.count}.hrl"
        self.count += 1
        log_id = uuid.uuid4()
        options = {"log_id": log_id, "previous_log_id": self.last_id, "data_write_guid": None} | header
        writer = LogWriter.create(guest.files, path, clock=SYSTEM, **options)
        with open_disk(guest.files, DISK, writable=True, clock=SYSTEM) as disk:
            for _ in range(30):
                offset = guest.rng.randrange(len(guest.model) // 512 - 64) * 512
                data = guest.rng.randbytes(512 * guest.rng.choice([1, 3, 8, 64]))
                disk.write(data, offset)
                guest.model[offset : offset + len(data)] = data
                writer.append(np.array([[offset, len(data)]]), data)
            disk.write_zeroes(MIB, MIB)
            writer.append_zeroes(MIB, MIB)
            guest.model[MIB : 2 * MIB] = bytes(MIB)
        if close:
            writer.close()
        else:
            writer.abort()
        self.last_id = log_id
        guest.files.settle()
        return path


@pytest.fixture
def hypervisor(guest: Guest) -> Hypervisor:
    return Hypervisor(guest)


def take(guest: Guest, *paths: Path, **options: Any) -> LogImport:
    return hvreplica.log_import(paths, state=STATE, files=guest.files, **options)


def state_of(guest: Guest) -> PrimaryState:
    folder = StateFolder(guest.files, STATE, clock=SYSTEM)
    try:
        state = folder.load()
    finally:
        folder.release()
    assert state is not None
    return state


def test_imported_logs_are_shipped_in_order_and_are_all_that_changed(
    guest: Guest, served: Served, hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.replicate(served)
    points, ids = [], []
    for round_number in range(3):
        report = take(guest, hypervisor.log(), force=round_number == 0, verify_disk=True)
        assert report.waiting == round_number + 1
        assert report.logs[0].follows == (round_number > 0)
        points.append(report.point)
        ids.append(report.logs[0].log_id)
    assert ids[-1] == str(hypervisor.last_id)
    assert set(guest.files.names(STATE / "logs")) == {f"{log_id}.hrl" for log_id in ids}
    with monkeypatch.context() as patch:
        patch.setattr(cycle, "cut", None)  # what waits is shipped without a comparison
        result = guest.replicate(served)
    assert ([log.id for log in result.logs], result.point) == (ids, points[-1])
    assert served.content() == guest.model
    assert [point.id for point in hvreplica.point_list(served.store, VM)][-1] == points[-1]
    assert guest.files.names(STATE / "logs") == []
    guest.write(MIB)
    guest.replicate(served)
    assert served.content() == guest.model


def test_a_gap_in_the_chain_is_refused_and_may_be_forced(
    guest: Guest, served: Served, hypervisor: Hypervisor
) -> None:
    guest.replicate(served)
    first = hypervisor.log()
    with pytest.raises(ChainBroken, match="previous_unique_id"):
        take(guest, first)
    take(guest, first, force=True)
    hypervisor.log()  # lost
    third = hypervisor.log()
    with pytest.raises(ChainBroken):
        take(guest, third)
    assert take(guest, third, force=True).waiting == 2
    assert state_of(guest).pending[1].logs[0].previous_log_id == state_of(guest).pending[0].logs[0].log_id
    guest.replicate(served)
    assert served.content() != guest.model
    guest.replicate(served)  # compares, and finds what was lost
    assert served.content() == guest.model


def test_a_log_is_taken_once(guest: Guest, served: Served, hypervisor: Hypervisor) -> None:
    guest.replicate(served)
    path = hypervisor.log()
    take(guest, path, force=True)
    with pytest.raises(ChainBroken, match="taken already"):
        take(guest, path, force=True)
    guest.replicate(served)
    with pytest.raises(ChainBroken, match="taken already"):
        take(guest, path, force=True)
    nameless = hypervisor.log(log_id=NO_ID)
    with pytest.raises(ChainBroken, match="UniqueId"):
        take(guest, nameless, force=True)
    assert state_of(guest).pending == []


def test_a_chain_may_begin_where_nothing_was_logged_yet(
    guest: Guest, served: Served, hypervisor: Hypervisor
) -> None:
    guest.replicate(served)
    assert take(guest, hypervisor.log(previous_log_id=None)).logs[0].follows


def test_a_cut_in_between_breaks_the_chain(guest: Guest, served: Served, hypervisor: Hypervisor) -> None:
    guest.replicate(served)
    take(guest, hypervisor.log(), force=True)
    guest.replicate(served)
    guest.write(MIB)
    guest.replicate(served)
    with pytest.raises(ChainBroken):
        take(guest, hypervisor.log())


def test_nothing_of_a_refused_log_stays(guest: Guest, served: Served, hypervisor: Hypervisor) -> None:
    guest.replicate(served)
    taken = hypervisor.log()
    take(guest, taken, force=True)
    damaged = hypervisor.log()
    with guest.files.open(damaged, writable=True) as file:
        file.write(b"\xff\xfe", 8192 + 77)
    before = guest.files.names(STATE / "logs")
    with pytest.raises(ChecksumMismatch) as caught:
        take(guest, damaged, force=True)
    assert caught.value.path == damaged
    with pytest.raises(NotClosed):
        take(guest, hypervisor.log(close=False), force=True)
    outside = FOREIGN / "outside.hrl"
    with LogWriter.create(
        guest.files, outside, log_id=uuid.uuid4(), previous_log_id=None, data_write_guid=None, clock=SYSTEM
    ) as writer:
        writer.append_zeroes(len(guest.model), 512)
    with pytest.raises(FieldOutOfRange) as beyond:
        take(guest, outside, force=True)
    assert beyond.value.path == outside
    assert guest.files.names(STATE / "logs") == before
    assert len(state_of(guest).pending) == 1


def test_the_disk_must_hold_what_the_log_wrote_on_request(
    guest: Guest, served: Served, hypervisor: Hypervisor
) -> None:
    guest.replicate(served)
    path = hypervisor.log()
    guest.zero(MIB + 4096, 512)  # as the log has it
    with open_disk(guest.files, DISK, writable=True, clock=SYSTEM) as disk:
        disk.write(b"x" * 512, MIB + 4096)
    guest.files.settle()
    with pytest.raises(LogError, match=f"data at {MIB + 4096}, found 512 bytes"):
        take(guest, path, force=True, verify_disk=True)
    assert state_of(guest).pending == []
    assert guest.files.names(STATE / "logs") == []
    take(guest, path, force=True)


def test_two_disks_become_one_point(tmp_path: Path, served: Served, tls: Path) -> None:
    paths = [tmp_path / "a.vhdx", tmp_path / "b.vhdx"]
    for path in paths:
        hvreplica.disk_create(path, 8 * MIB)
    options = {"to": served.address, "tls": tls, "state": tmp_path / "state"}
    hvreplica.replicate("two", paths, **options)
    logs = []
    for index, path in enumerate(paths):
        log = tmp_path / f"{index}.hrl"
        with LogWriter.create(
            OS_FILES,
            log,
            log_id=uuid.uuid4(),
            previous_log_id=None,
            data_write_guid=None,
            clock=SYSTEM,
        ) as writer:
            writer.append(np.array([[index * MIB, 512]]), bytes([index + 1]) * 512)
        logs.append(log)
        hvreplica.log_apply(log, path)
    for disks in (None, [0], [0, 0]):
        with pytest.raises(StateError, match="each log needs one disk"):
            hvreplica.log_import(logs, state=options["state"], disks=disks)
    for disk in (2, tmp_path / "c.vhdx"):
        with pytest.raises(StateError, match="no such disk"):
            hvreplica.log_import(logs[:1], state=options["state"], disks=[disk])
    report = hvreplica.log_import(logs[::-1], state=options["state"], disks=[1, paths[0]], verify_disk=True)
    assert [log.disk_index for log in report.logs] == [1, 0]
    result = hvreplica.replicate("two", paths, **options)
    assert result.point == report.point
    assert [disk.changed_bytes for disk in result.disks] == [512, 512]
    assert served.content("two", 1)[MIB : MIB + 512] == b"\2" * 512


def test_it_waits_for_a_whole_copy(guest: Guest, served: Served, hypervisor: Hypervisor) -> None:
    path = hypervisor.log()
    with pytest.raises(StateError, match="nothing is protected"):
        take(guest, path, force=True)
    guest.replicate(served)
    folder = StateFolder(guest.files, STATE, clock=SYSTEM)
    with pytest.raises(Locked):
        take(guest, path, force=True)
    state = folder.load()
    assert state is not None
    for phase, mixed in (("initial", False), ("ready", True)):
        state.phase, state.mixed = phase, mixed
        folder.save(state)
        folder.release()
        with pytest.raises(InvalidTransition, match="whole copy"):
            take(guest, path, force=True)
        folder = StateFolder(guest.files, STATE, clock=SYSTEM)
    folder.release()


def test_after_a_power_cut_the_log_is_taken_whole_or_not_at_all(
    guest: Guest, served: Served, hypervisor: Hypervisor, seed: int
) -> None:
    guest.replicate(served)
    path = hypervisor.log()
    take(guest, path, force=True)
    guest.files.acknowledge("taken")
    cuts = {0: 0, 1: 0}
    for _, world in crash_states(guest.files.trace(), seed=seed):
        folder = StateFolder(world, STATE, clock=SYSTEM)
        state = folder.load()
        assert state is not None
        cuts[len(state.pending)] += 1
        assert len(state.pending) == 1 or not world.acknowledged, world.story
        for cut in state.pending:
            report = verify_log(world, folder.log_path(cut.logs[0].log_id))
            assert report.log_bytes == cut.logs[0].log_bytes
        folder.release()
        if not state.pending:
            hvreplica.log_import([path], state=STATE, files=world, force=True)
            assert len(world.names(STATE / "logs")) == 1
    assert min(cuts.values()) > 0
