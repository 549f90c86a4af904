"""`disk`: look into a virtual disk, make, convert and compare them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import hvreplica
from hvreplica.cli.exit import DIFFERENT
from hvreplica.cli.options import (
    DISK_FORMAT,
    DISK_TYPE,
    PATH,
    SIZE,
    block_size_option,
    format_for,
    option,
    overwrite_option,
    verb,
)
from hvreplica.cli.progress import progress_shown
from hvreplica.units import GIB, TIB, format_size

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output
    from hvreplica.disk import DiskType, Format

_SECTOR_BYTES = 512
_SIZE_MAX = {"vhdx": (64 * TIB, "64T"), "vhd": (2040 * GIB, "2040G")}


@click.group()
def disk() -> None:
    """Look into virtual disks, make, convert and compare them."""


@disk.command()
@click.argument("file", type=PATH)
@verb
def info(output: Output, file: Path) -> None:
    """Show what kind of disk FILE is."""
    found = hvreplica.disk_info(file)
    output.answer(found, lambda: output.structure(found))


@disk.command("map", short_help="List the ranges of a disk.")
@click.argument("file", type=PATH)
@verb
def map_(output: Output, file: Path) -> None:
    """List the ranges of the disk in FILE, and which file of its chain holds them where.

    The list is written as it is found, so a huge disk needs no memory. --json writes an array, one element
    a line, with the names of `qemu-img map`: start, length, depth (0 is FILE, 1 its parent, ...), present,
    zero, data, and offset and filename where something is stored.
    """
    entries = hvreplica.disk_map(file)
    if output.json:
        output.stream_json(entries)
        return
    for index, entry in enumerate(entries):
        if index == 0:
            output.line(f"{'start':>18} {'length':>18} {'':>10}  {'':<4} {'offset':>18}  file")
        place = "-" if entry.offset is None else entry.offset
        kind = "data" if entry.data else "zero"
        line = f"{entry.start:>18} {entry.length:>18} {format_size(entry.length):>10}  {kind:<4} {place:>18}"
        output.line(f"{line}  {entry.filename or '-'}")


@disk.command()
@click.argument("file", type=PATH)
@option("--size", "size_bytes", type=SIZE, required=True, help="Size of the disk, as in 10G.")
@option(
    "--format",
    "format_",
    type=DISK_FORMAT,
    help="Format of FILE.  [default: by its name, vhd for .vhd, raw for .raw and .img, else vhdx]",
)
@option(
    "--type",
    "type_",
    type=DISK_TYPE,
    help="Type of a VHDX or VHD: dynamic grows as it is written; fixed holds every block from the start."
    "  [default: dynamic]",
)
@block_size_option
@overwrite_option
@verb
def create(
    output: Output,
    *,
    file: Path,
    size_bytes: int,
    format_: Format | None,
    type_: DiskType | None,
    block_bytes: int | None,
    overwrite: bool,
) -> None:
    """Make an empty disk."""
    kind = format_for(file, format_)
    _check(kind, size_bytes, type_, block_bytes)
    made = hvreplica.disk_create(
        file, size_bytes, format=kind, type=type_ or "dynamic", block_bytes=block_bytes, overwrite=overwrite
    )
    output.answer(made, lambda: output.structure(made))


def _check(kind: Format, size_bytes: int, type_: DiskType | None, block_bytes: int | None) -> None:
    """Refuse what no new disk of this format can be. Raises: UsageError."""
    context = click.get_current_context()
    if kind == "raw":
        for given, name in ((type_, "--type"), (block_bytes, "--block-size")):
            if given is not None:
                message = f"a raw disk has no {name}; leave it out, or pass --format vhdx"
                raise click.UsageError(message, context)
    if size_bytes <= 0 or size_bytes % _SECTOR_BYTES:
        message = f"the size of a disk is a multiple of its sectors of {_SECTOR_BYTES} bytes, above 0"
        raise click.BadParameter(message, context, param_hint="'--size'")
    size_max, called = _SIZE_MAX.get(kind, (size_bytes, ""))
    if size_bytes > size_max:
        message = f"a {kind.upper()} has at most {called}"
        raise click.BadParameter(message, context, param_hint="'--size'")


@disk.command(short_help="Copy a disk to another format or type.")
@click.argument("source", type=PATH, metavar="A")
@click.argument("target", type=PATH, metavar="B")
@option(
    "--format", "format_", type=DISK_FORMAT, help="Format of B.  [default: by its name, .vhdx, .vhd or raw]"
)
@option(
    "--type", "type_", type=DISK_TYPE, default="dynamic", show_default=True, help="Type of a VHDX or VHD."
)
@block_size_option
@overwrite_option
@verb
def convert(
    output: Output,
    *,
    source: Path,
    target: Path,
    format_: Format | None,
    type_: DiskType,
    block_bytes: int | None,
    overwrite: bool,
) -> None:
    """Copy the disk in A to a new file B of another format or type; what reads as zeros takes no room."""
    with progress_shown(output) as progress:
        report = hvreplica.disk_convert(
            source,
            target,
            format=format_,
            type=type_,
            block_bytes=block_bytes,
            overwrite=overwrite,
            progress=progress,
        )
    output.answer(report, lambda: output.structure(report))


@disk.command(short_help="Compare what a guest sees in two disks.")
@click.argument("first", type=PATH, metavar="A")
@click.argument("second", type=PATH, metavar="B")
@verb
def compare(output: Output, first: Path, second: Path) -> None:
    """Compare what a guest sees in A and B; where they differ, tell the first offset and exit with 1.

    Disks of different sizes are equal, with exit code 0, if the longer one has only zeros where the shorter
    one has ended, as `qemu-img compare` has it without -s. That is told; --json answers both sizes.
    """
    with progress_shown(output) as progress:
        report = hvreplica.disk_compare(first, second, progress=progress)

    def show() -> None:
        if report.equal and report.a_virtual_bytes != report.b_virtual_bytes:
            sizes = _sizes_apart(report.a_virtual_bytes, report.b_virtual_bytes)
            output.line(f"equal content, different sizes: {sizes}; the rest is zero")
        elif report.equal:
            output.line(f"equal: {format_size(report.bytes_compared)} compared")
        else:
            output.line(f"different: the first difference is at offset {report.first_difference}")

    output.answer(report, show)
    if not report.equal:
        click.get_current_context().exit(DIFFERENT)


def _sizes_apart(a_bytes: int, b_bytes: int) -> str:
    """Return both sizes, to the byte where they would look the same."""
    a, b = format_size(a_bytes), format_size(b_bytes)
    return f"{a} and {b}" if a != b else f"{a_bytes} and {b_bytes} bytes"
