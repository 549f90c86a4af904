"""`store`: what a replica's folder holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import hvreplica
from hvreplica.cli.options import store_option, verb
from hvreplica.cli.render import moment, plain
from hvreplica.units import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output
    from hvreplica.store import StoreStatus, VmStatus


@click.group()
def store() -> None:
    """Look into a replica's store."""


@store.command(short_help="Show every VM in the store.")
@store_option
@verb
def status(output: Output, store: Path) -> None:
    """Show every VM in the store: its state, newest point and size. Works while `serve` runs."""
    found = hvreplica.store_status(store)
    output.answer(found, lambda: _show(output, found))


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
        for damage in vm.damage:
            output.line(f"{plain(vm.name)}: DAMAGED: {plain(damage)}")


def _row(vm: VmStatus) -> tuple[object, ...]:
    newest = vm.points[-1] if vm.points else None
    return (
        vm.name,
        vm.phase,
        len(vm.disks),
        format_size(sum(disk.virtual_bytes for disk in vm.disks)),
        format_size(sum(disk.file_bytes or 0 for disk in vm.disks)),
        len(vm.points),
        moment(newest.instant_s) if newest else None,
        newest.id if newest else None,
    )
