"""Recovery points over the wire: what the primary asks to keep, and what each older point then shows."""

from __future__ import annotations

import json
import sqlite3
import uuid
from typing import TYPE_CHECKING

import pytest

import hvreplica
from hvreplica import PointPolicy
from hvreplica.clock import SYSTEM
from hvreplica.errors import UnsupportedVersion
from hvreplica.files import OS_FILES
from hvreplica.replication import serve
from tests.replication.sites import STATE, VM, Guest, Served
from tests.support.points import read_point

if TYPE_CHECKING:
    from pathlib import Path


def points(served: Served) -> list[str]:
    return [point.id for point in hvreplica.point_list(served.store, VM)]


def shown(served: Served, point_id: str) -> bytes:
    return read_point(OS_FILES, served.store, point_id, SYSTEM)[0]


def policy_of(store: Path) -> dict[str, object] | None:
    with sqlite3.connect(f"file:{store}/catalog.db?mode=ro", uri=True) as catalog:
        text = catalog.execute("SELECT policy FROM vm").fetchone()[0]
    catalog.close()
    return None if text is None else dict(json.loads(text))


def test_every_cycle_is_a_point_where_that_is_wanted(guest: Guest, served: Served) -> None:
    images = {}
    for _ in range(4):
        result = guest.replicate(served, points=PointPolicy(recovery_point_every_s=0))
        images[result.point] = bytes(guest.model)
        guest.write(20 * 4096)
    assert points(served) == list(images)
    for point_id, image in images.items():
        assert shown(served, point_id) == image
    guest.replicate(served, points=PointPolicy(recovery_points=0))
    guest.write(20 * 4096)
    last = guest.replicate(served)
    assert points(served) == [last.point], "no older one was wanted any more"


def test_point_of_an_hour_stays_without_a_word(guest: Guest, served: Served) -> None:
    images = {}
    for _ in range(3):
        images[guest.replicate(served).point] = bytes(guest.model)
        guest.write(20 * 4096)
    assert policy_of(served.store) is None
    listed = points(served)
    assert listed[-1] == list(images)[-1]
    assert len(listed) <= 2, "an hour may have begun between two of the calls"
    for point_id in listed:
        assert shown(served, point_id) == images[point_id]


def test_what_a_primary_leaves_out_stays_as_it_was_said(guest: Guest, served: Served) -> None:
    guest.replicate(served, points=PointPolicy(recovery_points=3, recovery_point_every_s=0))
    guest.replicate(served)
    guest.replicate(served, points=PointPolicy(recovery_points=5, app_consistent=True))
    assert policy_of(served.store) == {
        "recovery_points": 5,
        "recovery_point_every_s": 0.0,
        "app_consistent": True,
    }


def test_resync_keeps_older_points(guest: Guest, served: Served) -> None:
    kept = PointPolicy(recovery_point_every_s=0)
    first = guest.replicate(served, points=kept)
    image = bytes(guest.model)
    guest.write(20 * 4096)
    second = guest.replicate(served, resync=True)
    assert points(served) == [first.point, second.point]
    assert shown(served, first.point) == image
    assert shown(served, second.point) == bytes(guest.model)


def test_older_replica_takes_cycles_and_no_policy(
    guest: Guest, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.messages, "REVISION", 2)
    assert guest.replicate(served).kind == "initial"
    with pytest.raises(UnsupportedVersion, match="too old for recovery points"):
        guest.replicate(served, points=PointPolicy(recovery_points=3))


def test_cut_says_whether_the_guest_was_at_rest(guest: Guest, served: Served) -> None:
    guest.replicate(served, points=PointPolicy(recovery_point_every_s=3600))
    listed = {}
    for app_consistent in (True, False):
        guest.write(4096)
        cut = hvreplica.cut(STATE, app_consistent=app_consistent, files=guest.files)
        guest.replicate(served)
        listed[cut.point] = "app" if app_consistent else "crash"
    found = {point.id: point.consistency for point in hvreplica.point_list(served.store, VM)}
    assert listed.items() <= found.items(), "an app-consistent point stays although its hour has one"


def test_cycle_says_whether_the_guest_was_at_rest(guest: Guest, served: Served) -> None:
    guest.replicate(served, points=PointPolicy(recovery_point_every_s=0), app_consistent=True)
    for app_consistent in (True, False):
        guest.write(4096)
        guest.replicate(served, app_consistent=app_consistent)
    found = [point.consistency for point in hvreplica.point_list(served.store, VM)]
    assert found == ["crash", "app", "crash"], "a first copy is not called so"


def test_points_have_ids_of_their_own(guest: Guest, served: Served) -> None:
    assert uuid.UUID(guest.replicate(served).point).version == 4
