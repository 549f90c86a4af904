"""A QEMU's dirty bitmap becomes logs: whole, of one instant, and none is lost to whatever dies between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

import hvreplica
from hvreplica.capture.qemu_bitmap import QemuBitmap
from hvreplica.capture.qmp import Qmp
from hvreplica.errors import PeerClosed, QemuRefused, TrackingLost, Unreachable
from hvreplica.hrl import LogWriter
from tests.support.storage_daemon import NODE, StorageDaemon

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hvreplica.replication.log_qemu import LogFromQemu

KIB, MIB = 1 << 10, 1 << 20
SIZE = 24 * MIB + 5 * 512
CLUSTER = 64 * KIB
BITMAP = "hvreplica"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with (tmp_path / "disk.raw").open("wb") as disk:
        disk.truncate(SIZE)
    return tmp_path


@pytest.fixture
def daemon(folder: Path) -> Iterator[StorageDaemon]:
    with StorageDaemon(folder / "daemon", folder / "disk.raw", monitors=2) as running:
        yield running


class Copy:
    """A copy of the disk that only logs change."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "copy.raw"
        self.count = 0
        with self.path.open("wb") as copy:
            copy.truncate(SIZE)

    def follow(self, daemon: StorageDaemon, **options: Any) -> LogFromQemu:
        """Make the next log and apply it."""
        self.count += 1
        log = self.path.with_name(f"{self.count}.hrl")
        report = hvreplica.log_from_qemu(daemon.monitors[0], NODE, BITMAP, log, **options)
        assert hvreplica.log_verify(log).data_bytes == report.data_bytes
        hvreplica.log_apply(log, self.path)
        return report

    def content(self) -> bytes:
        return self.path.read_bytes()


@pytest.fixture
def copy(folder: Path) -> Copy:
    return Copy(folder)


