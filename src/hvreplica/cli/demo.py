"""`demo`: replicate a real disk between two processes on this machine and prove both sides equal."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hvreplica.cli.exit import DIFFERENT
from hvreplica.cli.options import PATH, SIZE, option, verb
from hvreplica.cli.render import ratio
from hvreplica.errors import StateError
from hvreplica.files import OS_FILES
from hvreplica.units import MIB, align_up, format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hvreplica.cli.demo_run import DemoResult
    from hvreplica.cli.render import Output

SIZE_BYTES_MIN = 32 * MIB
_SOUND = {True: "sound", False: "DAMAGED", None: "not checked here"}


@click.command(short_help="Replicate a real disk on this machine and prove both sides equal.")
@option("--size", "size_bytes", type=SIZE, default="1G", show_default=True, help="Size of the guest's disk.")
@option("--keep", "folder", type=PATH, metavar="DIR", help="Work in DIR, which must be empty, and keep it.")
@verb
def demo(output: Output, size_bytes: int, folder: Path | None) -> None:
    """Replicate a real disk on this machine and prove both sides equal.

    Two processes talk over TLS on 127.0.0.1: an initial replication, a change as a guest makes it, the change
    shipped as an [MS-HRL] log, a run that finds nothing. Then the VM fails over: a test from an older
    point, a planned failover and back again, and an unplanned one to an instant between two cycles, then to
    the older point. Everything happens
    in a temporary folder, and the exit code is 0 only if every disk is what it should be.
    """
    from hvreplica.cli.demo_run import Story  # noqa: PLC0415

    size_bytes = align_up(size_bytes, MIB)
    if size_bytes < SIZE_BYTES_MIN:
        message = f"a disk of less than {format_size(SIZE_BYTES_MIN)} shows nothing"
        raise click.BadParameter(message, param_hint="'--size'")
    with _folder(folder) as place, output.steps() as steps:
        result = Story(place, size_bytes, steps).run(kept=folder is not None)
    output.answer(result, lambda: _show(output, result))
    if not result.equal:
        click.get_current_context().exit(DIFFERENT)


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    """Yield the folder to work in; it goes away again unless it was asked for."""
    if kept is None:
        with tempfile.TemporaryDirectory(prefix="hvreplica-demo-", ignore_cleanup_errors=True) as temporary:
            yield Path(temporary)
        return
    kept.mkdir(parents=True, exist_ok=True)
    if OS_FILES.names(kept):
        raise StateError("the folder for the demo is not empty", path=kept, hint="name a new one")
    yield kept


def _show(output: Output, result: DemoResult) -> None:
    output.line()
    output.table(
        ("step", ">on disk", ">changed", ">on the wire", ">ratio", ">seconds"),
        [
            (
                step.name,
                format_size(step.on_disk_bytes),
                format_size(step.changed_bytes),
                format_size(step.wire_bytes),
                ratio(step.changed_bytes, step.wire_bytes),
                f"{step.seconds:.2f}",
            )
            for step in result.steps
        ],
    )
    output.line()
    compared = {True: "identical", False: "DIFFERENT", None: "not installed here"}[
        result.proof.qemu_img_identical
    ]
    output.fields(
        [
            ("sha256 of the primary", result.proof.primary_sha256),
            ("sha256 of the replica", result.proof.replica_sha256),
            ("qemu-img compare", compared),
            ("file system of the older point", _SOUND[result.life.file_system_sound]),
            ("points of before the failovers", f"{result.life.points_kept} are what they were"),
            ("kept in", result.folder),
        ]
    )
    output.line()
    sides = result.proof.equal
    verdict = "both sides are equal" if sides else "THE TWO SIDES DIFFER"
    if sides and not result.equal:
        verdict = "A DISK IS NOT WHAT IT SHOULD BE AFTER THE FAILOVERS"
    output.headline(f"{verdict} · {result.seconds:.1f} s", good=result.equal)
