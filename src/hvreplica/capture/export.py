"""What a client may know of a disk before it uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.formats.nbd import PAYLOAD_BYTES_MAX, TransmissionFlag
from hvreplica.formats.nbd_options import MINIMUM_BLOCK_BYTES_MAX, PREFERRED_BLOCK_BYTES_MIN

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_EXPORT = ""  # the name that a client gives when it does not care: the first export
_SIZE_BYTES_MAX = (1 << 63) - 1  # clients hold offsets in signed numbers


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """One export.

    name: how clients ask for it. minimum_block_bytes: what offsets and lengths must be multiples of, 1 to
    64 KiB; preferred_block_bytes: from where on requests are cheap, 512 to 32 MiB; both are powers of two.
    description: a line for people. fast_zero: write zeroes may be asked to fail rather than be slow.
    Raises: ValueError.
    """

    name: str
    size_bytes: int
    read_only: bool = False
    minimum_block_bytes: int = 512
    preferred_block_bytes: int = 4096
    description: str = ""
    fast_zero: bool = False

    def __post_init__(self) -> None:
        least = max(self.minimum_block_bytes, PREFERRED_BLOCK_BYTES_MIN)
        for field, value, low, high in (
            ("minimum_block_bytes", self.minimum_block_bytes, 1, MINIMUM_BLOCK_BYTES_MAX),
            ("preferred_block_bytes", self.preferred_block_bytes, least, PAYLOAD_BYTES_MAX),
        ):
            if not low <= value <= high or value & (value - 1):
                message = f"{field} must be a power of two from {low} to {high}, not {value}"
                raise ValueError(message)
        if not 0 <= self.size_bytes <= _SIZE_BYTES_MAX:
            message = f"size_bytes must be 0 to {_SIZE_BYTES_MAX}, not {self.size_bytes}"
            raise ValueError(message)

    def flags(self, *, structured: bool) -> TransmissionFlag:
        """Return what may be asked of it. structured: whether structured replies were negotiated."""
        flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_CACHE
        # All connections write the same file, and a flush of one syncs what every other one was answered.
        flags |= TransmissionFlag.CAN_MULTI_CONN
        if structured:
            flags |= TransmissionFlag.SEND_DF
        if self.read_only:
            return flags | TransmissionFlag.READ_ONLY
        flags |= TransmissionFlag.SEND_FUA | TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES
        return flags | TransmissionFlag.SEND_FAST_ZERO if self.fast_zero else flags


def choose_export(exports: Sequence[ExportInfo], name: str) -> int | None:
    """Return the index of the export that a client asks for by name, or None."""
    if name == DEFAULT_EXPORT and exports:
        return 0
    for index, export in enumerate(exports):
        if export.name == name:
            return index
    return None
