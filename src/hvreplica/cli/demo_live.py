"""The demo's guest while it runs on `capture`: it writes over NBD, and time passes."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

from hvreplica import native
from hvreplica.capture.client import NbdClient
from hvreplica.cli.demo_guest import GRAIN_BYTES
from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.units import MIB

if TYPE_CHECKING:
    from pathlib import Path

_WINDOW_BYTES = 4 * MIB


def write_live(image: Path, socket: Path) -> int:
    """Bring the first disk behind the socket to the image's content, as a guest writes; return the bytes.

    Only where the image has data is it looked at: a guest that removes files leaves their bytes there.
    """
    written_bytes = 0
    source = OS_FILES.open(image)
    try:
        with NbdClient(socket, "0") as client:
            for start in range(0, client.size_bytes, _WINDOW_BYTES):
                end = min(start + _WINDOW_BYTES, client.size_bytes)
                if not any(source.data_extents(start, end)):
                    continue
                wanted = source.read(start, end - start)
                runs = native.changed_runs(client.read(start, end - start), wanted, GRAIN_BYTES)
                for offset, length in runs.tolist():
                    client.write(start + offset, wanted[offset : offset + length])
                    written_bytes += length
            client.flush()
    finally:
        source.close()
    return written_bytes


def let_second_end() -> float:
    """Wait until the second that it is has passed, for whatever comes next; return the one that passed."""
    second = math.floor(SYSTEM.now_s())
    while SYSTEM.now_s() < second + 1:
        threading.Event().wait(second + 1 - SYSTEM.now_s())
    return float(second)
