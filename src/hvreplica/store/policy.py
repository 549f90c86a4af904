"""What is kept of a VM, and the rule for the newest point when the next one comes.

Which older points go later, and in which order, is another matter; here it is decided whether a point is
worth an undo part of its own at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from hvreplica.formats.messages import RECOVERY_POINTS_MAX

if TYPE_CHECKING:
    from hvreplica.formats.messages import PointPolicy
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import PointRow

RECOVERY_POINTS_DEFAULT = RECOVERY_POINTS_MAX
RECOVERY_POINT_EVERY_S_DEFAULT = 3600.0


class Policy(msgspec.Struct, frozen=True, omit_defaults=True):
    """What to keep of a VM.

    recovery_points: how many older points, None where `keep` alone counts. recovery_point_every_s: the newest
    point stays as an older one when it is the first of its period; 0: each one stays. keep: a rule in words
    for what stays longer. budget_bytes: of what older points need. keep_logs_s: how long applied logs stay.
    app_consistent: whether cuts are made with the guest's file systems standing still.
    """

    recovery_points: Annotated[int, Meta(ge=0, le=RECOVERY_POINTS_MAX)] | None = RECOVERY_POINTS_DEFAULT
    recovery_point_every_s: Annotated[float, Meta(ge=0, le=1e9)] = RECOVERY_POINT_EVERY_S_DEFAULT
    keep: Annotated[str, Meta(max_length=2000)] | None = None
    budget_bytes: Annotated[int, Meta(ge=0, le=1 << 62)] | None = None
    keep_logs_s: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    app_consistent: bool = False


def policy_of(home: VmHome) -> Policy:
    """Return what is to be kept of the VM; the defaults where nobody said."""
    row = home.catalog.vm(home.name)
    if row is None or row.policy is None:
        return Policy()
    return msgspec.json.decode(row.policy, type=Policy)


def changed_policy(text: str | None, wish: PointPolicy) -> str:
    """Return what the catalog holds once a primary has said what it wants; what it left out stays."""
    policy = Policy() if text is None else msgspec.json.decode(text, type=Policy)
    given = {name: value for name, value in msgspec.structs.asdict(wish).items() if value is not None}
    return pack_policy(msgspec.structs.replace(policy, **given))


def pack_policy(policy: Policy) -> str:
    """Return the text that the catalog holds."""
    return msgspec.json.encode(policy).decode()


def is_worth_keeping(policy: Policy, newest: PointRow, older: PointRow | None) -> bool:
    """Return whether the newest point stays when the next one comes. older: the newest that was kept before.

    A point that somebody asked for always stays. Of the others the first of each period does: periods are
    counted on the clock, so that the points of a day do not drift.
    """
    if newest.kind in {"manual", "planned"} or policy.keep is not None:
        return True
    if policy.recovery_points == 0:
        return False
    every_s = policy.recovery_point_every_s
    if older is None or every_s == 0 or newest.consistency == "app":
        return True
    return newest.instant_s // every_s != older.instant_s // every_s
