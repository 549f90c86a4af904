"""A machine under capture in this process, and a guest on it that speaks NBD over a socket pair.

The guest is written from the protocol document alone and is in the transmission phase from the start.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import uuid
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica import native
from hvreplica.capture.machine import Machine, Slot
from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.files import OS_FILES
from hvreplica.hrl import apply_log
from hvreplica.tracking.fingerprints import FingerprintTable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

    from hvreplica.capture.machine import Cut
    from hvreplica.capture.service import DiskService
    from hvreplica.disk.open import Format

NIL = uuid.UUID(int=0)
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE = 1, 2, 4, 8


class GuestError(Exception):
    """The error number of a reply."""


class Guest:
    """One connection with simple replies; at most one request is on its way unless the caller wants more."""

    def __init__(self, service: DiskService) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        ours.settimeout(60)
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, args=(service, theirs))
        self._thread.start()
        self._cookie = 0

    def _serve(self, service: DiskService, theirs: socket.socket) -> None:
        try:
            service.serve(theirs.fileno(), structured=False)
        except ConnectionError as error:
            self._ended = error
        finally:
            theirs.close()

    def send(self, command: int, offset: int, length: int, data: bytes = b"", flags: int = 0) -> int:
        self._cookie += 1
        head = struct.pack(">IHHQQI", 0x25609513, flags, command, self._cookie, offset, length)
        self._socket.sendall(head + data)
        return self._cookie

    def reply(self, length: int = 0) -> tuple[int, int, bytes]:
        magic, error, cookie = struct.unpack(">IIQ", self._receive(16))
        assert magic == 0x67446698
        return error, cookie, b"" if error else self._receive(length)

    def ask(self, command: int, offset: int, length: int, data: bytes = b"", flags: int = 0) -> bytes:
        expected = self.send(command, offset, length, data, flags)
        error, cookie, answer = self.reply(length if command == READ else 0)
        assert cookie == expected
        if error:
            raise GuestError(error)
        return answer

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.ask(WRITE, offset, len(data), data, flags)

    def read(self, offset: int, length: int) -> bytes:
        return self.ask(READ, offset, length)

    def flush(self) -> None:
        self.ask(FLUSH, 0, 0)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.ask(ZEROES, offset, length, flags=flags)

    def trim(self, offset: int, length: int) -> None:
        self.ask(TRIM, offset, length)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.send(DISC, 0, 0)
        self._socket.close()
        self._thread.join()

    def _receive(self, count: int) -> bytes:
        parts = []
        while count:
            part = self._socket.recv(min(count, 1 << 20))
            if not part:
                raise EOFError("the server ended")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Site:
    """Disks in a folder, captured, and a copy of each that follows the cuts as a replica does."""

    def __init__(
        self, folder: Path, *, sizes: list[int], form: Format = "vhdx", block_bytes: int | None = None
    ) -> None:
        self.folder = folder
        self.sizes = sizes
        ending = "img" if form == "raw" else form
        self.paths = [folder / f"disk{index}.{ending}" for index in range(len(sizes))]
        self.copies = [folder / f"copy{index}.img" for index in range(len(sizes))]
        for path, copy, size in zip(self.paths, self.copies, sizes, strict=True):
            create_disk(
                OS_FILES, path, virtual_bytes=size, format=form, block_bytes=block_bytes, clock=SYSTEM
            )
            with copy.open("wb") as file:
                file.truncate(size)
        self.previous = [NIL] * len(sizes)
        self.has_base = False

    def start(self, **settings: Any) -> Machine:
        slots = [
            Slot(index, open_disk(OS_FILES, path, writable=True, clock=SYSTEM), self.has_base)
            for index, path in enumerate(self.paths)
        ]
        self.has_base = True
        return Machine(OS_FILES, self.folder / "state", slots, clock=SYSTEM, **settings)

    @contextlib.contextmanager
    def running(self, **settings: Any) -> Iterator[Machine]:
        machine = self.start(**settings)
        try:
            yield machine
        finally:
            machine.close()

    def cycle(self, machine: Machine, *, known: bool = False) -> Cut:
        """Cut, and bring the copies to the cut. known: with tables of what the copies hold."""
        tables = [self._table(index) for index in range(len(self.sizes))] if known else None
        cut = machine.cut(self.previous, known=tables)
        for table in tables or ():
            table.close()
        self.follow(cut)
        machine.settle(cut)
        machine.recycle(log.path for log in cut.logs)
        return cut

    def follow(self, cut: Cut) -> None:
        for log in cut.logs:
            assert log.previous_log_id == self.previous[log.disk_index]
            with open_disk(OS_FILES, self.copies[log.disk_index], writable=True, clock=SYSTEM) as copy:
                apply_log(OS_FILES, log.path, copy)
            self.previous[log.disk_index] = log.log_id

    def _table(self, index: int) -> FingerprintTable:
        path = self.folder / f"{index}.fp"
        size = self.sizes[index]
        table = FingerprintTable.create(OS_FILES, path, disk_index=index, virtual_bytes=size)
        table.write(0, native.fingerprints(np.frombuffer(self.copy_of(index), np.uint8), table.block_bytes))
        return table

    def copy_of(self, index: int) -> bytes:
        return self.copies[index].read_bytes()

    def disk_of(self, machine: Machine, index: int) -> bytes:
        out = bytearray(self.sizes[index])
        machine.disks[index].read_into(out, 0)
        return bytes(out)


def random_data(length: int) -> bytes:
    """Return bytes that are no zeros."""
    return os.urandom(length - 1) + b"\1"
