"""The verb `failover test`: a point's disks over NBD, with overlays that stay, while replication goes on."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.replication.point_names import parse_point
from hvreplica.replication.point_server import PointServer
from hvreplica.store import Store
from hvreplica.store.firedrill import begin_firedrill, firedrill_lock, remove_firedrill

if TYPE_CHECKING:
    import os
    import uuid
    from types import TracebackType

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem

    PathLike = str | os.PathLike[str]


class FiredrillServer:
    """Serve the test failover of a VM: exports "0", "1" and so on, "" for the first.

    serve_forever() in a thread of the caller's; stop() from anywhere; close() at the end. What was written is
    there again in the next one, until failover_test_cleanup().
    """

    def __init__(
        self,
        store: PathLike,
        vm: str,
        *,
        socket: PathLike | None = None,
        point: str | None = None,
        files: FileSystem = OS_FILES,
        clock: Clock = SYSTEM,
    ) -> None:
        """Begin a test of `point`, or go on with the one that there is; bind the socket.

        socket: None for test/nbd.sock in the VM's folder.
        point: an id, "latest", "latest-app" or an instant, see point_at(); None goes on with the test that
        there is, else takes the latest. Raises: InvalidTransition where there is a test of another point;
        NoSuchPoint; FailoverRefused for a damaged point; Locked while another process serves it; StoreError;
        Unreachable for the socket.
        """
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(
                contextlib.closing(Store.open_reading(files, Path(store), clock=clock))
            )
            home = opened.home(vm)
            is_new = home.failover().test is None
            stack.enter_context(firedrill_lock(home))
            test = begin_firedrill(home, None if point is None else parse_point(point))
            try:
                self._server = stack.enter_context(
                    PointServer(
                        store,
                        vm,
                        socket=home.paths.test_socket if socket is None else socket,
                        point=test.point,
                        writable=True,
                        keep=home.paths.test_lock.parent,
                        files=files,
                        clock=clock,
                    )
                )
            except BaseException:
                if is_new:
                    remove_firedrill(home)  # a test that never began must not hold its point
                raise
            self.point: uuid.UUID = test.point
            self.disks = list(test.disks)
            self._closing = stack.pop_all()

    @property
    def address(self) -> Path:
        """The socket where NBD clients connect."""
        return self._server.address

    def serve_forever(self) -> None:
        """Serve clients until stop()."""
        self._server.serve_forever()

    def stop(self) -> None:
        """End serve_forever()."""
        self._server.stop()

    def close(self) -> None:
        """Let clients go; what they wrote stays. May be called twice."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
