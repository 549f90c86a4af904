"""Run in a process of its own with shim.c loaded: what the payload kernels do when the system gives less than asked.

Prints nothing and ends with 0 where all is well.
"""

from __future__ import annotations

import ctypes
import errno
import sys
import tempfile
from pathlib import Path

import numpy as np

from hvreplica import native
from hvreplica.files import OS_FILES
from tests.native.payload_model import MIB, Scene, extents_of, pattern

NEVER = -1
UNLIMITED = (1 << 62) - 1
SHIM = ctypes.CDLL(None)
SHIM.shim_arm.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_int)
SHIM.shim_disarm.restype = ctypes.c_long

DISK_BLOCKS = 4
SCENE = Scene([2, 3, 0, 1], frozenset(), 0, MIB, mapped=True)  # two pairs of neighbours
DISK = pattern(DISK_BLOCKS * MIB)
LOG = pattern(DISK_BLOCKS * MIB, start=7)
WHOLE = extents_of([(0, DISK_BLOCKS * MIB)])


class Bench:
    """The two files of a test, opened anew."""

    def __init__(self, folder: Path) -> None:
        (folder / "disk").write_bytes(SCENE.container(DISK))
        (folder / "log").write_bytes(LOG)
        self.disk = OS_FILES.open(folder / "disk", writable=True)
        self.log = OS_FILES.open(folder / "log")
        self.map = SCENE.block_map()

    def read(self) -> bytes:
        """Return the disk as the kernel reads it."""
        out = bytearray(DISK_BLOCKS * MIB)
        native.read_extents(self.disk, self.map, WHOLE, out)
        return bytes(out)

    def write(self) -> None:
        """Write the log's bytes over the disk, in two extents."""
        native.write_extents(
            self.disk, self.map, extents_of([(0, 5000), (5000, DISK_BLOCKS * MIB - 5000)]), LOG
        )

    def copy(self) -> None:
        """Copy the log in pieces of 4096 bytes, of which each pair stands in reverse order in the log."""
        pieces = np.arange(DISK_BLOCKS * MIB // 4096)
        extents = np.stack((pieces * 4096, np.full(len(pieces), 4096)), axis=1)
        native.copy_extents(self.log, ((pieces ^ 1) * 4096).astype(np.uint64), self.disk, self.map, extents)


def armed(call: object, *, max_bytes: int = UNLIMITED, every: int = 0, at: int = NEVER, code: int = 0) -> int:
    """Run `call` under the shim and return how many calls of the system it made."""
    SHIM.shim_arm(max_bytes, every, at, code)
    try:
        call()  # type: ignore[operator]
    finally:
        made = SHIM.shim_disarm()
    return int(made)


def swapped() -> bytes:
    """Return the disk that Bench.copy() makes."""
    pieces = [LOG[at : at + 4096] for at in range(0, len(LOG), 4096)]
    return b"".join(pieces[index ^ 1] for index in range(len(pieces)))


def check_calls(bench: Bench) -> None:
    """Neighbours in the file take one call."""
    assert armed(bench.read) == 2, "two runs of two blocks"
    assert armed(bench.write) == 2
    # Four windows of 1 MiB: one read each, for the log is read through; one write each, for a window is one block.
    assert armed(bench.copy) == 8


def check_short(bench: Bench) -> None:
    """Short transfers and interruptions change nothing but the number of calls."""
    for max_bytes, every in ((UNLIMITED, 2), (65_537, 0), (4095, 3), (1_000_003, 2)):
        armed(bench.write, max_bytes=max_bytes, every=every)
        assert bench.read() == LOG
        armed(bench.copy, max_bytes=max_bytes, every=every)
        assert bench.read() == swapped()
        out = []
        armed(lambda: out.append(bench.read()), max_bytes=max_bytes, every=every)  # noqa: B023
        assert out == [swapped()]


def check_errors(bench: Bench) -> None:
    """Expect an error of the system with its number, its file and the offset where it struck."""
    first_place = (SCENE.places[0] + 1) * MIB
    cases = (
        (bench.read, 0, errno.EIO, "disk", first_place),
        (bench.read, 1, errno.EIO, "disk", first_place + 100_000),
        (bench.write, 2, errno.ENOSPC, "disk", first_place + 199_999),
        (bench.copy, 0, errno.EIO, "log", 0),
        (bench.copy, 1, errno.EIO, "log", 100_000),
        (bench.copy, 11, errno.ENOSPC, "disk", first_place),
    )
    for call, at, code, name, offset in cases:
        try:
            armed(call, max_bytes=100_000, at=at, code=code)
        except OSError as error:
            assert error.errno == code, (call, error)
            assert str(error.filename).endswith(name), (call, error)
            found = int(error.__notes__[0].rpartition(" ")[2])
            assert offset - 1 <= found <= offset, (call, at, offset, error.__notes__)
        else:
            raise AssertionError((call, at))


def main() -> None:
    """Run all checks."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as name:
        bench = Bench(Path(name))
        check_calls(bench)
        check_short(bench)
        check_errors(bench)


if __name__ == "__main__":
    main()
