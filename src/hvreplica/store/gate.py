"""Let calls into an object until it is shut, and wait for those inside when shutting."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


class Gate:
    """Thread-safe. `with gate:` around a call; after shut() every new call raises what shut() was given.

    A call may pass the same gate again while it is inside. A call must not shut the gate it is inside of.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside_count = 0
        self._reason: Callable[[], Exception] | None = None

    def __enter__(self) -> Self:
        with self._changed:
            if self._reason is not None:
                raise self._reason()
            self._inside_count += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._inside_count -= 1
            self._changed.notify_all()

    def check(self) -> None:
        """Raise where the gate was shut; long calls ask between their steps, so that shut() waits less."""
        with self._changed:
            if self._reason is not None:
                raise self._reason()

    def shut(self, reason: Callable[[], Exception]) -> None:
        """Refuse every later call with a new reason(), the first one given; return when nobody is inside."""
        with self._changed:
            if self._reason is None:
                self._reason = reason
            self._changed.wait_for(lambda: self._inside_count == 0)
