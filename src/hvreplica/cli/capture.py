"""`capture`: serve a VM's disks over NBD, track every write, replicate while the VM runs."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import click

import hvreplica
from hvreplica.cli.exit import INTERRUPTED, Signalled
from hvreplica.cli.options import (
    ADDRESS,
    PATH,
    SIZE,
    cycle_options,
    disk_options,
    link_options,
    option,
    verb,
    vm_option,
)
from hvreplica.cli.policy_options import point_options
from hvreplica.cli.render import plain
from hvreplica.cli.replica_option import ReplicaType
from hvreplica.cli.replicate import check_disks
from hvreplica.cli.serve import run_until_signal

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output
    from hvreplica.replication.capture_verb import Capture


@click.command(short_help="Serve a VM's disks over NBD and track every write.")
@vm_option
@disk_options
@option("--socket", type=PATH, metavar="PATH", help="The Unix socket where NBD clients connect.")
@option("--tcp", type=ADDRESS, metavar="HOST:PORT", help="A TCP port for NBD clients.")
@option(
    "--nbd-tls",
    type=PATH,
    metavar="DIR",
    help="Certificates, as `tls nbd` makes them, for NBD clients on the TCP port; without, it is plain.",
)
@option(
    "--state",
    type=PATH,
    required=True,
    envvar="HVREPLICA_STATE",
    metavar="DIR",
    help="What this side remembers between runs; made where it is absent, never shared by two VMs' copies.",
)
@option("--to", type=ADDRESS, envvar="HVREPLICA_TO", metavar="HOST:PORT", help="Where `serve` listens.")
@option(
    "--tls",
    type=PATH,
    envvar="HVREPLICA_TLS",
    metavar="DIR",
    help="The folder with the certificates for the replica, as `tls init` makes it.",
)
@option(
    "--replica",
    "replicas",
    type=ReplicaType(),
    multiple=True,
    metavar="NAME=HOST:PORT[,SETTING]...",
    help="A further replica, fed by the same tracking, with a state folder of its own, DIR/replicas/NAME;"
    " repeat it for each one. Settings: interval=SECONDS, continuous, tls=DIR, recovery-points,"
    " recovery-point-every, points-budget, keep-logs.",
)
@option(
    "--remove-replica",
    "remove_replicas",
    multiple=True,
    metavar="NAME",
    help="A further replica that is to be fed no longer; what it holds stays.",
)
@cycle_options
@point_options
@link_options
@option(
    "--log-budget",
    type=SIZE,
    help="Most that a disk's log may take between two cuts; beyond it the next cut reads the disk."
    "  [default: a quarter of the disk]",
)
@option("--log-off", is_flag=True, help="Keep no log: each cut reads what changed from the disk.")
@option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What is logged to stderr.",
)
@option("--log-json", is_flag=True, help="Log one JSON object a line.")
@verb
def capture(
    output: Output,
    *,
    vm: str,
    disks: tuple[Path, ...],
    log_budget: int | None,
    log_off: bool,
    log_level: str,
    log_json: bool,
    **settings: Any,
) -> None:
    """Serve a VM's disks over NBD, and know every write.

    The exports are named 0, 1 and so on, and the hypervisor uses them instead of the files. With --to and
    --tls the disks are replicated while the VM runs; without, a cycle runs when `replicate --once` asks for
    it. With --replica there are further replicas, each at its own pace; one that was named once is fed until
    --remove-replica, and `--state DIR/replicas/NAME` names it to other verbs.

    Prints where it listens once it does. SIGTERM ends it cleanly with exit code 0, Ctrl-C with 130. After a
    crash of this process or its host, start it again: only what may have changed is looked at.
    """
    from hvreplica.cli.diagnostics import logging_shown  # noqa: PLC0415

    _check(vm, disks, settings, log_budget=log_budget, log_off=log_off)
    number = 0
    try:
        with (
            logging_shown(log_level, as_json=log_json),
            hvreplica.Capture(vm, disks, log_budget_bytes=0 if log_off else log_budget, **settings) as served,
        ):
            number = run_until_signal(served, lambda: _tell_ready(output, served))
    except Signalled as signalled:  # before it served: while it brought its state in order
        number = signalled.number
    if number == signal.SIGINT:
        click.get_current_context().exit(INTERRUPTED)
    if number not in (0, signal.SIGTERM):
        raise Signalled(number)


def _check(
    vm: str, disks: tuple[Path, ...], settings: dict[str, Any], *, log_budget: int | None, log_off: bool
) -> None:
    check_disks(vm, disks)
    is_for_others = settings["to"] is None and bool(settings["replicas"])  # then --tls is what they share
    message = None
    if settings["socket"] is None and settings["tcp"] is None:
        message = "name --socket or --tcp for NBD clients"
    elif not is_for_others and (settings["to"] is None) != (settings["tls"] is None):
        message = "--to and --tls belong together"
    elif settings["tls"] is None and not all(replica.tls for replica in settings["replicas"]):
        message = "--replica needs certificates: name --tls, or tls=DIR in it"
    elif settings["to"] is None and (settings["continuous"] or settings["interval_s"] is not None):
        message = "cycles need --to and --tls"
    elif settings["continuous"] and settings["interval_s"] is not None:
        message = "--interval and --continuous exclude each other"
    elif settings["nbd_tls"] is not None and settings["tcp"] is None:
        message = "--nbd-tls needs --tcp"
    elif log_off and log_budget is not None:
        message = "--log-budget and --log-off exclude each other"
    if message is not None:
        raise click.UsageError(message, click.get_current_context())


def _tell_ready(output: Output, served: Capture) -> None:
    places = [str(place) for place in served.addresses]
    if output.json:
        ready = {"event": "listening", "addresses": places, "metrics": served.metrics_address}
        output.write_json_line(ready)
    else:
        for place in places:
            output.line(f"listening on {plain(place)}")
        if served.metrics_address is not None:
            output.line(f"measurements at http://{served.metrics_address}/metrics")
    output.flush()
