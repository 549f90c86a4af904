"""--replica: one text with all settings of a further replica."""

from __future__ import annotations

from typing import Any

import click
import pytest

from hvreplica.cli.replica_option import ReplicaType
from hvreplica.formats.messages import PointPolicy
from hvreplica.replication.replicas import Replica


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("far=h:8084", {}),
        ("far=h:8084,interval=900,tls=keys", {"interval_s": 900, "tls": "keys"}),
        ("far=h:8084,continuous", {"continuous": True}),
        (
            "far=h:8084,recovery-points=4,recovery-point-every=60,keep-logs=2h",
            {"points": PointPolicy(recovery_points=4, recovery_point_every_s=60, keep_logs_s=7200)},
        ),
    ],
)
def test_replica_is_read_with_its_settings(text: str, fields: dict[str, Any]) -> None:
    assert ReplicaType().convert(text, None, None) == Replica("far", "h:8084", **fields)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h:8084", "NAME=HOST:PORT"),
        ("../far=h:8084", "letters, digits"),
        ("far=h", "h"),
        ("far=h:1,interval=0", "0"),
        ("far=h:1,interval", "no setting"),
        ("far=h:1,keep=last 3", "no setting"),
        ("far=h:1,recovery-points=25", "from 0 to 24"),
        ("far=h:1,recovery-points=x", "number"),
        ("far=h:1,points-budget=x", "budget"),
        ("far=h:1,interval=5,continuous", "exclude"),
        ("far=h:1,tls=", "no setting"),
    ],
)
def test_replica_that_does_not_fit_is_refused(text: str, words: str) -> None:
    with pytest.raises(click.BadParameter, match=words):
        ReplicaType().convert(text, None, None)
