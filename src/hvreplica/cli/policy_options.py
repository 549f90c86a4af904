"""The options that say which recovery points stay, for every verb that takes them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from hvreplica.cli.options import DURATION, TextParameter, option

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")
_NONE = "none"


class KeepType(TextParameter):
    """A rule such as "last 12, hourly 24, daily 7", or none; the value stays text."""

    name = "rule"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from hvreplica.errors import FieldOutOfRange  # noqa: PLC0415 - only where a rule is given
        from hvreplica.store.keep_rule import parse_keep_rule  # noqa: PLC0415

        text = str(value)
        if text != _NONE:
            try:
                parse_keep_rule(text)
            except FieldOutOfRange as error:
                place = f"{error.message} (character {error.offset})"
                self.fail(f"{place}: expected {error.expected}, found {error.actual}", param, ctx)
        return text


class BudgetType(TextParameter):
    """A size such as 20G, a percentage such as 15%, or none; the value stays text."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from hvreplica.errors import FieldOutOfRange  # noqa: PLC0415
        from hvreplica.replication.retention_verbs import parse_budget  # noqa: PLC0415

        try:
            parse_budget(str(value))
        except FieldOutOfRange as error:
            self.fail(f"{value!r} is no budget; {error.hint}", param, ctx)
        return str(value)


def policy_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add --recovery-points, --recovery-point-every, --keep, --points-budget and --keep-logs."""
    for decorate in (
        option(
            "--keep-logs",
            type=DURATION,
            metavar="DURATION",
            help="How long logs stay after they were applied, for `point at`: 12h, 2d, 0s for not at all.",
        ),
        option(
            "--points-budget",
            type=BudgetType(),
            metavar="SIZE|PERCENT|none",
            help="How much older points may take: 20G, or 15% of what the disks take.",
        ),
        option(
            "--keep",
            type=KeepType(),
            metavar="RULE|none",
            help='Which points stay, as in "last 12, hourly 24, daily 7, weekly 4, app-consistent 3".',
        ),
        option(
            "--recovery-point-every",
            type=click.FloatRange(0),
            metavar="SECONDS",
            help="One of them for each such period, 0 for each point.  [default: as before, at first 3600]",
        ),
        option(
            "--recovery-points",
            type=click.IntRange(0, 24),
            metavar="0-24",
            help="How many points stay beside the newest one.  [default: as before, at first 24]",
        ),
    ):
        function = decorate(function)
    return function


def point_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add policy_options() to a verb of the primary, given on as `points`, None where nothing is said."""

    @functools.wraps(function)
    def with_points(*args: P.args, **kwargs: P.kwargs) -> R:
        names = ("recovery_points", "recovery_point_every", "keep", "points_budget", "keep_logs")
        given: list[Any] = [kwargs.pop(name) for name in names]
        kwargs["points"] = None
        if any(value is not None for value in given):
            from hvreplica.replication.retention_verbs import make_wish  # noqa: PLC0415 - start-up time of --help

            kwargs["points"] = make_wish(*given)
        return function(*args, **kwargs)

    return policy_options(with_points)
