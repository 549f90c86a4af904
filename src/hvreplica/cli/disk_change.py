"""`disk resize` and `disk compact`: the size of a disk, and that of its file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import hvreplica
from hvreplica.cli.options import DISK_FORMAT, PATH, SIZE, option, parent_option, verb
from hvreplica.cli.progress import progress_shown
from hvreplica.units import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output
    from hvreplica.disk import Format


@click.command(short_help="Give a disk another size.")
@click.argument("file", type=PATH)
@option("--size", "size_bytes", type=SIZE, required=True, help="The size that it gets, as in 10G.")
@option("--format", "format_", type=DISK_FORMAT, help="Format of FILE.  [default: by its content]")
@parent_option
@option("--force", is_flag=True, help="Resize though other disks rest on FILE.")
@verb
def resize(
    output: Output,
    *,
    file: Path,
    size_bytes: int,
    format_: Format | None,
    parent: Path | None,
    force: bool,
) -> None:
    """Make the disk in FILE longer or shorter; the guest's partitions stay as they are.

    What is new reads as zeros. A disk becomes shorter only where it has nothing but zeros; else the error
    names the smallest size that loses nothing. A disk that has children must not be resized: those beside
    it are named, and nothing is done without --force. Cut off, it has its old size or its new one, and the
    same command finishes. A fixed VHD is copied to a new file, which needs as much room again as the data
    in it.
    """
    with progress_shown(output) as progress:
        report = hvreplica.disk_resize(
            file, size_bytes, format=format_, parent=parent, force=force, progress=progress
        )
    output.answer(report, lambda: output.structure(report))


@click.command(short_help="Make the file of a disk as short as it can be.")
@click.argument("file", type=PATH)
@parent_option
@verb
def compact(output: Output, *, file: Path, parent: Path | None) -> None:
    """Make the file of a dynamic or differencing disk as short as it can be; the guest sees no difference.

    Blocks that hold nothing but zeros are given back, others move from the end of the file into gaps, and the
    file is cut. Zero the free space in the guest first, or trim it. Cut off, the same command goes on.
    """
    with progress_shown(output) as progress:
        report = hvreplica.disk_compact(file, parent=parent, progress=progress)

    def show() -> None:
        before, after = format_size(report.file_bytes_before), format_size(report.file_bytes)
        output.line(f"{format_size(report.won_bytes)} won: the file has {after} instead of {before}")
        output.line(f"{report.released_blocks} blocks given back, {format_size(report.moved_bytes)} moved")

    output.answer(report, show)
