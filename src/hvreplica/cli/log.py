"""`log`: look into .hrl logs, check them, apply them to a disk, make them of other sources of change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import hvreplica
from hvreplica.cli.log_sources import from_child, from_qemu, import_logs
from hvreplica.cli.options import PATH, verb
from hvreplica.cli.progress import progress_shown

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output

_LOG = click.argument("file", type=PATH, metavar="FILE.hrl")


@click.group(short_help="Look into .hrl logs, check, apply and make them.")
def log() -> None:
    """Look into .hrl logs ([MS-HRL]), check, apply and make them, and take those of other programs."""


@log.command()
@_LOG
@verb
def info(output: Output, file: Path) -> None:
    """Show a log's header."""
    found = hvreplica.log_info(file)
    output.answer(found, lambda: output.structure(found))


@log.command(short_help="Check a closed log whole.")
@_LOG
@verb
def verify(output: Output, file: Path) -> None:
    """Check a closed log whole: structure, checksums, bounds and the checksum of every write's data."""
    with progress_shown(output) as progress:
        report = hvreplica.log_verify(file, progress=progress)
    output.answer(report, lambda: output.structure(report))


@log.command(short_help="Write into a disk what a log holds.")
@_LOG
@click.argument("disk", type=PATH)
@verb
def apply(output: Output, file: Path, disk: Path) -> None:
    """Write into DISK what the log holds, the newest write of each place; the data is checked first.

    It may be cut off and repeated at any time with the same outcome.
    """
    with progress_shown(output) as progress:
        report = hvreplica.log_apply(file, disk, progress=progress)
    output.answer(report, lambda: output.structure(report))


@log.command(short_help="List every write in a log.")
@_LOG
@verb
def dump(output: Output, file: Path) -> None:
    """List every write in the log, oldest first, as it is read.

    --json writes an array, one element a line.
    """
    entries = hvreplica.log_dump(file)
    if output.json:
        output.stream_json(entries)
        return
    output.stream_structures(entries)


@log.command(short_help="Close a log whose writer died.")
@_LOG
@verb
def recover(output: Output, file: Path) -> None:
    """Close a log whose writer died after its last complete metadata block; a torn end is reported."""
    report = hvreplica.log_recover(file)
    output.answer(report, lambda: output.structure(report))


log.add_command(from_child)
log.add_command(from_qemu)
log.add_command(import_logs)
