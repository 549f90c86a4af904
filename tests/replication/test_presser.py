"""What a served store compresses by itself, and what those see of it who read its points."""

from __future__ import annotations

import contextlib
import random
import threading
from typing import TYPE_CHECKING

import pytest

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.errors import FieldOutOfRange, StoreError
from hvreplica.files import OS_FILES
from hvreplica.replication.point_server import PointServer
from hvreplica.replication.presser import Presser
from hvreplica.store import Store
from hvreplica.store.press import is_raw, press_part
from hvreplica.store.retain import retain
from tests.store.point_world import MIB, PAGE, VM, PointWorld
from tests.store.test_press import damage_frame, parts_of, text_like
from tests.support.nbd_client import READ, Connection

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 6 * MIB
EIO = 5


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PointWorld]:
    made = PointWorld(tmp_path / "store", {0: SIZE})
    yield made
    made.close()


@contextlib.contextmanager
def serving(world: PointWorld, point: uuid.UUID, socket: Path, *, writable: bool = False) -> Iterator[None]:
    with PointServer(world.root, VM, socket=socket, point=point, writable=writable) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.stop()
            thread.join()


def fill(world: PointWorld, rng: random.Random) -> uuid.UUID:
    """Return an older point of text, of which some is still on the disk."""
    point = world.cut({0: [(0, text_like(rng, SIZE))]})
    world.cut({0: [(3 * PAGE, text_like(rng, 3 * MIB))]})
    world.cut({0: [(4 * MIB, text_like(rng, MIB))]})
    return point


@pytest.mark.parametrize("writable", [False, True])
def test_clients_read_a_pressed_point_while_it_is_pressed_and_the_disk_changes(
    world: PointWorld, tmp_path: Path, rng: random.Random, *, writable: bool
) -> None:
    """Reads of all sizes; longer ones than the loop's buffer meet pressed extents in their middle."""
    point = fill(world, rng)
    content = world.points[point][0]
    wrong: list[tuple[int, int]] = []

    def ask(number: int) -> None:
        own = random.Random(number)
        with contextlib.closing(Connection(tmp_path / "p.sock", "0")) as client:
            for _ in range(60):
                length = own.choice([512, PAGE, PAGE, 3 * PAGE + 512, MIB, 3 * MIB + PAGE])
                offset = own.randrange((SIZE - length) // 512 + 1) * 512
                error, data = client.ask(READ, offset, length)
                if error or data != content[offset : offset + length]:
                    wrong.append((offset, length))

    press_part(world.home, parts_of(world, point)[0])
    with serving(world, point, tmp_path / "p.sock", writable=writable):
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(4):
            world.cut({0: [(rng.randrange(1000) * PAGE, text_like(rng, MIB))]})
            for row in parts_of(world):
                if is_raw(row):
                    press_part(world.home, row)
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("writable", [False, True])
def test_long_read_meets_pressed_extents_late(
    world: PointWorld, tmp_path: Path, rng: random.Random, *, writable: bool
) -> None:
    """The first bytes of the answer are on their way when the first one comes that is not plain."""
    point = world.cut({0: [(0, text_like(rng, SIZE))]})
    world.cut({0: [(4 * MIB + PAGE, text_like(rng, MIB))]})
    press_part(world.home, parts_of(world, point)[0])
    with (
        serving(world, point, tmp_path / "p.sock", writable=writable),
        contextlib.closing(Connection(tmp_path / "p.sock", "0")) as client,
    ):
        assert client.ask(READ, 0, SIZE) == (0, world.points[point][0])


def test_damaged_frame_is_an_error_of_that_read_alone(
    world: PointWorld, tmp_path: Path, rng: random.Random
) -> None:
    point = fill(world, rng)
    content = world.points[point][0]
    press_part(world.home, parts_of(world, point)[0])
    damage_frame(world, parts_of(world, point)[0], 2 * MIB)
    with (
        serving(world, point, tmp_path / "p.sock"),
        contextlib.closing(Connection(tmp_path / "p.sock", "0")) as client,
    ):
        for offset, expected in ((PAGE, 0), (MIB, 0), (2 * MIB, EIO), (2 * MIB, EIO), (MIB, 0)):
            error, data = client.ask(READ, offset, PAGE)
            assert error == expected
            assert expected or data == content[offset : offset + PAGE]
    found = next(each for each in hvreplica.point_list(world.root, vm=VM) if each.id == str(point))
    assert found.state == "damaged"
    with pytest.raises(StoreError, match="frame"):
        hvreplica.point_export(world.root, VM, tmp_path / "copy.raw", point=str(point), disk=0)


def test_served_store_presses_what_its_policy_says(
    world: PointWorld, tmp_path: Path, rng: random.Random
) -> None:
    point = fill(world, rng)
    with pytest.raises(FieldOutOfRange, match="points"):
        hvreplica.store_policy(world.root, VM, compress_after=-1)
    assert hvreplica.store_policy(world.root, VM, compress_after=0).policy.compress_after_points is None
    with contextlib.closing(Store.open_reading(OS_FILES, world.root, clock=SYSTEM)) as store:
        presser = Presser(store, clock=SYSTEM)
        presser.press()
        assert all(is_raw(row) for row in parts_of(world))
        assert hvreplica.store_policy(world.root, VM, compress_after=2).policy.compress_after_points == 2
        presser.press()
        presser.start()
        presser.close()
    assert [is_raw(row) for row in parts_of(world, point)] == [False]
    assert sum(is_raw(row) for row in parts_of(world)) == 2  # of zeros, and of the newest one's neighbour
    copy = tmp_path / "copy.raw"
    hvreplica.point_export(world.root, VM, copy, point=str(point), disk=0, format="raw")
    assert copy.read_bytes() == world.points[point][0]
    ids = [str(each) for each in world.ids]
    (found,) = hvreplica.point_diff(world.root, VM, ids[1], ids[2]).disks
    expected = [
        at
        for at in range(0, SIZE, 512)
        if world.points[world.ids[1]][0][at : at + 512] != world.points[world.ids[2]][0][at : at + 512]
    ]
    assert found.changed_bytes == 512 * len(expected)


def test_budget_presses_before_a_point_goes(world: PointWorld, rng: random.Random) -> None:
    point = fill(world, rng)
    hvreplica.store_policy(world.root, VM, points_budget=str(4 * MIB), keep="last 100")
    with contextlib.closing(Store.open_reading(OS_FILES, world.root, clock=SYSTEM)) as store:
        assert store.plan_points(VM).used_bytes > 4 * MIB
        assert retain(store.home(VM)).gone == []
    assert [is_raw(row) for row in parts_of(world, point)] == [False]
