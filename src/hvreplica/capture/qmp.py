"""Ask a QEMU over QMP, in blocking calls with time limits; needs the extra `qemu` (the package qemu.qmp).

That package speaks asyncio. Its event loop lives in a thread of its own here, so that a caller may have one
too, and none sees it. A monitor serves one client at a time: with a second one the greeting never comes, and
the time limit says so. Answers are checked against the types that the caller names.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from hvreplica.errors import PeerClosed, ProtocolViolation, QemuRefused, StateError, Unreachable

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Self

    from qemu.qmp import QMPClient

TIME_LIMIT_S = 30.0  # for one command; transactions wait for requests that the guest has under way
_POLL_S = 0.5  # events tell of jobs; one that was missed costs this
_TEXT_CHARACTERS_MAX = 400

Answer = TypeVar("Answer")


class Job(msgspec.Struct):
    """A job of QEMU; status "concluded" is its end. error: why it failed, None where it did not."""

    id: str
    status: str
    error: str | None = None


class Qmp:
    """One connection to a monitor. One owner; close() it."""

    def __init__(self, path: str | os.PathLike[str], *, time_limit_s: float = TIME_LIMIT_S) -> None:
        """path: of the monitor's Unix socket. Raises: Unreachable; StateError without the package."""
        self._path = os.fspath(path)
        self._time_limit_s = time_limit_s
        client_class = _client_class()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hvreplica QMP", daemon=True)
        self._thread.start()
        self._client: QMPClient = self._made(client_class)
        try:
            self._run(self._client.connect(self._path))
        except BaseException as error:
            self.close()
            reason = _told(error)
            if reason is None:
                raise
            raise Unreachable(
                f"no QEMU answers on this monitor: {reason}",
                path=self._path,
                hint="is it the socket of a QMP monitor, and does no other client use it? add one of our own:"
                " -qmp unix:PATH,server=on,wait=off",
            ) from None

    def execute(self, command: str, answer: type[Answer] = object, /, **arguments: object) -> Answer:  # type: ignore[assignment]
        """Return the answer to a command; "_" in the names of arguments stands for "-".

        answer: what it must be, as msgspec understands types. Raises: QemuRefused with QEMU's own words;
        PeerClosed; ProtocolViolation for an answer of another form.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            found = self._run(self._client.execute(command, named))
        except BaseException as error:
            reason = _told(error)
            if reason is None:
                raise
            if _is_refusal(error):
                raise QemuRefused(f"QEMU refuses {command}: {reason}", path=self._path) from None
            raise PeerClosed(f"QEMU did not answer {command}: {reason}", path=self._path) from None
        try:
            return msgspec.convert(found, answer)
        except msgspec.ValidationError as error:
            raise ProtocolViolation(
                f"QEMU's answer to {command} has another form: {error}", path=self._path
            ) from None

    def transact(self, *actions: tuple[str, dict[str, object]]) -> None:
        """Do all of the actions (command, arguments) at one instant, or none. Raises: as execute()."""
        listed = [{"type": command, "data": data} for command, data in actions]
        self.execute("transaction", actions=listed)

    def job(self, job_id: str) -> Job | None:
        """Return the job of this name, or None where there is none."""
        return next((job for job in self.execute("query-jobs", list[Job]) if job.id == job_id), None)

    def wait_for(self, job_id: str) -> Job:
        """Return a job when it is at its end, which may take long.

        Raises: as execute(); QemuRefused if it is gone.
        """
        while True:
            job = self.job(job_id)
            if job is None:
                raise QemuRefused(f"the job {job_id} is gone: somebody else dismissed it", path=self._path)
            if job.status == "concluded":
                return job
            self._run(self._next_event())

    def close(self) -> None:
        """End the connection; QEMU goes on with what it was told. May be called twice."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(Exception):  # it may be broken, which is why it ends
            self._run(self._client.disconnect())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _made(self, client_class: type[QMPClient]) -> QMPClient:
        """Return a new client, which must be made in the thread of its loop."""

        async def make() -> QMPClient:
            return client_class("hvreplica")

        return self._run(make())

    async def _next_event(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._client.events.get(), _POLL_S)
        self._client.events.clear()

    def _run(self, coroutine: Coroutine[Any, Any, Answer]) -> Answer:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(self._time_limit_s)
        except BaseException:
            future.cancel()
            raise


def _client_class() -> type[QMPClient]:
    try:
        from qemu.qmp import QMPClient  # noqa: PLC0415 - an extra
    except ImportError:
        raise StateError(
            "this needs the package qemu.qmp, which is not installed",
            hint='install it with `pip install "hvreplica[qemu]"`',
        ) from None
    return QMPClient


def _is_refusal(error: BaseException) -> bool:
    from qemu.qmp import ExecuteError  # noqa: PLC0415 - an extra

    return isinstance(error, ExecuteError)


def _told(error: BaseException) -> str | None:
    """Return in words what QEMU, the package or the system says, None for an error that is none of theirs."""
    from qemu.qmp import QMPError  # noqa: PLC0415 - an extra

    if isinstance(error, TimeoutError):
        return "the time limit has passed"
    if isinstance(error, (QMPError, OSError, CancelledError, EOFError)):
        text = " ".join(str(error).split()) or type(error).__name__
        return "".join(each if each.isprintable() else "?" for each in text)[:_TEXT_CHARACTERS_MAX]
    return None
