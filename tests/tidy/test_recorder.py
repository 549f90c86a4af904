"""The recorder misses nothing that a process does, and a planted mistake is found in what it wrote down."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.crash import crash_states
from tests.support.recorder import Faults, build, recording
from tests.support.replay import Note, Recording, lay_out, photograph, read_recording

if TYPE_CHECKING:
    from pathlib import Path

# A journal and a disk: a number goes to the journal, which is synced, then to the disk, then an answer is sent. The
# switches plant the mistakes that the power-cut tests are to find.
SERVER = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int journal, disk, line, early_answer, early_write;

static void *serve(void *argument)
{
    uint64_t first = (uint64_t)(uintptr_t)argument;
    for (uint64_t number = first; number < 40; number += 2) {
        uint64_t block[512 / 8] = {number + 1};
        if (early_write) {
            pwrite(disk, block, 512, (off_t)number * 512);
        }
        pwrite(journal, block, 512, (off_t)number * 512);
        fdatasync(journal);
        if (!early_write) {
            pwrite(disk, block, 512, (off_t)number * 512);
        }
        if (early_answer) {
            send(line, &number, 8, 0);
        }
        fdatasync(disk);
        if (!early_answer) {
            send(line, &number, 8, 0);
        }
    }
    return 0;
}

int main(int count, char **arguments)
{
    pthread_t other;
    (void)count;
    line = atoi(arguments[1]);
    early_answer = strcmp(arguments[2], "early answer") == 0;
    early_write = strcmp(arguments[2], "early write") == 0;
    journal = open("journal", O_RDWR | O_CREAT, 0600);
    disk = open("disk", O_RDWR);
    int folder = open(".", O_RDONLY | O_DIRECTORY);
    if (strcmp(arguments[2], "early name") != 0) {
        fsync(folder);
    }
    pthread_create(&other, 0, serve, (void *)(uintptr_t)1);
    serve(0);
    pthread_join(other, 0);
    return 0;
}
"""

# Every call that the recorder knows, from Python.
CALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
a = os.open("a", os.O_RDWR | os.O_CREAT | os.O_EXCL)
os.write(a, b"x" * 10000)
os.writev(a, [b"one", b"", b"three"])
os.pwrite(a, b"y" * 3000, 70000)
os.pwritev(a, [b"1" * 5000, b"2" * 5000], 3)
os.ftruncate(a, 60000)
libc.fallocate(a, 3, 4096, 8192)
libc.fallocate(a, 0, 0, 100000)
libc.fallocate(a, 1, 100000, 4096)
os.posix_fallocate(a, 0, 120000)
os.fsync(a)
with open("b", "wb") as b:
    b.write(b"z" * 100000)
with open("b", "ab") as b:
    b.write(b"appended")
with open("b", "rb") as b:
    os.copy_file_range(b.fileno(), a, 50000, 10, 20000)
os.mkdir("folder")
os.rename("b", "folder/b")
os.replace("folder/b", "folder/c")
with open("old", "wb") as old:
    old.write(b"cut and new")
os.unlink("gone")
fd = os.open("folder", os.O_RDONLY)
os.fsync(fd)
d = os.open("d", os.O_RDWR | os.O_CREAT, dir_fd=os.open(".", os.O_RDONLY))
os.pwrite(d, b"in the folder", 1 << 33)
os.close(d)
os.dup2(a, d)
os.pwrite(d, b"through another number", 0)
e = os.open("e", os.O_RDWR | os.O_CREAT)
os.pwrite(e, b"first", 0)
os.unlink("e")
os.pwrite(e, b"without a name", 0)
if os.fork() == 0:
    os._exit(0)
