"""Runs of the command line: in this process for its words, as a process of its own for its contract."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from hvreplica.cli.main import cli
from tests.support.command_line import Run, run_verb

if TYPE_CHECKING:
    from collections.abc import Callable


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


@pytest.fixture
def hvreplica() -> Callable[..., Run]:
    """Return a function that runs `python -m hvreplica` as a process of its own."""
    return run_verb
