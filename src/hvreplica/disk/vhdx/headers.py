"""Both headers of an open VHDX, and the one way to change them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.errors import FormatError
from hvreplica.formats.vhdx_header import (
    HEADER_BYTES,
    HEADER_OFFSETS,
    choose_header,
    next_header,
    unpack_header,
)

if TYPE_CHECKING:
    from hvreplica.files import BlockFile
    from hvreplica.formats.vhdx_header import Header


class Headers:
    """The current header of `file` and where it stands. Not thread-safe: its owner holds a lock."""

    def __init__(self, file: BlockFile) -> None:
        """Read both copies and choose.

        Raises: FormatError if neither is valid or the current one cannot be.
        """
        candidates = [_read_header(file, at) for at in HEADER_OFFSETS]
        self._file = file
        self._slot = choose_header(candidates)
        chosen = candidates[self._slot]
        if isinstance(chosen, FormatError):
            raise chosen
        chosen.validate_within(file.size())
        self.current: Header = chosen

    def update(self, **changes: object) -> None:
        """Make `changes` current and durable, in both copies one after the other.

        The copy that is not current is replaced and synced first, so that one valid header stands in the file
        at any instant. Everything written before is durable too. Spec: [MS-VHDX] 2.2.2.1.
        """
        for _ in HEADER_OFFSETS:
            slot = 1 - self._slot
            header = next_header(self.current, at=HEADER_OFFSETS[slot], **changes)
            self._file.write(header.pack(), HEADER_OFFSETS[slot])
            self._file.sync()
            self._slot, self.current = slot, header

    def foreign(self) -> tuple[object, ...] | None:
        """Return what tells the newest header in the file from others; None if it was written here."""
        candidates = [_read_header(self._file, at) for at in HEADER_OFFSETS]
        try:
            found = candidates[choose_header(candidates)]
        except FormatError:
            return ()
        if isinstance(found, FormatError):
            return ()
        told = _marks(found)
        return None if told == _marks(self.current) else told


def _marks(header: Header) -> tuple[object, ...]:
    return header.sequence_number, header.file_write_guid, header.data_write_guid


def _read_header(file: BlockFile, file_offset: int) -> Header | FormatError:
    try:
        return unpack_header(file.read(file_offset, HEADER_BYTES), file_offset=file_offset)
    except FormatError as error:
        return error
