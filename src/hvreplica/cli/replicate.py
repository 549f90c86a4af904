"""`replicate`: ship a VM's disks, or what changed of them, to the replica."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import click

import hvreplica
from hvreplica.cli.exit import INTERRUPTED, Signalled
from hvreplica.cli.options import (
    ADDRESS,
    PATH,
    cycle_options,
    disk_options,
    link_options,
    option,
    verb,
    vm_option,
)
from hvreplica.cli.policy_options import point_options
from hvreplica.cli.progress import progress_shown
from hvreplica.cli.render import plain, ratio
from hvreplica.cli.serve import run_until_signal
from hvreplica.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hvreplica.cli.render import Output
    from hvreplica.replication.results import ReplicateResult
    from hvreplica.replication.reverse_verb import ReverseResult

_HEADLINES = {"initial": "initial replication", "delta": "changes replicated"}


@click.command(short_help="Bring the replica of a VM up to date.")
@vm_option
@disk_options
@option(
    "--to",
    type=ADDRESS,
    envvar="HVREPLICA_TO",
    metavar="HOST:PORT",
    help="Where `serve` listens. Needed unless a running `capture` knows it.",
)
@option(
    "--tls",
    type=PATH,
    envvar="HVREPLICA_TLS",
    metavar="DIR",
    help="The folder with the certificates, as `tls init` makes it. Belongs to --to.",
)
@option(
    "--state",
    type=PATH,
    required=True,
    envvar="HVREPLICA_STATE",
    metavar="DIR",
    help="What this side remembers between runs; made where it is absent, never shared by two VMs' copies.",
)
@option("--once", is_flag=True, help="Run one cycle and end.")
@cycle_options
@point_options
@link_options
@option(
    "--app-consistent",
    is_flag=True,
    help="With --once: call the point app-consistent, because you brought to rest what runs in the guest. A"
    " first copy is not called so.",
)
@option("--resync", is_flag=True, help="Trust no record: compare every block with the replica's.")
@option(
    "--takeover", is_flag=True, help="Become the VM's primary although another one owns it at the replica."
)
@option(
    "--prepare-failover",
    "prepare",
    is_flag=True,
    help="The VM is off: ship its last changes and hold it here, for `failover planned` at the replica.",
)
@option("--cancel-prepare", is_flag=True, help="Let a VM that is held for a planned failover run here again.")
@option(
    "--force",
    is_flag=True,
    help="With --prepare-failover: cut off the clients of a running `capture`. With --cancel-prepare: do not"
    " ask the replica whether it was promoted.",
)
@option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="What is logged to stderr.  [default: info, a line for each cycle; with --once warning]",
)
@verb
def replicate(  # noqa: PLR0913 - the options of the verb
    output: Output,
    *,
    vm: str,
    disks: tuple[Path, ...],
    once: bool,
    interval_s: float | None,
    continuous: bool,
    metrics: str | None,
    app_consistent: bool,
    resync: bool,
    takeover: bool,
    prepare: bool,
    cancel_prepare: bool,
    force: bool,
    log_level: str | None,
    **settings: Any,
) -> None:
    """Bring the replica of a VM up to date.

    The first run ships the disks, each later one what changed since, as an [MS-HRL] log. A run that was cut
    off is continued by the next one.

    With --prepare-failover, for a VM that is off, it runs a last cycle and holds the VM: neither `capture`
    nor `replicate` starts for it until --cancel-prepare. `failover planned` there then loses nothing.

    With --once it runs one cycle and ends. While `capture` serves the VM, its process runs the cycle, from
    the writes that it knows. Otherwise the disks are compared with what the replica has, and must not change
    meanwhile. Without --once it runs cycles until it is stopped, each one comparing the disks anew: SIGTERM
    ends it cleanly with exit code 0, Ctrl-C with 130.

    A log stands in STATE/logs until the replica has acknowledged it, and is removed then: in the JSON
    answer, logs[].path names where it stood.
    """
    check_disks(vm, disks)
    _check_failover(prepare=prepare, cancel_prepare=cancel_prepare, force=force)
    if cancel_prepare:
        _cancel(output, settings, force=force)
        return
    once = once or prepare
    cycles: dict[str, Any] = {"interval_s": interval_s, "continuous": continuous, "metrics": metrics}
    _check(settings, cycles, once=once, resync=resync or takeover, app_consistent=app_consistent)
    if not once:
        level = log_level or ("warning" if output.quiet else "info")
        run_cycles(output, lambda: hvreplica.Replicator(vm, disks, **settings, **cycles), level=level)
        return
    from hvreplica.cli.diagnostics import logging_shown  # noqa: PLC0415 - the start-up time of --help

    level = log_level or ("error" if output.quiet else "warning")
    with logging_shown(level, as_json=output.json), progress_shown(output) as progress:
        result = hvreplica.replicate(
            vm,
            disks,
            progress=progress,
            resync=resync,
            takeover=takeover,
            prepare=prepare,
            force=force,
            app_consistent=app_consistent,
            **settings,
        )
    output.answer(result, lambda: show_result(output, result))


def _check_failover(*, prepare: bool, cancel_prepare: bool, force: bool) -> None:
    message = None
    if prepare and cancel_prepare:
        message = "--prepare-failover and --cancel-prepare exclude each other"
    elif force and not (prepare or cancel_prepare):
        message = "--force belongs to --prepare-failover or --cancel-prepare"
    if message is not None:
        raise click.UsageError(message, click.get_current_context())


def _cancel(output: Output, settings: dict[str, Any], *, force: bool) -> None:
    if (settings["to"] is None) != (settings["tls"] is None):
        message = "--to and --tls belong together"
        raise click.UsageError(message, click.get_current_context())
    found = hvreplica.cancel_prepare(settings["state"], to=settings["to"], tls=settings["tls"], force=force)
    output.answer(found, lambda: output.line(f"{plain(found.vm)}: {found.replication_state}"))


def _check(
    settings: dict[str, Any], cycles: dict[str, Any], *, once: bool, resync: bool, app_consistent: bool
) -> None:
    message = None
    if (settings["to"] is None) != (settings["tls"] is None):
        message = "--to and --tls belong together"
    elif once and (cycles["interval_s"] is not None or cycles["continuous"] or cycles["metrics"]):
        message = "--interval, --continuous and --metrics are for runs without --once"
    elif not once and resync:
        message = "--resync and --takeover belong to one cycle: pass --once"
    elif not once and app_consistent:
        message = "--app-consistent belongs to one cycle: pass --once"
    elif not once and settings["to"] is None:
        message = "say where the replica is, with --to and --tls"
    elif cycles["continuous"] and cycles["interval_s"] is not None:
        message = "--interval and --continuous exclude each other"
    if message is not None:
        raise click.UsageError(message, click.get_current_context())


def run_cycles(
    output: Output, make: Callable[[], hvreplica.Replicator | hvreplica.Extender], *, level: str
) -> None:
    """Run cycles until a signal ends them, and leave as it asks. make: takes the state folder."""
    from hvreplica.cli.diagnostics import logging_shown  # noqa: PLC0415 - as above

    number = 0
    try:
        with logging_shown(level, as_json=output.json), make() as cycles:
            number = run_until_signal(cycles, lambda: _tell_running(output, cycles.metrics_address))
    except Signalled as signalled:
        number = signalled.number
    if number == signal.SIGINT:
        click.get_current_context().exit(INTERRUPTED)
    if number not in (0, signal.SIGTERM):
        raise Signalled(number)


def _tell_running(output: Output, metrics: str | None) -> None:
    if output.json:
        output.write_json_line({"event": "replicating", "metrics": metrics})
    elif metrics is not None:
        output.line(f"measurements at http://{metrics}/metrics")
    output.flush()


def check_disks(vm: str, disks: tuple[Path, ...]) -> None:
    """Refuse a VM's name and disks that cannot be. Raises: UsageError."""
    from hvreplica.replication.opening import check_vm  # noqa: PLC0415 - as above

    try:
        check_vm(vm, disks)
    except ValueError as error:
        raise click.UsageError(str(error), click.get_current_context()) from None


