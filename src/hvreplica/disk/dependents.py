"""Which disks beside a disk rest on it: whoever changes or removes a parent breaks its children.

Nothing in a parent tells of its children, so the files beside it are asked, each for the identity of its own
parent. A child in another folder is not found.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hvreplica.disk.open import open_layer
from hvreplica.disk.paths import candidate_paths
from hvreplica.errors import HvReplicaError, ParentInUse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from hvreplica.clock import Clock
    from hvreplica.disk.disk import Disk
    from hvreplica.files import FileSystem

_ENDINGS = (".vhdx", ".avhdx", ".vhd", ".avhd")
_SHOWN_COUNT = 5


def require_no_dependents(files: FileSystem, child: Path, parent: Path, *, keep: bool, clock: Clock) -> None:
    """Make sure that a merge of `child` into `parent` breaks no other disk in the folders of the two.

    keep: whether the child stays, and with it what rests on it. Raises: ParentInUse, which names them.
    """
    with ExitStack() as stack:
        upper = stack.enter_context(open_layer(files, child, clock=clock))
        lower = stack.enter_context(open_layer(files, parent, clock=clock))
        siblings, children = [], []
        for other in _differencing(files, (child, parent), clock):
            with other:
                # Near the end of a merge the parent has the child's identity: what rests on the child comes
                # first.
                if _rests_on(other, upper):
                    children.append(other.path)
                elif _rests_on(other, lower):
                    siblings.append(other.path)
    if siblings:
        raise _in_use(
            parent,
            siblings,
            "other disks rest on the parent too and would show other bytes or no longer open",
            "merge or convert those first, or merge with --force and lose them",
        )
    if children and not keep:
        raise _in_use(
            child,
            children,
            "other disks rest on the disk that is to be merged, and would no longer find it",
            "merge with --keep, then give each of them the parent by `hvreplica disk rebase`, and then remove"
            " the merged disk; or --force",
        )


def require_no_children(files: FileSystem, disk: Disk, *, clock: Clock) -> None:
    """Make sure that no disk in the folder of `disk` rests on it. Raises: ParentInUse, which names them."""
    children = []
    for other in _differencing(files, (disk.path,), clock):
        with other:
            if _rests_on(other, disk):
                children.append(other.path)
    if children:
        raise _in_use(
            disk.path,
            children,
            "other disks rest on this one and would show other bytes or no longer open",
            "merge them first and then resize the result, or resize with --force and lose them",
        )


def _differencing(files: FileSystem, known: Iterable[Path], clock: Clock) -> Iterator[Disk]:
    """Yield the disks with a parent, without it, in the folders of the `known`, which are left out."""
    known = list(known)
    seen = {os.path.realpath(path) for path in known}
    for folder in dict.fromkeys(path.parent for path in known):
        for name in files.names(folder):
            path = folder / name
            real = os.path.realpath(path)
            if path.suffix.lower() not in _ENDINGS or real in seen:
                continue
            seen.add(real)
            try:
                disk = open_layer(files, path, clock=clock)
            except (HvReplicaError, OSError):
                continue  # what does not open cannot break
            if disk.parent_reference is None:
                disk.close()
            else:
                yield disk


def _rests_on(disk: Disk, parent: Disk) -> bool:
    reference = disk.parent_reference
    if reference is None:
        return False
    try:
        reference.verify(parent)
    except HvReplicaError:
        return False
    if parent.format != "raw":
        return True
    # A raw disk has no identity to be recognised by, so only one that is named counts.
    names = candidate_paths(disk.path, reference.names)
    return os.path.realpath(parent.path) in map(os.path.realpath, names)


def _in_use(path: Path, others: list[Path], message: str, hint: str) -> ParentInUse:
    shown = ", ".join(str(other) for other in others[:_SHOWN_COUNT])
    more = f" and {len(others) - _SHOWN_COUNT} more" if len(others) > _SHOWN_COUNT else ""
    return ParentInUse(
        message, path=path, field="parent", expected="no other child", actual=shown + more, hint=hint
    )
