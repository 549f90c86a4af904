"""Runs of the command line: in this process for its words, as a process of its own for its contract."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from click.testing import CliRunner

from hvreplica.cli.main import cli

if TYPE_CHECKING:
    from collections.abc import Callable

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


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Return a function that runs the command line in this process."""
    for name in [name for name in os.environ if name.startswith("HVREPLICA_")]:
        monkeypatch.delenv(name)

    def run(*arguments: object, env: dict[str, str] | None = None) -> Run:
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments], env=env)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return Run(result.exit_code, result.stdout, result.stderr)

    return run


def environment(**more: str) -> dict[str, str]:
    """Return an environment in which a process finds this very source and no setting of the developer's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HVREPLICA_")}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (str(SOURCE), kept.get("PYTHONPATH"))))
    return kept | more


@pytest.fixture
def hvreplica() -> Callable[..., Run]:
    """Return a function that runs `python -m hvreplica` as a process of its own."""

    def run(*arguments: object, env: dict[str, str] | None = None) -> Run:
        done = subprocess.run(
            [sys.executable, "-m", "hvreplica", *(str(argument) for argument in arguments)],
            capture_output=True,
            text=True,
            env=environment(**(env or {})),
            timeout=TIMEOUT_S,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Run(done.returncode, done.stdout, done.stderr)

    return run
