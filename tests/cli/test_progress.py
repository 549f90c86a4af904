"""Figures of a running verb, and who gets to see them."""

from __future__ import annotations

import io

import pytest

from hvreplica.cli import progress
from hvreplica.cli.render import Output
from hvreplica.progress import Progress
from tests.support.fakeclock import FakeClock

MIB = 1 << 20


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(progress, "SYSTEM", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_meter_gives_rate_ratio_and_time_left() -> None:
    meter = progress.Meter()
    meter.add(Progress("ship", 0, 100 * MIB), 10.0)
    report = Progress("ship", 20 * MIB, 100 * MIB, raw_bytes=30 * MIB, wire_bytes=10 * MIB)
    meter.add(report, 12.0)
    assert meter.rate_bytes_per_s() == 10 * MIB
    assert meter.figures(report) == "20.0 of 100 MiB · 10.0 MiB/s · wire 10.0 MiB (3.0:1) · ETA 0:08"


def test_meter_rate_forgets_what_is_long_ago_and_other_phases() -> None:
    meter = progress.Meter()
    for second in range(20):
        meter.add(Progress("ship", min(second, 10) * MIB, 99 * MIB), float(second))
    assert meter.rate_bytes_per_s() == 0.0
    meter.add(Progress("apply", 5 * MIB, 99 * MIB), 20.0)
    assert meter.rate_bytes_per_s() == 0.0
    assert meter.figures(Progress("apply", 5 * MIB, 99 * MIB)) == "5.0 of 99.0 MiB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (61, "1:01"), (3661, "1:01:01"), (99 * 3600, "99:00:00"), (1e9, "over 99 h")],
)
def test_duration_is_short(seconds: float, text: str) -> None:
    assert progress.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1 << 20, "1.0 MiB"), (1023 << 20, "1023 MiB"), (3 << 39, "1.5 TiB")],
)
def test_short_size_is_short(size: int, text: str) -> None:
    assert progress.short_size(size) == text


def test_figures_of_different_units_name_both() -> None:
    assert progress.Meter().figures(Progress("ship", 1 << 20, 1 << 30)) == "1.0 MiB of 1.0 GiB"


def test_lines_come_every_few_seconds(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_shown(Output()) as report:
        assert report is not None
        for second in range(12):
            report(Progress("ship\x1b", second * MIB, 12 * MIB))
            clock.advance(1.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("ship\\x1b 41% · 5.0 of 12.0 MiB · 1.0 MiB/s")


@pytest.mark.parametrize("output", [Output(quiet=True), Output(json=True)])
def test_nothing_is_shown_to_a_program_or_with_quiet(output: Output) -> None:
    with progress.progress_shown(output) as report:
        assert report is None


def test_terminal_gets_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress.progress_shown(Output(json=True)) as report:
        assert report is not None
        report(Progress("compare", 0, 8 * MIB))
        clock.advance(1.0)
        report(Progress("compare", 4 * MIB, 8 * MIB))
        clock.advance(1.0)
        report(Progress("ship", 4 * MIB, 4 * MIB, raw_bytes=4 * MIB, wire_bytes=2 * MIB))
    shown = terminal.getvalue()
    assert "ship" in shown
    assert "wire 2.0 MiB (2.0:1)" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h"), "the cursor comes back"


def test_terminal_that_went_away_does_not_stop_the_verb(
    monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, text)

    monkeypatch.setattr("sys.stderr", Gone())
    with progress.progress_shown(Output()) as report:
        assert report is not None
        clock.advance(60.0)
        report(Progress("ship", 1, 2))
