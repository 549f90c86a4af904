"""Damage to whole disks, written down in a few bytes: which world of files, and what to overwrite in it.

    input     world (1 byte), flags (1 byte), then records up to the end
    record    window (1 byte), offset in it (2 bytes), length (1 byte), that many bytes
    flags     bit 0: leave the checksums as the damage left them, instead of setting them right
              bit 1: only read what is left, which is several times as fast as writing to it too

Every number is taken modulo what there is, so all bytes mean something. A window number past the last sets the
size of a file. So an input of ten bytes reaches any field of disks of many MiB, and stays small enough to keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from hvreplica.files import BlockFile
    from tests.support.faultfile import FaultFiles

_RECORD_HEAD_BYTES = 4
_SEED_PIECE_BYTES = 32
_SEED_WINDOW_BYTES = 256
_FILE_BYTES_MAX = 1 << 44
_PIECE_BYTES = 4096
KEEP_CHECKSUMS, ONLY_READ = 1, 2


def stored(world: FaultFiles, path: Path) -> tuple[int, dict[int, bytes]]:
    """Return the size of a file, and its 4 KiB pieces that are not zeros: damage may make it terabytes long."""
    pieces = {}
    with world.open(path) as file:
        size = file.size()
        for start, length in file.data_extents(0, size):
            for offset in range(start, start + length, _PIECE_BYTES):
                piece = file.read(offset, min(_PIECE_BYTES, start + length - offset))
                if any(piece):
                    pieces[offset] = piece
    return size, pieces


@dataclass(frozen=True, slots=True)
class Window:
    """A range of one file that damage may fall on: a structure. start: below 0 it counts from the file's end."""

    path: Path
    start: int
    length: int

    def start_in(self, file: BlockFile) -> int:
        """Return where it begins in `file`."""
        return self.start if self.start >= 0 else max(file.size() + self.start, 0)


@dataclass(frozen=True, slots=True)
class Scene:
    """Worlds with the same files in different states, and where their structures stand.

    seal: sets the checksums in an open file right again.
    """

    worlds: Sequence[FaultFiles]
    windows: Sequence[Window]
    seal: Callable[[BlockFile], None]

    @property
    def paths(self) -> list[Path]:
        """The files, each once."""
        return list(dict.fromkeys(window.path for window in self.windows))

    def damaged(self, data: bytes) -> FaultFiles:
        """Return a world of its own with the damage that `data` describes."""
        head = data[:2].ljust(2, b"\0")
        world = self.worlds[head[0] % len(self.worlds)].after_kill()
        touched = set()
        at = len(head)
        while at + _RECORD_HEAD_BYTES <= len(data):
            window = data[at] % (len(self.windows) + len(self.paths))
            offset = int.from_bytes(data[at + 1 : at + 3], "little")
            at += _RECORD_HEAD_BYTES
            piece = data[at : at + data[at - 1]]
            at += len(piece)
            touched.add(self._apply(world, window, offset, piece))
        if not head[1] & KEEP_CHECKSUMS:
            for path in sorted(touched):
                with world.open(path, writable=True) as file:
                    self.seal(file)
        world.settle()
        return world

    def _apply(self, world: FaultFiles, number: int, offset: int, piece: bytes) -> Path:
        if number >= len(self.windows):
            path = self.paths[number - len(self.windows)]
            size = int.from_bytes(piece[:8], "little")
            with world.open(path, writable=True) as file:
                file.resize(size if size < _FILE_BYTES_MAX else file.size())
            return path
        window = self.windows[number]
        offset %= window.length
        piece = piece[: window.length - offset]
        with world.open(window.path, writable=True) as file:
            start = window.start_in(file) + offset
            if start + len(piece) <= file.size():
                file.write(piece, start)
        return window.path

    def seeds(self) -> list[bytes]:
        """Return inputs that change nothing: each world as it is, and the windows written as they are."""
        seeds = [bytes([number, 0]) for number in range(len(self.worlds))]
        world = self.worlds[0]
        for number, window in enumerate(self.windows):
            data = bytes([0, ONLY_READ])
            with world.open(window.path) as file:
                for offset in range(0, min(window.length, _SEED_WINDOW_BYTES), _SEED_PIECE_BYTES):
                    start = window.start_in(file) + offset
                    length = min(_SEED_PIECE_BYTES, max(file.size() - start, 0))
                    piece = file.read(start, length)
                    data += bytes([number]) + offset.to_bytes(2, "little") + bytes([length]) + piece
            seeds.append(data)
        return seeds
