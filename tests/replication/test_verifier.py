"""The schedule on which a served store is read again."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING

import pytest

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.replication.verifier import Verifier
from hvreplica.store import Store
from hvreplica.store.pace import Pace, Stopped
from tests.replication.sites import VM, Guest, Served
from tests.support.fakeclock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def store(guest: Guest, served: Served) -> Iterator[Store]:
    """Return a store with one VM that was never read again, and that nobody serves."""
    guest.replicate(served)
    served.close()
    with contextlib.closing(Store.create_or_open(OS_FILES, served.store, clock=SYSTEM)) as opened:
        yield opened


def test_a_vm_is_due_one_interval_after_it_was_read(store: Store) -> None:
    verifier = Verifier(store, every_s=1000, rate_bytes_s=None, clock=SYSTEM)
    due = verifier.next_due()
    assert due == (1000, VM)
    before_s = SYSTEM.now_s()
    verifier.verify(VM)
    due = verifier.next_due()
    assert due is not None
    assert before_s + 1000 <= due[0]
    assert store.verify(VM, Pace(SYSTEM, lambda _: False), since_s=before_s).vms[0].read_bytes == 0


def test_a_vm_that_cannot_be_read_is_tried_again_later(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    verifier = Verifier(store, every_s=10, rate_bytes_s=None, clock=SYSTEM)
    monkeypatch.setattr(store, "verify", lambda *_, **__: 1 / 0)
    verifier.verify(VM)
    due = verifier.next_due()
    assert due is not None
    assert due[0] > SYSTEM.now_s() + 3000
    assert "could not be verified" in caplog.text


def test_a_server_reads_its_store_and_logs_what_is_damaged(
    guest: Guest, served: Served, tls: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guest.replicate(served)
    served.close()
    path = served.store / VM / "disks" / "0.vhdx"
    data = bytearray(path.read_bytes())
    at = next(at for at in range(len(data) - 4096, 0, -4096) if any(data[at : at + 512]))
    data[at + 7] ^= 0x20
    path.write_bytes(data)
    told = threading.Event()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR:
                told.set()

    handler = Handler()
    logging.getLogger("hvreplica.verify").addHandler(handler)
    try:
        with hvreplica.Server(served.store, listen="127.0.0.1:0", tls=tls, verify_every_s=3600):
            assert told.wait(60)
    finally:
        logging.getLogger("hvreplica.verify").removeHandler(handler)
    assert "DAMAGED" in caplog.text
    assert str(path) in caplog.text
    assert [point.state for point in hvreplica.point_list(served.store, VM)] == ["damaged"]


def test_a_rate_is_kept() -> None:
    clock = FakeClock(seed=1)

    def wait(seconds: float) -> bool:
        clock.advance(seconds)
        return False

    pace = Pace(clock, wait, rate_bytes_s=1 << 20)
    before_s = clock.monotonic_s()
    for _ in range(20):
        pace.spend(1 << 19)
    assert clock.monotonic_s() - before_s == pytest.approx(10, abs=0.5)
    clock.advance(1000)  # what was not read then is not made up for
    before_s = clock.monotonic_s()
    for _ in range(20):
        pace.spend(1 << 19)
    assert clock.monotonic_s() - before_s == pytest.approx(10, abs=0.5)


def test_a_stop_is_obeyed() -> None:
    pace = Pace(FakeClock(seed=1), lambda _: True)
    with pytest.raises(Stopped):
        pace.spend(1)


def test_nothing_is_read_while_a_point_is_applied() -> None:
    clock = FakeClock(seed=1)
    busy = [True, True, True, False]
    waits: list[float] = []
    pace = Pace(clock, lambda seconds: bool(waits.append(seconds)))
    pace.give_way = lambda: busy.pop(0)
    pace.spend(1)
    assert (busy, len(waits)) == ([], 4)
