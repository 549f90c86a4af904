"""`point`: list recovery points and export one as a disk of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import hvreplica
from hvreplica.cli.options import (
    DISK_FORMAT,
    PATH,
    POINT_HELP,
    SIZE,
    format_for,
    option,
    overwrite_option,
    store_option,
    verb,
    vm_option,
)
from hvreplica.cli.progress import progress_shown
from hvreplica.cli.render import kind_shown, moment, plain
from hvreplica.cli.store import DAMAGE_FOUND, show_verdict
from hvreplica.clock import exact_time
from hvreplica.units import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output
    from hvreplica.disk import Format
    from hvreplica.store import PointStatus
    from hvreplica.store.instant_spans import InstantSpan


@click.group()
def point() -> None:
    """List recovery points and export one."""


@point.command("list")
@store_option
@vm_option
@option("--instants", is_flag=True, help="List instead which instants between points `point at` can make.")
@verb
def list_(output: Output, store: Path, vm: str, *, instants: bool) -> None:
    """List a VM's recovery points, oldest first."""
    if instants:
        spans = hvreplica.point_instants(store, vm)
        output.answer(spans, lambda: _show_instants(output, vm, spans))
        return
    points = hvreplica.point_list(store, vm)
    output.answer(points, lambda: _show(output, vm, points))


def _show(output: Output, vm: str, points: list[PointStatus]) -> None:
    if not points:
        output.line(f"{plain(vm)} has no recovery point yet")
        return
    output.table(
        ("point", "shows the time", "kind", "state", ">received"),
        [
            (
                each.id,
                moment(each.instant_s),
                kind_shown(each.kind, each.consistency),
                each.state,
                format_size(each.bytes),
            )
            for each in points
        ],
    )
    for each in points:
        if each.warning is not None:
            output.line(plain(each.warning))


def _show_instants(output: Output, vm: str, spans: list[InstantSpan]) -> None:
    if not spans:
        output.line(f"no logs of {plain(vm)} are kept: see --keep-logs")
        return
    output.table(
        ("from", "to", ">steps of", ">flushes", "why not"),
        [
            (
                exact_time(span.from_s),
                exact_time(span.to_s),
                "none" if span.step_s is None else f"{span.step_s:g} s",
                span.flushes,
                plain(span.reason or ""),
            )
            for span in spans
        ],
    )


@point.command(short_help="Copy a disk at a point to a file of its own.")
@store_option
@vm_option
@option("--point", metavar="POINT", help=f"{POINT_HELP}  [default: latest]")
@option("--disk", type=click.IntRange(min=0), default=0, show_default=True, help="Which disk of the VM.")
@option("--output", "target", type=PATH, required=True, metavar="FILE", help="The new disk.")
@option(
    "--format",
    "format_",
    type=DISK_FORMAT,
    help="Format of the new disk.  [default: by its name, vhd for .vhd, raw for .raw and .img, else vhdx]",
)
@overwrite_option
@verb
def export(
    output: Output,
    *,
    store: Path,
    vm: str,
    point: str | None,
    disk: int,
    target: Path,
    format_: Format | None,
    overwrite: bool,
) -> None:
    """Copy a disk, as it was at a recovery point, to a file of its own. Works while `serve` runs."""
    with progress_shown(output) as progress:
        report = hvreplica.point_export(
            store,
            vm,
            target,
            point=point,
            disk=disk,
            format=format_for(target, format_),
            overwrite=overwrite,
            progress=progress,
        )
    output.answer(report, lambda: output.structure(report))


@point.command(short_help="Read a point again and tell whether it is damaged.")
@store_option
@vm_option
@option("--point", default="latest", show_default=True, metavar="ID", help="The recovery point.")
@option("--rate-limit", type=SIZE, metavar="SIZE", help="How much to read in a second.")
@verb
def verify(output: Output, *, store: Path, vm: str, point: str, rate_limit: int | None) -> None:
    """Read a recovery point again, from the files that make it, and hold it against its digest.

    Works while `serve` runs. One that is damaged is marked so, and one that is not any more can be had again.
    The exit code is 1 where damage was found.
    """
    with progress_shown(output) as progress:
        found = hvreplica.point_verify(store, vm, point=point, rate_limit=rate_limit, progress=progress)
    output.answer(found, lambda: show_verdict(output, found))
    if found.is_damaged:
        click.get_current_context().exit(DAMAGE_FOUND)
