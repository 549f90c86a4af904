"""The verbs about which recovery points stay, beside the process that serves the store."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hvreplica.clock import SYSTEM, parse_iso
from hvreplica.errors import FieldOutOfRange, NoSuchPoint
from hvreplica.files import OS_FILES
from hvreplica.formats.messages import RECOVERY_POINTS_MAX, PointPolicy
from hvreplica.store import Store
from hvreplica.units import parse_size

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from hvreplica.store.instant_spans import InstantSpan
    from hvreplica.store.plan import PointPlan
    from hvreplica.store.retain import GonePoint
    from hvreplica.store.status import MadePoint

    PathLike = str | os.PathLike[str]

NONE = "none"
_PERCENT_MAX = 1e6
_MICROSECOND_S = 1e-6
_BYTES_MAX = 1 << 62
_POINTS_MAX = 1 << 31


def point_plan(
    store: PathLike,
    vm: str,
    *,
    recovery_points: int | None = None,
    recovery_point_every: float | None = None,
    keep: str | None = None,
    points_budget: str | int | None = None,
    keep_logs: float | None = None,
) -> PointPlan:
    """Return which recovery points of a VM stay, why, and which go first; nothing is changed.

    By the VM's policy, as store_policy() with the same arguments would change it. Raises: NoSuchPoint for an
    unknown VM, FieldOutOfRange for an argument out of its range.
    """
    wish = make_wish(recovery_points, recovery_point_every, keep, points_budget, keep_logs)
    with contextlib.closing(Store.open_reading(OS_FILES, Path(store), clock=SYSTEM)) as opened:
        return opened.plan_points(vm, wish)


def point_delete(store: PathLike, vm: str, points: Sequence[str]) -> list[GonePoint]:
    """Let recovery points go; all others stay as they are. Nothing is done unless all of them can go.

    points: their ids. Raises: NoSuchPoint; InvalidTransition for the newest point; PointInUse while one is
    read.
    """
    ids = [_point_id(text) for text in points]
    with contextlib.closing(Store.open_reading(OS_FILES, Path(store), clock=SYSTEM)) as opened:
        return opened.delete_points(vm, ids)


def point_at(store: PathLike, vm: str, instant: str | float, *, flush: bool = False) -> MadePoint:
    """Make a recovery point of any instant between two cycles whose logs were kept; no disk is copied.

    instant: as ISO 8601 with its zone, as in "2026-11-23T10:15:30.250Z", or Unix seconds. Without parts of
    a second it means the end of its second; with them the last moment that is known at or before it, see
    `instant` of the answer. flush: the last flush of the guest at or before it. The same instant again is the
    same point. Raises: NoSuchPoint where it is outside of what was kept, StoreError where the log does not
    hold each write in the guest's order, FieldOutOfRange for what is no instant, Locked, StoreFull.
    """
    instant_s = parse_instant(instant)
    with contextlib.closing(Store.open_reading(OS_FILES, Path(store), clock=SYSTEM)) as opened:
        return opened.make_point_at(vm, instant_s, flush=flush)


def point_instants(store: PathLike, vm: str) -> list[InstantSpan]:
    """Return for which instants point_at() can make a point, and how fine. Raises: NoSuchPoint."""
    with contextlib.closing(Store.open_reading(OS_FILES, Path(store), clock=SYSTEM)) as opened:
        return opened.instant_spans(vm)


def parse_instant(instant: str | float) -> float:
    """Return the Unix seconds of an instant; without parts of a second they mean the end of the second.

    So what is written as 10:15:30.000 becomes the microsecond before. Raises: FieldOutOfRange for what is
    none.
    """
    if isinstance(instant, (int, float)):
        return float(instant)
    try:
        unix_s = parse_iso(instant)
        is_exact = not {".", ","}.isdisjoint(instant)
        return unix_s - _MICROSECOND_S if is_exact and unix_s == int(unix_s) else unix_s
    except ValueError:
        raise FieldOutOfRange(
            "this is no instant",
            field="instant",
            expected="ISO 8601 with its zone, as in 2026-11-23T10:15:30Z",
            actual=instant[:64],
        ) from None


def store_policy(
    store: PathLike,
    vm: str,
    *,
    recovery_points: int | None = None,
    recovery_point_every: float | None = None,
    keep: str | None = None,
    points_budget: str | int | None = None,
    keep_logs: float | None = None,
    compress_after: int | None = None,
) -> PointPlan:
    """Change what is kept of a VM, from its next cycle on; return the policy and what it makes of the points.

    What is None stays as it is. recovery_points: 0 to 24 older points, one each recovery_point_every seconds,
    0 for each point. keep: a rule such as "last 12, hourly 24, daily 7", instead of a number, or beside it
    where both are given; "none" for no rule. points_budget: of what older points may take, bytes or a size
    such as "20G", or "15%" of what the disks take, or "none". keep_logs: for how many seconds logs stay after
    they were applied, to make points between two cycles; 0 for not at all. compress_after: how many of the
    newest points have undo parts that are not compressed, 0 for all. A primary that says otherwise in a later
    cycle is followed. Raises: as point_plan(), StoreFull.
    """
    wish = make_wish(recovery_points, recovery_point_every, keep, points_budget, keep_logs)
    if compress_after is not None:
        if not 0 <= compress_after <= _POINTS_MAX:
            raise FieldOutOfRange(
                "no such number of points",
                field="compress_after",
                expected=f"0 to {_POINTS_MAX}, 0 for all",
                actual=compress_after,
            )
        wish = msgspec.structs.replace(wish, compress_after_points=compress_after)
    with contextlib.closing(Store.open_reading(OS_FILES, Path(store), clock=SYSTEM)) as opened:
        return opened.plan_points(vm) if wish == PointPolicy() else opened.set_policy(vm, wish)


def make_wish(
    recovery_points: int | None,
    recovery_point_every_s: float | None,
    keep: str | None,
    points_budget: str | int | None,
    keep_logs_s: float | None = None,
) -> PointPolicy:
    """Return what is wanted, checked but for the rule. Raises: FieldOutOfRange."""
    if recovery_points is not None and not 0 <= recovery_points <= RECOVERY_POINTS_MAX:
        raise FieldOutOfRange(
            "no such number of recovery points",
            field="recovery_points",
            expected=f"0 to {RECOVERY_POINTS_MAX}",
            actual=recovery_points,
            hint='a rule keeps more of them: keep="last 100"',
        )
    if recovery_point_every_s is not None and not 0 <= recovery_point_every_s <= 1e9:
        raise FieldOutOfRange(
            "no such period of recovery points",
            field="recovery_point_every",
            expected="seconds, 0 for each point",
            actual=recovery_point_every_s,
        )
    if keep_logs_s is not None and not 0 <= keep_logs_s <= 1e9:
        raise FieldOutOfRange(
            "no such time to keep logs for",
            field="keep_logs",
            expected="seconds, 0 for not at all",
            actual=keep_logs_s,
        )
    budget_bytes, budget_percent = (None, None) if points_budget is None else parse_budget(points_budget)
    return PointPolicy(
        recovery_points=recovery_points,
        recovery_point_every_s=recovery_point_every_s,
        keep="" if keep == NONE else keep,
        budget_bytes=budget_bytes,
        budget_percent=budget_percent,
        keep_logs_s=keep_logs_s,
    )


def parse_budget(budget: str | int) -> tuple[int | None, float | None]:
    """Return (bytes, percent) of "20G", "15%", a number of bytes, or "none", which is 0 bytes.

    Raises: FieldOutOfRange.
    """
    text = str(budget).strip()
    if text == NONE:
        return 0, None
    try:
        if text.endswith("%"):
            percent = float(text[:-1])
            if 0 < percent <= _PERCENT_MAX:
                return None, percent
        elif 0 < (size := parse_size(text)) <= _BYTES_MAX:
            return size, None
    except ValueError:
        pass
    raise FieldOutOfRange(
        "this is no budget for recovery points",
        field="points_budget",
        expected="a size, a percentage or none",
        actual=text[:64],
        hint="write for example 20G, 15% or none",
    )


def _point_id(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        raise NoSuchPoint(
            "this is not the id of a recovery point", actual=text, hint="see `point list`"
        ) from None
