"""The way back: an old primary becomes the replica of the side that was promoted, with what differs alone."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

import hvreplica
from hvreplica.cli.main import cli
from hvreplica.errors import (
    FailoverRefused,
    Fenced,
    HvReplicaError,
    InvalidTransition,
    Locked,
    StateError,
    StoreError,
    Unreachable,
)
from hvreplica.formats.messages import PointPolicy
from hvreplica.replication.capture_verb import Capture
from hvreplica.replication.state import NIL
from tests.replication.two_sites import MIB, VM, TwoSites
from tests.support.live_client import SocketGuest

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def sites(tmp_path: Path, tls: Path, rng: random.Random) -> Iterator[TwoSites]:
    scene = TwoSites(tmp_path, tls, rng)
    with contextlib.closing(scene.closing):
        yield scene


def forked(sites: TwoSites, *, written_at_a: int = 30, written_at_b: int = 30) -> list[bytearray]:
    """Replicate, let A write on alone, promote B, let it write; return what A's disks hold."""
    sites.write(200)
    sites.replicate(sites.b)
    sites.write(50)
    sites.replicate(sites.b)
    at_a = [bytearray(model) for model in sites.models]
    if written_at_a:
        sites.write(written_at_a, models=at_a)
    sites.fail_over(sites.b)
    if written_at_b:
        sites.write(written_at_b)
    return at_a


def test_old_primary_takes_what_either_side_wrote_and_keeps_its_own_as_a_point(sites: TwoSites) -> None:
    old_state = sites.state
    at_a = forked(sites)

    report = hvreplica.store_adopt(sites.a, VM, state=old_state)

    assert report.known
    assert 0 < report.changed_bytes <= 30 * 2 * 4096
    assert sites.replica_equals(sites.a, at_a), "nothing that was written at the old site is lost"
    result = hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))
    assert result.compared == []
    assert result.union_bytes is not None
    assert 0 < result.union_bytes <= 2 * 30 * 2 * 4096
    assert result.changed_bytes == result.union_bytes
    assert sites.replica_equals(sites.a)

    sites.write(20)
    delta = sites.replicate(sites.a)
    assert delta.kind == "delta"
    assert delta.disks[0].changed_bytes <= 20 * 2 * 4096
    assert sites.replica_equals(sites.a)


def test_fork_that_nobody_wrote_to_ships_nothing(sites: TwoSites) -> None:
    old_state = sites.state
    forked(sites, written_at_a=0, written_at_b=0)
    point = hvreplica.point_list(sites.b, VM)[-1].id
    status = hvreplica.failover_status(sites.b, VM)
    assert (status.point, status.point_type) == (point, "regular")
    assert hvreplica.store_status(sites.b).vms[0].phase == "failed over"

    report = hvreplica.store_adopt(sites.a, VM, state=old_state)
    result = hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))

    assert (report.changed_bytes, report.point) == (0, point), "the disks are that very point"
    assert (result.kind, result.union_bytes, result.changed_bytes, result.point) == ("none", 0, 0, point)
    assert sites.replica_equals(sites.a)
    status = hvreplica.failover_status(sites.b, VM)
    assert (status.point, status.point_type, status.possible) == (None, None, ["store adopt"])
    assert hvreplica.store_status(sites.b).vms[0].phase == "primary"
    assert hvreplica.store_status(sites.a).vms[0].phase == "ready"


@pytest.mark.parametrize("given", [None, PointPolicy(recovery_points=3)])
def test_reversal_passes_on_what_is_kept_of_points(sites: TwoSites, given: PointPolicy | None) -> None:
    old_state = sites.state
    forked(sites, written_at_a=0, written_at_b=0)
    rule: dict[str, Any] = {"keep": "last 30, daily 7", "points_budget": "15%", "keep_logs": 60}
    wanted = hvreplica.store_policy(sites.b, VM, **rule).policy
    if given is not None:
        wanted = hvreplica.store_policy(sites.b, VM, recovery_points=3).policy
        hvreplica.store_policy(sites.b, VM, **rule)
    hvreplica.store_adopt(sites.a, VM, state=old_state)
    hvreplica.store_policy(sites.a, VM, recovery_points=1, points_budget="1G")
    hvreplica.failover_reverse(sites.b, VM, points=given, **sites.link(sites.a))
    assert hvreplica.store_policy(sites.a, VM).policy == wanted
    hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))
    assert hvreplica.store_policy(sites.a, VM).policy == wanted