def scribble(daemon: StorageDaemon, rng: random.Random, count: int = 20) -> set[int]:
    """Write and zero at random; return the clusters that were touched."""
    writes, touched = [], set()
    for _ in range(count):
        length = rng.choice([512, 4096, CLUSTER, 3 * CLUSTER])
        offset = rng.randrange((SIZE - length) // 512) * 512
        writes.append((offset, length, rng.choice([-1, *range(1, 256)])))
        touched |= set(range(offset // CLUSTER, -(-(offset + length) // CLUSTER)))
    daemon.write(*writes)
    return touched


def bitmaps(daemon: StorageDaemon) -> dict[str, dict[str, Any]]:
    with daemon.qmp(1) as monitor:
        nodes = monitor.execute("query-named-block-nodes", list[dict[str, Any]], flat=True)
        assert monitor.execute("query-jobs", list) == []
    assert sorted(node["node-name"] for node in nodes) == ["disk", "file"]
    return {
        bitmap["name"]: bitmap
        for node in nodes
        if node["node-name"] == NODE
        for bitmap in node.get("dirty-bitmaps", [])
    }


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_each_log_holds_what_changed_since_the_last(
    daemon: StorageDaemon, copy: Copy, folder: Path, rng: random.Random
) -> None:
    scribble(daemon, rng)
    report = copy.follow(daemon, full=True)
    assert report.full
    assert report.virtual_bytes == SIZE
    assert copy.content() == daemon.content()
    for _ in range(3):
        touched = scribble(daemon, rng)
        report = copy.follow(daemon)
        last = SIZE // CLUSTER
        assert report.data_bytes == sum(SIZE % CLUSTER if one == last else CLUSTER for one in touched)
        assert copy.content() == daemon.content()
    assert copy.follow(daemon).entries == 0
    names = bitmaps(daemon)
    assert (list(names), names[BITMAP]["recording"], names[BITMAP]["count"]) == ([BITMAP], True, 0)
    assert leftovers(folder) == []


class Writer:
    """A guest that writes one slot after the other, each when the last was answered, until it is stopped."""

    SLOTS = 40
    STRIDE = 9 * CLUSTER // 2  # neighbours in one cluster, and clusters in between that nobody writes

    def __init__(self, daemon: StorageDaemon, rng: random.Random) -> None:
        self.writes: list[tuple[int, int]] = []
        self.changed = threading.Condition()
        self._rng = rng
        self._stop = threading.Event()
        self._guest = subprocess.Popen(
            ["qemu-io", "-f", "raw", daemon.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._write_on()
        finally:
            self._stop.set()
            with self.changed:
                self.changed.notify_all()

    def _write_on(self) -> None:
        assert self._guest.stdin is not None
        assert self._guest.stdout is not None
        while not self._stop.is_set():
            slot, number = self._rng.randrange(self.SLOTS), len(self.writes) % 250 + 1
            self._guest.stdin.write(f"write -P {number} {slot * self.STRIDE} 512\n".encode())
            answer = b""
            while answer.count(b"\n") < 2 and not answer.endswith(b"error\n"):
                octet = self._guest.stdout.read(1)
                assert octet, "the guest's disk is gone"
                answer += octet
            assert b"wrote 512/512 bytes" in answer, answer
            with self.changed:
                self.writes.append((slot, number))
                self.changed.notify_all()

    def wait_for_more(self, count: int) -> None:
        """Return when `count` more writes were answered."""
        with self.changed:
            wanted = len(self.writes) + count
            self.changed.wait_for(lambda: len(self.writes) >= wanted or self._stop.is_set(), 15)
            assert len(self.writes) >= wanted, "the guest is held up, or its disk failed"

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._guest.communicate(b"quit\n")

    def is_instant(self, content: bytes, first: int, last: int) -> bool:
        """Return whether `content` is what the disk held after some number of writes from `first` to `last`."""
        shown = [content[slot * self.STRIDE] for slot in range(self.SLOTS)]
        state = [0] * self.SLOTS
        for count, (slot, number) in enumerate(self.writes):
            if first <= count <= last and state == shown:
                return True
            state[slot] = number
        return state == shown


def test_a_log_is_one_instant_while_the_guest_writes_on(
    daemon: StorageDaemon, copy: Copy, folder: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy.follow(daemon, full=True)
    writer = Writer(daemon, rng)

    def overtaken(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            writer.wait_for_more(2)  # it is held up neither by a slow log nor by a slow monitor
            return inner(*arguments, **options)

        return call

    try:
        with monkeypatch.context() as patch:
            patch.setattr(LogWriter, "append", overtaken(LogWriter.append))
            patch.setattr(Qmp, "execute", overtaken(Qmp.execute))
            for round_number in range(5):
                first = len(writer.writes)
                copy.follow(daemon)
                assert writer.is_instant(copy.content(), first, len(writer.writes) + 1), f"log {round_number}"
    finally:
        writer.stop()
    copy.follow(daemon)
    assert copy.content() == daemon.content()
    assert leftovers(folder) == []


def kill_when(daemon: StorageDaemon, process: subprocess.Popen[bytes], job: str) -> None:
    """Kill the process when QEMU has a job whose name ends so."""
    with daemon.qmp(1) as monitor:
        while process.poll() is None:
            if any(one["id"].endswith(job) for one in monitor.execute("query-jobs", list[dict[str, Any]])):
                break
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("job", ["-copy", "-push"])
def test_a_call_that_is_killed_loses_nothing_and_harms_no_guest(
    daemon: StorageDaemon, copy: Copy, folder: Path, rng: random.Random, job: str
) -> None:
    copy.follow(daemon, full=True)
    touched = scribble(daemon, rng) | set(range(16 * MIB // CLUSTER))
    daemon.write((0, 16 * MIB, 7))
    command = [sys.executable, "-m", "hvreplica", "log", "from-qemu", folder / "killed.hrl", "--node", NODE]
    command += ["--qmp", daemon.monitors[0], "--bitmap", BITMAP]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": "src"}) as process:
        kill_when(daemon, process, job)
    assert process.returncode == -signal.SIGKILL
    touched |= scribble(daemon, rng)  # the guest's writes succeed
    report = copy.follow(daemon)
    assert copy.content() == daemon.content()
    assert report.data_bytes <= (len(touched) + 1) * CLUSTER
    assert list(bitmaps(daemon)) == [BITMAP]


def test_the_first_log_counts_only_when_it_is_whole(
    daemon: StorageDaemon, copy: Copy, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    scribble(daemon, rng)
    with monkeypatch.context() as patch:
        patch.setattr(QemuBitmap, "settle", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            copy.follow(daemon, full=True)
    scribble(daemon, rng)
    with pytest.raises(TrackingLost):
        copy.follow(daemon)
    assert bitmaps(daemon) == {}
    copy.follow(daemon, full=True)
    assert copy.content() == daemon.content()


def test_a_log_that_never_became_durable_comes_again(
    daemon: StorageDaemon, copy: Copy, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy.follow(daemon, full=True)
    before = scribble(daemon, rng)
    with monkeypatch.context() as patch:
        patch.setattr(QemuBitmap, "settle", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            copy.follow(daemon)
    after = scribble(daemon, rng)
    report = copy.follow(daemon)
    assert report.data_bytes > (len(before | after) - 1) * CLUSTER
    assert copy.content() == daemon.content()


def test_a_full_folder_fails_the_log_and_not_the_guest(
    daemon: StorageDaemon, copy: Copy, folder: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy.follow(daemon, full=True)
    scribble(daemon, rng)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LogWriter, "append", full)
        with pytest.raises(OSError, match="No space left"):
            copy.follow(daemon)
    assert [path.name for path in folder.glob("2.hrl")] == []
    assert leftovers(folder) == []
    scribble(daemon, rng)
    copy.follow(daemon)
    assert copy.content() == daemon.content()


def test_a_bitmap_that_died_with_its_qemu_is_told_and_begun_anew(
    folder: Path, copy: Copy, rng: random.Random
) -> None:
    with StorageDaemon(folder / "one", folder / "disk.raw") as daemon:
        copy.follow(daemon, full=True)
        scribble(daemon, rng)
    with StorageDaemon(folder / "two", folder / "disk.raw", monitors=2) as daemon:
        with pytest.raises(TrackingLost, match="no such bitmap") as caught:
            copy.follow(daemon)
        assert "--full" in str(caught.value.hint)
        assert bitmaps(daemon) == {}
        copy.follow(daemon, full=True)
        assert copy.content() == daemon.content()


def test_a_bitmap_that_somebody_stopped_is_not_believed(daemon: StorageDaemon, copy: Copy) -> None:
    copy.follow(daemon, full=True)
    with daemon.qmp() as monitor:
        monitor.execute("block-dirty-bitmap-disable", node=NODE, name=BITMAP)
    with pytest.raises(TrackingLost, match="missed writes"):
        copy.follow(daemon)


def test_what_qemu_refuses_is_told_in_its_words(daemon: StorageDaemon, folder: Path) -> None:
    def log(node: str, **options: Any) -> None:
        hvreplica.log_from_qemu(daemon.monitors[0], node, BITMAP, folder / "a.hrl", **options)

    with pytest.raises(QemuRefused, match="no block node nothing") as caught:
        log("nothing", full=True)
    assert caught.value.expected == "disk, file"
    with daemon.qmp() as monitor:
        with pytest.raises(QemuRefused, match="Cannot find device"):
            monitor.execute("block-dirty-bitmap-add", node="nothing", name="a")
        assert monitor.job("nothing") is None
        with pytest.raises(QemuRefused, match="is gone"):
            monitor.wait_for("nothing")
    with pytest.raises(Unreachable, match="cannot listen"):
        log(NODE, full=True, scratch=folder / "absent")
    assert leftovers(folder) == []
    assert bitmaps(daemon) == {}


def test_a_qemu_that_ends_in_the_middle_is_told(
    daemon: StorageDaemon, copy: Copy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy.follow(daemon, full=True)
    daemon.write((0, 16 * MIB, 7))
    inner = LogWriter.append

    def append(*arguments: Any, **options: Any) -> None:
        daemon.process.kill()
        inner(*arguments, **options)

    monkeypatch.setattr(LogWriter, "append", append)
    with pytest.raises(PeerClosed):
        copy.follow(daemon)
    assert leftovers(folder) == []
    with pytest.raises(Unreachable, match="no QEMU answers"):
        copy.follow(daemon)


def test_a_monitor_that_is_taken_is_told_in_time(daemon: StorageDaemon) -> None:
    with closing(daemon.qmp()), pytest.raises(Unreachable, match="time limit"):
        Qmp(daemon.monitors[0], time_limit_s=0.5)


def test_logs_follow_each_other_where_asked(daemon: StorageDaemon, copy: Copy, folder: Path) -> None:
    first = copy.follow(daemon, full=True)
    daemon.write((0, 512, 1))
    second = copy.follow(daemon, follows=folder / "1.hrl")
    assert second.previous_log_id == first.log_id
    third = copy.follow(daemon, follows=uuid.UUID(second.log_id))
    assert third.previous_log_id == second.log_id
