"""What must be durable before what: read off the trace, where drawing worlds at random would need luck.

The places follow from the layout of disk/vhdx/create.py: log at 1 MiB, metadata at 2, BAT at 3, blocks behind it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.disk import create_disk, open_disk
from hvreplica.formats.guid import NIL
from hvreplica.formats.vhdx_header import HEADER_OFFSETS, unpack_header
from hvreplica.formats.vhdx_log import unpack_entry_header
from hvreplica.units import GIB, MIB
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import Event, FaultFiles

if TYPE_CHECKING:
    from collections.abc import Iterator

PATH = Path("/vm/disk.vhdx")
SIZE = 1024 * GIB
BAT_END = 3 * MIB + 9 * MIB  # 2**20 entries of 8 bytes and 256 unused ones


def place_of(event: Event) -> str:
    if event.kind not in {"write", "zero"}:
        return event.kind
    if event.offset < MIB:
        return "header"
    if event.offset < 2 * MIB:
        return "log"
    if event.offset < 3 * MIB:
        return "metadata"
    return "bat" if event.offset < BAT_END else "payload"


def log_guid(event: Event) -> object:
    return unpack_header(event.data, file_offset=event.offset).log_guid


def walk(files: FaultFiles) -> Iterator[tuple[Event, str, set[str]]]:
    """Yield every event with its place and the places that hold unsynced changes just before it."""
    pending: set[str] = set()
    for event in files.trace().events:
        place = place_of(event)
        yield event, place, set(pending)
        if place == "sync":
            pending.clear()
        elif event.kind in {"write", "zero", "resize"}:
            pending.add(place)


@pytest.fixture(scope="module")
def written() -> FaultFiles:
    """Record a session with flushes of one and of several rounds, zeroing, and a clean close."""
    files = FaultFiles("/vm")
    clock = FakeClock()
    create_disk(files, PATH, virtual_bytes=SIZE, block_bytes=MIB, clock=clock)
    files.settle()
    with open_disk(files, PATH, writable=True, clock=clock) as disk:
        disk.write(b"1" * 4096, 0)
        disk.flush()
        places = np.arange(300, dtype=np.int64) * 600 * MIB
        disk.write_extents(np.column_stack((places, np.full(300, 512))), b"2" * (300 * 512))
        disk.flush()
        disk.write_zeroes(0, 100 * GIB)
        disk.write(b"3" * 4096, 700 * GIB)
    return files


def test_log_is_written_only_when_payload_and_bat_are_durable(written: FaultFiles) -> None:
    seen = 0
    for event, place, pending in walk(written):
        if place == "log" and "log" not in pending:
            seen += 1
            assert not pending & {"payload", "bat", "resize"}, str(event)
    assert seen >= 4


def test_a_new_sequence_never_overwrites_the_one_that_a_replay_would_find(written: FaultFiles) -> None:
    live: list[tuple[int, int]] = []
    new: list[tuple[int, int]] = []
    for event, place, _ in walk(written):
        if place == "log":
            start, end = event.offset, event.offset + event.length
            assert not [span for span in live if span[0] < end and start < span[1]], str(event)
            new.append((start, end))
        elif place == "sync" and new:
            live, new = new, []
    assert live


def test_bat_is_written_only_when_the_log_and_its_guid_are_durable(written: FaultFiles) -> None:
    current = NIL
    seen = 0
    for event, place, pending in walk(written):
        if place == "header":
            current = log_guid(event)
        if place == "bat":
            seen += 1
            assert not pending & {"log", "header"}, str(event)
            assert current != NIL
    assert seen > 300


def test_log_is_emptied_only_when_the_bat_is_durable(written: FaultFiles) -> None:
    cleared = [
        pending for event, place, pending in walk(written) if place == "header" and log_guid(event) == NIL
    ]
    assert len(cleared) == 4  # the first change of the session, and close: both copies each
    for pending in cleared:
        assert not pending


def test_headers_change_before_anything_else_and_one_at_a_time(written: FaultFiles) -> None:
    places = [(event, place, pending) for event, place, pending in walk(written) if place != "sync"]
    first_other = next(index for index, (_, place, _) in enumerate(places) if place != "header")
    assert first_other == 2
    assert {event.offset for event, _, _ in places[:2]} == set(HEADER_OFFSETS)
    for _, place, pending in places:
        if place == "header":
            assert "header" not in pending


def test_every_block_write_of_one_flush_is_logged_once(written: FaultFiles) -> None:
    """BAT updates go through the log once per flush, not once per block."""
    writes = [event for event, place, _ in walk(written) if place == "log"]
    assert len(writes) <= 12  # four flushes; 300 sectors need three entries, of which some wrap


def test_replay_is_durable_before_the_log_is_emptied() -> None:
    files = FaultFiles("/vm")
    clock = FakeClock()
    create_disk(files, PATH, virtual_bytes=SIZE, block_bytes=MIB, clock=clock)
    disk = open_disk(files, PATH, writable=True, clock=clock)
    disk.write(b"1" * 4096, 0)
    disk.flush()
    disk.abandon()
    files.settle()
    open_disk(files, PATH, writable=True, clock=clock).abandon()
    order = []
    for event, place, pending in walk(files):
        if place == "header":
            order.append("clear" if log_guid(event) == NIL else "identity")
            assert not pending
        elif place != "sync":
            order.append(place)
    assert order == ["identity", "identity", "bat", "clear", "clear"]


def test_identifier_of_a_new_disk_comes_last() -> None:
    files = FaultFiles("/vm")
    create_disk(files, PATH, virtual_bytes=GIB, type="fixed", clock=FakeClock())
    events = list(walk(files))
    at = next(i for i, (event, _, _) in enumerate(events) if event.kind == "write" and event.offset == 0)
    assert not events[at][2]
    assert [event.kind for event, _, _ in events[at + 1 :]] == ["sync", "rename", "sync_directory"]


def test_publishing_new_places_syncs_nothing_and_claims_no_length_that_a_power_cut_may_take() -> None:
    files = FaultFiles("/vm")
    clock = FakeClock()
    create_disk(files, PATH, virtual_bytes=SIZE, block_bytes=MIB, clock=clock)
    files.settle()
    disk = open_disk(files, PATH, writable=True, clock=clock)
    disk.write(b"1" * 4096, 0)
    disk.flush()
    begin = len(files.trace().events)
    for block in range(1, 40):
        disk.write(b"2" * 4096, block * MIB)
        disk.publish()
    published = files.trace().events[begin:]
    assert "sync" not in {event.kind for event in published}
    size = durable = 0
    entries = 0
    for event in files.trace().events:
        if event.kind == "resize":
            size = event.length
        elif event.kind == "sync":
            durable = size
        elif place_of(event) == "log" and event.data[:4] == b"loge":
            entries += 1
            assert (
                unpack_entry_header(event.data, log_offset=event.offset - MIB).flushed_file_offset <= durable
            )
    assert entries == 40
    with open_disk(files.after_kill(), PATH, clock=clock) as again:
        data = bytearray(4096)
        again.read_into(data, 39 * MIB)
        assert data == b"2" * 4096


def test_publishing_a_place_used_again_waits_until_its_zeros_are_durable() -> None:
    files = FaultFiles("/vm")
    clock = FakeClock()
    create_disk(files, PATH, virtual_bytes=SIZE, block_bytes=MIB, clock=clock)
    files.settle()
    disk = open_disk(files, PATH, writable=True, clock=clock)
    disk.write(b"1" * (4 * MIB), 0)
    disk.flush()
    disk.write_zeroes(0, 2 * MIB)
    disk.flush()
    for block in (8, 9, 10):  # two take the places that were given back, the third a new one
        disk.write(b"2" * 4096, block * MIB)
        disk.publish()
    zeroed = 0
    pending = False
    for event in files.trace().events:
        if event.kind == "zero" and place_of(event) == "payload":
            pending, zeroed = True, zeroed + 1
        elif event.kind == "sync":
            pending = False
        assert not (pending and place_of(event) == "log"), str(event)
    assert zeroed