@pytest.mark.parametrize("side", ["a", "b"])
def test_fork_that_one_side_wrote_to_ships_that(sites: TwoSites, side: str) -> None:
    old_state = sites.state
    forked(sites, written_at_a=20 * (side == "a"), written_at_b=20 * (side == "b"))

    hvreplica.store_adopt(sites.a, VM, state=old_state)
    result = hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))

    assert result.union_bytes is not None
    assert 0 < result.union_bytes <= 20 * 2 * 4096
    assert sites.replica_equals(sites.a)


def test_block_that_the_old_primary_wrote_back_is_taken_from_the_cut_that_was_on_its_way(
    sites: TwoSites,
) -> None:
    old_state = sites.state
    sites.write(200)
    sites.replicate(sites.b)
    before = bytes(sites.models[0])
    sites.write(50)
    # The replica has the cut, and the primary never learns of it.
    saved = sites.folder / "saved"
    hvreplica.cut(sites.state)
    shutil.copytree(sites.state, saved)
    sites.replicate(sites.b)
    shutil.rmtree(sites.state)
    saved.rename(sites.state)
    put_back(sites, before)
    sites.fail_over(sites.b)

    report = hvreplica.store_adopt(sites.a, VM, state=old_state)
    hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))

    assert report.changed_bytes > 0
    assert sites.replica_equals(sites.a)


def put_back(sites: TwoSites, content: bytes) -> None:
    """Write to the disk all that it held, without telling the model."""
    from hvreplica.clock import SYSTEM  # noqa: PLC0415 - of this helper alone
    from hvreplica.disk import open_disk  # noqa: PLC0415
    from hvreplica.files import OS_FILES  # noqa: PLC0415

    with contextlib.closing(open_disk(OS_FILES, sites.disks[0], writable=True, clock=SYSTEM)) as disk:
        disk.write(content, 0)
        disk.flush()


def test_whole_life_of_two_sites_with_two_disks(tmp_path: Path, tls: Path, rng: random.Random) -> None:
    sites = TwoSites(tmp_path, tls, rng, sizes=(16 * MIB, 6 * MIB))
    with contextlib.closing(sites.closing):
        old_state = sites.state
        forked(sites)
        hvreplica.store_adopt(sites.a, VM, state=old_state)
        hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))
        for here, there in ((sites.b, sites.a), (sites.a, sites.b), (sites.b, sites.a)):
            sites.write(20)
            prepared = sites.replicate(there, prepare=True)
            assert sites.replica_equals(there)
            state = sites.state
            found = hvreplica.failover_planned(there, VM)
            assert (found.point, found.point_type) == (prepared.point, "planned")
            sites.run_at(there)
            for path, model in zip(sites.disks, sites.models, strict=True):
                assert sites.content(path) == model, "a planned failover loses nothing"
            sites.write(20)
            report = hvreplica.store_adopt(here, VM, state=state)
            assert report.changed_bytes == 0
            result = hvreplica.failover_reverse(there, VM, **sites.link(here))
            assert result.union_bytes is not None
            assert 0 < result.union_bytes <= 2 * 20 * 2 * 4096
            assert sites.replica_equals(here)
            sites.write(10)
            sites.replicate(here)
            assert sites.replica_equals(here)


def test_planned_failover_needs_a_prepared_primary(sites: TwoSites) -> None:
    sites.write(50)
    sites.replicate(sites.b)
    with pytest.raises(InvalidTransition, match="planned") as caught:
        hvreplica.failover_planned(sites.b, VM)
    assert "hvreplica replicate --prepare-failover" in (caught.value.hint or "")
    sites.replicate(sites.b, prepare=True)
    hvreplica.cancel_prepare(sites.state, **sites.link(sites.b))
    with pytest.raises(InvalidTransition, match="planned"):
        hvreplica.failover_planned(sites.b, VM)


