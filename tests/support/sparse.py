"""A sparse run of bytes in memory whose copies share their chunks until one of them writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK_BYTES = (
    4096  # what a usual file system allocates at once, so that holes appear where they would on a disk
)
_ZEROS = bytes(CHUNK_BYTES)


class SparseBytes:
    """Bytes by offset; absent chunks read as zeros. Not thread-safe: the owner holds a lock."""

    __slots__ = ("_chunks", "_owned", "size_bytes")

    def __init__(self, data: bytes = b"") -> None:
        self._chunks: dict[int, bytes | bytearray] = {}
        self._owned: set[int] = set()  # chunks that no copy shares and that may be changed in place
        self.size_bytes = 0
        self.write(memoryview(data), 0)

    def copy(self) -> SparseBytes:
        """Return an independent copy at the cost of one dictionary."""
        twin = SparseBytes()
        twin._chunks = dict(self._chunks)
        twin.size_bytes = self.size_bytes
        self._owned = set()
        return twin

    @property
    def allocated_bytes(self) -> int:
        """The bytes that a file system would have allocated."""
        return len(self._chunks) * CHUNK_BYTES

    def new_bytes(self, start: int, end: int) -> int:
        """Return the bytes that a write of this range would newly allocate."""
        chunks = range(start // CHUNK_BYTES, -(-end // CHUNK_BYTES))
        return sum(index not in self._chunks for index in chunks) * CHUNK_BYTES

    def chunk_indexes(self) -> list[int]:
        """Return the indexes of the chunks held, in no order."""
        return list(self._chunks)

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view`; the caller has checked that it lies inside the size."""
        done = 0
        while done < len(view):
            index, at = divmod(start + done, CHUNK_BYTES)
            count = min(CHUNK_BYTES - at, len(view) - done)
            view[done : done + count] = memoryview(self._chunks.get(index, _ZEROS))[at : at + count]
            done += count

    def write(self, view: memoryview, start: int) -> None:
        """Put `view` at `start`, growing the size where needed."""
        done = 0
        while done < len(view):
            index, at = divmod(start + done, CHUNK_BYTES)
            count = min(CHUNK_BYTES - at, len(view) - done)
            if count == CHUNK_BYTES:
                self._chunks[index] = bytes(view[done : done + count])
                self._owned.discard(index)
            else:
                self._own(index)[at : at + count] = view[done : done + count]
            done += count
        if view:
            self.size_bytes = max(self.size_bytes, start + len(view))

    def zero(self, start: int, end: int) -> None:
        """Make a range read as zeros, dropping whole chunks; does not change the size."""
        first, last = -(-start // CHUNK_BYTES), end // CHUNK_BYTES
        if last - first > len(self._chunks):
            for index in [index for index in self._chunks if first <= index < last]:
                self._drop(index)
        else:
            for index in range(first, last):
                self._drop(index)
        if first > last:  # inside one chunk
            self._blank(last, start % CHUNK_BYTES, end % CHUNK_BYTES)
            return
        if start % CHUNK_BYTES:
            self._blank(first - 1, start % CHUNK_BYTES, CHUNK_BYTES)
        if end % CHUNK_BYTES:
            self._blank(last, 0, end % CHUNK_BYTES)

    def resize(self, size_bytes: int) -> None:
        """Cut or extend with zeros."""
        if size_bytes < self.size_bytes:
            self.zero(size_bytes, max(self.size_bytes, size_bytes))
        self.size_bytes = size_bytes

    def extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of the runs of held chunks between `start` and `end`, within the size."""
        end = min(end, self.size_bytes)
        run_start = run_end = start
        for index in sorted(self._chunks):
            chunk_start, chunk_end = max(index * CHUNK_BYTES, start), min((index + 1) * CHUNK_BYTES, end)
            if chunk_end <= chunk_start:
                continue
            if chunk_start != run_end:
                if run_end > run_start:
                    yield run_start, run_end - run_start
                run_start = chunk_start
            run_end = chunk_end
        if run_end > run_start:
            yield run_start, run_end - run_start

    def equals(self, other: SparseBytes) -> bool:
        """Return whether both hold the same chunks; quick where they share most of them."""
        return self.size_bytes == other.size_bytes and self._chunks == other._chunks

    def digest(self) -> int:
        """Return a hash of size, chunks held and what they hold."""
        return hash(
            (self.size_bytes, frozenset((index, bytes(chunk)) for index, chunk in self._chunks.items()))
        )

    def runs(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of the runs of held chunks, in order, within the size."""
        indexes = sorted(self._chunks)
        first = 0
        for last, index in enumerate(indexes):
            if last + 1 < len(indexes) and indexes[last + 1] == index + 1:
                continue
            start = indexes[first] * CHUNK_BYTES
            data = b"".join([self._chunks[held] for held in indexes[first : last + 1]])
            if start < self.size_bytes:
                yield start, data[: self.size_bytes - start]
            first = last + 1

    def _own(self, index: int) -> bytearray:
        chunk = self._chunks.get(index, _ZEROS)
        if index in self._owned and isinstance(chunk, bytearray):
            return chunk
        chunk = bytearray(chunk)
        self._chunks[index] = chunk
        self._owned.add(index)
        return chunk

    def _blank(self, index: int, start: int, end: int) -> None:
        if index in self._chunks:
            self._own(index)[start:end] = bytes(end - start)

    def _drop(self, index: int) -> None:
        if self._chunks.pop(index, None) is not None:
            self._owned.discard(index)
