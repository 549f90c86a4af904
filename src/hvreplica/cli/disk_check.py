"""`disk check` and `disk repair`: what is damaged in a disk's file, and mending it.

Their exit code is the state of the disk: 0 clean, 1 repairable, 2 corrupt. So wrong usage, which is 2
elsewhere, is 5 here: a script must not take its own typing error for a damaged disk.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

import hvreplica
from hvreplica.cli.exit import STATE_USAGE
from hvreplica.cli.options import PATH, option, parent_option, verb
from hvreplica.cli.render import plain
from hvreplica.units import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output
    from hvreplica.disk.check import CheckReport, Finding, Level, RepairReport

_LEVELS = ("structure", "log", "bat", "leaks", "parents")


class StateCommand(click.Command):
    """A verb whose exit codes 0 to 2 are the state of a disk."""

    usage_exit_code = STATE_USAGE

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does, and name the verb in each error: its exit code depends on it."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise


@click.command(cls=StateCommand, short_help="Look for damage in a disk's file.")
@click.argument("file", type=PATH)
@option(
    "--level",
    "levels",
    type=click.Choice(_LEVELS),
    multiple=True,
    help="Run this level and those that it needs; may be given more than once.  [default: all]",
)
@parent_option
@verb
def check(output: Output, *, file: Path, levels: tuple[Level, ...], parent: Path | None) -> None:
    """Look for damage in FILE, which is only read.

    The exit code is 0 if it is clean (there may be warnings), 1 if `disk repair` can mend it, 2 if it is
    corrupt; wrong usage is 5. A log that is not empty is judged as a replay would leave the file.
    """
    report = hvreplica.disk_check(file, levels=levels or None, parent=parent)
    output.answer(report, lambda: _show_check(output, report))
    click.get_current_context().exit(report.status)


@click.command(cls=StateCommand, short_help="Mend what a check calls repairable.")
@click.argument("file", type=PATH)
@option(
    "--backup",
    type=PATH,
    metavar="PATH",
    help="Where to save what is overwritten.  [default: FILE.repair-TIME.bak]",
)
@option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")
@option("--undo", type=PATH, metavar="BACKUP", help="Put back what a repair saved there.")
@verb
def repair(output: Output, *, file: Path, backup: Path | None, dry_run: bool, undo: Path | None) -> None:
    """Mend what `disk check` calls repairable in FILE; the guest's data never changes.

    What is overwritten is saved first. The exit code is the state of the disk afterwards, as with `disk
    check`. Cut off, it can be run again.
    """
    if undo is not None:
        if backup is not None or dry_run:
            message = "--undo goes with neither --backup nor --dry-run"
            raise click.UsageError(message, click.get_current_context())
        undone = hvreplica.disk_repair_undo(file, undo)
        output.answer(undone, lambda: output.structure(undone))
        return
    report = hvreplica.disk_repair(file, backup=backup, dry_run=dry_run)
    output.answer(report, lambda: _show_repair(output, report))
    click.get_current_context().exit(report.status)


def _show_check(output: Output, report: CheckReport) -> None:
    for level, findings in groupby(report.findings, key=lambda finding: finding.level):
        output.line(f"{level}:")
        for finding in findings:
            output.line(f"  {finding.severity:<10} {_sentence(finding)}")
    for code, count in report.omitted.items():
        output.line(f"  and {count} more of {code}")
    if report.findings:
        output.line()
    figures = report.statistics
    if figures.blocks is not None:
        size, length = format_size(figures.block_bytes or 0), format_size(figures.file_bytes)
        unused = f", {format_size(figures.leaked_bytes)} in no use" if figures.leaked_bytes else ""
        output.line(f"{figures.allocated_blocks} of {figures.blocks} blocks of {size} in {length}{unused}")
    _verdict(output, report)


def _sentence(finding: Finding) -> str:
    details: list[Any] = [
        f"{name} {value}"
        for name, value in (
            ("in", finding.path),
            ("field", finding.field),
            ("offset", finding.offset),
            ("expected", finding.expected),
            ("found", finding.actual),
        )
        if value is not None
    ]
    if finding.spec is not None:
        details.append(finding.spec)
    place = f" ({', '.join(details)})" if details else ""
    return plain(f"{finding.code}: {finding.message}{place}")


def _verdict(output: Output, report: CheckReport) -> None:
    counted = ", ".join(f"{count} {severity}" for severity, count in report.counts.items() if count)
    words = {
        "clean": "clean",
        "repairable": "repairable: `hvreplica disk repair` mends it",
        "corrupt": "corrupt: restore it from a copy, or read what is left with care",
    }[report.verdict]
    line = f"{report.format} {words}" + (f" ({counted})" if counted else "")
    output.headline(line, good=report.status == 0)


def _show_repair(output: Output, report: RepairReport) -> None:
    for action in report.actions:
        output.line(f"{'would' if report.dry_run else 'done'}: {action.action}: {plain(action.message)}")
    if not report.actions:
        output.line("there is nothing to repair")
    if report.backup is not None:
        output.line(f"backup: {plain(report.backup)}")
    _verdict(output, report.after or report.before)
