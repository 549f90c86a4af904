"""The times of logs: kept beside them for points between two cycles, and worth nothing without them.

    spool/<log id>.hrt   while the log is there, from before it is committed
    logs/<log id>.hrt    beside a log that is kept after it was applied

No transfer, no cycle and no point ever fails for them: what is missing or damaged costs the parts of seconds.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hvreplica.errors import FormatError, StoreFull
from hvreplica.files import write_durably
from hvreplica.formats.times import unpack_times
from hvreplica.hrl import LogReader, read_times_file
from hvreplica.store.kept_logs import kept_log_path
from hvreplica.store.policy import policy_of

if TYPE_CHECKING:
    import uuid
    from collections.abc import Sequence

    from hvreplica.formats.times import Times
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import KeptLogRow

_LOG = logging.getLogger("hvreplica.serve")


def keep_times(home: VmHome, log_id: uuid.UUID, data: bytes) -> None:
    """Keep the times of a log on its way, durably, if the policy keeps logs. Raises: nothing of them."""
    if not policy_of(home).keep_logs_s:
        return
    path = home.paths.times(log_id)
    try:
        unpack_times(data, log_id=log_id)
        write_durably(home.files, path, data, clock=home.clock)
    except (OSError, FormatError, StoreFull) as error:
        _LOG.warning("VM %r: the parts of seconds of a log are not kept: %s: %s", home.name, path, error)


def read_times(home: VmHome, row: KeptLogRow) -> Times | None:
    """Return the times of a kept log; None, with a warning where they are damaged, if they cannot be had."""
    for path in (home.paths.kept_times(row.log_id), home.paths.times(row.log_id)):
        if not home.files.exists(path):
            continue
        try:
            times = unpack_times(read_times_file(home.files, path), log_id=row.log_id)
            with LogReader(home.files, kept_log_path(home, row)) as reader:
                if reader.entry_count == times.entry_count:
                    return times
            _LOG.warning("VM %r: %s does not belong to its log", home.name, path)
        except (OSError, FormatError) as error:
            _LOG.warning("VM %r: the times of a log cannot be read: %s: %s", home.name, path, error)
    return None


def times_of(home: VmHome, rows: Sequence[KeptLogRow]) -> list[Times] | None:
    """Return the times of all logs of a cycle; None where those of one cannot be had."""
    found = [read_times(home, row) for row in rows]
    known = [times for times in found if times is not None]
    return known if len(known) == len(found) else None
