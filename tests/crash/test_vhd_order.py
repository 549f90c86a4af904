"""What must be durable before what in a VHD: read off the trace, where drawing worlds at random would need luck."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.disk import create_disk, open_disk
from hvreplica.disk.vhd.create import TABLE_OFFSET
from hvreplica.formats.vhd_bat import NO_OFFSET, unpack_bat
from hvreplica.units import KIB, MIB
from tests.support.disks import create_kind
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states
from tests.support.numbered import read_numbers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.faultfile import Event

PATH = Path("/vm/disk.vhd")
BLOCK = 512 * KIB
SIZE = 300 * BLOCK  # three sectors of BAT
BAT_END = TABLE_OFFSET + 3 * 512


def pending_before(files: FaultFiles) -> Iterator[tuple[Event, list[Event]]]:
    """Yield every event with the changes that are not durable just before it."""
    pending: list[Event] = []
    for event in files.trace().events:
        yield event, list(pending)
        if event.kind == "sync":
            pending.clear()
        elif event.kind in {"write", "zero", "resize"}:
            pending.append(event)


def is_bat(event: Event) -> bool:
    return event.kind == "write" and TABLE_OFFSET <= event.offset < BAT_END


def record(kind: str) -> FaultFiles:
    """Record a session of several flushes, with new blocks, old ones, zeroing and reuse."""
    files = FaultFiles("/vm")
    clock = FakeClock()
    create_kind(files, PATH, kind, virtual_bytes=SIZE, block_bytes=BLOCK, clock=clock)
    files.settle()
    with open_disk(files, PATH, writable=True, clock=clock) as disk:
        for number in range(1, 9):
            starts = np.arange(number, 290, 37, dtype=np.int64) * BLOCK
            extents = np.column_stack((starts, np.full(len(starts), 1024)))
            disk.write_extents(extents, bytes([number]) * (len(starts) * 1024))
            disk.flush()
            disk.write(bytes([number]) * 4096, BLOCK + number * 4096)
            if number % 3 == 0:
                disk.write_zeroes(0, 100 * BLOCK)
            if number % 2 == 0:
                disk.flush()
    return files


@pytest.mark.parametrize("kind", ["vhd-dynamic", "vhd-differencing"])
def test_bat_points_to_durable_blocks_only(kind: str) -> None:
    """An entry that was not durably there is written when payload, bitmap and length of its block are."""
    durable: set[int] = set()
    latest: set[int] = set()
    seen = 0
    for event, pending in pending_before(record(kind)):
        if event.kind == "sync":
            durable |= latest
        if not is_bat(event):
            continue
        offsets = unpack_bat(event.data, len(event.data) // 4)
        places = {int(offset) for offset in offsets if offset != NO_OFFSET}
        for place in places - durable:
            seen += 1
            for other in pending:
                assert other.kind != "resize", str(event)
                end = other.offset + other.length
                assert end <= place or other.offset >= place + 512 + BLOCK, f"{event} before {other}"
        latest = latest | places
    assert seen > 40


def test_sectors_count_only_when_they_are_durable() -> None:
    """The bitmap of a block that is in the BAT is written when no payload of that block is pending."""
    in_bat: set[int] = set()
    seen = 0
    for event, pending in pending_before(record("vhd-differencing")):
        if is_bat(event):
            in_bat |= {int(offset) for offset in unpack_bat(event.data, len(event.data) // 4)}
        elif event.kind == "write" and event.offset in in_bat and event.length == 512:
            seen += 1
            for other in pending:
                inside = event.offset + 512 <= other.offset < event.offset + 512 + BLOCK
                assert not (inside and other.kind == "write"), f"{event} before {other}"
    assert seen > 3


def test_file_never_ends_with_the_guests_bytes() -> None:
    """They could look like a footer: whatever length a cut leaves, its last sector is the footer's."""
    files = record("vhd-dynamic")
    sizes = {event.length for event in files.trace().events if event.kind == "resize"}
    ends = {0}
    for event in files.trace().events:
        if is_bat(event):
            offsets = unpack_bat(event.data, len(event.data) // 4)
            ends |= {int(offset) + 512 + BLOCK for offset in offsets}
    assert len(sizes) > 3
    assert {size - 512 for size in sizes} <= ends


def test_footer_is_at_the_end_of_a_closed_file() -> None:
    content = record("vhd-dynamic").content_of(PATH)
    assert content[:8] == content[-512:-504] == b"conectix"
    assert content[:512] == content[-512:]


@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_copy_is_made_right_before_the_footer_is_written_over(seed: int, kind: str) -> None:
    """A file whose copy at offset 0 is bad: at no instant of the first session is no footer left."""
    clock = FakeClock()
    files = FaultFiles("/vm")
    create_kind(files, PATH, f"vhd-{kind}", virtual_bytes=4 * MIB, block_bytes=BLOCK, clock=clock)
    with files.open(PATH, writable=True) as file:
        file.write(b"damaged!", 100)
    files.settle()
    with open_disk(files, PATH, writable=True, clock=clock) as disk:
        disk.write(b"\1" * BLOCK, 0)
        disk.flush()
        disk.write(b"\2" * BLOCK, BLOCK)
    for _, world in crash_states(files.trace(), seed=seed, limit=300, distinct=True):
        with open_disk(world, PATH, writable=True, clock=clock) as disk:
            assert set(read_numbers(disk)[: BLOCK // 512].tolist()) <= {0, 1, *range(200, 256)}


def test_first_block_lies_where_the_footer_was() -> None:
    """What the footer's bytes would say as a bitmap never counts: the new bitmap is durable before the BAT."""
    files = FaultFiles("/vm")
    create_disk(files, PATH, virtual_bytes=4 * MIB, format="vhd", block_bytes=BLOCK, clock=FakeClock())
    size = files.open(PATH).size()
    with open_disk(files, PATH, writable=True, clock=FakeClock()) as disk:
        disk.write(b"x", 0)
    table = files.content_of(PATH)[TABLE_OFFSET:]
    assert unpack_bat(table, 1).tolist() == [size - 512]
