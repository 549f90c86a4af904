"""The command line as processes of its own, every wait for one with a limit."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
TIMEOUT_S = 60


class Run(NamedTuple):
    """What a run left."""

    code: int
    out: str
    err: str

    @property
    def answer(self) -> Any:
        """The JSON on stdout."""
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        """The error object on stderr: the only thing that stands there."""
        return json.loads(self.err)["error"]


def environment(**more: str) -> dict[str, str]:
    """Return an environment in which a process finds this very source and no setting of the developer's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HVREPLICA_")}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (str(SOURCE), kept.get("PYTHONPATH"))))
    return kept | more


def run_verb(*arguments: object, env: dict[str, str] | None = None) -> Run:
    """Run `python -m hvreplica` to its end."""
    done = subprocess.run(
        _command(arguments),
        capture_output=True,
        text=True,
        env=environment(**(env or {})),
        timeout=TIMEOUT_S,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Run(done.returncode, done.stdout, done.stderr)


def ask_verb(*arguments: object) -> Any:
    """Return the JSON of a run with --json; fails the test unless it ended with 0."""
    run = run_verb(*arguments, "--json")
    assert run.code == 0, f"{' '.join(map(str, arguments))} -> {run.code}\n{run.err}"
    return run.answer


class Running:
    """A verb that runs until it is told to stop; a context manager that kills it.

    ready: the JSON of its first line on stdout, empty where it ended without one.
    """

    def __init__(self, *arguments: object) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - ends with us; a pipe would fill
        self.process = subprocess.Popen(
            _command(arguments), stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment()
        )
        assert self.process.stdout is not None
        try:
            if not select.select([self.process.stdout], [], [], TIMEOUT_S)[0]:
                pytest.fail(f"not ready in {TIMEOUT_S} s: {arguments}\n{self.errors()}", pytrace=False)
            line = self.process.stdout.readline()
        except BaseException:
            self.close()
            raise
        self.ready: dict[str, Any] = json.loads(line) if line else {}

    def errors(self) -> str:
        """Return what it has written to stderr so far."""
        self._errors.seek(0)
        return self._errors.read()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal and return the exit code and what stands on stderr. May be called twice."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            pytest.fail(f"it did not end by signal {number} in {TIMEOUT_S} s\n{self.errors()}", pytrace=False)
        return self.process.returncode, self.errors()

    def close(self) -> None:
        """Kill it if it still runs. May be called twice."""
        if not self._errors.closed:
            with self._errors:
                self.end(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _command(arguments: tuple[object, ...]) -> list[str]:
    return [sys.executable, "-m", "hvreplica", *(str(argument) for argument in arguments)]
