"""`python -m tests.replication.dying COUNT ARGS…`: the command line, killed at its COUNT-th file operation.

A SIGKILL at a counted place needs no waiting and repeats. Payload that the kernels write counts by
the request for its descriptor; dies() does the same in a fork, at a tenth of the cost. A COUNT of 0 never kills, and prints how many operations there were to standard error.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

from hvreplica import files
from hvreplica.cli.main import main
from hvreplica.replication import primary

if TYPE_CHECKING:
    from collections.abc import Callable

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


def dies(kill_at: int, verb: Callable[[], object]) -> bool:
    """Call `verb` in a fork that is killed at its `kill_at`-th file operation; return whether it was.

    The test fails where the verb fails by itself.
    """
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        code = 1
        try:
            arm(kill_at)
            verb()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, f"the verb failed where it was to be killed at {kill_at}"
    return False


if __name__ == "__main__":
    operations = arm(int(sys.argv.pop(1)))
    primary.RETRY_AFTER_S = ()  # a server that was killed stays dead here
    try:
        main()
    finally:
        sys.stderr.write(f"operations {operations[0]}\n")
