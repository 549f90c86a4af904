"""The chosen moment is the last one known, and stands for just the entries stamped by then, of all logs."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from hvreplica.formats.times import pack_times, unpack_times
from hvreplica.store.moment import SECOND_US, choose_moment, micros, reach_us, second_of
from tests.support.times import times_of_history

SLOTS = (1, 2, 10, 20, 100, 200, 1000)
START_US = 1_700_000_000 * SECOND_US - 500


@dataclass
class History:
    """When entries came, log by log, and when flushes were asked for; slots of each log."""

    stamps: list[list[int]]
    flushes: list[int]
    slots: list[tuple[int, int]]
    wanted: int


@st.composite
def histories(draw: st.DrawFn) -> History:
    moments = st.integers(0, 1500).map(lambda at: START_US + at)
    stamps = draw(st.lists(st.lists(moments, min_size=1, max_size=20).map(sorted), min_size=1, max_size=3))
    flushes = draw(st.lists(moments, max_size=8, unique=True).map(sorted))
    slot = st.sampled_from(SLOTS)
    slots = [draw(st.tuples(slot, slot)) for _ in stamps]
    return History(stamps, flushes, slots, draw(moments))


@given(histories(), st.booleans())
def test_moment_is_the_last_known_and_has_a_prefix_of_each_log(history: History, flush: bool) -> None:  # noqa: FBT001 - drawn
    logs = []
    for number, (stamps, (slot_us, flush_slot_us)) in enumerate(
        zip(history.stamps, history.slots, strict=True)
    ):
        log_id = uuid.UUID(int=number + 1)
        times = times_of_history(
            log_id,
            stamps,
            history.flushes,
            slot_us=slot_us,
            flush_slot_us=flush_slot_us,
            ended_us=START_US + 2000,
        )
        logs.append(unpack_times(pack_times(times), log_id=log_id))
    coarsest = max(flush_slot for _, flush_slot in history.slots)
    last_of_slot = {at // coarsest: at for at in history.flushes}
    known = [at for at in last_of_slot.values() if at <= history.wanted and at % SECOND_US]
    chosen = choose_moment(logs, history.wanted, flush=flush)
    if chosen is None:
        assert flush
        assert not known
        return
    assert chosen.time_us <= history.wanted
    assert chosen.entries == {
        log.log_id: sum(stamp <= chosen.time_us for stamp in stamps)
        for log, stamps in zip(logs, history.stamps, strict=True)
    }
    assert chosen.time_us % SECOND_US, "a whole second would stand for all of it"
    assert chosen.is_flush <= (chosen.time_us in history.flushes)
    slot_us = max(slot for slot, _ in history.slots)
    if flush:
        assert chosen.time_us == max(known)
    else:
        assert chosen.time_us >= max([*known, (history.wanted + 1) // slot_us * slot_us - 1])
        assert history.wanted - chosen.time_us < slot_us


@given(st.integers(0, 4_000_000_000 * SECOND_US))
def test_times_of_points_tell_what_they_have(time_us: int) -> None:
    second = second_of(time_us)
    assert time_us - SECOND_US < second.time_us <= time_us
    assert reach_us(second.time_us // SECOND_US) == second.time_us
    assert micros(time_us / SECOND_US) == time_us, "no microsecond is lost in Unix seconds"
    if time_us % SECOND_US:
        assert reach_us(time_us / SECOND_US) == time_us
