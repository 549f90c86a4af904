"""Why received points have not reached the disks yet: who holds the disks, asked without taking a lock.

Points wait in the spool while another program reads the replica's disks, and are applied with the next cycle
after it. Whoever asks for the reason must not become one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.files import who_bars_writers, who_has_open
from hvreplica.store.apply import is_unfinished

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hvreplica.files import BlockFile
    from hvreplica.store.home import VmHome


def why_waiting(home: VmHome) -> str | None:
    """Return a sentence that says who keeps what waits from being applied; None where nobody does."""
    if not is_unfinished(home):
        return None
    for row in home.catalog.disks(home.vm_id):
        path = home.paths.disk(row.spec.index)
        if row.removed_s is None and (who := _who(home, path, who_bars_writers)):
            return f"disk {row.spec.index} cannot be changed while {who} has {path} open"
    who = _who(home, home.paths.lock, who_has_open)
    return None if who is None else f"the disks cannot be changed while {who} works on them"


def _who(home: VmHome, path: Path, ask: Callable[[BlockFile], str | None]) -> str | None:
    try:
        file = home.files.open(path)
    except FileNotFoundError:
        return None
    try:
        return ask(file)
    finally:
        file.close()
