"""`serve`: receive replication into a store until told to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Protocol

import click

import hvreplica
from hvreplica.cli.exit import INTERRUPTED, Signalled
from hvreplica.cli.options import ADDRESS, DURATION, SIZE, option, store_option, tls_option, verb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

    from hvreplica.cli.render import Output

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppableServer(Protocol):
    """What is needed of hvreplica.Server here."""

    def serve_forever(self) -> None:
        """Serve until stop()."""
        ...

    def stop(self) -> None:
        """Make serve_forever() return; may be called from any thread."""
        ...


@click.command(short_help="Receive VMs into a store.")
@store_option
@option(
    "--listen",
    type=ADDRESS,
    default="127.0.0.1:8084",
    show_default=True,
    metavar="HOST:PORT",
    help="Where primaries connect; port 0 picks a free one.",
)
@tls_option
@option(
    "--verify-every",
    "verify_every_s",
    type=DURATION,
    metavar="DURATION",
    help="Read everything again that often, to find damage: 7d, 12h.  [default: never]",
)
@option(
    "--verify-rate",
    type=SIZE,
    default="50M",
    show_default=True,
    metavar="SIZE",
    help="How much of it in a second.",
)
@option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What is logged to stderr.",
)
@option("--log-json", is_flag=True, help="Log one JSON object a line.")
@verb
def serve(
    output: Output,
    *,
    store: Path,
    listen: str,
    tls: Path,
    verify_every_s: float | None,
    verify_rate: int,
    log_level: str,
    log_json: bool,
) -> None:
    """Receive VMs into the store at DIR.

    Prints "listening on HOST:PORT" once it does. SIGTERM ends it cleanly with exit code 0, Ctrl-C with 130; a
    transfer that is cut off by that continues later. Which certificate may write which VM stands in
    trust.toml beside the certificates.
    """
    from hvreplica.cli.diagnostics import logging_shown  # noqa: PLC0415

    number = 0
    try:
        with (
            logging_shown(log_level, as_json=log_json),
            hvreplica.Server(
                store, listen=listen, tls=tls, verify_every_s=verify_every_s, verify_rate=verify_rate
            ) as server,
        ):
            number = run_until_signal(server, lambda: _tell_ready(output, server.address))
    except Signalled as signalled:  # before the server ran: while it brought its store in order
        number = signalled.number
    if number == signal.SIGINT:
        click.get_current_context().exit(INTERRUPTED)
    if number not in (0, signal.SIGTERM):
        raise Signalled(number)


def _tell_ready(output: Output, address: tuple[str, int]) -> None:
    host, port = address
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if output.json:
        output.write_json_line({"event": "listening", "address": place, "host": host, "port": port})
    else:
        output.line(f"listening on {place}")
    output.flush()


def run_until_signal(server: StoppableServer, ready: Callable[[], None]) -> int:
    """Run `server` until a signal asks for its end; return its number, or 0 if the server ended by itself.

    ready: called once signals are handled and the server runs. The server has a thread of its own: a handler
    that called stop() in the middle of the server's code could meet a lock that this very thread holds. A
    second signal ends the process at once, which no store is harmed by.
    """
    reader, writer = os.pipe()
    failure: list[BaseException] = []

    def serve_in_thread() -> None:
        try:
            server.serve_forever()
        except BaseException as error:
            failure.append(error)
        finally:
            os.write(writer, b"\0")

    thread = threading.Thread(target=serve_in_thread, name="serve")
    try:
        with _signals_written(writer):
            thread.start()
            try:
                ready()
                number = os.read(reader, 1)[0]
            finally:
                _restore_default_signals()
                server.stop()
                thread.join()
    finally:
        os.close(reader)
        os.close(writer)
    if failure:
        raise failure[0]
    return number


@contextlib.contextmanager
def _signals_written(writer: int) -> Iterator[None]:
    """Write each signal's number to the pipe while the block runs; an ignored signal stays ignored.

    The interpreter's C code writes it, as the signal comes: a handler of ours would run only once the main
    thread is back from the read that waits for this very byte.
    """

    def handled(number: int, frame: FrameType | None) -> None:
        """Do nothing: the number is in the pipe."""

    numbers = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, handled) for number in numbers}
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)


def _restore_default_signals() -> None:
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
