"""A small disk in a scattered container, for tests of the payload kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.native import BlockMap

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet
    from pathlib import Path

    from typing_extensions import Buffer

    from hvreplica.files import BlockFile

MIB = 1 << 20
FULLY_PRESENT = 6
ABSENT_STATES = (0, 2, 3)  # not present, zero, unmapped: [MS-VHDX] 2.5.1.1


def pattern(length: int, start: int = 0) -> bytes:
    """Return bytes that differ from place to place and from start to start."""
    values = np.arange(start, start + length, dtype=np.uint64)
    return ((values * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(56)).astype(np.uint8).tobytes()


def disk_image(length: int) -> bytes:
    """Return the content of a raw disk."""
    return pattern(length, start=1000)


def extents_of(rows: list[tuple[int, int]]) -> np.ndarray:
    """Return rows (offset, length) as the kernels take them."""
    return np.array(rows, np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class Scene:
    """places: slot in the container of each guest block. absent: blocks without a place. mapped: False for raw."""

    places: list[int]
    absent: AbstractSet[int]
    chunk_ratio: int
    block_bytes: int
    mapped: bool

    @classmethod
    def straight(cls, block_count: int, block_bytes: int) -> Scene:
        """Return a scene whose blocks stand in order."""
        return cls(list(range(block_count)), frozenset(), 0, block_bytes, mapped=True)

    def without(self, blocks: set[int]) -> Scene:
        """Return the scene with these blocks absent."""
        return replace(self, absent=frozenset(blocks))

    def all_present(self) -> Scene:
        """Return the scene with a place for every block."""
        return replace(self, absent=frozenset())

    def disk(self, data: bytes) -> bytes:
        """Return what the guest sees where `data` was written before the absent blocks went away."""
        seen = bytearray(data)
        for block in self.absent if self.mapped else ():
            seen[block * self.block_bytes : (block + 1) * self.block_bytes] = bytes(self.block_bytes)
        return bytes(seen)

    def container(self, disk: bytes) -> bytes:
        """Return the file that holds `disk`: raw, or block b in the slot of 1 MiB steps that places[b] names."""
        if not self.mapped:
            return disk
        content = bytearray(b"\xdd" * ((max(self.places) + 1) * MIB + self.block_bytes))
        for block, place in enumerate(self.places):
            if block not in self.absent:
                start = (place + 1) * MIB
                content[start : start + self.block_bytes] = disk[block * self.block_bytes :][
                    : self.block_bytes
                ]
        return bytes(content)

    def block_map(self) -> BlockMap | None:
        """Return the block map of the container; sector bitmap entries hold what no payload entry would."""
        if not self.mapped:
            return None
        entries = []
        for block, place in enumerate(self.places):
            if self.chunk_ratio and block and block % self.chunk_ratio == 0:
                entries.append(0xFFFF_FFFF_FFF0_0006)
            state = ABSENT_STATES[block % 3] if block in self.absent else FULLY_PRESENT
            entries.append(((place + 1) << 20) | state)
        return BlockMap(np.array(entries, np.uint64), self.block_bytes, self.chunk_ratio)


class PassedFile:
    """A BlockFile without a descriptor: every access passes it."""

    def __init__(self, file: BlockFile) -> None:
        self._file = file

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def writable(self) -> bool:
        return self._file.writable

    def fileno(self) -> int | None:
        return None

    def size(self) -> int:
        return self._file.size()

    def read(self, file_offset: int, length: int) -> bytes:
        return self._file.read(file_offset, length)

    def read_into(self, buffer: Buffer, file_offset: int) -> None:
        self._file.read_into(buffer, file_offset)

    def write(self, buffer: Buffer, file_offset: int) -> None:
        self._file.write(buffer, file_offset)

    def resize(self, size_bytes: int) -> None:
        self._file.resize(size_bytes)

    def zero(self, file_offset: int, length: int) -> None:
        self._file.zero(file_offset, length)

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        return self._file.data_extents(start, end)

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()
