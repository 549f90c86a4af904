"""`python -m tests.replication.dying COUNT ARGS…`: the command line, killed at its COUNT-th file operation.

A SIGKILL at a counted place needs no waiting and repeats. Payload that the kernels write counts by
the request for its descriptor. A COUNT of 0 never kills, and prints how many operations there were to standard error.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from hvreplica import files
from hvreplica.cli.main import main
from hvreplica.replication import primary

_BLOCK_FILE = ("read_into", "write", "resize", "zero", "sync", "fileno", "close")
_FILE_SYSTEM = ("open", "make_directory", "replace", "unlink", "sync_directory", "lock")


def arm(kill_at: int) -> list[int]:
    """Make every file operation count, and the one numbered `kill_at` the last; return the running count."""
    count = [0]
    lock = threading.Lock()

    def counted(function: Any) -> Any:
        def operation(*values: Any, **options: Any) -> Any:
            with lock:
                count[0] += 1
                if count[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*values, **options)

        return operation

    for kind, names in ((files.OsBlockFile, _BLOCK_FILE), (files.OsFiles, _FILE_SYSTEM)):
        for name in names:
            setattr(kind, name, counted(getattr(kind, name)))
    return count


if __name__ == "__main__":
    operations = arm(int(sys.argv.pop(1)))
    primary.RETRY_AFTER_S = ()  # a server that was killed stays dead here
    try:
        main()
    finally:
        sys.stderr.write(f"operations {operations[0]}\n")
