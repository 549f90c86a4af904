"""A transfer that goes on: from where the replica confirmed, no further than the disk is what was sent."""

from __future__ import annotations

import contextlib
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.errors import Fenced, FieldOutOfRange, ReplicaDiverged, TrackingLost, Unreachable
from hvreplica.files import OS_FILES
from hvreplica.formats import messages
from hvreplica.replication import cycle, initial, primary, ship, sources, work
from tests.replication.sites import DISK, MIB, STATE, VM, Guest, Served
from tests.support.crash import worlds_after
from tests.support.faultfile import Killed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a checkpoint after every tick, and leave retries to the next call."""
    monkeypatch.setattr(ship, "_CHECKPOINT_BYTES", 1)
    monkeypatch.setattr(ship, "_TICK_S", 0.0)
    monkeypatch.setattr(primary, "RETRY_AFTER_S", ())


def kill_after(guest: Guest, served: Served, event_count: int) -> bool:
    """Replicate, killed after so many file events; return whether it was killed."""
    guest.files.kill_at(event_count)
    try:
        guest.replicate(served)
    except Killed:
        return True
    finally:
        guest.files.heal()
    return False


def checkpoint_each_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each window be sent after the one before was recorded as durable, so that kills strike the same place."""
    changed = threading.Condition()
    confirmed = {"watermark": 0, "ended": False}
    run, watch, checkpoint = ship.Shipment.run, ship.Shipment._watch, ship.Shipment._checkpoint
    load = sources.DiskSource.load

    def load_next(source: sources.DiskSource, window: sources.Window, buffer: object) -> sources.Loaded:
        with changed:
            changed.wait_for(lambda: confirmed["ended"] or confirmed["watermark"] >= window.sequence)
        return load(source, window, buffer)  # type: ignore[arg-type]

    def begun(shipment: ship.Shipment, *arguments: Any, **options: Any) -> bool:
        confirmed.update(watermark=0, ended=False)
        return run(shipment, *arguments, **options)

    def watched(shipment: ship.Shipment, *arguments: Any) -> None:
        try:
            watch(shipment, *arguments)
        finally:
            with changed:
                confirmed["ended"] = True
                changed.notify_all()

    def checkpointed(shipment: ship.Shipment, record: Callable[[], None]) -> None:
        session = shipment._session
        watermark = session.ask(messages.Checkpoint(), messages.Durable).watermark
        if watermark > confirmed["watermark"]:
            checkpoint(shipment, record)
            with changed:
                confirmed["watermark"] = watermark
                changed.notify_all()

    monkeypatch.setattr(ship, "_CHECKPOINT_BYTES", 0)
    monkeypatch.setattr(ship, "_TICK_S", 0.01)
    monkeypatch.setattr(ship.Shipment, "run", begun)
    monkeypatch.setattr(ship.Shipment, "_watch", watched)
    monkeypatch.setattr(ship.Shipment, "_checkpoint", checkpointed)
    monkeypatch.setattr(sources.DiskSource, "load", load_next)


