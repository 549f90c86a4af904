"""`failover`: run a VM from its replica, to test it, because its primary is lost, or planned; and back."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import click

import hvreplica
from hvreplica.cli.exit import INTERRUPTED, Signalled
from hvreplica.cli.options import (
    ADDRESS,
    PATH,
    POINT_HELP,
    link_options,
    option,
    store_option,
    verb,
    vm_option,
)
from hvreplica.cli.policy_options import point_options
from hvreplica.cli.progress import progress_shown
from hvreplica.cli.render import plain
from hvreplica.cli.replicate import show_gone
from hvreplica.cli.serve import run_until_signal
from hvreplica.units import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output
    from hvreplica.replication.firedrill_server import FiredrillServer
    from hvreplica.replication.reverse_verb import ReverseResult
    from hvreplica.store import FailoverStatus

_WORDS = {
    "Replicating": "the replica follows its primary",
    "PreparedForFailover": "the primary is off, and everything of it is here",
    "FailedOverWaitingCompletion": "failed over, may still be cancelled",
    "FailedOver": "failed over, for good",
}


@click.group()
def failover() -> None:
    """Run a VM from its replica: at any point, and back."""


@failover.command("test", short_help="Serve a point to a test VM, while replication goes on.")
@store_option
@vm_option
@option(
    "--point",
    metavar="POINT",
    help=f"{POINT_HELP}  [default: that of the test that there is, else latest]",
)
@option(
    "--socket",
    type=PATH,
    metavar="PATH",
    help="The Unix socket where NBD clients connect.  [default: test/nbd.sock in the VM's folder]",
)
@option("--cleanup", is_flag=True, help="End the test: remove what was written to it.")
@verb
def test_(
    output: Output, *, store: Path, vm: str, point: str | None, socket: Path | None, cleanup: bool
) -> None:
    """Serve the disks of a point over NBD to a test VM, while replication goes on.

    The exports are named 0, 1 and so on; an empty name means the first. What the test VM writes stays for the
    next call, and is removed with --cleanup. One test at a time for each VM; its point is not dropped before.

    Prints where it listens once it does. SIGTERM ends it cleanly with exit code 0, Ctrl-C with 130.
    """
    context = click.get_current_context()
    if cleanup and socket is not None:
        raise click.UsageError("--socket serves a test, --cleanup ends it: one of both", context)
    if cleanup:
        found = hvreplica.failover_test_cleanup(store, vm)
        output.answer(found, lambda: show_failover(output, found))
        return
    number = 0
    try:
        with hvreplica.FiredrillServer(store, vm, socket=socket, point=point) as served:
            number = run_until_signal(served, lambda: _tell_ready(output, served))
    except Signalled as signalled:  # before it served
        number = signalled.number
    if number == signal.SIGINT:
        context.exit(INTERRUPTED)
    if number not in (0, signal.SIGTERM):
        raise Signalled(number)


def _tell_ready(output: Output, served: FiredrillServer) -> None:
    if output.json:
        output.write_json_line(
            {
                "event": "listening",
                "addresses": [str(served.address)],
                "point": str(served.point),
                "exports": [str(index) for index in served.disks],
            }
        )
    else:
        output.line(f"listening on {plain(served.address)}, test failover of point {served.point}")
    output.flush()


@failover.command(short_help="Make the replica the active side, its primary being lost.")
@store_option
@vm_option
@option("--point", default="latest", show_default=True, metavar="POINT", help=POINT_HELP)
@option("--force", is_flag=True, help="Take a point that is marked damaged, too.")
@verb
def unplanned(output: Output, *, store: Path, vm: str, point: str, force: bool) -> None:
    """Make the replica the active side, for a primary that is lost. Make sure that it is really off.

    What was received is applied first. Then each disk gets an empty child, active/0.vhdx in the VM's folder,
    to run the VM from; the replica's own disks stay as they are. From now on the primary is refused. Ends
    with `failover commit` or `failover cancel`; cut anywhere, the same call goes on.
    """
    with progress_shown(output) as progress:
        found = hvreplica.failover_unplanned(store, vm, point=point, force=force, progress=progress)
    output.answer(found, lambda: show_failover(output, found))


@failover.command(short_help="Make the replica the active side, its primary being prepared.")
@store_option
@vm_option
@verb
def planned(output: Output, *, store: Path, vm: str) -> None:
    """Make the replica the active side without loss, after `replicate --prepare-failover` at the primary.

    Refused where the primary has not been prepared, or goes on since. Then `failover reverse` makes this side
    the primary; cut anywhere, the same call goes on.
    """
    with progress_shown(output) as progress:
        found = hvreplica.failover_planned(store, vm, progress=progress)
    output.answer(found, lambda: show_failover(output, found))


@failover.command(short_help="Take a failover back, or choose another point.")
@store_option
@vm_option
@option("--point", metavar="POINT", help=f"Fail over to this point instead: {POINT_HELP}")
@option("--force", is_flag=True, help="Lose what was written to the active disks.")
@verb
def cancel(output: Output, *, store: Path, vm: str, point: str | None, force: bool) -> None:
    """Take a failover back: the active disks go, and the primary may replicate again.

    Refused where the active disks hold writes, saying how many bytes would be lost, unless --force.
    """
    with progress_shown(output) as progress:
        found = hvreplica.failover_cancel(store, vm, point=point, force=force, progress=progress)
    output.answer(found, lambda: show_failover(output, found))


@failover.command(short_help="Make a failover final.")
@store_option
@vm_option
@option("--delete-points", is_flag=True, help="Let go of all points but the newest.")
@verb
def commit(output: Output, *, store: Path, vm: str, delete_points: bool) -> None:
    """Make a failover final: it cannot be cancelled any more. Recovery points stay."""
    found = hvreplica.failover_commit(store, vm, delete_points=delete_points)
    output.answer(found, lambda: show_failover(output, found))


@failover.command(short_help="Become the primary: the old one takes only what differs.")
@store_option
@vm_option
@option(
    "--to",
    type=ADDRESS,
    required=True,
    envvar="HVREPLICA_TO",
    metavar="HOST:PORT",
    help="Where `serve` listens at the old site, on the store that `store adopt` made there.",
)
@option(
    "--tls",
    type=PATH,
    required=True,
    envvar="HVREPLICA_TLS",
    metavar="DIR",
    help="The folder with the certificates, as `tls init` makes it.",
)
@option(
    "--state",
    type=PATH,
    metavar="DIR",
    help="What this side remembers as the primary; the folder `primary` beside the VM's disks by default.",
)
@point_options
@link_options
@verb
def reverse(output: Output, *, store: Path, vm: str, **settings: Any) -> None:
    """Make this side the primary of a VM that was failed over here, and its old primary the replica.

    Before: `store adopt` and `serve` at the old site. The VM must be off while this runs. What travels is
    what either side wrote since the two went apart, as one log that the old site can undo. Then serve
    the active disks with `capture --state`, or call `replicate` as usual. The old site keeps recovery points
    as this one did, unless told otherwise. Cut anywhere, the same call goes on.
    """
    with progress_shown(output) as progress:
        found = hvreplica.failover_reverse(store, vm, progress=progress, **settings)
    output.answer(found, lambda: _show_reversed(output, found))


def _show_reversed(output: Output, found: ReverseResult) -> None:
    output.headline(f"{plain(found.vm)}: this site is the primary now", good=True)
    if found.union_bytes is not None:
        output.line(f"either side wrote {format_size(found.union_bytes)} since they went apart")
    if found.compared:
        output.line(f"compared as a whole: disk {', '.join(map(str, found.compared))}")
    output.fields(
        [
            ("shipped", f"{format_size(found.changed_bytes)} changed, {format_size(found.wire_bytes)} sent"),
            ("point", found.point),
            ("state folder", plain(found.state)),
        ]
    )
    for path in found.disks:
        output.line(f"  {plain(path)}")
    show_gone(output, found)


@failover.command(short_help="Show where a failover stands.")
@store_option
@vm_option
@verb
def status(output: Output, *, store: Path, vm: str) -> None:
    """Show where a failover of a VM stands, which disks to run it from, and what may follow."""
    found = hvreplica.failover_status(store, vm)
    output.answer(found, lambda: show_failover(output, found))


def _type_words(found: FailoverStatus) -> str:
    return "the first copy" if found.point_type == "initial" else str(found.point_type)


def show_failover(output: Output, found: FailoverStatus) -> None:
    """Show where a failover stands to a person."""
    words = _WORDS[found.state] if found.mode == "Replica" else "this site is the primary"
    output.headline(f"{plain(found.vm)}: {found.state} · {found.mode} · {words}", good=not found.unfinished)
    if found.unfinished is not None:
        output.line(f"`{found.possible[0]}` was cut before its end ({found.unfinished}); call it again")
    output.fields(
        [
            ("point", None if found.point is None else f"{found.point} ({_type_words(found)})"),
            ("since", found.since),
            ("generation", found.generation or None),
            ("may follow", ", ".join(found.possible) or None),
        ]
    )
    if found.disks:
        output.table(
            (">disk", "run the VM from", ">size", ">written here"),
            [
                (
                    disk.index,
                    plain(disk.path),
                    format_size(disk.virtual_bytes),
                    "?" if disk.written_bytes is None else format_size(disk.written_bytes),
                )
                for disk in found.disks
            ],
        )
    if found.test is not None:
        output.line(f"{found.test.state}: point {found.test.point} since {found.test.since}")
        for path in found.test.disks:
            output.line(f"  {plain(path)}")
