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
    parent_option,
    sector_size_option,
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
    """Look into virtual disks, make, convert, compare, check and change them."""


@disk.command()
@click.argument("file", type=PATH)
@parent_option
@verb
def info(output: Output, file: Path, parent: Path | None) -> None:
    """Show what kind of disk FILE is, and where its parent is, or should be."""
    found = hvreplica.disk_info(file, parent=parent)
    output.answer(found, lambda: output.structure(found))


@disk.command("map", short_help="List the ranges of a disk.")
@click.argument("file", type=PATH)
@parent_option
@verb
def map_(output: Output, file: Path, parent: Path | None) -> None:
    """List the ranges of the disk in FILE, and which file of its chain holds them where.

    The list is written as it is found, so a huge disk needs no memory. --json writes an array, one element
    a line, with the names of `qemu-img map`: start, length, depth (0 is FILE, 1 its parent, ...), present,
    zero, data, and offset and filename where something is stored.
    """
    entries = hvreplica.disk_map(file, parent=parent)
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
@option("--size", "size_bytes", type=SIZE, help="Size of the disk, as in 10G.  [default: the parent's]")
@option(
    "--format",
    "format_",
    type=DISK_FORMAT,
    help="Format of FILE.  [default: by its name, vhd for .vhd and .avhd, raw for .raw and .img, else vhdx]",
)
@option(
    "--type",
    "type_",
    type=DISK_TYPE,
    help="Type of a VHDX or VHD: dynamic grows as it is written; fixed holds every block from the start."
    "  [default: dynamic]",
)
@option("--parent", type=PATH, metavar="FILE", help="Make a differencing disk on this one.")
@block_size_option
@sector_size_option
@overwrite_option
@verb
def create(  # noqa: PLR0913 - one for each option
    output: Output,
    *,
    file: Path,
    size_bytes: int | None,
    format_: Format | None,
    type_: DiskType | None,
    parent: Path | None,
    block_bytes: int | None,
    sector_bytes: int | None,
    overwrite: bool,
) -> None:
    """Make an empty disk; with --parent one that shows what its parent holds until it is written to.

    A parent must not change while it has children: it is theirs.
    """
    kind = format_for(file, format_)
    options = {"--type": type_, "--block-size": block_bytes, "--sector-size": sector_bytes}
    _check_options(kind, {**options, "--parent": parent})
    _check_size(kind, size_bytes, sector_bytes, is_child=parent is not None)
    made = hvreplica.disk_create(
        file,
        size_bytes,
        format=kind,
        type=type_ or "dynamic",
        block_bytes=block_bytes,
        logical_sector_bytes=sector_bytes or _SECTOR_BYTES,
        parent=parent,
        overwrite=overwrite,
    )
    output.answer(made, lambda: None if output.quiet else output.structure(made))


def _check_options(kind: Format, given: dict[str, object]) -> None:
    """Refuse options that no new disk of this format, or with this parent, can have. Raises: UsageError."""
    names = [name for name, value in given.items() if value is not None]
    message = None
    if kind == "raw" and names:
        message = f"a raw disk has no {names[0]}; leave it out, or pass --format vhdx"
    elif given["--parent"] is not None:
        for name in ("--type", "--sector-size"):
            if name in names:
                message = f"a disk with --parent has no {name}: it is differencing, with its parent's sectors"
    if message is not None:
        raise click.UsageError(message, click.get_current_context())


def _check_size(kind: Format, size_bytes: int | None, sector_bytes: int | None, *, is_child: bool) -> None:
    """Refuse sizes that no new disk of this format can have. Raises: UsageError."""
    context = click.get_current_context()
    if size_bytes is None:
        if not is_child:
            message = "a disk needs a --size, or a --parent to take it from"
            raise click.UsageError(message, context)
        return
    unit = sector_bytes or _SECTOR_BYTES
    if size_bytes <= 0 or size_bytes % unit:
        message = f"the size of a disk is a multiple of its sectors of {unit} bytes, above 0"
        raise click.BadParameter(message, context, param_hint="'--size'")
    size_max, called = _SIZE_MAX.get(kind, (size_bytes, ""))
    if size_bytes > size_max:
        message = f"a {kind.upper()} has at most {called}"
        raise click.BadParameter(message, context, param_hint="'--size'")


@disk.command(short_help="Copy a disk to another format or type.")
@click.argument("source", type=PATH, metavar="A")
@click.argument("target", type=PATH, metavar="B")
@option(
    "--format",
    "format_",
    type=DISK_FORMAT,
    help="Format of B.  [default: by its name, .vhdx, .avhdx, .vhd, .avhd, else raw]",
)
@option(
    "--type", "type_", type=DISK_TYPE, default="dynamic", show_default=True, help="Type of a VHDX or VHD."
)
@block_size_option
@sector_size_option
@parent_option
@overwrite_option
@verb
def convert(  # noqa: PLR0913 - one for each option
    output: Output,
    *,
    source: Path,
    target: Path,
    format_: Format | None,
    type_: DiskType,
    block_bytes: int | None,
    sector_bytes: int | None,
    parent: Path | None,
    overwrite: bool,
) -> None:
    """Copy the disk in A to a new file B of another format or type; what reads as zeros takes no room.

    B holds all that A and its parents hold, and needs none. With another --sector-size the bytes stay the
    same: a guest that counts in sectors of the other size does not find its partitions.
    """
    with progress_shown(output) as progress:
        report = hvreplica.disk_convert(
            source,
            target,
            format=format_,
            type=type_,
            block_bytes=block_bytes,
            logical_sector_bytes=sector_bytes,
            parent=parent,
            overwrite=overwrite,
            progress=progress,
        )
    output.answer(report, lambda: output.structure(report))


@disk.command(short_help="Compare what a guest sees in two disks.")
@click.argument("first", type=PATH, metavar="A")
@click.argument("second", type=PATH, metavar="B")
@option(
    "--parent", type=PATH, metavar="FILE", help="The parent of A, where the names in it do not lead there."
)
@option("--parent-b", type=PATH, metavar="FILE", help="The parent of B, likewise.")
@verb
def compare(output: Output, *, first: Path, second: Path, parent: Path | None, parent_b: Path | None) -> None:
    """Compare what a guest sees in A and B; where they differ, tell the first offset and exit with 1.

    Disks of different sizes are equal, with exit code 0, if the longer one has only zeros where the shorter
    one has ended, as `qemu-img compare` has it without -s. That is told; --json answers both sizes.
    """
    with progress_shown(output) as progress:
        report = hvreplica.disk_compare(
            first, second, first_parent=parent, second_parent=parent_b, progress=progress
        )

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
