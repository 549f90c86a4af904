"""Power is lost at any instant, and a failing call at any place: a log is closed and whole, or not closed.

Every prefix of what the writer did, with every kind of subset of what was not yet synced, is opened again.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.errors import FormatError, LogError, NotClosed
from hvreplica.hrl import LogReader, recover_log, verify_log
from tests.hrl.plain_reader import read_plain
from tests.hrl.support import LOG, new_files, new_writer, rows
from tests.support.faultfile import FaultFiles, Killed, crash_states

if TYPE_CHECKING:
    from hvreplica.hrl import LogWriter

FOLDER = LOG.parent
Write = tuple[int, bytes]


def some_writes(rng: random.Random) -> list[Write]:
    """Draw a batch: a few writes, some with data that has zero sectors, as torn sectors do."""
    writes = []
    for _ in range(rng.randint(1, 12)):
        sectors = [rng.randbytes(512) if rng.random() < 0.7 else bytes(512) for _ in range(rng.randint(1, 4))]
        writes.append((rng.randrange(256) * 512, b"".join(sectors)))
    return writes


def run(files: FaultFiles, seed: int, *, appended: list[Write], metadata_bytes: int = 512) -> None:
    """Write a log and acknowledge what is promised: ("durable", entries, bytes) and ("closed", entries)."""
    rng = random.Random(seed)
    writer = new_writer(files, metadata_bytes=metadata_bytes)
    files.sync_directory(FOLDER)
    files.acknowledge(("durable", 0, writer.durable_bytes))
    for _ in range(8):
        batch(writer, rng, appended)
        if rng.random() < 0.4:
            durable_bytes = writer.flush()
            files.acknowledge(("durable", writer.entry_count, durable_bytes))
    summary = writer.close()
    assert summary.entries == len(appended)
    files.acknowledge(("closed", summary.entries, summary.log_bytes))


def batch(writer: LogWriter, rng: random.Random, appended: list[Write]) -> None:
    if rng.random() < 0.2:
        offset, length = rng.randrange(256) * 512, rng.randint(1, 40) * 512
        writer.append_zeroes(offset, length)
        appended.append((offset, bytes(length)))
        return
    writes = some_writes(rng)
    extents = rows(*[(offset, len(data)) for offset, data in writes])
    writer.append(extents, b"".join(data for _, data in writes))
    appended.extend(writes)


def entries_in(world: FaultFiles) -> list[Write]:
    return [(write.byte_offset, write.data) for write in read_plain(world.content_of(LOG))[1]]


def check_world(world: FaultFiles, appended: list[Write]) -> str:
    """Check one world and return what became of the log."""
    promises = world.acknowledged
    if not world.exists(LOG):
        assert not promises
        return "absent"
    try:
        LogReader(world, LOG).close()
    except (NotClosed, FormatError) as error:
        assert not any(kind == "closed" for kind, *_ in promises), error
        if isinstance(error, FormatError):
            assert not promises
            return "not begun"
    else:
        verify_log(world, LOG)
        assert entries_in(world) == appended
        return "closed"
    if not promises:
        return "not begun"
    _, durable_count, durable_bytes = promises[-1]
    before = world.content_of(LOG)
    outcome = check_recovery_without_bound(world, before, appended, durable_count)
    report = recover_log(world, LOG, durable_bytes=durable_bytes)
    found = entries_in(world)
    assert found == appended[: len(found)]
    assert len(found) == report.entries >= durable_count
    assert report.log_bytes >= durable_bytes
    return outcome


def check_recovery_without_bound(
    world: FaultFiles, content: bytes, appended: list[Write], durable_count: int
) -> str:
    """Recovery that knows of no promise may refuse, but never loses what was promised."""
    twin = FaultFiles(FOLDER)
    twin.load(LOG, content)
    try:
        report = recover_log(twin, LOG)
    except LogError:
        assert twin.content_of(LOG) == content, world.story
        return "refused"
    found = entries_in(twin)
    assert found == appended[: len(found)]
    assert len(found) == report.entries >= durable_count
    return str(report.end)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("metadata_bytes", [512, 4096])
def test_power_cut_leaves_a_log_that_is_closed_and_whole_or_recoverable(
    seed: int, metadata_bytes: int
) -> None:
    files = new_files()
    appended: list[Write] = []
    run(files, seed, appended=appended, metadata_bytes=metadata_bytes)
    outcomes: dict[str, int] = {}
    for index, world in crash_states(files.trace(), seed=seed, subsets_per_prefix=12, distinct=True):
        try:
            outcome = check_world(world, appended)
        except BaseException as error:
            error.add_note(f"state {index}: {world.story}")
            raise
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert {"closed", "clean", "torn_tail"} <= outcomes.keys(), outcomes


@pytest.mark.parametrize("seed", range(3))
def test_kill_at_any_instant_leaves_a_recoverable_log(seed: int) -> None:
    whole = new_files()
    run(whole, seed, appended=[])
    for event_count in range(len(whole.trace())):
        files = new_files()
        files.kill_at(event_count)
        appended: list[Write] = []
        # What is killed inside an append may be in the log in part, so it is known beforehand.
        everything: list[Write] = []
        run(new_files(), seed, appended=everything)
        with pytest.raises(Killed):
            run(files, seed, appended=appended)
        world = files.after_kill()
        check_world(world, everything)


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_failed_call_anywhere_leaves_an_unclosed_log_that_keeps_its_promises(operation: str) -> None:
    everything: list[Write] = []
    run(new_files(), 1, appended=everything)
    for at in range(1, 100):
        files = new_files()
        fault = files.fail(operation, at=at, written_bytes=700)
        try:
            run(files, 1, appended=[])
        except OSError:
            pass
        else:
            assert not fault.hits
            return
        files.heal()
        if files.exists(LOG):
            with pytest.raises((NotClosed, FormatError)):
                LogReader(files, LOG)
        for index, world in crash_states(
            files.trace(), seed=at, subsets_per_prefix=3, limit=60, distinct=True
        ):
            try:
                check_world(world, everything)
            except BaseException as error:
                error.add_note(f"fault {at}, state {index}: {world.story}")
                raise
    pytest.fail("the fault struck every time: more operations than expected")


@pytest.mark.parametrize("seed", range(3))
def test_recovery_that_is_cut_is_repeated(seed: int) -> None:
    files = new_files()
    appended: list[Write] = []
    rng = random.Random(seed)
    writer = new_writer(files, metadata_bytes=512)
    for _ in range(5):
        batch(writer, rng, appended)
    durable_bytes = writer.flush()
    durable_count = writer.entry_count
    batch(writer, rng, appended)
    writer.abort()
    files.sync_directory(FOLDER)
    for _, world in crash_states(files.trace(), seed=seed, subsets_per_prefix=2, limit=20, distinct=True):
        if not world.exists(LOG) or world.open(LOG).size() < durable_bytes:
            continue
        try:
            report = recover_log(world, LOG, durable_bytes=durable_bytes)
        except (LogError, FormatError):
            continue  # a world from before the flush
        world.acknowledge(report.entries)
        for _, later in crash_states(world.trace(), seed=seed, subsets_per_prefix=6, distinct=True):
            if later.acknowledged:
                assert verify_log(later, LOG).entries == later.acknowledged[-1]
            recover_log(later, LOG, durable_bytes=durable_bytes)
            found = entries_in(later)
            assert found == appended[: len(found)]
            assert len(found) >= durable_count


@pytest.mark.parametrize("seed", range(3))
def test_recovery_makes_durable_what_only_the_killed_writer_had_written(seed: int) -> None:
    """The page cache outlives a process, and not a power cut that follows recovery."""
    files = new_files()
    data = random.Random(seed).randbytes(160 << 10)
    writer = new_writer(files, metadata_bytes=512)
    files.sync_directory(FOLDER)
    for index in range(17):
        writer.append(rows((index * len(data), len(data))), data)
    writer.abort()
    assert recover_log(files, LOG).entries == 15
    files.acknowledge("recovered")
    outcomes = set()
    for _, world in crash_states(files.trace(), seed=seed, subsets_per_prefix=12, limit=240, distinct=True):
        try:
            LogReader(world, LOG).close()
        except (NotClosed, FormatError, FileNotFoundError) as error:
            assert not world.acknowledged
            outcomes.add(type(error))
            continue
        assert verify_log(world, LOG).entries == 15, world.story
        outcomes.add(None)
    assert {None, NotClosed} <= outcomes


def test_capacity_that_runs_out_leaves_an_unclosed_log() -> None:
    for capacity_bytes in range(8192, 80 << 10, 4096):
        files = FaultFiles(FOLDER, capacity_bytes=capacity_bytes)
        writer = new_writer(files)
        with pytest.raises(OSError):
            fill(writer)
        with pytest.raises(LogError):
            writer.close()
        with pytest.raises(NotClosed):
            LogReader(files, LOG)


def fill(writer: LogWriter) -> None:
    for index in range(200):
        writer.append(np.array([[index * 512, 512]], np.int64), bytes([index % 255 + 1]) * 512)
        if index % 10 == 9:
            writer.flush()
