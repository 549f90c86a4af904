"""The fault model of tests/support/faultfile.py, since every crash test believes it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hvreplica.errors import Locked, Truncated
from hvreplica.files import OS_FILES, FileSystem, write_durably
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, Killed, Trace, crash_states

A, B = Path("/d/a"), Path("/d/b")


def contents(world: FaultFiles) -> dict[str, bytes]:
    return {str(path): world.content_of(path) for path in world.files()}


def worlds(files: FaultFiles, **options: Any) -> list[tuple[int, FaultFiles]]:
    return list(crash_states(files.trace(), **options))


def at_end(files: FaultFiles, subsets: int = 40) -> list[FaultFiles]:
    trace = files.trace()
    return [world for index, world in crash_states(trace, subsets_per_prefix=subsets) if index == len(trace)]


@pytest.fixture(params=["memory", "system"])
def any_files(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[FileSystem, Path]:
    """Both implementations of FileSystem: what this file calls contract must hold for both."""
    return (FaultFiles("/d"), Path("/d")) if request.param == "memory" else (OS_FILES, tmp_path)


def test_contract_files_read_back_what_was_written(any_files: tuple[FileSystem, Path]) -> None:
    files, folder = any_files
    rng = random.Random(1)
    with contextlib.closing(files.open(folder / "f", create=True, exclusive=True)) as file:
        model = bytearray()
        for _ in range(300):
            offset, length = rng.randrange(60_000), rng.randrange(9000)
            step = rng.choice(["write", "write", "write", "zero", "resize"])
            if step == "write":
                data = rng.randbytes(length)
                model.extend(bytes(max(offset + length - len(model), 0) if length else 0))
                model[offset : offset + length] = data
                file.write(data, offset)
            elif step == "zero":
                end = min(offset + length, len(model))
                if end > offset:
                    file.zero(offset, end - offset)
                    model[offset:end] = bytes(end - offset)
            else:
                model[offset:] = bytes(max(offset - len(model), 0))
                file.resize(offset)
            assert file.size() == len(model)
            assert file.read(0, len(model)) == model
            held = bytearray(len(model))
            for start, count in file.data_extents(0, len(model)):
                held[start : start + count] = model[start : start + count]
            assert held == model


def test_contract_errors_are_the_same_ones(any_files: tuple[FileSystem, Path]) -> None:
    files, folder = any_files
    with pytest.raises(FileNotFoundError):
        files.open(folder / "absent")
    with pytest.raises(FileNotFoundError):
        files.open(folder / "no" / "parent", create=True)
    with pytest.raises(FileNotFoundError):
        files.replace(folder / "absent", folder / "x")
    with pytest.raises(IsADirectoryError):
        files.open(folder)
    files.unlink(folder / "absent")
    file = files.open(folder / "f", create=True)
    with pytest.raises(FileExistsError):
        files.open(folder / "f", create=True, exclusive=True)
    file.write(b"12345", 0)
    with pytest.raises(Truncated, match="offset 3, expected 4 bytes, found 2 bytes"):
        file.read(3, 4)
    with pytest.raises(OSError, match="Invalid argument"):
        file.write(b"1", -1)
    reader = files.open(folder / "f")
    with pytest.raises(OSError, match="Bad file descriptor"):
        reader.write(b"1", 0)
    reader.close()
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.size()


def test_contract_names_follow_steps(any_files: tuple[FileSystem, Path]) -> None:
    files, folder = any_files
    files.make_directory(folder / "x" / "y")
    files.make_directory(folder / "x" / "y")
    file = files.open(folder / "x" / "one", create=True)
    file.write(b"1", 0)
    files.replace(folder / "x" / "one", folder / "x" / "two")
    assert files.names(folder / "x") == ["two", "y"]
    assert files.names(folder / "nowhere") == []
    files.sync_directory(folder / "x")
    assert files.exists(folder / "x")
    assert not files.exists(folder / "x" / "one")
    files.unlink(folder / "x" / "two")
    assert file.read(0, 1) == b"1"  # an open file outlives its name
    file.close()
    assert files.free_bytes(folder) > 0
    files.open(folder / "f", create=True).close()
    with pytest.raises(NotADirectoryError):
        files.make_directory(folder / "f")


def test_contract_locks_exclude_and_share(any_files: tuple[FileSystem, Path]) -> None:
    files, folder = any_files
    first = files.lock(folder / "lock", shared=True)
    second = files.lock(folder / "lock", shared=True)
    with pytest.raises(Locked):
        files.lock(folder / "lock")
    first.release()
    first.release()
    with pytest.raises(Locked):
        files.lock(folder / "lock")
    second.release()
    alone = files.lock(folder / "lock")
    with pytest.raises(Locked):
        files.lock(folder / "lock", shared=True)
    alone.release()
    files.lock(folder / "lock").release()


def test_crash_keeps_what_was_synced_and_nothing_is_certain_before() -> None:
    files = FaultFiles()
    files.load(A, b"o" * 2048)
    file = files.open(A, writable=True)
    file.write(b"n" * 2048, 0)
    seen = {world.content_of(A) for world in at_end(files)}
    assert len(seen) > 5
    for content in seen:
        assert all(content[at : at + 512] in {b"o" * 512, b"n" * 512} for at in range(0, 2048, 512))
    assert b"o" * 2048 in seen
    assert b"n" * 2048 in seen
    file.sync()
    assert {world.content_of(A) for world in at_end(files)} == {b"n" * 2048}


def test_crash_sector_is_one_of_its_versions() -> None:
    """A later write carries the earlier bytes of its sector: what never stood there cannot come back."""
    files = FaultFiles()
    files.load(A, b"0" * 512)
    file = files.open(A, writable=True)
    versions = {b"0" * 512}
    for step in range(6):
        file.write(b"%d" % (step + 1) * 100, step * 80)
        versions.add(file.read(0, 512))
    assert {world.content_of(A) for world in at_end(files, 300)} == versions


def test_crash_sectors_keep_versions_independently() -> None:
    """All nine pairs of versions come back, not only those that an ordered device would leave."""
    files = FaultFiles()
    files.load(A, b"0" * 1024)
    file = files.open(A, writable=True)
    for version in (b"1", b"2"):
        for sector in (0, 512):
            file.write(version * 512, sector)
    file.close()  # which is no sync
    seen = {world.content_of(A)[::512].decode() for world in at_end(files, 400)}
    assert seen == {first + second for first in "012" for second in "012"}


def test_crash_every_sector_of_any_writes_is_one_of_its_versions(rng: random.Random) -> None:
    files = FaultFiles()
    files.load(A, bytes(16 * 512))
    file = files.open(A, writable=True)
    versions: list[set[bytes]] = [{bytes(512)} for _ in range(16)]
    for _ in range(40):
        offset, length = rng.randrange(7000), rng.randrange(1, 1200)
        if rng.random() < 0.2:
            file.zero(offset, length)
        else:
            file.write(rng.randbytes(length), offset)
        content = files.content_of(A)
        for sector, known in enumerate(versions):
            known.add(content[sector * 512 : (sector + 1) * 512])
    for world in at_end(files, 150):
        content = world.content_of(A).ljust(16 * 512, b"\0")
        for sector, known in enumerate(versions):
            piece = content[sector * 512 : (sector + 1) * 512]
            assert piece in known, f"sector {sector}: {world.story}"


def test_crash_size_is_one_of_its_sizes_and_grown_bytes_are_zero() -> None:
    files = FaultFiles()
    files.load(A, b"x" * 10_000)
    file = files.open(A, writable=True)
    file.resize(100)
    file.resize(20_000)
    file.write(b"y" * 512, 25_600)
    sizes = set()
    for world in at_end(files, 300):
        content = world.content_of(A)
        sizes.add(len(content))
        assert set(content[10_000:25_600]) <= {0}
        assert set(content[25_600:]) <= {0, ord("y")}
    assert sizes == {100, 10_000, 20_000, 26_112}


def test_crash_zero_and_cut_may_be_lost_by_sector() -> None:
    files = FaultFiles()
    files.load(A, b"x" * 8192)
    file = files.open(A, writable=True)
    file.zero(100, 5000)
    seen = {world.content_of(A) for world in at_end(files, 60)}
    assert b"x" * 8192 in seen
    assert b"x" * 100 + bytes(5000) + b"x" * 3092 in seen
    assert len(seen) > 5
    assert all(set(content[:100] + content[5100:]) == {ord("x")} for content in seen)


def test_crash_name_needs_its_folder_synced() -> None:
    files = FaultFiles("/d")
    file = files.open(A, create=True)
    file.write(b"data", 0)
    file.sync()
    assert {tuple(contents(world)) for world in at_end(files)} == {(), ("/d/a",)}
    files.sync_directory(A.parent)
    assert [contents(world) for world in at_end(files)] == [{"/d/a": b"data"}]


def test_crash_rename_before_sync_shows_the_classic_mistake() -> None:
    files = FaultFiles()
    files.load(A, b"old")
    file = files.open(B, create=True)
    file.write(b"new", 0)
    files.replace(B, A)
    files.sync_directory(A.parent)
    assert {world.content_of(A) for world in at_end(files)} >= {b"", b"new"}


def test_crash_names_of_a_folder_stay_in_order_and_renames_whole() -> None:
    files = FaultFiles("/d", "/e")
    files.load(A, b"1")
    files.replace(A, B)
    files.replace(B, Path("/e/c"))
    files.open(Path("/e/later"), create=True).close()
    seen = {tuple(contents(world)) for world in at_end(files, 100)}
    assert seen == {("/d/a",), ("/d/b",), ("/e/c",), ("/e/c", "/e/later")}


def test_crash_unlink_may_not_have_happened() -> None:
    files = FaultFiles()
    files.load(A, b"1")
    files.unlink(A)
    assert {tuple(contents(world).values()) for world in at_end(files)} == {(), (b"1",)}
    files.sync_directory(Path("/d"))
    assert [contents(world) for world in at_end(files)] == [{}]


def test_crash_write_durably_is_old_or_new_and_promises_hold() -> None:
    files = FaultFiles()
    files.load(A, b"old" * 1000)
    files.note("catalog", b"c0")
    write_durably(files, A, b"new" * 1000, clock=FakeClock())
    files.acknowledge("new")
    files.note("catalog", b"c1")
    promised = 0
    for index, world in crash_states(files.trace(), subsets_per_prefix=30):
        content = world.content_of(A)
        assert content in {b"old" * 1000, b"new" * 1000}, world.story
        if world.acknowledged:
            promised += 1
            assert content == b"new" * 1000, world.story
            assert world.last_note("catalog") == (b"c1" if index == len(files.trace()) else b"c0")
    assert promised > 1


def test_crash_finds_a_promise_made_before_the_sync() -> None:
    """The mistake that all this exists for."""
    files = FaultFiles()
    files.load(A, b"")
    file = files.open(A, writable=True)
    for step in range(20):
        file.write(bytes([step + 1]) * 512, step * 512)
        files.acknowledge(step)
        file.sync()
    broken = 0
    for _, world in crash_states(files.trace(), seed=3):
        content = world.content_of(A)
        broken += any(
            content[step * 512 : step * 512 + 1] != bytes([step + 1]) for step in world.acknowledged
        )
    assert broken >= 20


def test_crash_states_repeat_per_seed_and_respect_the_limit() -> None:
    files = FaultFiles("/d")
    file = files.open(A, create=True)
    rng = random.Random(5)
    for step in range(400):
        file.write(rng.randbytes(700), rng.randrange(1 << 20))
        if step % 50 == 49:
            file.sync()

    def digest(seed: int) -> tuple[int, str]:
        digest = hashlib.sha256()
        count = 0
        for index, world in crash_states(files.trace(), seed=seed, limit=90):
            count += 1
            digest.update(b"%d" % index + b"".join(contents(world).values()))
        return count, digest.hexdigest()

    first = digest(1)
    assert first == digest(1)
    assert first != digest(2)
    assert 60 <= first[0] <= 90
    assert {index for index, _ in worlds(files, limit=90)} & {50, 51, 52, 53}


def test_crash_of_a_recovery_is_possible_again() -> None:
    files = FaultFiles()
    files.load(A, b"o" * 512)
    file = files.open(A, writable=True)
    file.write(b"n" * 512, 0)
    ((_, world), *_) = worlds(files)
    again = world.open(A, writable=True)
    again.write(b"r" * 512, 0)
    assert {inner.content_of(A) for inner in at_end(world)} == {b"o" * 512, b"r" * 512}


def test_failed_sync_poisons_and_loses_what_was_pending() -> None:
    files = FaultFiles()
    files.load(A, b"o" * 512)
    file = files.open(A, writable=True)
    fault = files.fail("sync", error=errno.EIO)
    file.write(b"n" * 512, 0)
    for call in (file.sync, file.sync, file.size):
        with pytest.raises(OSError, match="Input/output"):
            call()
    assert fault.hits == 1
    with files.open(A, writable=True) as other:
        assert other.read(0, 512) == b"n" * 512
        other.sync()
    assert {world.content_of(A) for world in at_end(files)} == {b"o" * 512}


def test_faults_strike_the_nth_call_of_their_path() -> None:
    files = FaultFiles("/d")
    fault = files.fail("write", at=2, error=errno.ENOSPC, path="*/a", written_bytes=3)
    other, file = files.open(B, create=True), files.open(A, create=True)
    for _ in range(3):
        other.write(b"x", 0)
    file.write(b"12345", 0)
    with pytest.raises(OSError, match="No space left") as caught:
        file.write(b"abcde", 0)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.__notes__ == ["write /d/a at offset 0"]
    assert file.read(0, 5) == b"abc45"
    assert fault.hits == 1
    file.write(b"abcde", 0)
    files.fail("rename", error=errno.EACCES, count=None)
    for _ in range(2):
        with pytest.raises(PermissionError):
            files.replace(A, B)
    files.heal()
    files.replace(A, B)


def test_capacity_ends_with_enospc_and_comes_back() -> None:
    files = FaultFiles("/d", capacity_bytes=64 << 10)
    file = files.open(A, create=True)
    file.resize(1 << 40)
    file.write(b"x" * (60 << 10), 1 << 30)
    assert files.free_bytes(A) == 4096
    with pytest.raises(OSError, match="No space left"):
        file.write(b"y" * 8192, 0)
    file.zero(1 << 30, 60 << 10)
    file.write(b"y" * (64 << 10), 0)
    files.unlink(A)
    assert files.free_bytes(A) == 64 << 10


def test_kill_stops_every_thread_and_frees_the_locks() -> None:
    files = FaultFiles("/d")
    files.lock(Path("/d/lock"))
    file = files.open(A, create=True)
    files.kill_at(10)
    killed = []

    def work() -> None:
        try:
            while True:
                file.write(b"x" * 512, 512 * len(files.trace()))
        except Killed:
            killed.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(killed) == 3
    assert len(files.trace()) == 10
    world = files.after_kill()
    world.lock(Path("/d/lock")).release()
    assert world.content_of(A) == files.content_of(A)
    with pytest.raises(Killed):  # the dead process itself stays dead
        files.exists(A)


def test_recorder_is_quick_with_large_traces() -> None:
    files = FaultFiles("/d")
    file = files.open(A, create=True)
    file.resize(10 << 40)
    block = bytes(range(256)) * 4096
    for step in range(32):
        file.write(block, step << 34)
    file.sync()
    for step in range(3000):
        file.write(block[:4096], step * 40_960)
        if step % 100 == 0:
            file.sync()
    trace = files.trace()
    assert isinstance(trace, Trace)
    start = time.monotonic()
    count = sum(1 for _ in crash_states(trace, limit=200))
    assert count > 100
    assert time.monotonic() - start < 20  # a guard against quadratic costs, not a benchmark


def test_crash_distinct_leaves_out_repeated_worlds_and_no_other() -> None:
    files = FaultFiles("/s")
    file = files.open(Path("/s/a"), create=True)
    for number in range(1, 5):
        file.write(bytes([number]) * 1024, 512 * number)
        if number % 2:
            file.sync()
        files.note("step", number)
    files.sync_directory(Path("/s"))

    def looks(**options: Any) -> list[Any]:
        return [
            ({str(path): world.content_of(path) for path in world.files()}, world.notes)
            for _, world in crash_states(files.trace(), subsets_per_prefix=9, **options)
        ]

    whole, distinct = looks(), looks(distinct=True)
    assert len(distinct) < len(whole) / 2
    assert all(look in distinct for look in whole)
    assert all(distinct.count(look) == 1 for look in distinct)


def test_second_name_of_a_file_is_the_same_file(any_files: tuple[FileSystem, Path]) -> None:
    files, folder = any_files
    first, second = folder / "first", folder / "second"
    with contextlib.closing(files.open(first, create=True)) as file:
        file.write(b"old", 0)
        assert files.link(first, second)
        with pytest.raises(FileExistsError):
            files.link(first, second)
        with pytest.raises(FileNotFoundError):
            files.link(folder / "absent", folder / "third")
        file.write(b"new", 0)
    files.unlink(first)
    with contextlib.closing(files.open(second)) as file:
        assert file.read(0, 3) == b"new"
    assert files.names(folder) == ["second"]


def test_second_name_is_there_after_a_sync_of_its_folder_alone() -> None:
    files = FaultFiles("/d", "/e")
    files.load("/d/a", b"a" * 1000)
    files.link(Path("/d/a"), Path("/e/b"))
    found = {tuple(sorted(map(str, world.files()))) for world in at_end(files)}
    assert found == {("/d/a",), ("/d/a", "/e/b")}
    files.sync_directory(Path("/e"))
    assert {tuple(sorted(map(str, world.files()))) for world in at_end(files)} == {("/d/a", "/e/b")}
