"""Points that wait for logs which are damaged or gone: a resync lets them go, and brings what differs
instead.

A point that has not begun to change the disks goes with those behind it, and the point before it is the
newest one again. Where the change has begun, the disks are between two points and only the log leads on: then
a whole copy has to take their place, which keeps all older points.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hvreplica.errors import FormatError, LogError
from hvreplica.hrl import verify_log
from hvreplica.store.apply import remove_logs, waiting_points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hvreplica.store.home import VmHome
    from hvreplica.store.records import PointRow

_LOG = logging.getLogger("hvreplica.store")


def drop_unreadable(home: VmHome) -> str | None:
    """Let the points go that wait for a log which cannot be read, and those behind them; durable on return.

    Every waiting log is read whole. Returns a sentence where the disks need such a log: only a whole copy
    helps then. Raises: Locked while another process reads the disks.
    """
    if not waiting_points(home):
        return None
    with home.exclusive():
        waiting = waiting_points(home)
        for place, point in enumerate(waiting):
            fault = _fault(home, point)
            if fault is None:
                continue
            if point.state == "applying":
                return f"the disks are half on point {point.id}, and its log cannot be read: {fault}"
            _drop(home, waiting[place:], fault)
            break
    return None


def _fault(home: VmHome, point: PointRow) -> str | None:
    sizes = home.catalog.members(home.vm_id, point.id)
    for log in home.catalog.logs(home.vm_id, point.id):
        path = home.paths.log(log.log_id)
        try:
            report = verify_log(home.files, path, disk_bytes=sizes[log.disk_index])
        except FileNotFoundError:
            return f"{path} is missing"
        except (FormatError, LogError) as error:
            return str(error)
        if report.log_id != str(log.log_id):
            return f"{path} is another log"
    return None


def _drop(home: VmHome, points: Sequence[PointRow], fault: str) -> None:
    logs = [log for point in points for log in home.catalog.logs(home.vm_id, point.id)]
    with home.catalog.transaction():
        home.catalog.delete_transfers(home.vm_id, "logs")  # they would follow the points that go
        for point in points:
            home.catalog.delete_point(home.vm_id, point.id)
    for point in points:
        _LOG.warning("VM %r: point %s was never applied and goes: %s", home.name, point.id, fault)
    remove_logs(home, logs)
