"""What replication did lately, and how well it is: pure functions over one record.

The record covers one monitoring interval; the names are those of Hyper-V's replication statistics. Times in
the record are Unix seconds, sizes are bytes of the guest, before compression.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from hvreplica.clock import iso_time
from hvreplica.errors import StoreFull

VERSION = 1
MONITORING_INTERVAL_S = 12 * 3600.0
MISSED_SHARE_MAX = 0.2
SYNCHRONIZED_AGE_MAX_S = 3600.0
LATENCY_MAX_S = 300.0
_TEXT_CHARS_MAX = 2_000

Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]


class Trouble(msgspec.Struct, frozen=True):
    """Why the last cycle failed. since_s: of the first failure in a row. is_fatal: no retry will be made."""

    kind: str
    message: str
    since_s: float
    is_fatal: bool

    @property
    def waits_for_room(self) -> bool:
        """Whether replication goes on by itself as soon as the replica's store has room."""
        return self.kind == StoreFull.__name__


class Statistics(msgspec.Struct, frozen=True):
    """The record of one interval. *_sum: over its successful cycles; trouble: None once a cycle succeeded.

    waits_for: why the replica had not applied the point of the last successful cycle; None where it had.
    """

    start_statistic_time: float
    version: int = VERSION
    replication_success_count: Count = 0
    replication_miss_count: Count = 0
    replication_failure_count: Count = 0
    network_failure_count: Count = 0
    application_consistent_snapshot_failure_count: Count = 0
    replication_size: Count = 0
    replication_size_sum: Count = 0
    max_replication_size: Count = 0
    replication_latency: Seconds = 0.0
    replication_latency_sum: Seconds = 0.0
    max_replication_latency: Seconds = 0.0
    last_synchronized_at: float | None = None
    trouble: Trouble | None = None
    waits_for: Annotated[str, Meta(max_length=_TEXT_CHARS_MAX)] | None = None


class ReplicationStatistics(msgspec.Struct, frozen=True):
    """The record as it is shown. Times are ISO 8601 in UTC, sizes bytes, latencies seconds.

    replication_size, replication_latency: of the last cycle. average_*, max_*: over the interval's.
    pending_replication_size: what the replica does not have yet. replication_health: NotApplicable, Normal,
    Warning or Critical; replication_health_issues: why, a sentence each.
    """

    start_statistic_time: str
    end_statistic_time: str
    replication_success_count: int
    replication_miss_count: int
    replication_failure_count: int
    network_failure_count: int
    application_consistent_snapshot_failure_count: int
    replication_size: int
    average_replication_size: int
    max_replication_size: int
    pending_replication_size: int
    replication_latency: float
    average_replication_latency: float
    max_replication_latency: float
    last_synchronized_at: str | None
    replication_health: str
    replication_health_issues: list[str]


@dataclass(frozen=True, slots=True)
class Situation:
    """What health depends on beside the record.

    has_replica: whether there is one, or shall be. phase: as in the primary's state. now_s: Unix time.
    issues: what else is worth a warning.
    """

    has_replica: bool
    phase: str
    is_paused: bool
    pending_bytes: int
    now_s: float
    issues: tuple[str, ...] = ()


def succeeded(
    record: Statistics,
    *,
    size_bytes: int,
    latency_s: float,
    synchronized_s: float,
    waits_for: str | None = None,
) -> Statistics:
    """Count a cycle that ended well. synchronized_s: the instant that the replica has now."""
    return replace(
        record,
        replication_success_count=record.replication_success_count + 1,
        replication_size=size_bytes,
        replication_size_sum=record.replication_size_sum + size_bytes,
        max_replication_size=max(record.max_replication_size, size_bytes),
        replication_latency=latency_s,
        replication_latency_sum=record.replication_latency_sum + latency_s,
        max_replication_latency=max(record.max_replication_latency, latency_s),
        last_synchronized_at=synchronized_s,
        trouble=None,
        waits_for=None if waits_for is None else waits_for[:_TEXT_CHARS_MAX],
    )


def failed(
    record: Statistics, *, kind: str, message: str, now_s: float, is_network: bool, is_fatal: bool
) -> Statistics:
    """Count a cycle that failed."""
    trouble, before = Trouble(kind, message[:_TEXT_CHARS_MAX], now_s, is_fatal), record.trouble
    if before is not None and before.waits_for_room == trouble.waits_for_room:  # a state of its own
        trouble = replace(trouble, since_s=before.since_s)
    return replace(
        record,
        replication_failure_count=record.replication_failure_count + 1,
        network_failure_count=record.network_failure_count + is_network,
        trouble=trouble,
    )