def test_prepared_primary_cannot_be_taken_back_once_its_replica_was_promoted(sites: TwoSites) -> None:
    sites.write(50)
    sites.replicate(sites.b, prepare=True)
    hvreplica.failover_planned(sites.b, VM)
    with pytest.raises(Fenced, match="failed over"):
        hvreplica.cancel_prepare(sites.state, **sites.link(sites.b))
    assert hvreplica.status(sites.state).replication_state == "PreparedForFailover"


def test_prepared_primary_cannot_be_taken_back_where_its_replica_had_failed_over_unplanned(
    sites: TwoSites,
) -> None:
    sites.write(50)
    sites.replicate(sites.b)
    hvreplica.failover_unplanned(sites.b, VM)
    with pytest.raises(Fenced, match="failed over"):
        sites.replicate(sites.b, prepare=True)
    with pytest.raises(Fenced, match="failed over"):
        hvreplica.cancel_prepare(sites.state, **sites.link(sites.b))
    with pytest.raises(StateError, match="where the replica is"):
        hvreplica.cancel_prepare(sites.state)
    assert hvreplica.status(sites.state).replication_state == "PreparedForFailover"
    hvreplica.failover_cancel(sites.b, VM)
    hvreplica.cancel_prepare(sites.state, **sites.link(sites.b))
    sites.write(10)
    sites.replicate(sites.b)
    assert sites.replica_equals(sites.b)


def test_primary_that_was_prepared_alone_asks_a_replica_that_it_can_reach(sites: TwoSites) -> None:
    sites.write(50)
    sites.replicate(sites.b)
    link = sites.link(sites.b)
    sites.serve(sites.b).close()
    with pytest.raises(Unreachable):
        hvreplica.replicate(VM, sites.disks, state=sites.state, prepare=True, **link)
    hvreplica.failover_unplanned(sites.b, VM)
    sites.serve(sites.b).start()
    with pytest.raises(Fenced, match="failed over"):
        hvreplica.cancel_prepare(sites.state, **sites.link(sites.b))
    sites.serve(sites.b).close()
    found = hvreplica.cancel_prepare(sites.state, **link)
    assert found.replication_state == "Replicating", "told of nothing, and out of reach"


def test_old_primary_that_wakes_up_is_fenced_whatever_it_tries(sites: TwoSites) -> None:
    old_state, old_disks = sites.state, sites.disks
    forked(sites)
    copies = sites.folder / "copy"  # of state folder and disks, as a backup would bring them back
    copies.mkdir()
    shutil.copytree(old_state, copies / "state")
    disk = shutil.copy(old_disks[0], copies / "disk.vhdx")

    def wake(**options: object) -> None:
        state = json.loads((copies / "state/state.json").read_text())
        with pytest.raises(Fenced) as caught:
            hvreplica.replicate(VM, [disk], state=copies / "state", **sites.link(sites.b), **options)
        assert caught.value.hint
        after = json.loads((copies / "state/state.json").read_text())
        assert after["generation"] == state["generation"] or options, "refused claims are not counted"

    wake()
    hvreplica.store_adopt(sites.a, VM, state=old_state)
    wake()
    hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))
    wake()
    wake(takeover=True)
    with pytest.raises(InvalidTransition, match="is a replica since"):
        hvreplica.replicate(VM, old_disks, state=old_state, **sites.link(sites.b))
    with pytest.raises(InvalidTransition, match="is a replica since"):
        Capture(VM, [], state=old_state, socket=sites.folder / "nbd.sock")
    assert not old_disks[0].exists()
    assert "became a replica" in old_disks[0].with_name(old_disks[0].name + ".moved.txt").read_text()
    sites.write(10)
    sites.replicate(sites.a)
    assert sites.replica_equals(sites.a)


def test_lost_state_folder_has_everything_compared(sites: TwoSites) -> None:
    old_state, old_disks = sites.state, sites.disks
    at_a = forked(sites)
    shutil.rmtree(old_state)

    report = hvreplica.store_adopt(sites.a, VM, disks=old_disks, unknown=True)
    again = hvreplica.store_adopt(sites.a, VM, disks=old_disks, unknown=True)

    assert (report.known, again) == (False, report)
    assert sites.replica_equals(sites.a, at_a)
    result = hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))
    assert result.compared == [0]
    assert 0 < result.changed_bytes <= 2 * 30 * 2 * 4096
    assert sites.replica_equals(sites.a)


