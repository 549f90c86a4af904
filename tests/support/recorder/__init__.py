"""Record what a real process does to files and sockets, and let its calls fail while it runs.

The library in this folder is compiled where it is needed and stands before the C library of a process under test
(LD_PRELOAD): C code and Python alike pass through it. recorder.c says what is written down and in which order;
tests/support/replay.py reads the trace.

    library = build(folder)
    faults = Faults(folder / "faults")
    environment = recording(library, trace=folder / "trace", roots=[state, disks], faults=faults)
    process = subprocess.Popen(command, env={**os.environ, **environment})
    faults.add("sync", "*.ij", error=errno.EIO)
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.tools import missing

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = Path(__file__).parent
_FLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-fPIC", "-shared")

# One rule of faults.c, byte for byte.
_RULE = struct.Struct("<4i6q192s")
_RULES = 64
_OPERATIONS = {"write": 1, "sync": 2, "resize": 4, "allocate": 8, "open": 16, "rename": 32, "unlink": 64}
_HOLD_AT, _COUNTERS_AT = 12, 40
_FOR_EVER = -1


def build(folder: Path) -> Path:
    """Compile the library into `folder` and return it; skip or fail the running test without a compiler."""
    if shutil.which("cc") is None:
        missing("a C compiler is not installed (Debian: apt-get install gcc)")
    library = folder / "recorder.so"
    sources = [str(path) for path in sorted(FOLDER.glob("*.c"))]
    command = ["cc", *_FLAGS, "-o", str(library), *sources, "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stderr}", pytrace=False)
    return library


def recording(
    library: Path,
    *,
    trace: Path | None = None,
    roots: Sequence[Path] = (),
    faults: Faults | None = None,
) -> dict[str, str]:
    """Return what the environment of a process under test must hold.

    trace: the file that it appends to; None: only faults. roots: folders whose files are recorded, present now.
    """
    environment = {"LD_PRELOAD": str(library)}
    if trace is not None:
        environment["HVR_RECORD_TRACE"] = str(trace)
        environment["HVR_RECORD_ROOTS"] = ":".join(os.path.realpath(root) for root in roots)
    if faults is not None:
        environment["HVR_RECORD_FAULTS"] = str(faults.path)
    return environment


class Rule:
    """One armed rule; what it counted can be asked at any time."""

    def __init__(self, shared: mmap.mmap, at: int) -> None:
        self._shared = shared
        self._at = at

    @property
    def calls(self) -> int:
        """The calls that matched its operations and names."""
        return self._counter(0)

    @property
    def hits(self) -> int:
        """The calls that it struck."""
        return self._counter(1)

    @property
    def held(self) -> int:
        """The calls that began to wait."""
        return self._counter(2)

    def release(self) -> None:
        """Let go of the calls that wait, and of all later ones."""
        struct.pack_into("<i", self._shared, self._at + _HOLD_AT, 0)

    def disarm(self) -> None:
        """Strike no more; whoever waits goes on."""
        struct.pack_into("<i", self._shared, self._at, 0)

    def _counter(self, index: int) -> int:
        return int(struct.unpack_from("<q", self._shared, self._at + _COUNTERS_AT + 8 * index)[0])


class Faults:
    """Rules that a running process obeys at once, in a file that both map."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(_RULE.size * _RULES))
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), _RULE.size * _RULES)
        self._rules: list[Rule] = []

    def add(
        self,
        operations: str,
        pattern: str,
        *,
        error: int = 0,
        skip: int = 0,
        count: int | None = 1,
        short_bytes: int | None = None,
        hold: bool = False,
    ) -> Rule:
        """Arm a rule. operations: of write sync resize allocate open rename unlink, with spaces between.

        pattern: a glob over whole names as they are at the call, in which "*" matches "/" too. skip: calls that
        pass first. count: calls that it strikes then, None for all. short_bytes: writes move no more, instead of
        failing. hold: calls wait until release() or disarm(), then they fail or go on.
        """
        at = len(self._rules) * _RULE.size
        if len(self._rules) >= _RULES:
            message = f"more than {_RULES} rules"
            raise ValueError(message)
        mask = sum(_OPERATIONS[operation] for operation in operations.split())
        name = os.fsencode(pattern)
        rule = _RULE.pack(
            *(0, mask, error, int(hold), skip, _FOR_EVER if count is None else count),
            *(-1 if short_bytes is None else short_bytes, 0, 0, 0, name),
        )
        self._shared[at : at + _RULE.size] = rule
        struct.pack_into("<i", self._shared, at, 1)
        self._rules.append(Rule(self._shared, at))
        return self._rules[-1]

    def heal(self) -> None:
        """Disarm every rule."""
        for rule in self._rules:
            rule.disarm()
