"""The count of a test's own threads: what it left is found, and what others did is not."""

from __future__ import annotations

import threading

import pytest

from tests.support.threads import own_threads


@pytest.mark.parametrize("is_own", [False, True])
def test_only_own_threads_that_are_left_count(*, is_own: bool) -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="left here")
    try:
        if not is_own:
            thread.start()
            with own_threads():
                pass
            return
        with pytest.raises(AssertionError, match="left here"), own_threads("left"):
            thread.start()
        with own_threads("right"):
            pass
    finally:
        release.set()
        thread.join()
