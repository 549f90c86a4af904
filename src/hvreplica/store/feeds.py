"""What further sites have of this replica, so that the rule keeps what their next cycles need.

    feeds/<relationship id>.json    of one extended replication, replaced as a whole

The point that was shipped last tells what changed since. Without it the next cycle has to read whole disks,
and nothing worse, so a note is only a wish: the budget and a person may let the point go, a note that is
damaged is none, and one that was not renewed for as long as it says counts no more. A site that is dead for
good costs the changes of that time, once.
"""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from hvreplica.files import write_durably

if TYPE_CHECKING:
    from hvreplica.store.home import VmHome

HOLD_DEFAULT_S = 7 * 86400.0
VERSION = 1
_POINTS_MAX = 8  # the last one, one on its way, the one that is to be shipped
_FILE_BYTES_MAX = 1 << 16
_LOG = logging.getLogger("hvreplica.serve")


class Feed(msgspec.Struct, frozen=True):
    """What is noted of one further site.

    to: its address. points: those to hold. renewed_s: when a cycle ended well, Unix seconds. hold_s: for how
    long from then on.
    """

    to: Annotated[str, Meta(max_length=300)]
    points: Annotated[list[uuid.UUID], Meta(max_length=_POINTS_MAX)]
    renewed_s: Annotated[float, Meta(ge=0, le=1e11)]
    hold_s: Annotated[float, Meta(ge=0, le=1e9)]
    version: int = VERSION

    def holds(self, now_s: float) -> bool:
        """Return whether the note counts at `now_s`."""
        return now_s - self.renewed_s < self.hold_s


def read_feed(home: VmHome, relationship_id: uuid.UUID) -> Feed | None:
    """Return what is noted of a further site; None where nothing is, or where it cannot be read."""
    path = home.paths.feed(relationship_id)
    if not home.files.exists(path):
        return None
    try:
        file = home.files.open(path)
        try:
            data = file.read(0, min(file.size(), _FILE_BYTES_MAX))
        finally:
            file.close()
        found = msgspec.json.decode(data, type=Feed)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _LOG.warning("VM %r: %s holds no point: %s", home.name, path, error)
        return None
    return found if found.version == VERSION else None


def write_feed(home: VmHome, relationship_id: uuid.UUID, feed: Feed) -> None:
    """Note what a further site has; durable on return."""
    path = home.paths.feed(relationship_id)
    home.files.make_directory(path.parent)
    for name in home.files.names(path.parent):
        if name.startswith(f".{path.name}."):
            home.files.unlink(path.parent / name)  # of a call that was cut
    write_durably(home.files, path, msgspec.json.encode(feed), clock=home.clock)


def held_points(home: VmHome) -> frozenset[uuid.UUID]:
    """Return the points that further sites were sent last, as far as their notes count now."""
    if not home.files.exists(home.paths.feeds):
        return frozenset()
    now_s = home.clock.now_s()
    held: set[uuid.UUID] = set()
    for name in home.files.names(home.paths.feeds):
        try:
            relationship_id = uuid.UUID(name.removesuffix(".json"))
        except ValueError:
            continue  # on its way to its name
        feed = read_feed(home, relationship_id)
        if feed is not None and feed.holds(now_s):
            held.update(feed.points)
    return frozenset(held)
