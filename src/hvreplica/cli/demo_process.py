"""The demo's processes: servers that stop when their block ends, and one verb after the other."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hvreplica
from hvreplica.errors import HvReplicaError
from hvreplica.files import OS_FILES
from hvreplica.units import KIB

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_READY_TIMEOUT_S = 60
_STOP_TIMEOUT_S = 10
_LAST_WORDS_BYTES = 4 * KIB
_KEPT_SETTINGS = frozenset({"HVREPLICA_KERNELS", "HVREPLICA_DEBUG"})


class ProcessFailed(HvReplicaError):
    """One of the demo's processes ended as it should not."""


@contextlib.contextmanager
def serving(store: Path, tls: Path, log: Path) -> Iterator[tuple[str, int]]:
    """Run `serve` on a free port of 127.0.0.1; yield (HOST:PORT, process id), SIGTERM it at the end."""
    command = ("serve", "--store", store, "--tls", tls, "--listen", "127.0.0.1:0")
    with running(command, log) as (ready, process_id):
        yield str(ready["address"]), process_id


@contextlib.contextmanager
def running(command: Sequence[object], log: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Run a server; yield its first line and process id once it listens, SIGTERM it at the end."""
    words = [*(str(word) for word in command), "--json"]
    with _log_file(log) as errors, _process(words, stderr=errors) as process:
        ready = _ready_line(process)
        if ready is None:
            raise ProcessFailed("the server did not start", path=log, hint=_last_words(log))
        yield ready, process.pid
        process.terminate()
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(_STOP_TIMEOUT_S)
        if code != 0:
            raise ProcessFailed(
                "the server did not stop cleanly on SIGTERM",
                path=log,
                expected="exit code 0",
                actual="none yet" if code is None else f"exit code {code}",
                hint=_last_words(log),
            )


def ask(verb: str, *arguments: object) -> dict[str, Any]:
    """Run a verb with --json in a process of its own and return its answer."""
    command = [verb, *(str(argument) for argument in arguments), "--json"]
    with _process(command, stderr=subprocess.PIPE) as process:
        out, errors = process.communicate()
    if process.returncode == 0:
        answer: dict[str, Any] = json.loads(out)
        return answer
    words = errors.decode(errors="replace").strip()
    message, hint = words, None
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
        told = json.loads(words.splitlines()[-1])["error"]
        message, hint = f"{told['class']}: {told['message']}", told["hint"]
    raise ProcessFailed(f"{verb} ended with exit code {process.returncode}: {message}", hint=hint)


@contextlib.contextmanager
def _process(arguments: Sequence[str], *, stderr: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start hvreplica with `arguments`; whatever happens, it does not run any more when the block is left."""
    command = [sys.executable, "-m", "hvreplica", *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, env=_environment()
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except BaseException:  # a second Ctrl-C too: the process must not outlive us
            process.kill()
            process.wait()
            raise
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _ready_line(process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    """Return the server's first line, or None if it ends or takes too long before that."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    stream = process.stdout
    assert stream is not None
    threading.Thread(target=lambda: lines.put(stream.readline()), daemon=True).start()
    try:
        answer: dict[str, Any] = json.loads(lines.get(timeout=_READY_TIMEOUT_S))
    except (queue.Empty, ValueError):
        return None
    return answer


def _environment() -> dict[str, str]:
    """Return an environment that finds this very hvreplica and in which no setting changes the demo."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HVREPLICA_") or name in _KEPT_SETTINGS
    }
    package_root = os.fspath(Path(hvreplica.__file__ or "").resolve().parent.parent)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (package_root, kept.get("PYTHONPATH"))))
    return kept


def _last_words(log: Path) -> str | None:
    file = OS_FILES.open(log)
    try:
        size_bytes = file.size()
        start = max(size_bytes - _LAST_WORDS_BYTES, 0)
        lines = file.read(start, size_bytes - start).decode(errors="replace").strip().splitlines()
    finally:
        file.close()
    return f"its last words: {lines[-1]}" if lines else None


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[int]:
    """Make the file that a process writes its log to; yield its descriptor."""
    file = OS_FILES.open(path, create=True)
    try:
        descriptor = file.fileno()
        assert descriptor is not None
        yield descriptor
    finally:
        file.close()
