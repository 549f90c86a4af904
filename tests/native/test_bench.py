"""The benchmark of the kernels runs, checks its own answers, and writes the figures it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_kernel_benchmark_runs_small_and_its_answers_are_right(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "bench" / "micro" / "kernels.py"), "--smoke", "--json", str(target)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(target.read_text(encoding="utf-8"))
    assert {row["name"] for row in figures["bytes"]} >= {"crc32c", "byte_sum", "bitmap_count"}
    assert all(row["ratio"] > 0 for row in figures["bytes"] + figures["payload"])
    assert "crc32c" in result.stdout
