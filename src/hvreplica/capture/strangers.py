"""Notice that somebody else writes to a disk that is served, for all that its locks say.

Only what is cheap and sure is looked at, at each cut: a program that writes to a VHDX puts a new identity
into its header first, and a file that was replaced has another inode. What another program writes into a raw
disk or a VHD leaves no trace that our own writes do not leave too.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hvreplica.disk.vhdx.disk import VhdxDisk
from hvreplica.errors import kept

if TYPE_CHECKING:
    from hvreplica.disk import Disk
    from hvreplica.files import FileSystem

_LOG = logging.getLogger("hvreplica.capture")


class Watch:
    """Watches one disk, which is open for writing. Calls come one after the other."""

    def __init__(self, files: FileSystem, disk: Disk) -> None:
        self._files = files
        self._disk = disk
        self._last: object = None
        self._inode = self._find_inode()
        self._is_replaced = False

    def notices(self) -> bool:
        """Return whether the disk may hold what another program wrote since the last call, and say so."""
        found = self._disk.parts().session.foreign() if isinstance(self._disk, VhdxDisk) else None
        if not self._is_replaced and self._find_inode() != self._inode:
            self._is_replaced = True
            _LOG.error(
                "%s was replaced or removed while it is served: the guest goes on with the file that it was. "
                "Stop the VM and capture, see to the disk, then start both again.",
                self._disk.path,
            )
        if found is None or found == self._last:
            return False
        self._last = found
        _LOG.error(
            "another program writes to %s while it is served, and may have damaged it: its header is not the "
            "one that was written here. This cut looks at the whole disk. Stop that program and the VM, stop "
            "capture, and look at the disk with `hvreplica disk check`.",
            self._disk.path,
        )
        return True

    def _find_inode(self) -> int | None:
        try:
            return self._files.identity(self._disk.path).inode
        except OSError as error:
            kept(error)
            return None
