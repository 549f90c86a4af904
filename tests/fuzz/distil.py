"""Choose, from all inputs that were found, the few small ones that together reach as much: the committed corpus."""

from __future__ import annotations

import hashlib
import os
import sys
from typing import TYPE_CHECKING

from tests.fuzz.guided import CACHE, CORPUS
from tests.fuzz.registry import attempt

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType
    from typing import Any

    from tests.fuzz.registry import Fuzzer

INPUT_BYTES_MAX = 9 * 1024
CORPUS_BYTES_MAX = 18 * 1024  # of one fuzzer; most need a tenth of it
_PACKAGE = f"{os.sep}hvreplica{os.sep}"


def distil(fuzzer: Fuzzer) -> tuple[int, int]:
    """Rewrite the committed inputs of one fuzzer; return how many they are, and their bytes.

    Those named found-... are kept whatever they reach: each was a bug once.
    """
    folder = CORPUS / fuzzer.name
    candidates = _candidates(fuzzer, folder)
    seen: set[tuple[str, int, int]] = set()
    for data in fuzzer.seeds():
        seen |= _reached(fuzzer, data)
    chosen: list[bytes] = []
    total = 0
    for data in sorted(candidates, key=lambda data: (len(data), data)):
        new = _reached(fuzzer, data) - seen
        if new and total + len(data) <= CORPUS_BYTES_MAX:
            seen |= new
            chosen.append(data)
            total += len(data)
    for path in folder.glob("in-*"):
        path.unlink()
    if chosen:
        folder.mkdir(parents=True, exist_ok=True)
    for data in chosen:
        (folder / f"in-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
    return len(chosen), total


def _candidates(fuzzer: Fuzzer, folder: Path) -> set[bytes]:
    paths = [*folder.glob("in-*"), *(CACHE / "found" / fuzzer.name).glob("*")]
    return {path.read_bytes() for path in paths if path.stat().st_size <= INPUT_BYTES_MAX}


def _reached(fuzzer: Fuzzer, data: bytes) -> set[tuple[str, int, int]]:
    """Return the steps from line to line of the package that an input takes."""
    steps: set[tuple[str, int, int]] = set()
    last: dict[int, int] = {}

    def lines(frame: FrameType, event: str, argument: Any) -> Any:
        del event, argument
        key = id(frame)
        steps.add((frame.f_code.co_filename, last.get(key, 0), frame.f_lineno))
        last[key] = frame.f_lineno
        return lines

    def calls(frame: FrameType, event: str, argument: Any) -> Any:
        del event, argument
        if _PACKAGE not in frame.f_code.co_filename:
            return None
        last.pop(id(frame), None)
        return lines

    sys.settrace(calls)
    try:
        attempt(fuzzer, data)
    finally:
        sys.settrace(None)
    return steps