def show_result(output: Output, result: ReplicateResult) -> None:
    """Show a result to a person: what was done, the point, and the disks where something was shipped."""
    if result.prepared:
        output.line(f"{plain(result.vm)} is held here for a planned failover")
    if result.kind == "none":
        output.line(f"{plain(result.vm)}: nothing changed · {result.seconds:.1f} s")
        _show_points(output, result)
        return
    changed = sum(disk.changed_bytes for disk in result.disks)
    shrunk = ratio(changed, result.wire_bytes)
    words = _HEADLINES.get(result.kind, result.kind)
    output.line(
        f"{plain(result.vm)}: {words} in {result.seconds:.1f} s · {format_size(changed)} changed"
        f" · {format_size(result.wire_bytes)} sent" + (f" ({shrunk})" if shrunk else "")
    )
    _show_points(output, result)
    output.line()
    output.table(
        ("disk", ">size", ">changed"),
        [
            (disk.path, format_size(disk.virtual_bytes), format_size(disk.changed_bytes))
            for disk in result.disks
        ],
    )


def _show_points(output: Output, result: ReplicateResult) -> None:
    output.line(f"recovery point {result.point}")
    if result.waits_for is not None:
        output.line(f"the replica applies it later: {plain(result.waits_for)}")
    show_gone(output, result)


def show_gone(output: Output, result: ReplicateResult | ReverseResult) -> None:
    """Show a person which points the replica let go, and which ones it will."""
    for point in result.gone:
        output.line(f"the replica let point {point.id} of {point.instant} go: {plain(point.reason)}")
    if result.warning is not None:
        output.line(f"at the replica {plain(result.warning)}")
