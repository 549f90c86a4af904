"""Count how often a VM's disks began to change, where every process that reads them can see it.

Whoever reads from a disk's file without holding the VM's lock looks at the counter after the read: if it has
moved since the catalog was read, the bytes may be newer than the point that was meant, and both are read
again. Nothing of it is durable: after a power cut nobody is left who remembers a value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from hvreplica.files import map_shared

if TYPE_CHECKING:
    import mmap
    from pathlib import Path

    from hvreplica.files import FileSystem

COUNTER_BYTES = 8  # one little-endian number


class Counter:
    """An open counter; close() when done. One writer at a time: the holder of the VM's exclusive lock."""

    def __init__(self, files: FileSystem, path: Path, *, writable: bool = False) -> None:
        """Open the file, making it where it is not; its folder must be there. Raises: OSError."""
        self._file = files.open(path, writable=writable, create=not files.exists(path))
        try:
            if self._file.size() < COUNTER_BYTES:
                # Its length was lost with the power, or whoever made it has not come to it yet.
                self._file.close()
                self._file = files.open(path, writable=True)
                self._file.resize(COUNTER_BYTES)
            self._map = map_shared(self._file, COUNTER_BYTES)
        except BaseException:
            self._file.close()
            raise

    @property
    def memory(self) -> mmap.mmap | None:
        """The COUNTER_BYTES as all processes see them, for a native loop; None without a descriptor."""
        return self._map

    def value(self) -> int:
        """Return the number as it is now."""
        found = self._file.read(0, COUNTER_BYTES) if self._map is None else self._map[:COUNTER_BYTES]
        return int.from_bytes(found, "little")

    def increment(self) -> None:
        """Count one; every process sees it on return."""
        packed = ((self.value() + 1) % (1 << 64)).to_bytes(COUNTER_BYTES, "little")
        if self._map is None:
            self._file.write(packed, 0)
        else:
            self._map[:COUNTER_BYTES] = packed

    def close(self) -> None:
        """Close; may be called twice."""
        if self._map is not None:
            self._map.close()
            self._map = None
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
