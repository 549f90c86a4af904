"""What is kept of a VM, as the catalog holds it. What it means is said in store/retention.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from hvreplica.formats.messages import RECOVERY_POINTS_MAX, PointPolicy
from hvreplica.store.keep_rule import parse_keep_rule

if TYPE_CHECKING:
    from hvreplica.store.home import VmHome

RECOVERY_POINTS_DEFAULT = RECOVERY_POINTS_MAX
RECOVERY_POINT_EVERY_S_DEFAULT = 3600.0
COMPRESS_AFTER_POINTS_DEFAULT = 2  # the newest point, and the one that still gets what cycles overwrite


class Policy(msgspec.Struct, frozen=True, omit_defaults=True):
    """What to keep of a VM.

    recovery_points: how many older points, None where `keep` alone counts. recovery_point_every_s: one
    point of each such period, 0: each one. keep: a rule in words, see store/keep_rule.py. budget_bytes: of
    what older points need; budget_percent: the same in percent of what the disks need. keep_logs_s: how long
    applied logs stay. app_consistent: whether cuts are made with the guest's file systems standing still.
    compress_after_points: how many of the newest points have undo parts that are not compressed, None: all.
    """

    recovery_points: Annotated[int, Meta(ge=0, le=RECOVERY_POINTS_MAX)] | None = RECOVERY_POINTS_DEFAULT
    recovery_point_every_s: Annotated[float, Meta(ge=0, le=1e9)] = RECOVERY_POINT_EVERY_S_DEFAULT
    keep: Annotated[str, Meta(max_length=2000)] | None = None
    budget_bytes: Annotated[int, Meta(ge=0, le=1 << 62)] | None = None
    budget_percent: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    keep_logs_s: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    app_consistent: bool = False
    compress_after_points: Annotated[int, Meta(ge=1, le=1 << 31)] | None = COMPRESS_AFTER_POINTS_DEFAULT


def policy_of(home: VmHome) -> Policy:
    """Return what is to be kept of the VM; the defaults where nobody said."""
    row = home.catalog.vm(home.name)
    if row is None or row.policy is None:
        return Policy()
    return msgspec.json.decode(row.policy, type=Policy)


def changed_policy(text: str | None, wish: PointPolicy) -> str:
    """Return what the catalog holds once somebody has said what is wanted. Raises: as follow()."""
    return pack_policy(follow(Policy() if text is None else msgspec.json.decode(text, type=Policy), wish))


def follow(policy: Policy, wish: PointPolicy) -> Policy:
    """Return the policy once somebody has said what is wanted; what was left out stays.

    A number of recovery points and a rule in words stand for each other: who names one means that one alone,
    who names both means both. So do a budget in bytes and one in percent. An empty rule, and 0 for a budget,
    for how long logs stay or for which parts are compressed, take theirs away. Raises: FieldOutOfRange for a
    rule that is none.
    """
    given = {name: value for name, value in msgspec.structs.asdict(wish).items() if value is not None}
    if "keep" in given:
        given["keep"] = str(parse_keep_rule(given["keep"])) if given["keep"] else None
        default = None if given["keep"] else RECOVERY_POINTS_DEFAULT
        given.setdefault(
            "recovery_points", default if policy.keep or given["keep"] else policy.recovery_points
        )
    elif "recovery_points" in given:
        given["keep"] = None
    if "budget_bytes" in given:
        given["budget_bytes"] = given["budget_bytes"] or None
        given.setdefault("budget_percent", None)
    elif "budget_percent" in given:
        given["budget_percent"] = given["budget_percent"] or None
        given["budget_bytes"] = None
    for name in {"keep_logs_s", "compress_after_points"} & given.keys():
        given[name] = given[name] or None
    return msgspec.structs.replace(policy, **given)


def wish_of(policy: Policy) -> PointPolicy:
    """Return what to ask another replica for, so that it keeps what this policy says, whatever it kept."""
    return PointPolicy(
        recovery_points=policy.recovery_points,
        recovery_point_every_s=policy.recovery_point_every_s,
        keep=policy.keep or "",
        budget_bytes=None if policy.budget_percent else policy.budget_bytes or 0,
        budget_percent=policy.budget_percent,
        keep_logs_s=policy.keep_logs_s or 0,
        app_consistent=policy.app_consistent,
        compress_after_points=policy.compress_after_points or 0,
    )


def pack_policy(policy: Policy) -> str:
    """Return the text that the catalog holds."""
    return msgspec.json.encode(policy).decode()
