"""Failovers by real processes, judged by other programs: chains, kills, a primary that is locked out, tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import settings

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.errors import Fenced, InvalidTransition, Locked
from hvreplica.files import OS_FILES
from tests.replication.dying import dies
from tests.store.failover_world import World
from tests.store.world import read_disk
from tests.support.command_line import Running, ask_verb, environment, run_verb
from tests.support.nbd_client import FLUSH, READ, WRITE, Connection
from tests.support.tools import missing, run_tool

try:
    from dissect.hypervisor.disk.vhdx import VHDX
except ImportError:
    VHDX = None

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from hvreplica.store.failover_status import FailoverStatus
    from tests.replication.sites import Guest, Served

ROOT = Path(__file__).parents[2]
KILLS_MAX = 60 if settings().max_examples > 1000 else 6


@pytest.fixture
def world(tmp_path: Path, rng: random.Random) -> Iterator[World]:
    """Return a store in real files with three points, served here; the newest one waits to be applied."""
    made = World(tmp_path / "store", rng, files=OS_FILES)
    yield made
    made.store.close()


def points(world: World) -> list[str]:
    return [str(point_id) for point_id in world.images]


def vm(world: World) -> tuple[object, ...]:
    return ("--store", world.root, "--vm", "web01")


def read_by_dissect(path: Path) -> bytes:
    """Read a chain with a program that is not ours, which finds the parent by the child's locator."""
    if VHDX is None:
        missing("dissect.hypervisor is not installed")
    disk = VHDX(path)
    try:
        content: bytes = disk.read(disk.size)
        return content
    finally:
        while disk is not None:
            disk.fh.close()
            disk = getattr(disk, "parent", None)


@pytest.mark.parametrize("place", [2, 0])
def test_other_programs_read_the_active_disks(world: World, tmp_path: Path, place: int) -> None:
    """Oracles: dissect follows the chain; qemu-img checks the parent and compares what `disk convert` makes."""
    answer = ask_verb("failover", "unplanned", *vm(world), "--point", points(world)[place])
    assert answer["state"] == "FailedOverWaitingCompletion"
    assert answer["generation"] == 2
    wanted = list(world.images.values())[place]
    for disk in answer["disks"]:
        content = wanted[disk["index"]]
        assert read_by_dissect(Path(disk["path"])) == content
        run_tool("qemu-img", "check", "-f", "vhdx", disk["parent"])
        copy, raw = tmp_path / "copy.vhdx", tmp_path / "model.raw"
        hvreplica.disk_convert(disk["path"], copy, overwrite=True)
        raw.write_bytes(content)
        run_tool("qemu-img", "compare", "-f", "vhdx", "-F", "raw", copy, raw)
    moved = tmp_path / "elsewhere"
    shutil.copytree(world.root / "web01", moved)
    assert read_by_dissect(moved / "active" / "0.vhdx") == wanted[0]


def test_whole_life_on_the_command_line(world: World) -> None:
    status = ask_verb("failover", "status", *vm(world))
    assert (status["mode"], status["state"], status["disks"]) == ("Replica", "Replicating", [])
    assert status["possible"] == ["replicate --prepare-failover", "failover unplanned"]
    answer = ask_verb("failover", "unplanned", *vm(world))
    assert answer["point"] == points(world)[-1]
    world.run_vm()
    refused = run_verb("failover", "cancel", *vm(world), "--json")
    assert (refused.code, refused.error["actual"]) == (62, "512 bytes")
    answer = ask_verb("failover", "cancel", *vm(world), "--point", points(world)[0], "--force")
    assert answer["point"] == points(world)[0]
    assert [point["kind"] for point in ask_verb("point", "list", *vm(world))][-1] == "manual"
    assert ask_verb("failover", "commit", *vm(world))["state"] == "FailedOver"
    late = run_verb("failover", "cancel", *vm(world), "--json")
    assert (late.code, late.error["class"]) == (61, "InvalidTransition")
    shown = run_verb("failover", "status", *vm(world)).out
    assert "web01: FailedOver" in shown
    assert str(world.home.paths.active(0)) in shown


@pytest.mark.parametrize("arguments", [("--point", "not-an-id"), ("--point", "latest-app")])
def test_points_that_are_not_there_are_told(world: World, arguments: tuple[str, ...]) -> None:
    assert run_verb("failover", "unplanned", *vm(world), *arguments, "--json").code == 52


