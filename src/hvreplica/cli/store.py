"""`store`: what a replica's folder holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import hvreplica
from hvreplica.cli.options import store_option, verb

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output


@click.group()
def store() -> None:
    """Look into a replica's store."""


@store.command(short_help="Show every VM in the store.")
@store_option
@verb
def status(output: Output, store: Path) -> None:
    """Show every VM in the store: its state, newest point and size. Works while `serve` runs."""
    found = hvreplica.store_status(store)
    output.answer(found, lambda: output.structure(found))
