"""`python -m tests.replication.capturing DISK SOCKET STATE`: a disk under capture, cut line by line of stdin.

Prints "ready" once it serves. A line "cut PREVIOUS_ID" is answered with the new log's path and id, or "none".
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from hvreplica.capture.export import ExportInfo
from hvreplica.capture.listen import NbdListener
from hvreplica.capture.machine import Machine, Slot
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES

if TYPE_CHECKING:
    from hvreplica.capture.handshake import Negotiated


def main(disk_path: Path, socket: Path, state: Path) -> None:
    """Serve until stdin ends."""
    OS_FILES.make_directory(state)
    disk = open_disk(OS_FILES, disk_path, writable=True, clock=SYSTEM)
    machine = Machine(OS_FILES, state, [Slot(0, disk, has_base=True)], clock=SYSTEM)
    export = ExportInfo("0", disk.virtual_bytes, minimum_block_bytes=1)

    def handle(client: Negotiated) -> None:
        machine.services[client.export_index].serve(client.socket.fileno(), structured=client.structured)

    with NbdListener(socket, lambda: [export], handle):
        _tell("ready")
        for line in sys.stdin:
            cut = machine.cut([UUID(line.split()[1])])
            machine.settle(cut)
            told = " ".join(f"{log.path} {log.log_id} {cut.held_us:.0f}" for log in cut.logs)
            _tell(told or "none")
    machine.close()


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main(*(Path(argument) for argument in sys.argv[1:]))
