"""What a long verb tells while it runs. The callback is called from the verb's threads, never two at once."""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class Progress(msgspec.Struct, frozen=True):
    """One report. Byte counts only grow within a phase.

    phase: what is being done, for people ("initial", "compare", "ship", "apply", "convert", …).
    done_bytes of total_bytes: the way through the phase; total_bytes may be an estimate and is never below
    done_bytes.
    raw_bytes: the bytes of data met so far, before compression. wire_bytes: what they became on the wire; 0
    off the wire.
    """

    phase: str
    done_bytes: int
    total_bytes: int
    raw_bytes: int = 0
    wire_bytes: int = 0


ProgressCallback = Callable[[Progress], None]


def quiet(_: Progress) -> None:
    """Tell nobody."""
