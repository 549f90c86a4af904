"""Which threads a test has started and not ended: those of others, and of others' garbage, do not count."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def own_threads(prefix: str = "", *, at_most: int = 0) -> Iterator[None]:
    """Fail if more than `at_most` threads that began in the block, of names with `prefix`, live behind it."""
    before = set(threading.enumerate())
    yield
    own = [
        thread for thread in threading.enumerate() if thread not in before and thread.name.startswith(prefix)
    ]
    assert len(own) <= at_most, f"threads were left behind: {[thread.name for thread in own]}"
