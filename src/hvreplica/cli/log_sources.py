"""`log from-child`, `log from-qemu`, `log import`: logs of what other sources of change know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import hvreplica
from hvreplica.cli.options import LOG, PATH, option, overwrite_option, parent_option, verb
from hvreplica.cli.progress import progress_shown
from hvreplica.cli.render import plain
from hvreplica.units import format_size

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

    from hvreplica.cli.render import Output


_follows = option(
    "--follows",
    type=LOG,
    metavar="LOG",
    help="The log before this one, as a file or by its id, for the chain.",
)


@click.command("from-child", short_help="Make a log of what a differencing disk holds.")
@click.argument("child", type=PATH)
@click.argument("log", type=PATH, metavar="OUTPUT.hrl")
@option("--base", type=PATH, metavar="FILE", help="Take all layers above this parent of CHILD, not one.")
@parent_option
@option("--skip-equal", is_flag=True, help="Read the parent too, and leave out what it has already.")
@_follows
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
    follows: uuid.UUID | Path | None,
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
            follows=follows,
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


@click.command("from-qemu", short_help="Make a log of what a VM that QEMU serves has written.")
@click.argument("log", type=PATH, metavar="OUTPUT.hrl")
@option("--qmp", type=PATH, required=True, metavar="SOCKET", help="A QMP monitor of the VM, for us alone.")
@option("--node", required=True, metavar="NAME", help="The block node of the disk.")
@option("--bitmap", required=True, metavar="NAME", help="The dirty bitmap that is kept on it for us.")
@option("--full", is_flag=True, help="Log all that the disk holds, and begin to track it.")
@_follows
@option(
    "--scratch",
    type=PATH,
    metavar="DIR",
    help="Where QEMU may open our socket and a file for what is overwritten meanwhile."
    "  [default: the folder of OUTPUT.hrl]",
)
@overwrite_option
@verb
def from_qemu(
    output: Output,
    *,
    log: Path,
    qmp: Path,
    node: str,
    bitmap: str,
    **settings: Any,
) -> None:
    """Write into a log what a VM wrote to a disk since the last log, as it was at one instant.

    QEMU serves the disk and goes on; it keeps track in a dirty bitmap and pushes what changed. Begin with
    --full: that log holds the whole disk. Cut off, nothing is lost: the next log holds it too. A QEMU that
    ends forgets its bitmaps: this verb says so, and tracking begins anew with --full.
    """
    with progress_shown(output) as progress:
        report = hvreplica.log_from_qemu(qmp, node, bitmap, log, progress=progress, **settings)

    def show() -> None:
        what = "in all" if report.full else "changed"
        output.line(
            f"{format_size(report.data_bytes)} {what} on {plain(report.node)}: {report.entries} entries in"
            f" {report.path}, {format_size(report.log_bytes)}"
        )

    output.answer(report, show)


@click.command("import", short_help="Take logs that another program wrote for a protected VM.")
@click.argument("logs", type=PATH, metavar="LOG.hrl...", nargs=-1, required=True)
@option(
    "--state",
    type=PATH,
    required=True,
    envvar="HVREPLICA_STATE",
    metavar="DIR",
    help="The state folder of the VM, as `replicate` has it.",
)
@option(
    "--disk-index",
    "indexes",
    type=click.IntRange(0, 63),
    multiple=True,
    help="Whose log it is: the disk's place in the VM. Repeat it for each log.",
)
@option("--disk", "disks", type=PATH, multiple=True, metavar="FILE", help="The same, by the disk's file.")
@option("--force", is_flag=True, help="Take a log that does not say that it follows the last one.")
@option("--verify-disk", is_flag=True, help="Refuse unless the disk holds now what the log wrote last.")
@verb
def import_logs(
    output: Output,
    *,
    logs: tuple[Path, ...],
    state: Path,
    indexes: tuple[int, ...],
    disks: tuple[Path, ...],
    force: bool,
    verify_disk: bool,
) -> None:
    """Make logs that another program wrote the next cut of a protected VM; `replicate` ships it.

    The disks hold these changes already, and are not touched. Each log is copied and checked whole first. It
    must follow the last one of its disk, or be forced. Logs of several disks that belong to one instant are
    given in one call.
    """
    named: list[int | Path] = [*indexes, *disks]
    if (indexes and disks) or (named and not len(named) == len(set(named)) == len(logs)):
        message = "give one --disk-index, or one --disk, for each log, in the same order"
        raise click.UsageError(message, click.get_current_context())
    with progress_shown(output) as progress:
        report = hvreplica.log_import(
            logs, state=state, disks=named or None, force=force, verify_disk=verify_disk, progress=progress
        )

    def show() -> None:
        for log in report.logs:
            why = "follows the last one" if log.follows else "forced"
            output.line(f"{log.path}: {format_size(log.data_bytes)} changed on disk {log.disk_index} ({why})")
        output.line(f"recovery point {report.point} waits to be shipped by `hvreplica replicate`")

    output.answer(report, show)