def test_damaged_tables_of_the_old_primary_cost_a_comparison_and_nothing_else(sites: TwoSites) -> None:
    old_state = sites.state
    forked(sites)
    (old_state / "fingerprints/0.fp").unlink()

    hvreplica.store_adopt(sites.a, VM, state=old_state)
    result = hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))

    assert result.compared == [0]
    assert sites.replica_equals(sites.a)


def test_raw_disk_becomes_a_vhdx_and_keeps_its_content_aside(
    tmp_path: Path, tls: Path, rng: random.Random
) -> None:
    sites = TwoSites(tmp_path, tls, rng, sizes=(6 * MIB,))
    with contextlib.closing(sites.closing):
        sites.disks = [tmp_path / "disk.raw"]
        hvreplica.disk_create(sites.disks[0], 6 * MIB, format="raw")
        old_state, raw = sites.state, sites.disks[0]
        at_a = forked(sites)

        hvreplica.store_adopt(sites.a, VM, state=old_state)

        assert sites.replica_equals(sites.a, at_a)
        assert not raw.exists()
        assert raw.with_name("disk.raw.old").read_bytes() == at_a[0]
        hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))
        assert sites.replica_equals(sites.a)


def test_wrong_folders_and_stores_are_refused_and_change_nothing(sites: TwoSites) -> None:
    old_state, old_disks = sites.state, sites.disks
    forked(sites)
    before = (old_state / "state.json").read_bytes()
    with pytest.raises(StateError, match="another VM"):
        hvreplica.store_adopt(sites.a, "other", state=old_state)
    with pytest.raises(StateError, match="holds no state"):
        hvreplica.store_adopt(sites.a, VM, state=sites.folder)
    with pytest.raises(FailoverRefused, match="no replica here"):
        hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))
    assert (old_state / "state.json").read_bytes() == before
    assert old_disks[0].exists()

    hvreplica.store_adopt(sites.a, VM, state=old_state)
    with pytest.raises(StateError, match="another store"):
        hvreplica.store_adopt(sites.folder / "c", VM, state=old_state)
    other = sites.folder / "other-state"
    shutil.copytree(old_state, other)
    text = json.loads((other / "state.json").read_text())
    text["relationship_id"] = str(NIL)
    (other / "state.json").write_text(json.dumps(text))
    with pytest.raises(StateError, match="another life"):
        hvreplica.failover_reverse(sites.b, VM, state=other, **sites.link(sites.a))
    hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))
    assert sites.replica_equals(sites.a)


def test_store_that_refuses_an_old_primary_does_not_bind_its_folder(sites: TwoSites) -> None:
    old_state = sites.state
    forked(sites, written_at_b=0)
    before = (old_state / "state.json").read_bytes()
    with pytest.raises(InvalidTransition, match="has a replica of VM"):
        hvreplica.store_adopt(sites.b, VM, state=old_state)
    assert (old_state / "state.json").read_bytes() == before

    hvreplica.store_adopt(sites.a, VM, state=old_state)
    hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))
    sites.write(10)
    sites.replicate(sites.a)
    sites.replicate(sites.a, prepare=True)
    hvreplica.failover_planned(sites.a, VM)
    state, moved = sites.state, sites.disks[0].with_name("elsewhere.vhdx")
    sites.disks[0].rename(moved)
    text = json.loads((state / "state.json").read_text())
    text["disks"][0]["path"] = str(moved)
    (state / "state.json").write_text(json.dumps(text))
    before = (state / "state.json").read_bytes()
    with pytest.raises(StoreError, match="not the one that its failover made"):
        hvreplica.store_adopt(sites.b, VM, state=state)
    assert (state / "state.json").read_bytes() == before