def test_resume_after_a_change_below_the_position_sends_it(
    served: Served, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions: list[tuple[int, int]] = []
    real = sources.unchanged_until

    def spy(disk: object, table: object, position: int) -> int:
        unchanged = real(disk, table, position)  # type: ignore[arg-type]
        positions.append((position, unchanged))
        return unchanged

    monkeypatch.setattr(initial, "unchanged_until", spy)
    checkpoint_each_window(monkeypatch)
    for event_count in range(14, 120, 9):
        guest = Guest(seed + event_count, vm=f"web{event_count}", disk_bytes=64 * MIB)
        guest.write(24 * MIB, piece_bytes=MIB)
        if not kill_after(guest, served, event_count):
            continue
        guest.files = guest.files.after_kill()
        guest.write(6 * 4096)
        if event_count % 2:
            guest.zero(3 * MIB, 5 * MIB)
        assert guest.replicate(served).kind in ("initial", "delta", "none")
        assert served.content(guest.vm) == guest.model, (event_count, positions)
        guest.write(6 * 4096)
        guest.replicate(served)
        assert served.content(guest.vm) == guest.model, (event_count, positions)
    assert any(position > 0 for position, _ in positions), "no transfer was cut behind its first checkpoint"
    assert any(unchanged < position for position, unchanged in positions), "no change fell below a position"


def test_power_lost_after_the_commit_finds_later_zeros(
    guest: Guest, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the replica committed must be in the fingerprints, or what becomes zero later looks unchanged."""
    with monkeypatch.context() as patch:
        patch.setattr(initial, "settle_initial", dead)
        with pytest.raises(Killed):
            guest.replicate(served)
    guest.files = worlds_after(guest.files.trace(), subsets=1)[0]  # nothing that was not synced came back
    guest.zero(0, len(guest.model))
    guest.replicate(served)
    assert served.content() == guest.model, guest.files.story


def test_disk_that_is_slow_for_long_does_not_break_the_transfer(
    guest: Guest, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.server._listener._idle_timeout_s = 0.5
    real = sources.DiskSource.load

    def load(source: sources.DiskSource, window: sources.Window, buffer: object) -> sources.Loaded:
        if window.sequence == 2:
            threading.Event().wait(1.5)  # longer than the silence that the replica allows
        return real(source, window, buffer)  # type: ignore[arg-type]

    monkeypatch.setattr(sources.DiskSource, "load", load)
    monkeypatch.setattr(ship, "_TICK_S", 0.2)
    guest.replicate(served)
    assert served.content() == guest.model


@pytest.mark.parametrize("damage", ["missing", "written"])
def test_damaged_replica_is_told_and_mended_by_resync(guest: Guest, served: Served, damage: str) -> None:
    guest.replicate(served)
    path = served.store / VM / "disks" / "0.vhdx"
    if damage == "missing":
        path.unlink()
    else:
        with contextlib.closing(open_disk(OS_FILES, path, writable=True, clock=SYSTEM)) as disk:
            disk.write(b"x" * 4096, 0)
            disk.flush()
    with pytest.raises(ReplicaDiverged, match="damaged"):
        guest.replicate(served)
    assert guest.replicate(served, resync=True).kind == "initial"
    assert served.content() == guest.model
    guest.write(4096)
    assert guest.replicate(served).kind == "delta"
    assert served.content() == guest.model


def test_lost_table_in_the_initial_transfer_is_mended_by_resync(guest: Guest, served: Served) -> None:
    assert kill_after(guest, served, 30)
    guest.files = guest.files.after_kill()
    guest.files.unlink(STATE / "fingerprints" / "0.fp")
    with pytest.raises(TrackingLost):
        guest.replicate(served)
    assert guest.replicate(served, resync=True).kind == "initial"
    assert served.content() == guest.model


@pytest.mark.parametrize("sector_bytes", [512, 4096])
def test_several_disks_with_short_last_blocks_stay_equal(
    tmp_path: Path, served: Served, seed: int, sector_bytes: int
) -> None:
    rng = random.Random(seed)
    paths, models = [], []
    for index, size in enumerate((5 * MIB + 3 * sector_bytes, 9 * MIB, 4 * MIB + sector_bytes)):
        paths.append(tmp_path / f"{index}.vhdx")
        hvreplica.disk_create(paths[-1], size, block_bytes=MIB, logical_sector_bytes=sector_bytes)
        models.append(bytearray(size))

    def write(index: int, offset: int, data: bytes) -> None:
        with contextlib.closing(open_disk(OS_FILES, paths[index], writable=True, clock=SYSTEM)) as disk:
            disk.write(data, offset)
            disk.flush()
        models[index][offset : offset + len(data)] = data

    def replicate(**options: bool) -> hvreplica.ReplicateResult:
        result = hvreplica.replicate(
            "many", paths, to=served.address, tls=served.tls, state=tmp_path / "state", **options
        )
        for index, model in enumerate(models):
            assert served.content("many", index) == model, index
        return result

    for index, model in enumerate(models):
        for _ in range(20):
            write(
                index, rng.randrange(len(model) // sector_bytes) * sector_bytes, rng.randbytes(sector_bytes)
            )
        write(index, len(model) - sector_bytes, rng.randbytes(sector_bytes))
    assert replicate().kind == "initial"
    write(1, 0, rng.randbytes(sector_bytes))
    result = replicate()
    assert (result.kind, len(result.logs)) == ("delta", 1)
    write(2, len(models[2]) - sector_bytes, bytes(sector_bytes))
    write(0, len(models[0]) - sector_bytes, rng.randbytes(sector_bytes))
    assert len(replicate().logs) == 2
    assert replicate().kind == "none"
    assert replicate(resync=True).kind == "none"
    write(0, 0, rng.randbytes(sector_bytes))
    assert replicate(resync=True).kind == "delta"


@pytest.mark.parametrize("length", [0, 1_000_001])
def test_raw_disk_without_whole_sectors_is_refused_and_can_be_mended(
    tmp_path: Path, served: Served, length: int
) -> None:
    disk = tmp_path / "odd.raw"
    disk.write_bytes(b"x" * length)
    options = {"to": served.address, "tls": served.tls, "state": tmp_path / "state"}
    with pytest.raises(FieldOutOfRange, match=r"odd\.raw"):
        hvreplica.replicate("odd", [disk], **options)
    disk.write_bytes(b"x" * 1_000_448)
    assert hvreplica.replicate("odd", [disk], **options).kind == "initial"
    assert served.content("odd") == disk.read_bytes()


def test_failed_first_call_does_not_bind_the_state_folder(guest: Guest, served: Served) -> None:
    served.close()
    with pytest.raises(Unreachable):
        guest.replicate(served)
    served.start()
    result = hvreplica.replicate(
        "another", [DISK], to=served.address, tls=served.tls, state=STATE, files=guest.files
    )
    assert result.kind == "initial"
    assert served.content("another") == guest.model


def test_resync_that_died_early_does_not_make_an_empty_table_believed(
    guest: Guest, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut log waits, a resync dies while it empties the tables, the guest zeroes what the log does not hold."""
    guest.replicate(served)
    guest.write(8 * 4096)
    with monkeypatch.context() as patch:
        patch.setattr(cycle, "ship", dead)
        with pytest.raises(Killed):
            guest.replicate(served)
    for name in ("save", "create_tables", "close_tables"):
        with monkeypatch.context() as patch:
            patch.setattr(work.Work, name, dead)
            with pytest.raises(Killed):
                guest.replicate(served, resync=True)
        guest.files = guest.files.after_kill()
        guest.zero(guest.rng.randrange(16) * MIB, MIB)
        with contextlib.suppress(TrackingLost):
            guest.replicate(served)
            assert served.content() == guest.model, name
        guest.write(4096)
    guest.replicate(served, resync=True)
    assert served.content() == guest.model


def test_primary_rolled_back_in_its_initial_transfer_is_fenced(served: Served, seed: int) -> None:
    """Disk and state folder go back to a backup; meanwhile the replica took newer windows of the same transfer."""
    fenced = 0
    for event_count in range(20, 100, 8):
        guest = Guest(seed, vm=f"web{event_count}", disk_bytes=64 * MIB)
        guest.write(24 * MIB, piece_bytes=MIB)
        if not kill_after(guest, served, event_count):
            continue
        backup, model = guest.files.after_kill(), bytes(guest.model)
        guest.files = guest.files.after_kill()
        guest.write(40 * 4096)
        kill_after(guest, served, event_count // 2)
        guest.files, guest.model = backup, bytearray(model)
        try:
            guest.replicate(served)
        except Fenced:  # unless the second call died before it had claimed
            fenced += 1
            guest.replicate(served, takeover=True)
        assert served.content(guest.vm) == guest.model, event_count
    assert fenced > 2


def dead(*_: object, **__: object) -> None:
    """Die here."""
    raise Killed
