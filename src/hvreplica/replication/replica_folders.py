"""The state folders of a VM with several replicas: STATE, and STATE/replicas/NAME for each further one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hvreplica.errors import InvalidTransition, StateError
from hvreplica.replication.state import StateFolder, load_state

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem
    from hvreplica.replication.state import PrimaryState

FOLDER_NAME = "replicas"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # it becomes a folder's


def checked_name(name: str) -> str:
    """Return the name of a replica. Raises: ValueError for one that is no folder's."""
    if not _NAME.fullmatch(name):
        message = f"a replica's name has 1 to 64 letters, digits, - and _, not {name!r}"
        raise ValueError(message)
    return name


def replica_folder(state: Path, name: str) -> Path:
    """Return the state folder of a further replica. Raises: ValueError."""
    return state / FOLDER_NAME / checked_name(name)


def replica_names(files: FileSystem, state: Path) -> list[str]:
    """Return the further replicas that a state folder has."""
    names = files.names(state / FOLDER_NAME)
    return [
        name
        for name in names
        if _NAME.fullmatch(name) and files.exists(state / FOLDER_NAME / name / "state.json")
    ]


def main_folder(state: Path) -> Path:
    """Return the state folder that has the VM's tracking, for any of the VM's."""
    return state.parent.parent if state.parent.name == FOLDER_NAME else state


def family(files: FileSystem, state: Path) -> Iterator[tuple[Path, PrimaryState]]:
    """Yield the state folders of a VM that belong together, with their states: `state` may be any of them."""
    main = main_folder(state)
    for folder in [main, *(replica_folder(main, name) for name in replica_names(files, main))]:
        known = load_state(files, folder)
        if known is not None:
            yield folder, known


def require_none_stopped(files: FileSystem, state: Path) -> None:
    """Refuse where the VM is handed to any other of its replicas than that of `state`.

    Raises: InvalidTransition.
    """
    for folder, known in family(files, state):
        if folder != state and known.stopped is not None:
            raise InvalidTransition(
                f"VM {known.vm!r} is prepared for a failover to another of its replicas, or runs there",
                path=folder,
                hint=f"`hvreplica status --state {folder}` tells more; to go on here, call"
                f" `hvreplica replicate --cancel-prepare --state {folder}` if it was not promoted",
            )


def remove_replica(files: FileSystem, state: Path, name: str, *, clock: Clock) -> None:
    """Forget a replica: it is fed no longer. What it holds stays. The caller holds the lock of `state`.

    Raises: StateError where there is none of that name, Locked where a verb works in its folder.
    """
    folder = replica_folder(state, name)
    if name not in replica_names(files, state):
        raise StateError(
            "there is no such replica to remove",
            path=folder,
            expected=", ".join(replica_names(files, state)) or "none",
            actual=name,
        )
    owned = StateFolder(files, folder, clock=clock)
    try:
        files.unlink(folder / "state.json")  # first: what is left without it means nothing
        files.sync_directory(folder)
        for inner in ("", "logs", "fingerprints"):
            for file_name in files.names(folder / inner):
                if file_name not in {"logs", "fingerprints", "lock"}:
                    files.unlink(folder / inner / file_name)
    finally:
        owned.release()
