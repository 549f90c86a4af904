"""`point plan`, `point delete` and `store policy`: which recovery points stay, and which go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import hvreplica
from hvreplica.cli.options import option, store_option, verb, vm_option
from hvreplica.cli.policy_options import policy_options
from hvreplica.cli.render import kind_shown, moment, plain
from hvreplica.units import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output
    from hvreplica.store.plan import PlannedPoint, PointPlan
    from hvreplica.store.retain import GonePoint
    from hvreplica.store.status import MadePoint


@click.command(short_help="Show which recovery points stay, why, and which go first.")
@store_option
@vm_option
@policy_options
@verb
def plan(
    output: Output,
    *,
    store: Path,
    vm: str,
    recovery_points: int | None,
    recovery_point_every: float | None,
    keep: str | None,
    points_budget: str | None,
    keep_logs: float | None,
) -> None:
    """Show which recovery points stay, why, and which go first over a budget. Nothing is changed.

    Without options by the VM's policy; with them by what `store policy` would make of it. Works while
    `serve` runs.
    """
    found = hvreplica.point_plan(
        store,
        vm,
        recovery_points=recovery_points,
        recovery_point_every=recovery_point_every,
        keep=keep,
        points_budget=points_budget,
        keep_logs=keep_logs,
    )
    output.answer(found, lambda: _show_plan(output, found))


@click.command(short_help="Make a recovery point of any instant between two cycles.")
@store_option
@vm_option
@click.argument("instant")
@option("--flush", is_flag=True, help="Take the last flush of the guest at or before the instant.")
@verb
def at(output: Output, *, store: Path, vm: str, instant: str, flush: bool) -> None:
    """Make a recovery point of any INSTANT between two cycles, such as 2026-11-23T10:15:30.250Z.

    The point has all that was written until then. Without parts of a second that is the whole second; with
    them, the last moment that is known; the answer tells it. With --flush it is what the guest itself wanted
    to be durable. Needs the cycle's log, see --keep-logs, and the log must hold each write in the guest's
    order; `point list --instants` shows what there is. No disk is copied, no other point changes, and `serve`
    may run. The point is of kind manual: it stays until it is deleted.
    """
    made = hvreplica.point_at(store, vm, instant, flush=flush)
    output.answer(made, lambda: _show_made(output, made))


def _show_made(output: Output, made: MadePoint) -> None:
    what = f"{made.id} has all that was written until {made.instant}"
    if made.is_flush:
        what += ", a flush of the guest"
    output.line(what)
    if made.note:
        output.line(plain(made.note))


@click.command(short_help="Let recovery points go.")
@store_option
@vm_option
@option("--point", "points", metavar="ID", multiple=True, required=True, help="A recovery point; repeatable.")
@verb
def delete(output: Output, *, store: Path, vm: str, points: tuple[str, ...]) -> None:
    """Let recovery points go; every other one stays exactly as it is.

    Nothing is done unless all of them can go: not the newest one, and none that somebody reads. Works while
    `serve` runs.
    """
    gone = hvreplica.point_delete(store, vm, points)
    output.answer(gone, lambda: _show_gone(output, gone))


@click.command(short_help="Show or change which recovery points of a VM stay.")
@store_option
@vm_option
@policy_options
@option(
    "--compress-after",
    type=click.IntRange(0, 1 << 31),
    metavar="POINTS",
    help="How many of the newest points stay uncompressed, 0 for all.  [default: as before, at first 2]",
)
@verb
def policy(  # noqa: PLR0913 - one for each option
    output: Output,
    *,
    store: Path,
    vm: str,
    recovery_points: int | None,
    recovery_point_every: float | None,
    keep: str | None,
    points_budget: str | None,
    keep_logs: float | None,
    compress_after: int | None,
) -> None:
    """Show which recovery points of a VM stay, or change it from the next cycle on. Works while `serve` runs.

    --recovery-points and --keep stand for each other: give both to have both. What a primary says in a later
    cycle changes it again.
    """
    found = hvreplica.store_policy(
        store,
        vm,
        recovery_points=recovery_points,
        recovery_point_every=recovery_point_every,
        keep=keep,
        points_budget=points_budget,
        keep_logs=keep_logs,
        compress_after=compress_after,
    )
    output.answer(found, lambda: _show_policy(output, found))


def _show_policy(output: Output, found: PointPlan) -> None:
    wanted = found.policy
    going = [point for point in found.points if not point.keep]
    output.fields(
        [
            ("recovery points", wanted.recovery_points),
            ("one each", _period(wanted.recovery_point_every_s) if wanted.recovery_points else None),
            ("keep", wanted.keep),
            ("budget", None if found.budget_bytes is None else format_size(found.budget_bytes)),
            ("logs stay", _period(wanted.keep_logs_s) if wanted.keep_logs_s else None),
            ("compressed", _compressed(wanted.compress_after_points)),
            ("used", format_size(found.used_bytes)),
            ("points", f"{len(found.points) - len(going)} stay, {len(going)} go with the next cycle"),
        ]
    )
    if found.budget_bytes is not None and found.used_bytes > found.budget_bytes:
        output.line("more go for the budget, in the order that `point plan` shows, until they fit it")
    if found.warning:
        output.line(plain(found.warning))


def _compressed(after_points: int | None) -> str:
    return "none" if after_points is None else f"points older than the newest {after_points}"


def _show_plan(output: Output, found: PointPlan) -> None:
    if not found.points:
        output.line(f"{plain(found.vm)} has no recovery point yet")
        return
    output.table(
        ("point", "shows the time", "kind", "state", ">own size", "stays", ">goes"),
        [_row(point) for point in found.points],
    )
    _show_policy(output, found)


def _row(point: PlannedPoint) -> tuple[object, ...]:
    kind = kind_shown(point.kind, point.consistency)
    goes = "now" if not point.keep else point.budget_place or "never"
    reasons = ", ".join(point.reasons)
    return point.id, moment(point.instant_s), kind, point.state, format_size(point.bytes), reasons, goes


def _period(seconds: float) -> str:
    return f"{seconds:g} s" if seconds else "point"


def _show_gone(output: Output, gone: list[GonePoint]) -> None:
    for point in gone:
        output.line(f"{point.id} of {moment(point.instant_s)} went")
