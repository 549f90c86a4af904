"""What a check says: findings with their place, counts, figures, and one verdict.

Nothing here knows a format. A check adds what it finds to Findings and goes on; only what it was asked for
is kept, and of one code at most LIST_MAX findings are listed, the rest is counted.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal

import msgspec

from hvreplica.disk.check.codes import CODES, LEVELS, SEVERITIES, Level, Repair, Severity

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hvreplica.errors import HvReplicaError

__all__ = ["LEVELS", "LIST_MAX", "CheckReport", "Finding", "Findings", "Level", "Statistics", "Verdict"]

Verdict = Literal["clean", "repairable", "corrupt"]
VERDICTS: tuple[Verdict, ...] = ("clean", "repairable", "corrupt")  # by exit status
LIST_MAX = 100


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is worth saying.

    code: see codes.py. path: of the file, where it is not the one that was checked. offset: of the field in
    the file, in bytes. field, expected, actual, spec, hint: as in
    an HvReplicaError. repair: the action of `disk repair` that mends it.
    """

    level: Level
    code: str
    severity: Severity
    message: str
    path: str | None = None
    offset: int | None = None
    field: str | None = None
    expected: str | int | None = None
    actual: str | int | None = None
    spec: str | None = None
    hint: str | None = None
    repair: Repair | None = None


class Statistics(msgspec.Struct, kw_only=True):
    """Figures of the file, as a replay of its log would leave it; None where they could not be told.

    allocated_blocks: payload blocks with a place in the file, partial_blocks among them. used_bytes: of
    blocks, bitmaps and structures, kept places included. leaked_bytes: of the file in no use, tail_bytes
    behind the last use among them. log: "none", "clean" or "dirty". parents: their files, nearest first, as
    far as they could be opened.
    """

    file_bytes: int
    virtual_bytes: int | None = None
    block_bytes: int | None = None
    blocks: int | None = None
    allocated_blocks: int | None = None
    partial_blocks: int | None = None
    zero_blocks: int | None = None
    unmapped_blocks: int | None = None
    bitmap_blocks: int | None = None
    used_bytes: int | None = None
    leaked_bytes: int | None = None
    tail_bytes: int | None = None
    log: str | None = None
    parents: list[str] | None = None


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found.

    levels: those that were run. status: 0 clean (info and warnings at most), 1 repairable, 2 corrupt. counts:
    by severity, of all findings; omitted: by code, of those that are not listed.
    """

    path: str
    format: str
    levels: tuple[Level, ...]
    status: int
    verdict: Verdict
    counts: dict[str, int]
    findings: tuple[Finding, ...]
    omitted: dict[str, int]
    statistics: Statistics

    def codes(self) -> list[str]:
        """Return the codes found, each once, in order."""
        return list(dict.fromkeys(finding.code for finding in self.findings))


class Findings:
    """What one check has found so far. Not thread-safe."""

    def __init__(self, levels: Iterable[Level]) -> None:
        self.levels = frozenset(levels)
        self._listed: list[Finding] = []
        self._codes: Counter[str] = Counter()
        self._severities: Counter[Severity] = Counter()

    def add(self, code: str, message: str, *, severity: Severity | None = None, **place: object) -> None:
        """Add a finding of `code`; place: the other fields of Finding. severity: where not the code's own,
        and then nothing mends it.
        """
        known = CODES[code]
        if known.level not in self.levels:
            return
        chosen = severity or known.severity
        self._severities[chosen] += 1
        self._codes[code] += 1
        if self._codes[code] > LIST_MAX:
            return
        shown = {name: _plain(value) for name, value in place.items()}
        self._listed.append(
            Finding(
                level=known.level,
                code=code,
                severity=chosen,
                message=message,
                repair=known.repair if chosen == known.severity else None,
                **shown,  # type: ignore[arg-type]
            )
        )

    def add_error(
        self, code: str, error: HvReplicaError, *, severity: Severity | None = None, path: object = None
    ) -> None:
        """Add what an error says. path: of the file, where it is not the one that is checked."""
        self.add(
            code,
            error.message,
            severity=severity,
            path=path,
            offset=error.offset,
            field=error.field,
            expected=error.expected,
            actual=error.actual,
            spec=error.spec,
            hint=error.hint,
        )

    def add_errors(self, errors: Iterable[HvReplicaError], codes: Mapping[str, str]) -> None:
        """Add errors of formats; codes: by "Class field", else by "Class"."""
        for error in errors:
            kind = type(error).__name__
            code = codes.get(f"{kind} {error.field}") or codes[kind]
            self.add_error(code, error)

    def count_more(self, code: str, count: int) -> None:
        """Count `count` more findings of a code that cannot be listed."""
        known = CODES[code]
        if known.level in self.levels and count > 0:
            self._severities[known.severity] += count
            self._codes[code] += count

    def has(self, severity: Severity) -> bool:
        """Return whether anything of this severity was found."""
        return self._severities[severity] > 0

    def report(self, path: str, format_name: str, statistics: Statistics) -> CheckReport:
        """Return all of it."""
        status = 2 if self.has("corrupt") else 1 if self.has("repairable") else 0
        listed = Counter(finding.code for finding in self._listed)
        order = {level: index for index, level in enumerate(LEVELS)}
        return CheckReport(
            path=path,
            format=format_name,
            levels=tuple(level for level in LEVELS if level in self.levels),
            status=status,
            verdict=VERDICTS[status],
            counts={severity: self._severities[severity] for severity in SEVERITIES},
            findings=tuple(sorted(self._listed, key=lambda finding: order[finding.level])),
            omitted=dict(self._codes - listed),
            statistics=statistics,
        )


def _plain(value: object) -> str | int | None:
    """Return a value as a report can carry it: bytes as text where they are, else as hex."""
    if isinstance(value, (bytes, bytearray)):
        text = value.rstrip(b"\0").decode("latin-1")
        return f"'{text}'" if text and text.isascii() and text.isprintable() else f"0x{value.hex()}"
    return value if value is None or isinstance(value, int) else str(value)
