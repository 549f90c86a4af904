"""`point serve`: a point's disks over NBD, judged by other programs, while the replica moves on."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

import hvreplica
from hvreplica.errors import Locked, ParentMismatch
from hvreplica.files import OS_FILES
from hvreplica.replication.point_server import PointServer
from tests.store.point_world import MIB, PAGE, VM, PointWorld, random_writes
from tests.support.command_line import Running
from tests.support.nbd_client import FLUSH, FUA, NO_HOLE, READ, TRIM, WRITE, ZEROES, Connection
from tests.support.tools import require_tool

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator
    from pathlib import Path

    from tests.replication.sites import Guest, Served

SIZE = 6 * MIB
EPERM = 1


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PointWorld]:
    made = PointWorld(tmp_path / "store", {0: SIZE, 1: 2 * MIB})
    yield made
    made.close()


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "p.sock"


@contextlib.contextmanager
def serving(
    world: PointWorld, socket: Path, point: uuid.UUID | str, **settings: object
) -> Iterator[PointServer]:
    """Serve a point in a thread of this process."""
    with PointServer(world.root, VM, socket=socket, point=point, **settings) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join()


def read(client: Connection, offset: int, length: int) -> bytes:
    error, data = client.ask(READ, offset, length)
    assert error == 0
    return data


def fill(world: PointWorld, rng: random.Random, count: int) -> list[uuid.UUID]:
    return [
        world.cut({0: random_writes(rng, SIZE, 12), 1: random_writes(rng, 2 * MIB, 4)}) for _ in range(count)
    ]


def test_other_programs_see_every_point(world: PointWorld, socket: Path, rng: random.Random) -> None:
    """Oracles: qemu-img compares the served disk with an exported copy, qemu-io and nbdinfo look at it."""
    qemu_img, qemu_io, nbdinfo = (require_tool(name) for name in ("qemu-img", "qemu-io", "nbdinfo"))
    ids = fill(world, rng, 4)
    copy = world.root.parent / "copy.vhdx"
    for point_id in (ids[0], ids[2], ids[3]):
        arguments = ("--store", world.root, "--vm", VM, "--point", point_id)
        with Running("point", "serve", *arguments, "--socket", socket, "--json") as server:
            assert server.ready["point"] == str(point_id)
            assert server.ready["exports"] == ["0", "1"]
            for index in (0, 1):
                hvreplica.point_export(world.root, VM, copy, point=str(point_id), disk=index, overwrite=True)
                uri = f"nbd+unix:///{index}?socket={socket}"
                compare = [qemu_img, "compare", "-f", "raw", uri, "-F", "vhdx", str(copy)]
                assert b"identical" in subprocess.run(compare, check=True, capture_output=True).stdout
                raw = world.root.parent / "copy.raw"
                subprocess.run([qemu_img, "convert", "-f", "raw", uri, "-O", "raw", raw], check=True)
                assert raw.read_bytes() == world.points[point_id][index]
            listed = subprocess.run(
                [nbdinfo, "--list", f"nbd+unix:///?socket={socket}"],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            assert 'export="0"' in listed
            assert 'export="1"' in listed
            size = subprocess.run(
                [nbdinfo, "--size", f"nbd+unix:///?socket={socket}"], check=True, capture_output=True
            ).stdout
            assert int(size) == SIZE  # an empty name means the first
            write = [qemu_io, "-f", "raw", "-c", "write 0 4k", f"nbd+unix:///0?socket={socket}"]
            assert subprocess.run(write, check=False, capture_output=True).returncode != 0
            assert server.end(signal.SIGTERM)[0] == 0
        assert not socket.exists()
    uses = [name for name in OS_FILES.names(world.home.paths.points) if name.endswith(".use")]
    for name in uses:
        OS_FILES.lock(world.home.paths.points / name).release()


@pytest.mark.parametrize("process", [False, True])
def test_clients_read_the_point_while_the_disk_changes(
    world: PointWorld, socket: Path, rng: random.Random, *, process: bool
) -> None:
    """Reads of all sizes, longer than the loop's buffer too, from a server in this or in another process."""
    point_id = fill(world, rng, 2)[0]
    content = world.points[point_id][0]
    stopping, wrong, counts = threading.Event(), [], [0, 0, 0]

    def ask(number: int) -> None:
        own = random.Random(number)
        with contextlib.closing(Connection(socket, "0")) as client:
            while not stopping.is_set():
                length = own.choice([512, PAGE, 3 * PAGE + 512, MIB, 3 * MIB + PAGE])
                offset = own.randrange((SIZE - length) // 512 + 1) * 512
                counts[number] += 1
                if read(client, offset, length) != content[offset : offset + length]:
                    wrong.append((offset, length))
                    return

    arguments = ("--store", world.root, "--vm", VM, "--point", point_id, "--socket", socket, "--json")
    with Running("point", "serve", *arguments) if process else serving(world, socket, point_id):
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            world.cut({0: random_writes(rng, SIZE, 12)})
        stopping.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert all(count > 5 for count in counts)


def test_copy_is_the_point_though_the_disk_changes(
    world: PointWorld, socket: Path, rng: random.Random
) -> None:
    """Oracle: nbdcopy, with structured replies and block status, while points are applied."""
    nbdcopy = require_tool("nbdcopy")
    point_id = fill(world, rng, 2)[0]
    target = world.root.parent / "copied.raw"
    with serving(world, socket, point_id):
        for _ in range(4):
            copying = subprocess.Popen([nbdcopy, f"nbd+unix:///0?socket={socket}", str(target)])
            while copying.poll() is None:
                world.cut({0: random_writes(rng, SIZE, 6)})
            assert copying.returncode == 0
            assert target.read_bytes() == world.points[point_id][0]
            target.unlink()


def test_what_a_client_writes_is_its_own(world: PointWorld, socket: Path, rng: random.Random) -> None:
    """Random commands against a bytearray, with cuts of the replica between them; then all of it is gone."""
    point_id = fill(world, rng, 3)[1]
    model = bytearray(world.points[point_id][0])
    with (
        serving(world, socket, point_id, writable=True),
        contextlib.closing(Connection(socket, "0")) as client,
    ):
        assert OS_FILES.names(world.home.paths.test(0).parent) == []
        for step in range(300):
            length = rng.choice([512, PAGE, 3 * PAGE, MIB, 2 * MIB + 512])
            offset = rng.randrange((SIZE - length) // 512 + 1) * 512
            command = rng.choice([READ, READ, WRITE, WRITE, TRIM, ZEROES, FLUSH])
            flags = rng.choice([0, FUA, NO_HOLE]) if command == ZEROES else 0
            data = rng.randbytes(length) if command == WRITE else b""
            if command == FLUSH:
                offset = length = 0
            error, answer = client.ask(command, offset, length, flags=flags, data=data)
            assert error == 0
            if command == READ:
                assert answer == model[offset : offset + length]
            elif command != FLUSH:
                model[offset : offset + length] = data or bytes(length)
            if step % 60 == 0:
                world.cut({0: random_writes(rng, SIZE, 4)})
        assert read(client, 0, SIZE) == model
    with (
        serving(world, socket, point_id, writable=True),
        contextlib.closing(Connection(socket, "0")) as client,
    ):
        assert read(client, 0, SIZE) == world.points[point_id][0]
    assert hvreplica.point_diff(world.root, VM, str(point_id), "latest").disks[0].changed_bytes


def test_kept_writes_are_there_again_after_a_kill(
    world: PointWorld, socket: Path, rng: random.Random
) -> None:
    ids = fill(world, rng, 3)
    keep = world.root.parent / "kept"
    arguments = ("--store", world.root, "--vm", VM, "--point", ids[0], "--socket", socket)
    model = bytearray(world.points[ids[0]][1])
    with Running("point", "serve", *arguments, "--writable", "--keep", keep, "--json") as server:
        with contextlib.closing(Connection(socket, "1")) as client:
            for _ in range(20):
                offset, data = rng.randrange(2 * MIB // 512 - 8) * 512, rng.randbytes(PAGE)
                assert client.ask(WRITE, offset, PAGE, data=data)[0] == 0
                model[offset : offset + PAGE] = data
            assert client.ask(FLUSH)[0] == 0
        server.process.kill()
        server.process.wait()
    world.cut({1: random_writes(rng, 2 * MIB, 4)})
    with (
        serving(world, socket, ids[0], writable=True, keep=keep),
        contextlib.closing(Connection(socket, "1")) as client,
    ):
        assert read(client, 0, 2 * MIB) == model
        with pytest.raises(Locked), serving(world, socket.with_name("q"), ids[0], writable=True, keep=keep):
            pass
    with pytest.raises(ParentMismatch), serving(world, socket, ids[1], writable=True, keep=keep):
        pass
    assert hvreplica.disk_info(keep / "1.vhdx").type == "differencing"


def test_reader_is_refused_to_write(world: PointWorld, socket: Path) -> None:
    with serving(world, socket, "latest"), contextlib.closing(Connection(socket, "")) as client:
        assert client.size_bytes == SIZE
        for command, data in ((WRITE, bytes(512)), (TRIM, b""), (ZEROES, b"")):
            assert client.ask(command, 0, 512, data=data)[0] == EPERM
        assert read(client, SIZE - 512, 512) == bytes(512)
        assert client.ask(READ, SIZE - 512, 1024)[0] != 0
    with pytest.raises(ValueError, match="kept"):
        PointServer(world.root, VM, socket=socket, keep=socket)


@pytest.mark.parametrize("every_s", [0, 3600])
def test_cycles_go_on_while_points_are_read(
    guest: Guest, served: Served, tmp_path: Path, every_s: float
) -> None:
    """A real server applies what a real primary sends; also where the rule keeps no point that is read here."""
    policy = hvreplica.PointPolicy(recovery_point_every_s=every_s)
    wrong, counts, stopping = [], [0, 0], threading.Event()

    def ask(number: int, path: Path, content: bytes) -> None:
        own = random.Random(number)
        with contextlib.closing(Connection(path, "0")) as client:
            while not stopping.is_set():
                length = own.choice([PAGE, MIB, 2 * MIB + PAGE])
                offset = own.randrange((len(content) - length) // 512 + 1) * 512
                counts[number] += 1
                if read(client, offset, length) != content[offset : offset + length]:
                    wrong.append((number, offset, length))
                    return

    with contextlib.ExitStack() as stack:
        threads = []
        for number in range(2):
            guest.write(MIB)
            point = guest.replicate(served, points=policy).point
            path = tmp_path / f"{number}.sock"
            arguments = ("--store", served.store, "--vm", VM, "--socket", path, "--json")
            running = stack.enter_context(Running("point", "serve", *arguments))
            assert running.ready["point"] == point
            threads.append(threading.Thread(target=ask, args=(number, path, bytes(guest.model))))
            threads[-1].start()
        for step in range(6):
            guest.write(MIB)
            if step % 3 == 2:
                guest.zero(step * MIB, 3 * MIB)
            guest.replicate(served)
        stopping.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert all(counts)
    assert served.content() == guest.model
