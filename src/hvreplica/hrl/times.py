"""The times file beside a log; formats/times.py says what it holds."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hvreplica.errors import FieldOutOfRange
from hvreplica.formats.times import TIMES_BYTES_MAX

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.files import FileSystem


_SUFFIX = ".hrt"


def times_path(log: Path) -> Path:
    """Return where the times of a log stand: beside it."""
    return log.with_suffix(_SUFFIX)


def read_times_file(files: FileSystem, path: Path) -> bytes:
    """Return all bytes of a times file, unchecked. Raises: OSError, FieldOutOfRange for too long a one."""
    with contextlib.closing(files.open(path)) as file:
        size_bytes = file.size()
        if size_bytes > TIMES_BYTES_MAX:
            raise FieldOutOfRange(
                "a times file is longer than any",
                path=path,
                field="length",
                expected=f"at most {TIMES_BYTES_MAX}",
                actual=size_bytes,
            )
        return bytes(file.read(0, size_bytes))
