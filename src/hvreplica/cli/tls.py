"""`tls`: certificates for both sides, and who may write which VM."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

import hvreplica
from hvreplica.cli.options import PATH, option, verb
from hvreplica.cli.render import plain

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output


@click.group()
def tls() -> None:
    """Make certificates and say who is trusted."""


@tls.command(short_help="Make certificates for a first try.")
@click.argument("folder", type=PATH, metavar="DIR")
@option(
    "--name",
    "names",
    multiple=True,
    metavar="HOST",
    help="A name or address the replica is reached by, besides localhost; repeatable.",
)
@verb
def init(output: Output, folder: Path, names: tuple[str, ...]) -> None:
    """Make a CA and certificates for a primary and a replica in DIR, for a first try.

    Whoever holds ca-key.pem can make certificates that both sides trust: later, keep it away from both.
    """
    made = hvreplica.tls_init(folder, names=names)
    output.answer({"folder": folder, "files": made}, lambda: _show_made(output, folder, made))


def _show_made(output: Output, folder: Path, made: list[str]) -> None:
    for path in made:
        output.line(plain(path))
    output.note(f"next: hvreplica serve --store DIR --tls {shlex.quote(plain(folder))}")


@tls.command(short_help="Make certificates for NBD over TLS.")
@click.argument("folder", type=PATH, metavar="DIR")
@option(
    "--name",
    "names",
    multiple=True,
    metavar="HOST",
    help="A name or address that NBD clients connect to, besides localhost and this host's; repeatable.",
)
@verb
def nbd(output: Output, folder: Path, names: tuple[str, ...]) -> None:
    """Make DIR/nbd, for `capture --nbd-tls DIR/nbd` and for NBD clients, with the CA of `tls init` in DIR.

    QEMU and libnbd find ca-cert.pem, client-cert.pem and client-key.pem there. These certificates are in no
    trust list: they write nothing to a replica.
    """
    made = hvreplica.tls_nbd(folder, names=names)

    def show() -> None:
        for path in made:
            output.line(plain(path))

    output.answer({"folder": folder / "nbd", "files": made}, show)


@tls.command(short_help="Let a certificate write VMs.")
@click.argument("folder", type=PATH, metavar="DIR")
@option("--certificate", required=True, metavar="ID", help='"sha256:…" of a certificate, or its common name.')
@option(
    "--vm",
    "patterns",
    required=True,
    multiple=True,
    metavar="PATTERN",
    help='VM names, as in "web*"; repeatable.',
)
@verb
def trust(output: Output, folder: Path, certificate: str, patterns: tuple[str, ...]) -> None:
    """Let a certificate write VMs: adds to DIR/trust.toml, which `serve` obeys."""
    hvreplica.tls_trust(folder, certificate, patterns)
    output.answer(
        {"certificate": certificate, "vm": list(patterns)},
        lambda: output.line(f"{certificate} may write {', '.join(patterns)}"),
    )
