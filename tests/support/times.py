"""What a times file must say of a history, by its rule alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica.formats.times import Times

if TYPE_CHECKING:
    import uuid
    from collections.abc import Sequence


def times_of_history(
    log_id: uuid.UUID,
    stamps: Sequence[int],
    flushes: Sequence[int],
    *,
    slot_us: int,
    flush_slot_us: int = 1,
    ended_us: int | None = None,
) -> Times:
    """Return the times of a log whose entries came at `stamps`, ascending; entries come before flushes."""
    ticks: dict[int, tuple[int, int]] = {}
    for number, stamp in enumerate(stamps):
        ticks.setdefault(stamp // slot_us, (number, stamp))
    kept = {at // flush_slot_us: (sum(stamp <= at for stamp in stamps), at) for at in flushes}
    return Times(
        log_id=log_id,
        entry_count=len(stamps),
        slot_us=slot_us,
        ended_us=max([*stamps, *flushes, 0]) if ended_us is None else ended_us,
        ticks=np.array(list(ticks.values()), np.int64).reshape(-1, 2),
        flushes=np.array(list(kept.values()), np.int64).reshape(-1, 2),
    )
