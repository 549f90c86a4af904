"""Logs that stay after they were applied, so that a point between two cycles can be made later.

    record   a row for each log of a point, in the very transaction that completes it
    settle   only then their files move from spool/ to logs/; what a cut leaves behind moves at the next call
    expire   rows of those whose time is over, or that no kept point lies before, go; then their files

All logs of a point are kept, or none: so a point that has one kept log has all of them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hvreplica.store.policy import policy_of
from hvreplica.store.records import KeptLogRow

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hvreplica.store.home import VmHome
    from hvreplica.store.policy import Policy
    from hvreplica.store.records import LogSpec, PointRow

_SUFFIXES = (".hrl", ".hrt")


def record_kept(home: VmHome, point: PointRow, logs: Sequence[LogSpec]) -> bool:
    """Keep the logs that led to a point if the policy asks for it; return whether they are kept.

    Inside the transaction that completes the point. settle_kept() comes behind it.
    """
    keep_s = policy_of(home).keep_logs_s
    if not keep_s:
        return False
    until_s = home.clock.now_s() + keep_s
    for log in logs:
        home.catalog.insert_kept_log(
            home.vm_id,
            KeptLogRow(
                log_id=log.log_id,
                disk_index=log.disk_index,
                previous_log_id=log.previous_log_id,
                log_bytes=log.log_bytes,
                point_id=point.id,
                before_point_id=point.previous_id,
                instant_s=point.instant_s,
                is_ordered=log.is_ordered,
                kept_until_s=until_s,
            ),
        )
    return True


def settle_kept(home: VmHome) -> None:
    """Move kept logs that are still in the spool to their place, durably. Repeatable."""
    names = set(home.files.names(home.paths.spool))
    rows = [row for row in home.catalog.kept_logs(home.vm_id) if home.paths.log(row.log_id).name in names]
    if not rows:
        return
    home.files.make_directory(home.paths.logs)
    for row in rows:
        with contextlib.suppress(FileNotFoundError):  # there are none; before the log, which is looked for
            home.files.replace(home.paths.times(row.log_id), home.paths.kept_times(row.log_id))
        with contextlib.suppress(FileNotFoundError):  # another thread did it meanwhile
            home.files.replace(home.paths.log(row.log_id), home.paths.kept_log(row.log_id))
    home.files.sync_directory(home.paths.logs)
    home.files.sync_directory(home.paths.spool)


def kept_log_path(home: VmHome, row: KeptLogRow) -> Path:
    """Return where a kept log stands now."""
    path = home.paths.kept_log(row.log_id)
    return path if home.files.exists(path) else home.paths.log(row.log_id)


def expire_kept(home: VmHome, policy: Policy) -> None:
    """Let logs go whose time is over, or that no point lies before any more from which to go on.

    Where no logs are to be kept all go. Files that no row speaks of go too.
    """
    catalog, vm_id = home.catalog, home.vm_id
    settle_kept(home)
    now_s = home.clock.now_s()
    with catalog.transaction():
        points = catalog.points(vm_id, superseded=True)
        first = min((point.sequence for point in points if point.is_kept), default=None)
        useful = {point.id for point in points if first is not None and point.sequence > first}
        for row in catalog.kept_logs(vm_id):
            if not policy.keep_logs_s or row.kept_until_s <= now_s or row.point_id not in useful:
                catalog.delete_kept_log(vm_id, row.log_id)
        rows = catalog.kept_logs(vm_id)
    kept = {home.paths.kept_log(row.log_id).name for row in rows}
    kept |= {home.paths.kept_times(row.log_id).name for row in rows}
    names = home.files.names(home.paths.logs)
    gone = [name for name in names if name.endswith(_SUFFIXES) and name not in kept]
    for name in gone:
        home.files.unlink(home.paths.logs / name)
    if gone:
        home.files.sync_directory(home.paths.logs)
