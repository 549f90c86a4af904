"""Serve one page of text over HTTP, for a program that collects measurements.

One request at a time, and no client can make the next one wait for long.
"""

from __future__ import annotations

import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

from hvreplica.address import Address, parse_address
from hvreplica.errors import Unreachable

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = "/metrics"
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SILENCE_S = 5.0  # a client that says or takes nothing has the next one wait so long, and no longer
_POLL_S = 0.2

log = logging.getLogger("hvreplica.metrics")


class PageServer:
    """Answers GET of PAGE with what `produce` returns. start() makes its thread; close() at the end."""

    def __init__(self, address: str, produce: Callable[[], str]) -> None:
        """Bind. address: HOST:PORT. Raises: Unreachable, ValueError."""
        target = parse_address(address)

        class Handler(_Handler):
            make_page = staticmethod(produce)

        try:
            self._server = _server_kind(target)((target.host, target.port), Handler)
        except OSError as error:
            raise Unreachable(
                f"cannot listen: {error.strerror or error}", path=str(target), hint="is the port in use?"
            ) from None
        host, port = self._server.server_address[:2]
        self.address = Address(str(host), int(port))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="hvreplica metrics", daemon=True
        )

    def start(self) -> None:
        """Answer from now on. Called once."""
        self._thread.start()

    def close(self) -> None:
        """Stop and wait. May be called twice."""
        if self._thread.ident is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def _server_kind(target: Address) -> type[HTTPServer]:
    class Server(HTTPServer):
        address_family = socket.AF_INET6 if ":" in target.host else socket.AF_INET

        def server_bind(self) -> None:
            """Bind without asking for the host's full name, which may take long."""
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(self.server_address)
            self.server_address = self.socket.getsockname()
            self.server_name, self.server_port = target.host, int(self.server_address[1])

    return Server


class _Handler(BaseHTTPRequestHandler):
    make_page: Callable[[], str]
    timeout = _SILENCE_S
    server_version = "hvreplica"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != PAGE:
            self.send_error(404)
            return
        try:
            page = self.make_page().encode()
        except Exception:
            log.exception("the measurements cannot be made")
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("Content-Type", _CONTENT_TYPE)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as the base class calls it
        log.debug(format, *args)
