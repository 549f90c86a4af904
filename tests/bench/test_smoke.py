"""Each benchmark runs once, small, and verifies its own output; no time is asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import END_TO_END, MICRO

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [*MICRO, *END_TO_END])
def test_benchmark_runs_small_and_its_output_is_right(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--smoke", "--results", str(tmp_path), name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if name in END_TO_END and "skipped" not in done.stdout:
        assert list(tmp_path.glob("*.json")), done.stdout
