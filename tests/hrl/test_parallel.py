"""Batches run at once, results keep their order, and an error leaves nothing running."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from hvreplica.hrl.parallel import WORKERS, in_order

if TYPE_CHECKING:
    from collections.abc import Iterator


def test_results_keep_the_order_of_the_items() -> None:
    second_done = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second_done.wait(10)  # ends only after the one behind it: two do run at once
        if item == 1:
            second_done.set()
        return item * item

    assert list(in_order(work, range(20))) == [item * item for item in range(20)]


def test_items_are_taken_only_a_little_ahead() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    results = in_order(lambda item: item, items())
    for count in range(1, 50):
        next(results)
        assert len(taken) <= count + WORKERS
    results.close()  # type: ignore[attr-defined]


def test_first_error_by_order_is_raised_and_the_rest_does_not_begin() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item >= 3:
            raise ValueError(item)
        return item

    with pytest.raises(ValueError, match="3"):
        list(in_order(work, range(1000)))
    assert len(begun) < 20
    assert threading.active_count() == 1 or not [
        thread for thread in threading.enumerate() if thread.name.startswith("hrl")
    ]
