"""What a point may be called where a verb takes one: latest, latest-app, its id, or an instant."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from hvreplica.replication.retention_verbs import parse_instant
from hvreplica.store.at_instant import Instant, reach
from hvreplica.store.open_point import LATEST, LATEST_APP, point_id_of

if TYPE_CHECKING:
    from hvreplica.store.home import VmHome


def parse_point(text: str) -> uuid.UUID | str | Instant:
    """Return LATEST, LATEST_APP, or the id or instant that `text` says.

    Raises: FieldOutOfRange for what begins as an instant does and is none, NoSuchPoint for anything else.
    """
    if text in {LATEST, LATEST_APP}:
        return text
    try:
        return uuid.UUID(text)
    except ValueError:
        pass
    if ":" in text:
        return Instant(parse_instant(text))
    return point_id_of(text)


def point_to_open(home: VmHome, text: str) -> uuid.UUID | str:
    """Return what open_point() takes; for an instant a point is made that stays. Raises: as reach()."""
    which = parse_point(text)
    return reach(home, which).id if isinstance(which, Instant) else which