os.wait()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("recorder"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    (folder / "server.c").write_text(SERVER)
    command = ["cc", "-O1", "-o", str(folder / "server"), str(folder / "server.c"), "-lpthread"]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    return folder / "server"


def root_of(folder: Path) -> Path:
    root = folder / "root"
    root.mkdir()
    return root


def serve(
    library: Path, server: Path, folder: Path, fault: str = "", faults: Faults | None = None
) -> tuple[Path, Recording, list[Note]]:
    """Run the server and return its root, what was recorded, and each answer as a note."""
    root = root_of(folder)
    (root / "disk").write_bytes(bytes(40 * 512))
    before = photograph(root)
    ours, theirs = socket.socketpair()
    environment = recording(library, trace=folder / "trace", roots=[root], faults=faults)
    with ours, theirs:
        done = subprocess.run(
            [server, str(theirs.fileno()), fault],
            cwd=root,
            pass_fds=[theirs.fileno()],
            env={**os.environ, **environment},
            timeout=60,
            check=True,
        )
        assert done.returncode == 0
        answers = ours.recv(1 << 16)
    kept = read_recording(folder / "trace", before)
    notes = [Note(sent.position, "acknowledged", int.from_bytes(sent.data, "little")) for sent in kept.sends]
    assert sorted(sent.data for sent in kept.sends) == sorted(
        answers[at : at + 8] for at in range(0, len(answers), 8)
    )
    assert kept.differences(photograph(root)) == []
    return root, kept, notes


def broken_promises(
    root: Path, kept: Recording, notes: list[Note], *, seed: int, limit: int = 400
) -> set[str]:
    """Return what goes wrong in the worlds of a recording of the server: lost answers, blocks no journal names."""
    found = set()
    for _, world in crash_states(kept.trace(notes), seed=seed, limit=limit):
        lay_out(world, [root])
        disk = (root / "disk").read_bytes()
        journal = (root / "journal").read_bytes() if (root / "journal").exists() else b""
        for number in range(40):
            at = number * 512
            is_there = disk[at : at + 8] == (number + 1).to_bytes(8, "little")
            if is_there and journal[at : at + 8] != disk[at : at + 8]:
                found.add("block without its journal")
            if number in world.acknowledged and not is_there:
                found.add("answer without its block")
    return found


def test_recorder_follows_every_call(tmp_path: Path, library: Path) -> None:
    root = root_of(tmp_path)
    (root / "old").write_bytes(b"o" * 5000)
    (root / "gone").write_bytes(b"g" * 5000)
    before = photograph(root)
    environment = recording(library, trace=tmp_path / "trace", roots=[root])
    command = [sys.executable, "-c", CALLS]
    subprocess.run(command, cwd=root, env={**os.environ, **environment}, timeout=60, check=True)
    kept = read_recording(tmp_path / "trace", before)
    assert kept.differences(photograph(root)) == []
    kinds = {event.kind for event in kept.events}
    assert kinds == {
        *("create", "write", "resize", "zero", "sync_begin", "sync", "rename", "unlink", "mkdir"),
        "sync_directory",
    }
    (root / "a").write_bytes(b"something else")
    assert kept.differences(photograph(root)) != []


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("import mmap; mmap.mmap(os.open('old', os.O_RDWR), 10)", "mapping"),
        ("os.link('old', 'second')", "second name"),
        ("os.truncate('old', 3)", "resize"),
        ("os.mkdir('one'); os.rename('one', 'two')", "renamed folder"),
    ],
)
def test_recorder_says_what_it_cannot_follow(tmp_path: Path, library: Path, call: str, what: str) -> None:
    root = root_of(tmp_path)
    (root / "old").write_bytes(b"o" * 5000)
    before = photograph(root)
    environment = recording(library, trace=tmp_path / "trace", roots=[root])
    command = [sys.executable, "-c", f"import os; {call}"]
    subprocess.run(command, cwd=root, env={**os.environ, **environment}, timeout=60, check=True)
    assert any(what in text for text in read_recording(tmp_path / "trace", before).refused)


def test_right_server_keeps_its_promises(tmp_path: Path, library: Path, server: Path, seed: int) -> None:
    root, kept, notes = serve(library, server, tmp_path)
    assert len(notes) == 40
    assert broken_promises(root, kept, notes, seed=seed) == set()


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("early answer", {"answer without its block"}),
        ("early write", {"block without its journal"}),
        ("early name", {"block without its journal"}),
    ],
)
def test_planted_mistake_is_found(
    tmp_path: Path, library: Path, server: Path, seed: int, fault: str, found: set[str]
) -> None:
    root, kept, notes = serve(library, server, tmp_path, fault)
    assert broken_promises(root, kept, notes, seed=seed) == found


def test_sync_does_not_cover_what_was_written_meanwhile(tmp_path: Path, library: Path) -> None:
    program = (
        "import os, threading\n"
        "file = os.open('file', os.O_RDWR)\n"
        "os.pwrite(file, b'before', 0)\n"
        "syncing = threading.Thread(target=os.fsync, args=(file,))\n"
        "syncing.start()\n"
        "input()\n"
        "os.pwrite(file, b'during', 512)\n"
        "print('written', flush=True)\n"
        "syncing.join()\n"
    )
    root = root_of(tmp_path)
    (root / "file").write_bytes(bytes(1024))
    before = photograph(root)
    faults = Faults(tmp_path / "faults")
    rule = faults.add("sync", "*/file", hold=True)
    environment = recording(library, trace=tmp_path / "trace", roots=[root], faults=faults)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=root,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while rule.held == 0:
            assert process.poll() is None
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"written\n"
        rule.release()
    kept = read_recording(tmp_path / "trace", before)
    assert [event.kind for event in kept.events] == ["write", "sync_begin", "write", "sync"]
    worlds = [world for index, world in crash_states(kept.trace(), limit=None) if index == 4]
    held = [world.content_of(root / "file") for world in worlds]
    assert {content[:6] for content in held} == {b"before"}
    assert {content[512:518] for content in held} == {b"during", bytes(6)}


def test_failed_sync_loses_what_was_pending(tmp_path: Path, library: Path, server: Path, seed: int) -> None:
    faults = Faults(tmp_path / "faults")
    rule = faults.add("sync", "*/disk", error=errno.EIO, skip=5)
    root, kept, notes = serve(library, server, tmp_path, faults=faults)
    assert rule.hits == 1
    assert "sync_failed" in {event.kind for event in kept.events}
    assert broken_promises(root, kept, notes, seed=seed) == {"answer without its block"}


def test_fault_strikes_the_call_it_names_and_no_other(tmp_path: Path, library: Path) -> None:
    faults = Faults(tmp_path / "faults")
    full = faults.add("write", "*/log", error=errno.ENOSPC, skip=1)
    short = faults.add("write", "*/journal", short_bytes=3)
    never = faults.add("rename", "*/other", error=errno.EIO)
    program = (
        "import os\n"
        "log = os.open('log', os.O_RDWR | os.O_CREAT)\njournal = os.open('journal', os.O_RDWR | os.O_CREAT)\n"
        "def moved(file):\n"
        "    try:\n        return os.pwrite(file, b'12345', 0)\n    except OSError as error:\n        return error.errno\n"
        "print(*[moved(file) for file in (log, log, log, journal, journal)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, **recording(library, faults=faults)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["5", str(errno.ENOSPC), "5", "3", "5"]
    assert (full.calls, full.hits) == (3, 1)
    assert (short.calls, short.hits) == (2, 1)
    assert never.calls == 0
