"""`store`: what a replica's folder holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import hvreplica
from hvreplica.cli.options import PATH, SIZE, option, store_option, verb, vm_option
from hvreplica.cli.progress import progress_shown
from hvreplica.cli.render import moment, plain
from hvreplica.units import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output
    from hvreplica.store import StoreStatus, StoreVerdict, VmStatus, VmVerdict
    from hvreplica.store.adoption import AdoptReport

DAMAGE_FOUND = 1  # the exit code where a verification found what it was to look for


@click.group()
def store() -> None:
    """Look into a replica's store, and put an old primary into it."""


@store.command(short_help="Show every VM in the store.")
@store_option
@verb
def status(output: Output, store: Path) -> None:
    """Show every VM in the store: its state, newest point and size. Works while `serve` runs."""
    found = hvreplica.store_status(store)
    output.answer(found, lambda: _show(output, found))


@store.command(short_help="Read everything again and tell what is damaged.")
@store_option
@option("--vm", metavar="NAME", help="Only this VM.  [default: all]")
@option("--rate-limit", type=SIZE, metavar="SIZE", help="How much to read in a second.")
@verb
def verify(output: Output, *, store: Path, vm: str | None, rate_limit: int | None) -> None:
    """Read everything again, tell what is damaged, and mark the recovery points that show it.

    Works while `serve` runs, and goes on where an earlier call was ended. The exit code is 1 where damage was
    found. What is damaged of a newest point is put right by the primary's next `replicate`, where it still
    can.
    """
    with progress_shown(output) as progress:
        found = hvreplica.store_verify(store, vm=vm, rate_limit=rate_limit, progress=progress)
    output.answer(found, lambda: _show_verdicts(output, found))
    if found.is_damaged:
        click.get_current_context().exit(DAMAGE_FOUND)


def _show_verdicts(output: Output, found: StoreVerdict) -> None:
    for verdict in found.vms:
        show_verdict(output, verdict)


def show_verdict(output: Output, verdict: VmVerdict) -> None:
    """Tell what reading a VM again has found."""
    counts = {state: sum(point.state == state for point in verdict.points) for state in ("ok", "damaged")}
    unproven = len(verdict.points) - sum(counts.values())
    sound = "1 point is" if counts["ok"] == 1 else f"{counts['ok']} points are"
    text = f"{plain(verdict.vm)}: {sound} sound, {counts['damaged']} damaged"
    if unproven:
        text += f", {unproven} have no digest yet"
    output.line(f"{text}; {format_size(verdict.read_bytes)} read")
    for point in verdict.points:
        if point.state == "damaged":
            output.line(f"  point {point.id}: DAMAGED: {plain(point.reason or '')}")
    for sentence in verdict.damage:
        output.line(f"  DAMAGED: {plain(sentence)}")
    for path in verdict.unknown_files:
        output.line(f"  {plain(path)}: nothing speaks of this file")


@store.command(short_help="Make a replica of the disks of an old primary.")
@store_option
@vm_option
@option(
    "--state",
    type=PATH,
    metavar="DIR",
    help="The state folder that `capture` or `replicate` had for the VM at this site.",
)
@option("--unknown", is_flag=True, help="The state folder is lost: compare everything later. Needs --disk.")
@option(
    "--disk",
    "disks",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="With --unknown: a disk of the VM; each one, in the order in which they were replicated.",
)
@verb
def adopt(
    output: Output,
    *,
    store: Path,
    vm: str,
    state: Path | None,
    unknown: bool,
    disks: tuple[Path, ...],
) -> None:
    """Make a replica of the disks of an old primary, whose VM was failed over to another site.

    The VM must be off here. Its disks move into the store, so that nothing starts them by accident; a file
    DISK.moved.txt beside each old name says where it went. What was written here after the last cut that the
    other site has is a recovery point of its own, and is told to the other site when `failover reverse` runs
    there: only what differs travels. Works while `serve` runs; cut off, the same call goes on.
    """
    if (state is None) != unknown or bool(disks) != unknown:
        message = "give either --state DIR, or --unknown with each --disk"
        raise click.UsageError(message, click.get_current_context())
    with progress_shown(output) as progress:
        report = hvreplica.store_adopt(
            store, vm, state=state, disks=disks, unknown=unknown, progress=progress
        )
    output.answer(report, lambda: _show_adopted(output, report))


def _show_adopted(output: Output, report: AdoptReport) -> None:
    output.line(f"{plain(report.vm)} is a replica in {plain(report.store)} now, at point {report.point}")
    if report.known:
        output.line(f"at most {format_size(report.changed_bytes)} were written here alone")
    else:
        output.line("what was written here alone is not known: everything will be compared")
    for path in report.disks:
        output.line(f"  {plain(path)}")


def _show(output: Output, found: StoreStatus) -> None:
    count = f"{len(found.vms)} VM" + ("" if len(found.vms) == 1 else "s")
    output.line(f"{plain(found.root)}: {count}, {format_size(found.free_bytes)} free")
    if not found.vms:
        return
    output.line()
    output.table(
        ("vm", "phase", ">disks", ">size", ">on disk", ">points", "newest point", "id"),
        [_row(vm) for vm in found.vms],
    )
    for vm in found.vms:
        if vm.transfer is not None:
            done, total = format_size(vm.transfer.durable_bytes), format_size(vm.transfer.total_bytes)
            output.line(f"{plain(vm.name)}: {vm.transfer.kind} transfer, {done} of {total} are safe here")
        if vm.phase == "waiting":
            output.line(f"{plain(vm.name)}: the whole copy is here and waits for the first cut to be a point")
        if vm.joining is not None:
            done, total = format_size(vm.joining.durable_bytes), format_size(vm.joining.total_bytes)
            output.line(f"{plain(vm.name)}: added disks, {done} of {total} are safe here")
        if vm.spool_bytes:
            output.line(f"{plain(vm.name)}: {format_size(vm.spool_bytes)} of logs wait to be applied")
        if vm.waits_for is not None:
            output.line(f"{plain(vm.name)}: {plain(vm.waits_for)}")
        if vm.kept_logs:
            count = f"{vm.kept_logs} applied log" + ("" if vm.kept_logs == 1 else "s")
            taken = format_size(vm.kept_log_bytes)
            output.line(f"{plain(vm.name)}: {count} kept for points between cycles, {taken}, in no budget")
        if vm.failover != "Replicating":
            output.line(f"{plain(vm.name)}: {vm.failover}; see `hvreplica failover status`")
        if vm.test is not None:
            output.line(f"{plain(vm.name)}: a test failover of point {vm.test}")
        for warning in vm.warnings:
            output.line(f"{plain(vm.name)}: {plain(warning)}")
        for damage in vm.damage:
            output.line(f"{plain(vm.name)}: DAMAGED: {plain(damage)}")


def _row(vm: VmStatus) -> tuple[object, ...]:
    newest = vm.points[-1] if vm.points else None
    disks = [disk for disk in vm.disks if disk.state != "removed"]
    return (
        vm.name,
        vm.phase,
        len(disks),
        format_size(sum(disk.virtual_bytes for disk in disks)),
        format_size(sum(disk.file_bytes or 0 for disk in vm.disks)),
        len(vm.points),
        moment(newest.instant_s) if newest else None,
        newest.id if newest else None,
    )
