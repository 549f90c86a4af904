"""Compress and decompress the frames of pressed undo parts, each by itself."""

from __future__ import annotations

import zstandard

from hvreplica.errors import FieldOutOfRange
from hvreplica.formats.pressed import FRAME_BYTES_MAX, SPEC

LEVEL = 3  # away from whoever waits: a few percent less than level 1 for hardly more time


class FrameCodec:
    """Contexts of one thread at a time."""

    def __init__(self) -> None:
        self._compressor: zstandard.ZstdCompressor | None = None
        self._decompressor: zstandard.ZstdDecompressor | None = None

    def encode(self, plain: bytearray) -> bytes:
        """Return a zstd frame of `plain`, which may be longer than it."""
        if self._compressor is None:
            self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False)
        return self._compressor.compress(plain)

    def decode(self, stored: bytearray, out: bytearray) -> None:
        """Decompress into `out`, which must be filled exactly; never writes or allocates beyond it.

        Raises: FieldOutOfRange.
        """
        if self._decompressor is None:
            self._decompressor = zstandard.ZstdDecompressor(max_window_size=FRAME_BYTES_MAX)
        # A reader writes straight into `out`; decompress() would allocate what the frame claims to hold.
        view, done, is_longer = memoryview(out), 0, False
        try:
            with self._decompressor.stream_reader(stored, read_size=FRAME_BYTES_MAX) as reader:
                while done < len(view) and (count := reader.readinto(view[done:])):
                    done += count
                is_longer = done == len(view) and bool(reader.read(1))
        except (zstandard.ZstdError, MemoryError, ValueError) as error:
            self._decompressor = None
            raise FieldOutOfRange(
                f"a frame of a pressed undo part does not decode: {error}", field="frame", spec=SPEC
            ) from None
        if is_longer or done < len(view):
            raise FieldOutOfRange(
                "a frame of a pressed undo part decodes to another length",
                field="log_bytes",
                expected=len(view),
                actual="more" if is_longer else done,
                spec=SPEC,
            )
