"""A VM's status as measurements in the text format that Prometheus reads. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hvreplica.replication.status import ReplicationStatus

HEALTH = ("NotApplicable", "Normal", "Warning", "Critical")  # by Hyper-V's numbers

Sample = tuple[dict[str, str], float]


def exposition(status: ReplicationStatus) -> str:
    """Return the page of one VM. Counters begin anew with each monitoring interval."""
    return "".join(_families(status))


def _families(status: ReplicationStatus) -> Iterator[str]:
    vm = {"vm": status.vm}
    record = status.statistics

    def one(value: float) -> Sequence[Sample]:
        return [(vm, value)]

    yield _family(
        "replication_health", "0 not applicable, 1 normal, 2 warning, 3 critical",
        one(HEALTH.index(record.replication_health)),
    )  # fmt: skip
    yield _family("replication_paused", "1 while paused", one(status.paused))
    waits = status.replication_state == "Suspended" and not status.paused
    yield _family("replica_full", "1 while replication waits for room at the replica", one(waits))
    for name, text, value in (
        ("cycles_total", "Cycles that ended well", record.replication_success_count),
        ("cycles_missed_total", "Cycles that could not begin when due", record.replication_miss_count),
        ("cycles_failed_total", "Cycles that failed", record.replication_failure_count),
        (
            "network_failures_total",
            "Cycles that failed on the way",
            record.network_failure_count,
        ),
        (
            "freeze_failures_total",
            "Cuts that could not be application-consistent",
            record.application_consistent_snapshot_failure_count,
        ),
    ):
        yield _family(name, text, one(value), kind="counter")
    for name, text, size in (
        ("cycle_bytes", "Guest bytes of the last cycle", record.replication_size),
        ("cycle_bytes_max", "Most guest bytes of a cycle", record.max_replication_size),
        ("pending_bytes", "What the replica does not have yet", record.pending_replication_size),
        ("pending_cuts", "Cuts that the replica does not have yet", len(status.pending)),
        ("cycle_seconds", "Length of the last cycle", record.replication_latency),
        ("cycle_seconds_max", "Length of the longest cycle", record.max_replication_latency),
    ):
        yield _family(name, text, one(size))
    if record.last_synchronized_at is not None:
        instant_s = datetime.fromisoformat(record.last_synchronized_at).timestamp()
        yield _family("last_synchronized_seconds", "What the replica has, as Unix time", one(instant_s))
    yield from _tracking(status)


def _tracking(status: ReplicationStatus) -> Iterator[str]:
    tracked = [
        ({"vm": status.vm, "disk": str(disk.index)}, disk.tracking)
        for disk in status.disks
        if disk.tracking is not None
    ]
    if not tracked:
        return
    for name, text, kind in (
        ("dirty_bytes", "Changed since the last cut", "gauge"),
        ("unlogged_bytes", "What the next cut reads from the disk", "gauge"),
        ("log_bytes", "Length of the open log", "gauge"),
        ("journal_regions", "Regions that a crash would have compared", "gauge"),
        ("writes", "Writes of the guest", "counter"),
        ("written_bytes", "Bytes that the guest wrote", "counter"),
    ):
        samples = [(labels, float(getattr(tracking, name))) for labels, tracking in tracked]
        yield _family(f"disk_{name}" + "_total" * (kind == "counter"), text, samples, kind=kind)


def _family(name: str, text: str, samples: Sequence[Sample], *, kind: str = "gauge") -> str:
    full = f"hvreplica_{name}"
    lines = [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
    for labels, value in samples:
        named = ",".join(f'{label}="{_escaped(words)}"' for label, words in labels.items())
        lines.append(f"{full}{{{named}}} {_number(value)}")
    return "\n".join(lines) + "\n"


def _escaped(words: str) -> str:
    return words.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
