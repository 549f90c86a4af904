"""`point serve` and `point diff`: look into recovery points without copying them."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import click

import hvreplica
from hvreplica.cli.exit import INTERRUPTED, Signalled
from hvreplica.cli.options import PATH, POINT_HELP, option, store_option, verb, vm_option
from hvreplica.cli.render import plain
from hvreplica.cli.serve import run_until_signal
from hvreplica.units import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output
    from hvreplica.replication.point_server import PointServer
    from hvreplica.store import PointDiff


@click.command("serve", short_help="Serve a recovery point's disks over NBD, at once.")
@store_option
@vm_option
@option(
    "--point",
    "which",
    metavar="POINT",
    default="latest",
    show_default=True,
    help=POINT_HELP,
)
@option(
    "--socket", type=PATH, required=True, metavar="PATH", help="The Unix socket where NBD clients connect."
)
@option("--writable", is_flag=True, help="Let clients write; what they write is lost at the end.")
@option(
    "--keep",
    type=PATH,
    metavar="DIR",
    help="With --writable: keep what is written in this folder, as a differencing disk for each disk."
    " The same point is served with it again later.",
)
@verb
def serve_point(
    output: Output, *, store: Path, vm: str, which: str, socket: Path, writable: bool, keep: Path | None
) -> None:
    """Serve the disks of a recovery point over NBD, as the guest sees them, whatever the point's age.

    The exports are named 0, 1 and so on; an empty name means the first. Nothing is copied first, and
    replication goes on. The point is not dropped while it is served.

    Prints where it listens once it does. SIGTERM ends it cleanly with exit code 0, Ctrl-C with 130.
    """
    if keep is not None and not writable:
        raise click.UsageError("--keep needs --writable", click.get_current_context())
    number = 0
    try:
        with hvreplica.PointServer(
            store, vm, point=which, socket=socket, writable=writable, keep=keep
        ) as served:
            number = run_until_signal(served, lambda: _tell_ready(output, served))
    except Signalled as signalled:  # before it served
        number = signalled.number
    if number == signal.SIGINT:
        click.get_current_context().exit(INTERRUPTED)
    if number not in (0, signal.SIGTERM):
        raise Signalled(number)


def _tell_ready(output: Output, served: PointServer) -> None:
    if output.json:
        output.write_json_line(
            {
                "event": "listening",
                "addresses": [str(served.address)],
                "point": str(served.point.id),
                "exports": [str(index) for index in served.point.disks],
            }
        )
    else:
        output.line(f"listening on {plain(served.address)}, point {served.point.id}")
    output.flush()


@click.command(short_help="List the ranges in which two recovery points differ.")
@store_option
@vm_option
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@option("--coarse", is_flag=True, help="List what was written between them, without comparing any bytes.")
@verb
def diff(output: Output, *, store: Path, vm: str, a: str, b: str, coarse: bool) -> None:
    """List the ranges in which the recovery points A and B differ, whichever is older.

    A and B are ids, latest or latest-app. Only what was written between them is looked at, and of that the
    sectors are listed whose bytes differ. Works while `serve` runs.
    """
    found = hvreplica.point_diff(store, vm, a, b, coarse=coarse)
    output.answer(found, lambda: _show(output, found))


def _show(output: Output, found: PointDiff) -> None:
    for disk in found.disks:
        if disk.a_bytes is None or disk.b_bytes is None:
            only = found.a if disk.b_bytes is None else found.b
            output.line(f"disk {disk.disk}: only point {only} has it")
            continue
        output.line(f"disk {disk.disk}: {format_size(disk.changed_bytes)} in {len(disk.ranges)} ranges")
        for offset, length in disk.ranges:
            output.line(f"{offset:>16}  {length}")
