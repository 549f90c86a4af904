"""Copy a closed log under another predecessor, as a chain that it was not written for needs it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hvreplica.formats.hrl import HEADER_BYTES
from hvreplica.units import MIB

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

    from hvreplica.files import FileSystem
    from hvreplica.hrl.reader import LogReader

_WINDOW_BYTES = 4 * MIB


def copy_log(files: FileSystem, source: LogReader, target: Path, *, previous_log_id: uuid.UUID) -> None:
    """Write the log that `source` reads to the new file `target`, with another PreviousUniqueId.

    All else stays, the UniqueId too; holes stay holes, and what stands behind the log is left out. Nothing is
    checked that the reader did not check: verify the copy. Durable on return, but for the name. Raises:
    FileExistsError if the name is taken; after a failure there is no file.
    """
    header = source.header.sealed(previous_unique_id=previous_log_id)
    file = files.open(target, create=True, exclusive=True)
    try:
        with contextlib.closing(file) as copied:
            copied.resize(source.log_bytes)
            copied.write(header.pack(), 0)
            buffer = memoryview(bytearray(min(_WINDOW_BYTES, source.log_bytes)))
            for start, length in source.file.data_extents(HEADER_BYTES, source.log_bytes):
                for position in range(start, start + length, _WINDOW_BYTES):
                    window = buffer[: min(_WINDOW_BYTES, start + length - position)]
                    source.file.read_into(window, position)
                    copied.write(window, position)
            copied.sync()
    except BaseException:
        with contextlib.suppress(OSError):
            files.unlink(target)
        raise