def dying(kill_at: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.replication.dying", str(kill_at), *map(str, arguments), "--json"],
        cwd=ROOT,
        env=environment(PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'src'}"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("before", "verb"),
    [
        ((), ("unplanned", "--point", 0)),
        (("unplanned", "--point", 0), ("cancel", "--force")),
        (("unplanned", "--point", 0), ("cancel", "--point", 1)),
    ],
    ids=["unplanned", "cancel", "cancel-point"],
)
def test_command_killed_anywhere_the_next_one_ends_it(
    world: World, tmp_path: Path, before: tuple[Any, ...], verb: tuple[Any, ...]
) -> None:
    def named(words: tuple[Any, ...]) -> tuple[object, ...]:
        return tuple(points(world)[word] if isinstance(word, int) else word for word in words)

    if before:
        ask_verb("failover", *named(before), *vm(world))
    world.store.close()
    original, store = world.root, tmp_path / "copy"
    target = ("--store", store, "--vm", "web01")
    shutil.copytree(original, store)
    whole = dying(0, "failover", *named(verb), *target)
    wanted = json.loads(whole.stdout)
    operations = int(whole.stderr.rsplit("operations ", 1)[1])
    place = next((word for word in verb if isinstance(word, int)), None)
    fields = ("mode", "state", "unfinished", "point", "generation")
    places = range(1, operations, max(1, operations // KILLS_MAX))
    killed = 0
    for kill_at in places:
        shutil.rmtree(store)
        shutil.copytree(original, store)
        if kill_at == places[-1]:  # once with processes; a fork is the same, and there is no Python to start
            killed += dying(kill_at, "failover", *named(verb), *target).returncode == -signal.SIGKILL
        else:
            killed += dies(kill_at, lambda: call(store, *named(verb)))
        status = answer = told(hvreplica.failover_status(store, "web01"))
        if status["unfinished"] or any(status[field] != wanted[field] for field in ("state", "point")):
            answer = told(call(store, *named(verb)))
        where = f"killed at operation {kill_at} of {operations}"
        assert {field: answer[field] for field in fields} == {field: wanted[field] for field in fields}, where
        if place is not None and answer["point"] == points(world)[place]:
            for disk in answer["disks"]:
                content = list(world.images.values())[place][disk["index"]]
                assert read_disk(OS_FILES, Path(disk["path"]), SYSTEM) == content, where
        elif place is None:
            path = store / "web01" / "disks" / "0.vhdx"
            assert read_disk(OS_FILES, path, SYSTEM) == world.latest[0], where
    assert killed >= KILLS_MAX // 2


def call(store: Path, verb: str, *words: object) -> FailoverStatus:
    """Do what the command line does with the same words."""
    options = dict(zip(words[::2], words[1::2], strict=False))
    point = options.get("--point")
    if verb == "unplanned":
        return hvreplica.failover_unplanned(store, "web01", point=str(point))
    return hvreplica.failover_cancel(
        store, "web01", point=None if point is None else str(point), force="--force" in words
    )


def told(status: FailoverStatus) -> Any:
    return msgspec.to_builtins(status)


def test_primary_is_locked_out_and_goes_on_after_cancel(served: Served, guest: Guest) -> None:
    """The server runs all the while; the failover is another process beside it."""
    guest.replicate(served)
    guest.write(64 << 10)
    guest.replicate(served)
    target = ("--store", served.store, "--vm", "web01")
    before = served.content()
    answer = ask_verb("failover", "unplanned", *target)
    assert read_by_dissect(Path(answer["disks"][0]["path"])) == before
    guest.write(64 << 10)
    for options in ({}, {"takeover": True}):
        with pytest.raises(Fenced) as caught:
            guest.replicate(served, **options)
        assert "failover cancel" in (caught.value.hint or "")
    served.close()
    served.start()  # a server that starts anew lets nobody in either
    with pytest.raises(Fenced):
        guest.replicate(served)
    ask_verb("failover", "cancel", *target)
    assert guest.replicate(served).kind == "delta"
    assert served.content() == bytes(guest.model)


@contextlib.contextmanager
def served_test(world: World, socket: Path, *, point: str | None) -> Iterator[hvreplica.FiredrillServer]:
    """Serve a test failover in a thread of this process."""
    with hvreplica.FiredrillServer(world.root, "web01", socket=socket, point=point) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join()


def read(client: Connection, length: int) -> bytes:
    error, data = client.ask(READ, 0, length)
    assert error == 0
    return data


def test_test_failover_keeps_what_is_written_while_replication_goes_on(world: World, tmp_path: Path) -> None:
    socket, old = tmp_path / "t.sock", points(world)[0]
    content = next(iter(world.images.values()))[0]
    with served_test(world, socket, point=old), contextlib.closing(Connection(socket, "0")) as client:
        assert read(client, len(content)) == content
        assert client.ask(WRITE, 8192, 512, data=b"t" * 512)[0] == 0
        world.cycle()
        world.replica.apply()
        written = content[:8192] + b"t" * 512 + content[8704:]
        assert read(client, len(content)) == written
        with pytest.raises(Locked):
            hvreplica.failover_test_cleanup(world.root, "web01")
    status = ask_verb("failover", "status", *vm(world))
    assert (status["state"], status["test"]["point"], status["test"]["served"]) == ("Replicating", old, False)
    with served_test(world, socket, point=None), contextlib.closing(Connection(socket, "0")) as client:
        assert read(client, len(content)) == written
    with pytest.raises(InvalidTransition):
        hvreplica.FiredrillServer(world.root, "web01", socket=socket, point=points(world)[-1])
    assert ask_verb("failover", "test", *vm(world), "--cleanup")["test"] is None
    assert not world.home.paths.test(0).exists()
    world.check_kept()


def test_test_failover_as_a_process_ends_cleanly_and_counts_as_none_if_it_never_began(
    world: World, tmp_path: Path
) -> None:
    socket = tmp_path / "t.sock"
    with Running("failover", "test", *vm(world), "--socket", socket, "--json") as server:
        assert server.ready["point"] == points(world)[1]
        assert server.ready["exports"] == ["0", "1"]
        assert ask_verb("failover", "status", *vm(world))["test"]["served"]
        assert server.end(signal.SIGTERM)[0] == 0
    ask_verb("failover", "test", *vm(world), "--cleanup")
    with Running("failover", "test", *vm(world), "--json") as server:  # as short as it can be said
        default = world.home.paths.folder / "test" / "nbd.sock"
        assert server.ready["addresses"] == [str(default.absolute())]
        with contextlib.closing(Connection(default, "0")) as client:
            assert read(client, 512) == next(iter(world.images.values()))[1][:512]
        assert server.end(signal.SIGTERM)[0] == 0
    ask_verb("failover", "test", *vm(world), "--cleanup")
    nowhere = tmp_path / "no" / "t.sock"
    assert run_verb("failover", "test", *vm(world), "--socket", nowhere, "--json").code != 0
    assert ask_verb("failover", "status", *vm(world))["test"] is None
    both = run_verb("failover", "test", *vm(world), "--socket", socket, "--cleanup", "--json")
    assert both.code == 2


def test_test_failover_and_cleanup_killed_by_the_system_go_on(world: World, tmp_path: Path) -> None:
    """SIGKILL ends the server after a flush, and the cleanup at some of its file operations."""
    socket, old = tmp_path / "t.sock", points(world)[0]
    content = next(iter(world.images.values()))[0]
    verb = ("failover", "test", *vm(world), "--point", old, "--socket", socket, "--json")
    for place in range(2):
        with Running(*verb) as server, contextlib.closing(Connection(socket, "0")) as client:
            assert read(client, len(content)) == content, f"run {place}"
            assert client.ask(WRITE, 8192, 512, data=b"t" * 512)[0] == 0
            assert client.ask(FLUSH, 0, 0)[0] == 0
            content = content[:8192] + b"t" * 512 + content[8704:]
            assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
    world.store.close()
    original, store = world.root, tmp_path / "copy"
    target = ("--store", store, "--vm", "web01")
    cleanup = ("failover", "test", "--cleanup", *target)
    shutil.copytree(original, store)
    operations = int(dying(0, *cleanup).stderr.rsplit("operations ", 1)[1])
    killed = 0
    for kill_at in range(1, operations, max(1, operations // (KILLS_MAX // 2))):
        shutil.rmtree(store)
        shutil.copytree(original, store)
        killed += dies(kill_at, lambda: hvreplica.failover_test_cleanup(store, "web01"))
        assert hvreplica.failover_test_cleanup(store, "web01").test is None, (
            f"killed at operation {kill_at} of {operations}"
        )
        assert [path.name for path in (store / "web01" / "test").iterdir()] == ["lock"]
        assert read_by_dissect(store / "web01" / "disks" / "0.vhdx") == list(world.images.values())[1][0]
    assert killed >= KILLS_MAX // 4
