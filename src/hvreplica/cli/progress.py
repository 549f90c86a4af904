"""Show a verb's progress on stderr: a live bar on a terminal, a line every few seconds elsewhere.

Nothing is shown with --quiet, nor with --json where stderr is not a terminal: a program reads errors there.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from typing import TYPE_CHECKING

from hvreplica.cli.render import console_for, is_terminal, plain, ratio, write_error
from hvreplica.clock import SYSTEM
from hvreplica.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from hvreplica.cli.render import Output
    from hvreplica.progress import Progress, ProgressCallback

RATE_WINDOW_S = 5.0
LINE_INTERVAL_S = 5.0
_REDRAW_INTERVAL_S = 0.1
_FIGURES_WIDTH = 59  # of the longest usual ones, so that the bar keeps its length


class Meter:
    """Turns reports of one phase into rate, ratio and time left. One owner."""

    def __init__(self) -> None:
        self.phase = ""
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, report: Progress, now_s: float) -> None:
        """Take a report made at `now_s`; a new phase starts afresh."""
        if report.phase != self.phase:
            self.phase = report.phase
            self._samples.clear()
        self._samples.append((now_s, report.done_bytes))
        while len(self._samples) > 2 and now_s - self._samples[1][0] >= RATE_WINDOW_S:
            self._samples.popleft()

    def rate_bytes_per_s(self) -> float:
        """Return the rate over the last seconds; 0 where it is not known yet."""
        if len(self._samples) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self._samples[0], self._samples[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    def figures(self, report: Progress) -> str:
        """Return the figures of `report` in one short line: way, rate, wire and ratio, time left."""
        if report.total_bytes <= 1:  # a phase that counts no bytes
            return ""
        rate = self.rate_bytes_per_s()
        done, total = short_size(report.done_bytes), short_size(report.total_bytes)
        if done.partition(" ")[2] == total.partition(" ")[2]:
            done = done.partition(" ")[0]
        parts = [f"{done} of {total}"]
        if rate:
            parts.append(f"{short_size(rate)}/s")
        if report.wire_bytes and report.raw_bytes:
            shrunk = ratio(report.raw_bytes, report.wire_bytes)
            parts.append(f"wire {short_size(report.wire_bytes)}" + (f" ({shrunk})" if shrunk else ""))
        left = report.total_bytes - report.done_bytes
        if rate and left > 0:
            parts.append(f"ETA {format_duration(left / rate)}")
        return " · ".join(parts)


@contextlib.contextmanager
def progress_shown(output: Output) -> Iterator[ProgressCallback | None]:
    """Yield the callback to hand to a verb, or None where nobody wants to see progress."""
    if output.quiet or (output.json and not is_terminal(sys.stderr)):
        yield None
    elif is_terminal(sys.stderr):
        with _live_bars() as bars:
            yield _guarded(_BarView(bars).report)
    else:
        yield _guarded(_LineView().report)


def short_size(size_bytes: float) -> str:
    """Return a size in at most eight characters: no decimal where three digits stand before it."""
    text = format_size(size_bytes)
    number, _, unit = text.partition(" ")
    return f"{float(number):.0f} {unit}" if len(number) > 4 else text


def format_duration(duration_s: float) -> str:
    """Return m:ss or h:mm:ss; more than 99 hours says so."""
    total = round(duration_s)
    minutes, seconds = divmod(total, 60)
    hours, minutes = divmod(minutes, 60)
    if hours > 99:
        return "over 99 h"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _live_bars() -> Bars:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn  # noqa: PLC0415

    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        console=console_for(sys.stderr),
        transient=True,
        redirect_stdout=False,
        expand=True,
        refresh_per_second=5,
    )


class _BarView:
    """One bar, for the phase that runs. Called from a verb's threads, never two at once."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._meter = Meter()
        self._task: TaskID | None = None
        self._drawn_s = float("-inf")

    def report(self, report: Progress) -> None:
        now_s = SYSTEM.monotonic_s()
        new_phase = report.phase != self._meter.phase
        if (
            not new_phase
            and now_s - self._drawn_s < _REDRAW_INTERVAL_S
            and report.done_bytes < report.total_bytes
        ):
            return
        self._drawn_s = now_s
        self._meter.add(report, now_s)
        if new_phase or self._task is None:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(plain(report.phase), total=None, figures="")
        self._bars.update(
            self._task,
            completed=report.done_bytes,
            total=max(report.total_bytes, report.done_bytes) or None,
            figures=self._meter.figures(report).ljust(_FIGURES_WIDTH),
        )


class _LineView:
    """A line every LINE_INTERVAL_S, for logs and pipes; a verb that is done sooner stays silent."""

    def __init__(self) -> None:
        self._meter = Meter()
        self._written_s = SYSTEM.monotonic_s()
        self._sampled_s = float("-inf")

    def report(self, report: Progress) -> None:
        now_s = SYSTEM.monotonic_s()
        if report.phase == self._meter.phase and now_s - self._sampled_s < _REDRAW_INTERVAL_S:
            return
        self._sampled_s = now_s
        self._meter.add(report, now_s)
        if now_s - self._written_s < LINE_INTERVAL_S:
            return
        self._written_s = now_s
        percent = 100 * report.done_bytes // max(report.total_bytes, 1)
        write_error(f"{plain(report.phase)} {percent}% · {self._meter.figures(report)}\n")


def _guarded(report: Callable[[Progress], None]) -> ProgressCallback:
    """Return `report` made harmless: a terminal that went away must not stop a replication."""

    def guarded(progress: Progress) -> None:
        with contextlib.suppress(OSError, ValueError):
            report(progress)

    return guarded