def test_reversal_tells_which_points_of_the_old_site_go(sites: TwoSites) -> None:
    sites.write(20)
    first = sites.replicate(sites.b, points=PointPolicy(recovery_points=24, recovery_point_every_s=0)).point
    old_state = sites.state
    sites.fail_over(sites.b)
    hvreplica.store_adopt(sites.a, VM, state=old_state)
    hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))
    sites.replicate(sites.a, prepare=True)
    hvreplica.failover_planned(sites.a, VM)
    hvreplica.store_adopt(sites.b, VM, state=sites.state)
    sites.run_at(sites.a)
    sites.write(20)
    assert first in {point.id for point in hvreplica.point_list(sites.b, VM)}
    link = sites.link(sites.b)
    options = ["--store", str(sites.a), "--vm", VM, "--to", link["to"], "--tls", str(link["tls"])]

    done = CliRunner().invoke(cli, ["failover", "reverse", *options, "--recovery-points", "0"])

    assert done.exit_code == 0, done.output
    assert first not in {point.id for point in hvreplica.point_list(sites.b, VM)}
    assert f"the replica let point {first} of " in done.stdout


def test_reversal_of_a_replica_that_another_primary_writes_is_refused(sites: TwoSites) -> None:
    old_state = sites.state
    forked(sites)
    hvreplica.store_adopt(sites.a, VM, state=old_state)
    other = sites.folder / "other.vhdx"
    hvreplica.disk_create(other, 8 * MIB, block_bytes=MIB)
    elsewhere = sites.folder / "elsewhere"
    hvreplica.replicate(VM, [other], state=sites.folder / "other", **sites.link(elsewhere))

    with pytest.raises(FailoverRefused, match="no replica here"):
        hvreplica.failover_reverse(sites.b, VM, **sites.link(elsewhere))

    hvreplica.replicate(VM, [other], state=sites.folder / "other", **sites.link(elsewhere))
    hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))
    assert sites.replica_equals(sites.a)


def test_capture_serves_the_active_disks_with_the_folder_of_the_reversal(sites: TwoSites) -> None:
    old_state = sites.state
    forked(sites)
    hvreplica.store_adopt(sites.a, VM, state=old_state)
    hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))
    socket = sites.folder / "nbd.sock"
    with Capture(VM, [], state=sites.state, socket=socket) as capture:
        thread = threading.Thread(target=capture.serve_forever)
        thread.start()
        try:
            with SocketGuest(socket, "0") as guest:
                for _ in range(20):
                    at = sites.rng.randrange(sites.sizes[0] // 4096) * 4096
                    data = sites.rng.randbytes(4096)
                    guest.write(at, data)
                    sites.models[0][at : at + 4096] = data
                guest.flush()
            result = hvreplica.replicate(VM, state=sites.state, **sites.link(sites.a))
            assert result.disks[0].changed_bytes <= 20 * 4096
            with SocketGuest(socket, "0") as guest:
                guest.write(0, bytes(sites.models[0][:4096]))
            hvreplica.replicate(VM, state=sites.state, app_consistent=True, **sites.link(sites.a))
            found = [point.consistency for point in hvreplica.point_list(sites.a, VM)]
            assert found[-2:] == ["crash", "app"]
            assert sites.replica_equals(sites.a)
            with pytest.raises((Locked, HvReplicaError)):
                hvreplica.store_adopt(sites.b, VM, state=sites.state)
        finally:
            capture.stop()
            thread.join()


def export(sites: TwoSites, store: Path, point: str) -> bytes:
    """Return what a recovery point's first disk holds."""
    output = sites.folder / "point.raw"
    hvreplica.point_export(store, VM, output, point=point, format="raw", overwrite=True)
    return output.read_bytes()


def test_points_of_both_stores_survive_failover_reversal_and_failback(sites: TwoSites) -> None:
    points = PointPolicy(recovery_points=24, recovery_point_every_s=0)
    old_state = sites.state
    kept: dict[tuple[Path, str], bytes] = {}

    def cycle(store: Path, **options: object) -> None:
        sites.write(15)
        result = sites.replicate(store, points=points, **options)
        kept[store, result.point] = bytes(sites.models[0])

    for _ in range(3):
        cycle(sites.b)
    at_a = [bytearray(model) for model in sites.models]
    sites.write(15, models=at_a)
    sites.fail_over(sites.b)
    report = hvreplica.store_adopt(sites.a, VM, state=old_state)
    kept[sites.a, report.point] = bytes(at_a[0])
    sites.write(15)
    result = hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))
    kept[sites.a, result.point] = bytes(sites.models[0])
    for _ in range(2):
        cycle(sites.a)
    cycle(sites.a, prepare=True)
    state = sites.state
    hvreplica.failover_planned(sites.a, VM)
    sites.run_at(sites.a)
    report = hvreplica.store_adopt(sites.b, VM, state=state)
    kept[sites.b, report.point] = bytes(sites.models[0])
    sites.write(15)
    result = hvreplica.failover_reverse(sites.a, VM, **sites.link(sites.b))
    kept[sites.b, result.point] = bytes(sites.models[0])
    cycle(sites.b)

    for (store, point), content in kept.items():
        assert export(sites, store, point) == content, f"{point} in {store}"


