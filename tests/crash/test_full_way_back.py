"""A file system that is full on the way back: each verb says so, no point changes, and the same call goes on with room.

tests/store/test_full.py has the same for cycles, tests/store/test_compact_parts.py for undo parts that are written
anew, tests/store/test_instant.py for `point at`.
"""

from __future__ import annotations

import errno
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hvreplica.errors import StoreFull
from hvreplica.store.promotion import Wish, cancel, fail_over
from tests.crash.near_network import NearNetwork
from tests.crash.test_adopt_crash import EVERY, Forked
from tests.crash.two_hosts import MIB, Host, TwoHosts, check_points
from tests.store.world import ram_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hvreplica.disk.open import Format

ROOMS = (0, 3000, 20_000, 100_000, 300_000, MIB, 3 * MIB, 6 * MIB)


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    NearNetwork().install(monkeypatch)
    with ram_folder() as folder:
        yield folder


def fill_up(host: Host, verb: Callable[[], object]) -> int:
    """Call a verb with ever more room, then with enough; return how often it said that it was full."""
    told = 0
    for room_bytes in ROOMS:
        host.files.capacity_bytes = used_bytes(host) + room_bytes
        try:
            verb()
        except StoreFull as error:
            told += 1
            assert error.hint, "what can be done"
        except OSError as error:
            # What a primary remembers is no part of a store: the file is named, as everywhere.
            assert error.errno == errno.ENOSPC
            parts = Path(error.filename).relative_to(host.folder).parts
            assert parts[0] != "store" or "primary" in parts
        else:
            return told
        finally:
            host.files.capacity_bytes = None
        check_points(host)
    verb()
    return told


def used_bytes(host: Host) -> int:
    """Return what the files of a host take."""
    files = host.files
    files.capacity_bytes = 1 << 40
    used = (1 << 40) - files.free_bytes(host.folder)
    files.capacity_bytes = None
    return used


@pytest.mark.parametrize(("kind", "back"), [("raw", False), ("vhdx", False), ("vhdx", True)])
def test_adoption_and_reversal_wait_for_room_and_lose_nothing(
    root: Path, seed: int, kind: Format, *, back: bool
) -> None:
    forked = Forked(root, seed, kind=kind)
    if back:
        forked.go_back()
    assert fill_up(forked.old, forked.adopt) > 0
    forked.check(forked.at_old)
    forked.vm.write(8)
    assert fill_up(forked.old, forked.reverse) > 0, "of the replica"
    forked.check(forked.vm.models)
    forked.cycle()
    forked.check(forked.vm.models)
    forked.vm.close()


def test_failover_to_an_older_point_waits_for_room_and_can_be_taken_back(root: Path, seed: int) -> None:
    vm = TwoHosts(root, seed, (2 * MIB, MIB))
    for _ in range(3):
        vm.write()
        result = vm.replicate(points=EVERY)
        vm.there.points[uuid.UUID(result.point)] = vm.image
    oldest, _, newest = vm.there.points
    host = vm.there

    def promote() -> None:
        with host.home() as home:
            fail_over(home, "unplanned", Wish(oldest, wait_s=0.0))

    def take_back() -> None:
        with host.home() as home:
            cancel(home, Wish(force=True, wait_s=0.0))

    assert fill_up(host, promote) > 0
    take_back()
    assert check_points(host)[-1] == newest
    vm.write()
    vm.there.points[uuid.UUID(vm.replicate().point)] = vm.image
    check_points(host)
    vm.close()
