"""`python -m tests.replication.full BYTES ARGS…`: the command line on a disk with room for so many bytes.

Only payload counts, so that catalog and logs of the program itself still fit, as on a disk that fills up for real.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from typing import Any

from hvreplica import native
from hvreplica.cli.main import main


def limit(room_bytes: int) -> None:
    """Make payload writes fail with ENOSPC once `room_bytes` were written."""
    real = native.write_extents
    left = [room_bytes]
    lock = threading.Lock()

    def write_extents(file: Any, block_map: Any, extents: Any, data: Any) -> None:
        with lock:
            left[0] -= memoryview(data).nbytes
            if left[0] < 0:
                # A local variable that is raised makes a cycle of exception and frames, as in the kernels' facade.
                refusal = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.path))
                raise refusal
        real(file, block_map, extents, data)

    native.write_extents = write_extents


if __name__ == "__main__":
    limit(int(sys.argv.pop(1)))
    main()
