"""A shut gate lets nobody in, and shutting waits for who is inside."""

from __future__ import annotations

import threading

import pytest

from hvreplica.errors import Fenced
from hvreplica.store.gate import Gate


def test_open_gate_lets_calls_through_nested_too() -> None:
    gate = Gate()
    with gate, gate:
        gate.check()


def test_shut_gate_refuses_with_the_first_reason() -> None:
    gate = Gate()
    gate.shut(lambda: Fenced("first"))
    gate.shut(lambda: ValueError("second"))
    with pytest.raises(Fenced, match="first"), gate:
        pytest.fail("the gate was shut")
    with pytest.raises(Fenced, match="first"):
        gate.check()


def test_shut_waits_for_calls_inside_and_they_can_notice() -> None:
    gate = Gate()
    inside, noticed, order = threading.Event(), threading.Event(), []

    def work() -> None:
        with gate:
            inside.set()
            while True:
                try:
                    gate.check()
                except Fenced:
                    break
            noticed.set()
            order.append("left")

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    gate.shut(lambda: Fenced("newer"))
    order.append("shut")
    thread.join()
    assert noticed.is_set()
    assert order == ["left", "shut"]


def test_gate_opens_for_leavers_after_an_exception() -> None:
    gate = Gate()
    with pytest.raises(KeyError), gate:
        raise KeyError
    gate.shut(lambda: Fenced("newer"))