def missed(record: Statistics, count: int) -> Statistics:
    """Count cycles that could not begin when they were due."""
    return replace(record, replication_miss_count=record.replication_miss_count + count)


def freeze_failed(record: Statistics) -> Statistics:
    """Count a cut that was to be application-consistent and could not be."""
    count = record.application_consistent_snapshot_failure_count + 1
    return replace(record, application_consistent_snapshot_failure_count=count)


def reset(record: Statistics, now_s: float) -> Statistics:
    """Begin a new interval now: counts go, what is true now stays."""
    return Statistics(
        now_s,
        last_synchronized_at=record.last_synchronized_at,
        trouble=record.trouble,
        waits_for=record.waits_for,
    )


def is_over(record: Statistics, now_s: float) -> bool:
    """Return whether the interval has ended; a clock that was set back ends it too."""
    return not 0 <= now_s - record.start_statistic_time < MONITORING_INTERVAL_S


def show(record: Statistics, situation: Situation) -> ReplicationStatistics:
    """Return the record with health, averages and what waits."""
    health, issues = judge(record, situation)
    count = max(record.replication_success_count, 1)
    synchronized_s = record.last_synchronized_at
    return ReplicationStatistics(
        start_statistic_time=iso_time(record.start_statistic_time),
        end_statistic_time=iso_time(situation.now_s),
        replication_success_count=record.replication_success_count,
        replication_miss_count=record.replication_miss_count,
        replication_failure_count=record.replication_failure_count,
        network_failure_count=record.network_failure_count,
        application_consistent_snapshot_failure_count=record.application_consistent_snapshot_failure_count,
        replication_size=record.replication_size,
        average_replication_size=record.replication_size_sum // count,
        max_replication_size=record.max_replication_size,
        pending_replication_size=situation.pending_bytes,
        replication_latency=round(record.replication_latency, 3),
        average_replication_latency=round(record.replication_latency_sum / count, 3),
        max_replication_latency=round(record.max_replication_latency, 3),
        last_synchronized_at=None if synchronized_s is None else iso_time(synchronized_s),
        replication_health=health,
        replication_health_issues=issues,
    )


def judge(record: Statistics, situation: Situation) -> tuple[str, list[str]]:
    """Return the health, "NotApplicable", "Normal", "Warning" or "Critical", and why it is not better."""
    if not situation.has_replica:
        return "NotApplicable", []
    critical = _critical_issues(record)
    warnings = _warnings(record, situation)
    health = "Critical" if critical else "Warning" if warnings else "Normal"
    return health, [*critical, *warnings]


def _critical_issues(record: Statistics) -> list[str]:
    trouble = record.trouble
    if trouble is None:
        return []
    since = iso_time(trouble.since_s)
    if trouble.waits_for_room:
        what = f"replication waits for room at the replica since {since}, and goes on by itself"
        return [f"{what}: {trouble.message}"]
    if trouble.is_fatal:
        return [f"replication stopped at {since} and waits to be resumed: {trouble.message}"]
    return [f"replication has failed since {since}: {trouble.message}"]


def _warnings(record: Statistics, situation: Situation) -> list[str]:
    issues = list(situation.issues)
    if record.waits_for is not None:
        issues.append(f"the replica has the newest point and applies it later: {record.waits_for}")
    if situation.phase != "ready":
        issues.append("the initial replication is not complete")
    if situation.is_paused:
        issues.append("replication is paused")
    due = record.replication_success_count + record.replication_miss_count + record.replication_failure_count
    if due and record.replication_miss_count / due > MISSED_SHARE_MAX:
        share = round(100 * record.replication_miss_count / due)
        issues.append(f"{share} % of the cycles in this interval were missed")
    synchronized_s = record.last_synchronized_at
    if synchronized_s is not None and situation.now_s - synchronized_s > SYNCHRONIZED_AGE_MAX_S:
        issues.append(f"the replica was last synchronized at {iso_time(synchronized_s)}, over an hour ago")
    count = max(record.replication_success_count, 1)
    if record.replication_latency_sum / count > LATENCY_MAX_S:
        issues.append("a cycle takes longer than five minutes on average")
    return issues
