"""The verb `point serve`: a recovery point's disks over NBD, at once, while replication goes on.

Reads go through the undo parts and the replica's disk, nothing is copied first. With `writable` what a client
writes goes into a differencing disk of its own, which ends with the server or is kept.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hvreplica.capture.export import ExportInfo
from hvreplica.capture.listen import NbdListener
from hvreplica.capture.service import DiskService
from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.native.live import Gate
from hvreplica.replication.point_names import point_to_open
from hvreplica.store import Store
from hvreplica.store.open_point import LATEST
from hvreplica.store.point_child import kept_child, loose_child

if TYPE_CHECKING:
    import os
    import uuid
    from types import TracebackType

    from hvreplica.capture.handshake import Negotiated
    from hvreplica.clock import Clock
    from hvreplica.disk.whole_blocks import WholeBlocks
    from hvreplica.files import FileSystem
    from hvreplica.store.open_point import OpenPoint

    PathLike = str | os.PathLike[str]

_LOG = logging.getLogger("hvreplica.capture")
_PREFERRED_BLOCK_BYTES = 4096


class PointServer:
    """Serve the disks of one recovery point: exports "0", "1" and so on, "" for the first.

    serve_forever() in a thread of the caller's; stop() from anywhere; close() at the end. The point is not
    dropped before.
    """

    def __init__(
        self,
        store: PathLike,
        vm: str,
        *,
        socket: PathLike,
        point: str | uuid.UUID = LATEST,
        writable: bool = False,
        keep: PathLike | None = None,
        files: FileSystem = OS_FILES,
        clock: Clock = SYSTEM,
    ) -> None:
        """Open the point and bind the socket; clients wait until serve_forever().

        point: its id, "latest", "latest-app", or an instant, for which a point is made that stays. writable:
        let clients write; what they write is lost at the end, or is in the folder `keep`, one differencing
        disk for each of the point's, named 0.vhdx and so on, which the same point can be served with again.
        Raises: NoSuchPoint, StoreError; ParentMismatch for a `keep` of another point; Locked, Unreachable for
        the socket; ValueError for `keep` without `writable`.
        """
        if keep is not None and not writable:
            message = "only what may be written can be kept"
            raise ValueError(message)
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(Store.open_reading(files, Path(store), clock=clock))
            which = point_to_open(opened.home(vm), point) if isinstance(point, str) else point
            self.point: OpenPoint = stack.enter_context(opened.open_point(vm, which))
            self._services = [
                self._service(index, stack, writable=writable, keep=keep, files=files, clock=clock)
                for index in self.point.disks
            ]
            self._listener = NbdListener(
                Path(socket).absolute(), self._exports, self._serve, files=files, clock=clock
            )
            stack.callback(self._listener.close)
            self._read_only = not writable
            self._stopping = threading.Event()
            self._closing = stack.pop_all()

    @property
    def address(self) -> Path:
        """The socket where NBD clients connect."""
        return Path(str(self._listener.address))

    def serve_forever(self) -> None:
        """Serve clients until stop()."""
        self._listener.start()
        self._stopping.wait()

    def stop(self) -> None:
        """End serve_forever()."""
        self._stopping.set()

    def close(self) -> None:
        """Let clients go, then the point. May be called twice."""
        self.stop()
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _service(
        self,
        index: int,
        stack: contextlib.ExitStack,
        *,
        writable: bool,
        keep: PathLike | None,
        files: FileSystem,
        clock: Clock,
    ) -> DiskService:
        below = self.point.disks[index]
        if not writable:
            return DiskService(below, Gate(), None, read_only=True, clock=clock, under=below, is_bare=True)
        child: WholeBlocks
        if keep is None:
            child = loose_child(files, self.point.scratch, below, clock=clock)
        else:
            child = kept_child(files, Path(keep).absolute() / f"{index}.vhdx", below, clock=clock)
        stack.callback(child.abandon if keep is None else child.close)
        return DiskService(child, Gate(), None, read_only=False, clock=clock, under=below)

    def _exports(self) -> list[ExportInfo]:
        return [
            ExportInfo(
                name=str(index),
                size_bytes=disk.virtual_bytes,
                read_only=self._read_only,
                minimum_block_bytes=disk.logical_sector_bytes,
                preferred_block_bytes=max(_PREFERRED_BLOCK_BYTES, disk.logical_sector_bytes),
                description=f"{self.point.vm}, disk {index}, point {self.point.id}",
            )
            for index, disk in self.point.disks.items()
        ]

    def _serve(self, client: Negotiated) -> None:
        try:
            self._services[client.export_index].serve(
                client.socket.fileno(),
                structured=client.structured,
                base_allocation=client.base_allocation,
            )
        except ConnectionError as error:
            _LOG.info("%s", error)
