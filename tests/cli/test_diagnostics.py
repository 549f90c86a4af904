"""The log on stderr, for people and for programs."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from hvreplica.cli.diagnostics import logging_shown

if TYPE_CHECKING:
    import pytest


def test_text_has_time_level_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_shown("info"):
        logging.getLogger("hvreplica.transport").info("refused %s", "web\x1b[0m")
        logging.getLogger("hvreplica.transport").debug("not this")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("Z info transport: refused web\\x1b[0m")


def test_json_keeps_what_was_passed_along(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_shown("info", as_json=True):
        logging.getLogger("hvreplica.store").warning("full", extra={"vm": "web01", "free_bytes": 0})
    entry = json.loads(capsys.readouterr().err)
    assert {"level": "warning", "logger": "hvreplica.store", "message": "full"}.items() <= entry.items()
    assert (entry["vm"], entry["free_bytes"]) == ("web01", 0)


def test_handler_goes_away_again() -> None:
    logger = logging.getLogger("hvreplica")
    before = (list(logger.handlers), logger.level, logger.propagate)
    with logging_shown("debug"):
        pass
    assert (list(logger.handlers), logger.level, logger.propagate) == before
