"""A full disk or an I/O error at any write, sync, rename or removal: told, never taken for success, and survived."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from hvreplica.errors import StoreError, StoreFull
from tests.store.history import History, check_world, open_store, put_catalog
from tests.store.world import MIB, ram_folder, read_replica
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OPERATIONS = {"write": 12, "sync": 12, "rename": 8, "sync_directory": 8, "unlink": 4, "open": 8, "mkdir": 2}


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


def count_calls(history: History, root: Path, operation: str) -> int:
    put_catalog(root, None)
    files = FaultFiles(root)
    counter = files.fail(operation, at=1 << 60)
    with open_store(files, root, FakeClock(seed=2)) as store:
        history.run(files, store)
    return counter.calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_fault_at_any_call_is_told_and_survived(root: Path, seed: int, operation: str, code: int) -> None:
    history = History(seed)
    calls = count_calls(history, root, operation)
    assert calls > 0
    told = 0
    for at in range(1, calls + 1, max(calls // OPERATIONS[operation], 1)):
        put_catalog(root, None)
        files = FaultFiles(root)
        with open_store(files, root, FakeClock(seed=2)) as store:
            fault = files.fail(operation, at=at, error=code)
            try:
                history.run(files, store)
            except StoreFull as error:
                assert code == errno.ENOSPC
                told += 1
                assert "free" in str(error)
            except StoreError as error:  # an acknowledged state that is not reached yet, named as such
                told += 1
                assert error.hint
            except OSError as error:
                assert error.errno == code
                assert code == errno.EIO
                told += 1
            assert fault.hits <= 1
            files.heal()
            history.check_listed(files, root, store)
            history.run(files, store)  # the same process goes on once there is room
            assert read_replica(files, root, history.primary) == history.primary.image()
        check_world(files, history, root)
    assert told > 0


def test_disk_that_fills_up_is_told_at_every_size(root: Path, seed: int) -> None:
    """The file system is full at one size after the other; with room made, the same store goes on."""
    history = History(seed)
    for capacity_bytes in range(MIB, 9 * MIB, MIB // 2):
        put_catalog(root, None)
        files = FaultFiles(root, capacity_bytes=capacity_bytes)
        with open_store(files, root, FakeClock(seed=3)) as store:
            try:
                history.run(files, store)
            except StoreFull as error:
                assert "free" in str(error)
            history.check_listed(files, root, store)
            files.capacity_bytes = None
            history.run(files, store)
        check_world(files, history, root)
