"""`disk merge` and `disk rebase`: which disk rests on which."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import hvreplica
from hvreplica.cli.options import PATH, option, verb
from hvreplica.cli.progress import progress_shown

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output


@click.command(short_help="Merge a differencing disk into its parent.")
@click.argument("child", type=PATH)
@option("--keep", is_flag=True, help="Leave CHILD where it is; it shows the same as its parent then.")
@option("--force", is_flag=True, help="Merge though other disks rest on the parent or on CHILD.")
@verb
def merge(output: Output, *, child: Path, keep: bool, force: bool) -> None:
    """Write what the differencing disk CHILD holds into its parent, and remove CHILD.

    The parent then shows what CHILD showed. Nobody may use either meanwhile. Cut off at any instant, CHILD
    still opens and shows the same, and the same command finishes. Other disks in the two folders that rest on
    the parent, or on a CHILD that is to go, would break: they are named, and nothing is done without --force.
    """
    with progress_shown(output) as progress:
        report = hvreplica.disk_merge(child, keep=keep, force=force, progress=progress)
    output.answer(report, lambda: output.structure(report))


@click.command(short_help="Give a differencing disk another parent.")
@click.argument("child", type=PATH)
@option("--parent", type=PATH, required=True, metavar="FILE", help="The new parent.")
@option(
    "--unsafe",
    is_flag=True,
    help="Compare and copy nothing: the new parent holds the same as the old one. If not, CHILD is corrupt.",
)
@verb
def rebase(output: Output, *, child: Path, parent: Path, unsafe: bool) -> None:
    """Make FILE the parent of the differencing disk CHILD, whose guest sees the same bytes as before.

    If FILE is the same disk that has moved, only names change. Else old and new parent are compared, and
    what differs is copied into CHILD first, for which the old parent must be there. Cut off at any instant,
    CHILD shows the same, and the same command finishes.
    """
    with progress_shown(output) as progress:
        report = hvreplica.disk_rebase(child, parent, unsafe=unsafe, progress=progress)
    output.answer(report, lambda: output.structure(report))
