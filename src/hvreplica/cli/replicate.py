"""`replicate`: ship a VM's disks, or what changed of them, to the replica."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import hvreplica
from hvreplica.cli.options import ADDRESS, PATH, option, tls_option, verb, vm_option
from hvreplica.cli.progress import progress_shown
from hvreplica.cli.render import plain, ratio
from hvreplica.units import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output
    from hvreplica.replication.results import ReplicateResult

_HEADLINES = {"initial": "initial replication", "delta": "changes replicated"}


@click.command(short_help="Bring the replica of a VM up to date.")
@vm_option
@option(
    "--disk",
    "disks",
    type=PATH,
    required=True,
    multiple=True,
    metavar="FILE",
    help="A disk of the VM; repeat it for each one, always in the same order.",
)
@option(
    "--to",
    type=ADDRESS,
    required=True,
    envvar="HVREPLICA_TO",
    metavar="HOST:PORT",
    help="Where `serve` listens.",
)
@tls_option
@option(
    "--state",
    type=PATH,
    required=True,
    envvar="HVREPLICA_STATE",
    metavar="DIR",
    help="What this side remembers between runs; made where it is absent, never shared by two VMs' copies.",
)
@option("--once", is_flag=True, help="Run one cycle and end.")
@option(
    "--compression",
    type=click.Choice(["auto", "zstd", "lz4", "none"]),
    default="auto",
    show_default=True,
    help="auto picks per frame what link and processor can do.",
)
@option(
    "--connections",
    type=click.IntRange(1, 16),
    default=2,
    show_default=True,
    help="Parallel connections for data.",
)
@option("--resync", is_flag=True, help="Trust no record: compare every block with the replica's.")
@option(
    "--takeover", is_flag=True, help="Become the VM's primary although another one owns it at the replica."
)
@verb
def replicate(
    output: Output,
    *,
    vm: str,
    disks: tuple[Path, ...],
    once: bool,
    **settings: Any,
) -> None:
    """Bring the replica of a VM up to date.

    The first run ships the disks, each later one what changed since, as an [MS-HRL] log. A run that was cut
    off is continued by the next one.

    A log stands in STATE/logs until the replica has acknowledged it, and is removed then: in the JSON
    answer, logs[].path names where it stood.
    """
    if not once:
        message = "pass --once: it runs one cycle and ends, and is the only mode there is"
        raise click.UsageError(message, click.get_current_context())
    from hvreplica.cli.diagnostics import logging_shown  # noqa: PLC0415 - the start-up time of --help

    _check(vm, disks)
    level = "error" if output.quiet else "warning"
    with logging_shown(level, as_json=output.json), progress_shown(output) as progress:
        result = hvreplica.replicate(vm, disks, progress=progress, **settings)
    output.answer(result, lambda: show_result(output, result))


def _check(vm: str, disks: tuple[Path, ...]) -> None:
    from hvreplica.formats.messages import VM_NAME_CHARS_MAX  # noqa: PLC0415 - as above

    context = click.get_current_context()
    if not 1 <= len(vm) <= VM_NAME_CHARS_MAX:
        message = f"a VM's name has 1 to {VM_NAME_CHARS_MAX} characters"
        raise click.UsageError(message, context)
    if len({disk.absolute() for disk in disks}) != len(disks):
        message = "a disk is named twice"
        raise click.UsageError(message, context)


def show_result(output: Output, result: ReplicateResult) -> None:
    """Show a result to a person: what was done, the point, and the disks where something was shipped."""
    if result.kind == "none":
        output.line(f"{plain(result.vm)}: nothing changed · {result.seconds:.1f} s")
        output.line(f"recovery point {result.point}")
        return
    changed = sum(disk.changed_bytes for disk in result.disks)
    shrunk = ratio(changed, result.wire_bytes)
    words = _HEADLINES.get(result.kind, result.kind)
    output.line(
        f"{plain(result.vm)}: {words} in {result.seconds:.1f} s · {format_size(changed)} changed"
        f" · {format_size(result.wire_bytes)} sent" + (f" ({shrunk})" if shrunk else "")
    )
    output.line(f"recovery point {result.point}")
    output.line()
    output.table(
        ("disk", ">size", ">changed"),
        [
            (disk.path, format_size(disk.virtual_bytes), format_size(disk.changed_bytes))
            for disk in result.disks
        ],
    )