def test_state_folder_from_a_backup_still_leads_back(sites: TwoSites) -> None:
    """The folder is two cycles older than the disks: what the replica took since is in its undo parts."""
    points = PointPolicy(recovery_points=24, recovery_point_every_s=0)
    old_state, saved = sites.state, sites.folder / "saved"
    sites.write(200)
    sites.replicate(sites.b, points=points)
    shutil.copytree(old_state, saved)
    before = bytes(sites.models[0])
    for _ in range(2):
        sites.write(20)
        sites.replicate(sites.b, points=points)
    put_back(sites, before)  # so that the folder sees nothing changed: the other side alone can tell
    sites.fail_over(sites.b)
    sites.write(10)
    shutil.rmtree(old_state)
    saved.rename(old_state)

    report = hvreplica.store_adopt(sites.a, VM, state=old_state)
    result = hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))

    assert report.changed_bytes == 0
    assert result.compared == []
    assert result.union_bytes is not None
    assert 0 < result.union_bytes <= 50 * 2 * 4096
    assert sites.replica_equals(sites.a)


def test_fork_that_no_part_leads_over_is_compared(sites: TwoSites) -> None:
    points = PointPolicy(recovery_points=0)
    old_state, saved = sites.state, sites.folder / "saved"
    sites.write(200)
    sites.replicate(sites.b, points=points)
    shutil.copytree(old_state, saved)
    before = bytes(sites.models[0])
    sites.write(20)
    sites.replicate(sites.b, points=points)
    put_back(sites, before)
    sites.fail_over(sites.b)
    shutil.rmtree(old_state)
    saved.rename(old_state)

    hvreplica.store_adopt(sites.a, VM, state=old_state)
    result = hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))

    assert result.compared == [0]
    assert 0 < result.changed_bytes <= 20 * 2 * 4096
    assert sites.replica_equals(sites.a)


@pytest.mark.parametrize("committed", [False, True], ids=["at once", "after commit"])
def test_reversal_after_a_failover_to_an_older_point_ships_what_was_undone(
    sites: TwoSites, *, committed: bool
) -> None:
    points = PointPolicy(recovery_points=24, recovery_point_every_s=0)
    old_state = sites.state
    sites.write(100)
    older = sites.replicate(sites.b, points=points).point
    content = bytes(sites.models[0])
    for _ in range(2):
        sites.write(20)
        sites.replicate(sites.b, points=points)
    at_a = [bytearray(model) for model in sites.models]
    sites.fail_over(sites.b, point=older)
    sites.models = [bytearray(content)]
    if committed:
        hvreplica.failover_commit(sites.b, VM)
    sites.write(10)

    report = hvreplica.store_adopt(sites.a, VM, state=old_state)
    result = hvreplica.failover_reverse(sites.b, VM, **sites.link(sites.a))

    assert report.changed_bytes == 0
    assert result.compared == []
    assert result.union_bytes is not None
    assert 0 < result.union_bytes <= 50 * 2 * 4096
    assert sites.replica_equals(sites.a)
    assert export(sites, sites.a, report.point) == at_a[0], "what was left behind is a point at the old site"
