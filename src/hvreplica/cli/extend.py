"""`extend`: ship a replica's newest point on to a further site."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import hvreplica
from hvreplica.cli.options import (
    ADDRESS,
    DURATION,
    PATH,
    cycle_options,
    link_options,
    option,
    store_option,
    tls_option,
    verb,
    vm_option,
)
from hvreplica.cli.policy_options import point_options
from hvreplica.cli.progress import progress_shown
from hvreplica.cli.replicate import run_cycles, show_result

if TYPE_CHECKING:
    from hvreplica.cli.render import Output


@click.command(short_help="Feed a further replica, at a third site, from this one.")
@store_option
@vm_option
@option(
    "--to",
    type=ADDRESS,
    required=True,
    envvar="HVREPLICA_TO",
    metavar="HOST:PORT",
    help="Where `serve` listens at the further site.",
)
@tls_option
@option(
    "--state",
    type=PATH,
    metavar="DIR",
    help="What is remembered between runs; one for each further site.  [default: <vm folder>/extended]",
)
@option("--once", is_flag=True, help="Run one cycle and end.")
@cycle_options
@option(
    "--hold",
    "hold_s",
    type=DURATION,
    default="7d",
    show_default=True,
    metavar="DURATION",
    help="How long the store keeps what was shipped last for the next cycle; 0s for not at all.",
)
@point_options
@link_options
@option("--resync", is_flag=True, help="Trust no record: compare every block with the further replica's.")
@option(
    "--takeover",
    is_flag=True,
    help="Become the VM's primary there although another one owns it at the further replica.",
)
@option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="What is logged to stderr.  [default: info, a line for each cycle; with --once warning]",
)
@verb
def extend(
    output: Output,
    *,
    once: bool,
    interval_s: float | None,
    continuous: bool,
    metrics: str | None,
    resync: bool,
    takeover: bool,
    log_level: str | None,
    **settings: Any,
) -> None:
    """Feed a further replica, at a third site, from the one in this store.

    The first run ships the newest recovery point, each later one what changed from then to the newest of now;
    nothing where there is no newer one. What comes between is not shipped, so the further site may have a
    longer interval and other points. The point made there shows the same instant and is as consistent. The
    primary knows nothing of it, and replication to this store goes on meanwhile.

    --recovery-points, --keep and the like are for the further site.

    With --once it runs one cycle and ends. Without --once it runs cycles until it is stopped: SIGTERM ends
    it cleanly with exit code 0, Ctrl-C with 130. A run that was cut off is continued by the next one.
    """
    cycles: dict[str, Any] = {"interval_s": interval_s, "continuous": continuous, "metrics": metrics}
    _check(cycles, once=once, resync=resync or takeover)
    if not once:
        level = log_level or ("warning" if output.quiet else "info")
        run_cycles(output, lambda: hvreplica.Extender(**settings, **cycles), level=level)
        return
    from hvreplica.cli.diagnostics import logging_shown  # noqa: PLC0415 - the start-up time of --help

    level = log_level or ("error" if output.quiet else "warning")
    with logging_shown(level, as_json=output.json), progress_shown(output) as progress:
        result = hvreplica.extend(progress=progress, resync=resync, takeover=takeover, **settings)
    output.answer(result, lambda: show_result(output, result))


def _check(cycles: dict[str, Any], *, once: bool, resync: bool) -> None:
    message = None
    if once and any(cycles.values()):
        message = "--interval, --continuous and --metrics are for runs without --once"
    elif not once and resync:
        message = "--resync and --takeover belong to one cycle: pass --once"
    elif cycles["continuous"] and cycles["interval_s"] is not None:
        message = "--interval and --continuous exclude each other"
    if message is not None:
        raise click.UsageError(message, click.get_current_context())
