"""Take logs that another program wrote: what they say has changed becomes a cut that waits to be shipped.

The disk holds these changes already, for whoever wrote the log wrote them too; only the replica lacks them. A
log becomes one of ours by its place in the chain: it keeps its UniqueId, so that the next one of its writer
follows it, and names our last log as the one before.

    logs/<id>.hrl   copied, durable, checked whole: nothing of it is in force yet, and a crash leaves a file
                    that the next verb sweeps away
    state.json      names it behind the cuts that wait: from here on it is shipped
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hvreplica.clock import HRL_EPOCH_S, SYSTEM
from hvreplica.disk import open_disk
from hvreplica.errors import ChainBroken, HvReplicaError, InvalidTransition, LogError, StateError
from hvreplica.files import OS_FILES
from hvreplica.formats.hrl import HEADER
from hvreplica.hrl import LogReader, verify_log
from hvreplica.hrl.compare import log_differences
from hvreplica.hrl.copy import copy_log
from hvreplica.replication.shape import point_disks
from hvreplica.replication.state import (
    NIL,
    PENDING_MAX,
    CutLog,
    StateFolder,
    Transfer,
    load_state,
    logs_kept,
    previous_log_ids,
)
from hvreplica.replication.stopped import require_own_disks

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem
    from hvreplica.formats.hrl import LogHeader
    from hvreplica.hrl import LogReport
    from hvreplica.progress import ProgressCallback
    from hvreplica.replication.state import PrimaryState

    PathLike = str | os.PathLike[str]


class ImportedLog(msgspec.Struct, frozen=True, kw_only=True):
    """A log that was taken.

    follows: whether it said itself that it follows the last one of the disk; else it was forced.
    previous_log_id: what it says now. verified_disk: whether the disk was found to hold what it wrote.
    """

    disk_index: int
    disk: str
    path: str
    log_id: str
    previous_log_id: str
    follows: bool
    entries: int
    data_bytes: int
    log_bytes: int
    verified_disk: bool


class LogImport(msgspec.Struct, frozen=True, kw_only=True):
    """What an import made: one recovery point to come. waiting: the cuts that wait now, this one the last."""

    point: str
    instant_s: float
    logs: list[ImportedLog]
    waiting: int


def log_import(
    logs: Sequence[PathLike],
    *,
    state: PathLike,
    disks: Sequence[int | PathLike] | None = None,
    force: bool = False,
    verify_disk: bool = False,
    progress: ProgressCallback | None = None,
    files: FileSystem = OS_FILES,
    clock: Clock = SYSTEM,
) -> LogImport:
    """Make closed logs of a protected VM's disks the next cut of the VM, to be shipped by `replicate`.

    logs: one for each disk that changed; together they are one instant. disks: whose they are, an index or
    the file as it was protected, in the same order; may be left out where the VM has one disk. force: also
    where a log does not say that it follows the last one. verify_disk: refuse unless the disks hold now what
    the logs wrote last. Durable on return; before that nothing is in force. Raises: NotClosed, FormatError
    for a log that is not whole or does not fit its disk; ChainBroken; InvalidTransition before the replica
    has a whole copy; LogError where the disk holds something else; Locked.
    """
    folder_path = Path(state).absolute()
    _ready(load_state(files, folder_path), folder_path)  # before a lock is made in a folder of something else
    folder = StateFolder(files, folder_path, clock=clock)
    try:
        known = _ready(folder.load(), folder.folder)
        work = _Import(folder, known, files, clock, progress)
        indexes = _disk_indexes(known, logs, disks, folder.folder)
        folder.discard_logs(keep=logs_kept(known))
        return work.run([Path(log) for log in logs], indexes, force=force, verify_disk=verify_disk)
    finally:
        folder.release()


class _Import:
    """One call, with the state folder locked."""

    def __init__(
        self,
        folder: StateFolder,
        state: PrimaryState,
        files: FileSystem,
        clock: Clock,
        progress: ProgressCallback | None,
    ) -> None:
        self._folder = folder
        self._state = state
        self._files = files
        self._clock = clock
        self._progress = progress

    def run(
        self, paths: Sequence[Path], indexes: Sequence[int], *, force: bool, verify_disk: bool
    ) -> LogImport:
        try:
            imported, instant_s = self._take(paths, indexes, force=force, verify_disk=verify_disk)
        except BaseException:
            self._folder.discard_logs(keep=logs_kept(self._state))
            raise
        # From here on a failure may leave a state that names the copies: they stay, and are swept if not.
        self._files.sync_directory(self._folder.logs)
        transfer = self._record(imported, instant_s)
        return LogImport(
            point=str(transfer.point_id),
            instant_s=instant_s,
            logs=imported,
            waiting=len(self._state.pending),
        )

    def _take(
        self, paths: Sequence[Path], indexes: Sequence[int], *, force: bool, verify_disk: bool
    ) -> tuple[list[ImportedLog], float]:
        """Copy the logs and check the copies; return them and the instant at which the last was closed."""
        previous = previous_log_ids(self._state)
        taken = {log.log_id for log in logs_kept(self._state)} | {*previous}
        instant_s = 0.0
        imported: list[ImportedLog] = []
        for path, index in zip(paths, indexes, strict=True):
            with LogReader(self._files, path) as log:
                header = log.header
                follows = _judge(path, header, previous[index], taken, force=force)
                taken.add(header.unique_id)
                target = self._folder.log_path(header.unique_id)
                copy_log(self._files, log, target, previous_log_id=previous[index])
            report = self._verify(target, path, index)
            if verify_disk:
                self._verify_disk(target, path, index)
            instant_s = max(instant_s, float(header.last_modified_time_stamp + HRL_EPOCH_S))
            imported.append(
                ImportedLog(
                    disk_index=index,
                    disk=self._state.disks[index].path,
                    path=str(path),
                    log_id=report.log_id,
                    previous_log_id=report.previous_log_id,
                    follows=follows,
                    entries=report.entries,
                    data_bytes=report.data_bytes,
                    log_bytes=report.log_bytes,
                    verified_disk=verify_disk,
                )
            )
        return imported, min(instant_s, self._clock.now_s())

    def _verify(self, copy: Path, path: Path, index: int) -> LogReport:
        try:
            return verify_log(
                self._files,
                copy,
                disk_bytes=self._state.disks[index].virtual_bytes,
                progress=self._progress,
            )
        except HvReplicaError as error:
            if error.path == copy:
                error.path = path  # the name that the user knows
            raise

    def _verify_disk(self, copy: Path, path: Path, index: int) -> None:
        with open_disk(self._files, self._state.disks[index].path, shared=True, clock=self._clock) as disk:
            rows = log_differences(self._files, copy, disk, progress=self._progress)
            if not len(rows):
                return
            raise LogError(
                "the disk does not hold what the log wrote to it last",
                path=path,
                field="disk_offset",
                expected=f"the log's data at {int(rows[0, 0])}",
                actual=f"{int(rows[:, 1].sum())} bytes of {disk.path} differ",
                hint="is it this disk's log? If the disk was written to since the log was closed, import the"
                " logs of that too, and leave out --verify-disk",
            )

    def _record(self, imported: Sequence[ImportedLog], instant_s: float) -> Transfer:
        logs = [
            CutLog(
                log.disk_index,
                uuid.UUID(log.log_id),
                uuid.UUID(log.previous_log_id),
                log.log_bytes,
                log.data_bytes,
            )
            for log in imported
        ]
        transfer = Transfer(
            kind="logs",
            stage="cut",
            transfer_id=self._clock.guid(),
            point_id=self._clock.guid(),
            instant_s=instant_s,
            positions=[0] * len(logs),
            logs=logs,
            disks=point_disks(self._state),
        )
        self._state.pending.append(transfer)
        self._folder.save(self._state)
        return transfer


def _ready(state: PrimaryState | None, folder: Path) -> PrimaryState:
    """Return the state if a cut can be put behind it."""
    if state is None:
        raise StateError(
            "nothing is protected with this state folder",
            path=folder,
            hint="bring a first copy to the replica with `hvreplica replicate`",
        )
    require_own_disks(state, folder)
    if state.phase != "ready" or state.mixed:
        raise InvalidTransition(
            "the replica has no whole copy of one instant yet, which a log could change",
            path=folder,
            field="phase",
            expected="ready",
            actual="mixed" if state.mixed else state.phase,
            hint="call `hvreplica replicate` first: what it ships holds what these logs wrote",
        )
    if len(state.pending) >= PENDING_MAX:
        raise StateError(
            "too many cuts wait to be shipped",
            path=folder,
            expected=f"at most {PENDING_MAX}",
            actual=len(state.pending),
            hint="ship them with `hvreplica replicate --once`",
        )
    return state


def _disk_indexes(
    state: PrimaryState, logs: Sequence[PathLike], disks: Sequence[int | PathLike] | None, folder: Path
) -> list[int]:
    """Return whose each log is. Raises: StateError unless every log has one disk, and no disk two logs."""
    paths = {disk.index: state.disks[disk.index].path for disk in point_disks(state)}
    protected = ", ".join(f"{index}: {path}" for index, path in paths.items())
    named = [*paths] if disks is None and len(paths) == 1 else disks or []
    indexes = []
    for disk in named:
        index = disk if isinstance(disk, int) else _index(paths, str(Path(disk).absolute()))
        if index not in paths:
            raise StateError(
                "no such disk is protected with this state folder",
                path=folder,
                field="disk",
                expected=protected,
                actual=disk,
            )
        indexes.append(index)
    if not len(logs) == len(indexes) == len(set(indexes)):
        raise StateError(
            "each log needs one disk, and each disk may have one log in a call",
            path=folder,
            field="disk",
            expected=f"{len(logs)} of {protected}",
            actual=", ".join(map(str, named)) or "none",
        )
    return indexes


def _index(paths: dict[int, str], path: str) -> int:
    return next((index for index, known in paths.items() if known == path), -1)


def _judge(
    path: Path, header: LogHeader, previous_log_id: uuid.UUID, taken: set[uuid.UUID], *, force: bool
) -> bool:
    """Return whether the log says that it follows the last one of its disk. Raises: ChainBroken."""
    if header.unique_id == NIL or header.unique_id in taken:
        raise ChainBroken(
            "this log cannot be told from another: it was taken already, or has no UniqueId",
            path=path,
            field="unique_id",
            actual=header.unique_id,
            spec=HEADER.spec,
            hint="import the one that follows it",
        )
    follows = header.previous_unique_id == previous_log_id
    if not follows and not force:
        raise ChainBroken(
            "the log does not say that it follows what was replicated last: changes before it may be missing",
            path=path,
            field="previous_unique_id",
            expected=previous_log_id,
            actual=header.previous_unique_id,
            spec=HEADER.spec,
            hint="if you know that it does, as with the first log of another program, use --force;"
            " `hvreplica replicate` without it compares the disk and misses nothing",
        )
    return follows
