"""`status`, `pause` and `resume`: how replication of a VM stands at its primary, and whether it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import hvreplica
from hvreplica.cli.options import option, state_option, verb
from hvreplica.cli.render import plain
from hvreplica.units import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output
    from hvreplica.replication.status import DiskStatus, NamedReplica, ReplicationStatus

_GOOD = ("Normal", "NotApplicable")


@click.command(short_help="Show how replication of a VM stands.")
@state_option
@option("--reset-statistics", is_flag=True, help="Begin the statistics anew.")
@verb
def status(output: Output, *, state: Path, reset_statistics: bool) -> None:
    """Show how replication of a VM stands: health, what waits, and the statistics of the last 12 hours.

    Health is Normal; Warning where over a fifth of the cycles was missed, the last one ended over an hour
    ago, the first copy is not complete, replication is paused, or capture served the disks and does not run;
    Critical where cycles fail; NotApplicable where there is no replica yet. While capture does not run, what
    waits is told from its journals, as at most so much.
    """
    found = hvreplica.reset_statistics(state) if reset_statistics else hvreplica.status(state)
    output.answer(found, lambda: show_status(output, found))


@click.command(short_help="Begin no further cycles.")
@state_option
@verb
def pause(output: Output, *, state: Path) -> None:
    """Begin no further cycles until `resume`, in later runs too. What the VM writes is tracked on."""
    found = hvreplica.pause(state)
    output.answer(found, lambda: None if output.quiet else show_status(output, found))


@click.command(short_help="Go on with cycles.")
@state_option
@verb
def resume(output: Output, *, state: Path) -> None:
    """Go on with cycles after `pause`, or after an error that had stopped them."""
    found = hvreplica.resume(state)
    output.answer(found, lambda: None if output.quiet else show_status(output, found))


def show_status(output: Output, found: ReplicationStatus) -> None:
    """Show a status to a person."""
    record = found.statistics
    running = "no process runs" if found.running is None else f"{found.running} runs"
    output.headline(
        f"{plain(found.vm)}: {found.replication_state} · {record.replication_health} · {running}",
        good=record.replication_health in _GOOD,
    )
    for issue in record.replication_health_issues:
        output.line(plain(issue))
    output.line()
    output.fields(_rows(found))
    output.line()
    output.table(
        (">disk", "file", ">size", ">changed", "log"),
        [
            (disk.index, plain(disk.path), format_size(disk.virtual_bytes), *_tracked(disk))
            for disk in found.disks
        ],
    )
    for replica in found.replicas:
        _show_replica(output, replica)


def _show_replica(output: Output, replica: NamedReplica) -> None:
    """Show a further replica of the same disks."""
    found = replica.status
    record = found.statistics
    output.line()
    output.headline(
        f"replica {plain(replica.name)}: {found.replication_state} · {record.replication_health}",
        good=record.replication_health in _GOOD,
    )
    for issue in record.replication_health_issues:
        output.line(plain(issue))
    output.fields(_rows(found))


def _rows(found: ReplicationStatus) -> list[tuple[str, object]]:
    record, cycles = found.statistics, found.cycles
    every = None
    if cycles is not None:
        pace = f"every {cycles.interval_s:g} s" if cycles.interval_s else "back to back"
        then = "" if cycles.next_s is None else f", next in {cycles.next_s:.0f} s"
        every = f"to {cycles.to} {pace}{then}"
    done = record.replication_success_count
    sizes = f"{format_size(record.average_replication_size)} on average"
    sizes += f", at most {format_size(record.max_replication_size)}"
    lengths = f"{record.average_replication_latency:.1f} s on average"
    lengths += f", at most {record.max_replication_latency:.1f} s"
    return [
        ("last synchronized", record.last_synchronized_at),
        ("recovery point", found.last_point),
        ("waiting", _waiting(found)),
        ("cycles", every),
        (
            "since " + record.start_statistic_time,
            f"{done} done, {record.replication_miss_count} missed, {record.replication_failure_count} failed",
        ),
        ("sizes", sizes if record.max_replication_size else None),
        ("lengths", lengths if record.max_replication_latency else None),
    ]


def _waiting(found: ReplicationStatus) -> str:
    count = len(found.pending)
    most = "at most " if any(disk.journal is not None for disk in found.disks) else ""
    size = format_size(found.statistics.pending_replication_size)
    return f"{count} cut{'' if count == 1 else 's'}, {most}{size}"


def _tracked(disk: DiskStatus) -> tuple[str, str]:
    if disk.tracking is not None:
        return format_size(disk.tracking.dirty_bytes), disk.tracking.log_state
    if disk.journal is not None:
        state = "journal left clean" if disk.journal.clean else "journal left unclean"
        return f"at most {format_size(disk.journal.marked_bytes)}", state
    return "", ""
