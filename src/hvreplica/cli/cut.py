"""`cut`: close what was written so far as logs, at one instant of all disks."""

from __future__ import annotations

import shlex
import subprocess
from typing import TYPE_CHECKING

import click

import hvreplica
from hvreplica.cli.options import PATH, SecondsType, option, state_option, verb
from hvreplica.cli.render import plain
from hvreplica.errors import FreezeFailed
from hvreplica.units import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.cli.render import Output
    from hvreplica.replication.results import CutResult

_COMMAND_LIMIT_S = 60.0
_COMMAND_LIMIT_MAX_S = 86_400.0


@click.command(short_help="Cut all disks of a VM at one instant.")
@state_option
@option(
    "--freeze",
    type=PATH,
    metavar="SOCKET",
    help="The socket of the guest's QEMU agent: its file systems stand still for the instant.",
)
@option(
    "--freeze-limit",
    "freeze_limit_s",
    type=SecondsType(3600),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Longest that the guest may stand still; after it the guest goes on and the cut fails.",
)
@option(
    "--app-consistent",
    is_flag=True,
    help="Call the point app-consistent: --before, or you, brought to rest what runs in the guest."
    " --freeze does so by itself.",
)
@option("--before", metavar="COMMAND", help="A program to run first; the cut is not made if it fails.")
@option("--after", metavar="COMMAND", help="A program to run as soon as the instant has passed, or failed.")
@option(
    "--command-limit",
    "command_limit_s",
    type=SecondsType(_COMMAND_LIMIT_MAX_S),
    default=_COMMAND_LIMIT_S,
    show_default=True,
    metavar="SECONDS",
    help="Longest that --before, and that --after, may take; after it the program is killed and has failed.",
)
@verb
def cut(
    output: Output,
    *,
    state: Path,
    freeze: Path | None,
    freeze_limit_s: float,
    app_consistent: bool,
    before: str | None,
    after: str | None,
    command_limit_s: float,
) -> None:
    """Cut all disks of a VM at one instant.

    What was written since the last cut is closed as a log for each disk that changed. The logs wait in
    STATE/logs, and the next `replicate` ships them as a recovery point of their own. A guest that runs on
    `capture` is held for less than a millisecond.

    COMMAND is a program with its arguments, quoted as for a shell, which is not involved.
    """
    steps = _Steps(before, after, command_limit_s)
    try:
        steps.begin()
        result = hvreplica.cut(
            state,
            freeze=freeze,
            freeze_limit_s=freeze_limit_s,
            app_consistent=app_consistent,
            on_instant=steps.end,
        )
    finally:
        steps.end()
    for warning in result.warnings:
        output.note(f"warning: {warning}")
    output.answer(result, lambda: _show(output, result))


class _Steps:
    """The user's commands around the instant; the second runs once, however it went."""

    def __init__(self, before: str | None, after: str | None, limit_s: float) -> None:
        self._before = _words(before, "--before")
        self._after = _words(after, "--after")
        self._limit_s = limit_s

    def begin(self) -> None:
        if self._before:
            _run(self._before, "before", self._limit_s)

    def end(self) -> None:
        words, self._after = self._after, []
        if words:
            _run(words, "after", self._limit_s)


def _words(command: str | None, name: str) -> list[str]:
    try:
        return shlex.split(command or "")
    except ValueError as error:
        message = f"{name}: {error}"
        raise click.UsageError(message, click.get_current_context()) from None


def _run(words: list[str], name: str, limit_s: float) -> None:
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, check=False, timeout=limit_s, stdout=2)
    except subprocess.TimeoutExpired:
        raise FreezeFailed(
            f"the command of --{name} did not end within {limit_s:g} s",
            path=words[0],
            hint="it was killed; give it longer with --command-limit",
        ) from None
    except OSError as error:
        raise FreezeFailed(
            f"the command of --{name} cannot be run: {error.strerror or error}",
            path=words[0],
            hint=f"--{name} takes a program with its arguments, without a shell",
        ) from None
    if done.returncode:
        raise FreezeFailed(
            f"the command of --{name} failed", path=words[0], expected="exit code 0", actual=done.returncode
        )


def _show(output: Output, result: CutResult) -> None:
    if not result.logs:
        output.line("nothing changed since the last cut")
        return
    held = f" · writes held for {result.held_us:.0f} µs" if result.held_us else ""
    frozen = "" if result.frozen is None else f" · {result.frozen} file systems frozen"
    what = "cut" if result.point is None else f"recovery point {result.point}"
    output.line(f"{what} at {result.instant}{held}{frozen}")
    output.line()
    output.table(
        (">disk", "log", ">size", ">entries"),
        [(log.disk, plain(log.path), format_size(log.bytes), log.entries) for log in result.logs],
    )
