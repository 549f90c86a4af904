"""`log from-child`: an .hrl of what another source of change knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import hvreplica
from hvreplica.cli.options import PATH, option, overwrite_option, parent_option, verb
from hvreplica.cli.progress import progress_shown
from hvreplica.units import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output


@click.command("from-child", short_help="Make a log of what a differencing disk holds.")
@click.argument("child", type=PATH)
@click.argument("log", type=PATH, metavar="OUTPUT.hrl")
@option("--base", type=PATH, metavar="FILE", help="Take all layers above this parent of CHILD, not one.")
@parent_option
@option("--skip-equal", is_flag=True, help="Read the parent too, and leave out what it has already.")
@overwrite_option
@verb
def from_child(
    output: Output,
    *,
    child: Path,
    log: Path,
    base: Path | None,
    parent: Path | None,
    skip_equal: bool,
    overwrite: bool,
) -> None:
    """Write what the differencing disk CHILD (.avhdx, .avhd) holds into a log.

    Applied to its parent, or to a copy of that, the log makes it show what CHILD shows. Nobody may write to
    CHILD or its parents meanwhile. A parent that is shorter than CHILD must be grown before the log is
    applied.
    """
    with progress_shown(output) as progress:
        report = hvreplica.log_from_child(
            child,
            log,
            base=base,
            parent=parent,
            skip_equal=skip_equal,
            overwrite=overwrite,
            progress=progress,
        )

    def show() -> None:
        output.line(
            f"{format_size(report.data_bytes)} changed since {report.base}: {report.entries} entries in"
            f" {report.path}, {format_size(report.log_bytes)}"
        )
        if report.child_virtual_bytes > report.base_virtual_bytes:
            output.line(f"grow the parent to {report.child_virtual_bytes} bytes before the log is applied")

    output.answer(report, show)
