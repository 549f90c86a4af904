"""How serve ends: by which signal, with which code, and what of a failing server."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from hvreplica.cli.serve import run_until_signal


class FakeServer:
    """Serves until stop(), or fails at once."""

    def __init__(self, error: Exception | None = None) -> None:
        self.stopped = threading.Event()
        self.error = error

    def serve_forever(self) -> None:
        if self.error is not None:
            raise self.error
        self.stopped.wait(10)

    def stop(self) -> None:
        self.stopped.set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_stops_the_server_and_is_told(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    server = FakeServer()
    assert run_until_signal(server, lambda: os.kill(os.getpid(), number)) == number
    assert server.stopped.is_set()
    assert {each: signal.getsignal(each) for each in before} == before


def test_failing_server_fails_the_verb() -> None:
    with pytest.raises(OSError, match="gone"):
        run_until_signal(FakeServer(OSError(5, "gone")), lambda: None)


def test_failure_to_tell_stops_the_server() -> None:
    server = FakeServer()

    def ready() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_until_signal(server, ready)
    assert server.stopped.is_set()


def test_server_that_ends_by_itself_is_no_signal() -> None:
    server = FakeServer()
    server.stop()
    assert run_until_signal(server, lambda: None) == 0
