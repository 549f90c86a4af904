"""A FileSystem in memory that fails on demand, remembers what was synced, and can lose power at any instant.

The fault model, in words:

- a write, zero or resize is volatile until sync() of its file returned; until then each 512-byte sector
  holds, after a power cut, any of the versions it went through, each sector on its own, and the size any of
  its sizes
- a created, linked, renamed or removed name is volatile until sync_directory() of its folder; until then the
names of
  that folder stand, after a power cut, as some prefix of those steps left them (a rename is whole or not at
  all)
- sync() of a file does not make its name durable; sync_directory() does not make any data durable
- a failed sync loses all that was pending in that file, although this process goes on reading it
- the time of a file's last change is that of any of its steps since the last sync, or of the last one before
- make_directory() is durable at once, as files.py promises
- locks and open files end with the process

Use: record with FaultFiles, then walk crash_states(files.trace(), ...), each of which is a FaultFiles again:

    files = FaultFiles("/data")
    do_something(files)
    files.acknowledge("point 1")
    for index, world in crash_states(files.trace(), seed=1):
        recover(world)
        check(world, acknowledged=world.acknowledged)
"""

from __future__ import annotations

from tests.support.crash import crash_states
from tests.support.memfiles import FaultBlockFile, FaultFiles
from tests.support.trace import SECTOR_BYTES, Event, Fault, FileTree, Killed, Trace

__all__ = [
    "SECTOR_BYTES",
    "Event",
    "Fault",
    "FaultBlockFile",
    "FaultFiles",
    "FileTree",
    "Killed",
    "Trace",
    "crash_states",
]
