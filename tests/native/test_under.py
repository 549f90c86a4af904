"""What stands under a served disk: where each byte comes from, and when it does not count."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.native import live
from hvreplica.native.tables import BlockMap
from hvreplica.units import MIB

if TYPE_CHECKING:
    import random
    from pathlib import Path

PAGE = 4096
SIZE = 4 * MIB
READ = struct.Struct(">IHHQQI")


class _Layers:
    """A base disk of blocks and one file of extents, with what both together show."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.base_folder = folder
        self.base, self.part = rng.randbytes(2 * MIB), rng.randbytes(MIB)
        (folder / "base").write_bytes(self.base)
        (folder / "part").write_bytes(self.part)
        self.files = [os.open(folder / name, os.O_RDONLY) for name in ("base", "part")]
        self.counter = np.zeros(1, np.uint64)
        # Blocks 1 and 3 are present; 0 and 2 are not.
        self.map = BlockMap(np.array([0, MIB | 6, 2, 0 | 6], np.uint64), MIB, 0)
        self.rows = [(PAGE, 2 * PAGE, 512, 1), (MIB - 512, PAGE, PAGE, 1), (2 * MIB, PAGE, 0, -1)]
        self.rows += [(3 * MIB + PAGE, PAGE, 0, -1), (SIZE - PAGE, PAGE, MIB - PAGE, 1)]

    def content(self) -> bytes:
        shown = bytearray(SIZE)
        shown[MIB : 2 * MIB] = self.base[MIB:]
        shown[3 * MIB :] = self.base[:MIB]
        for start, length, place, part in self.rows:
            shown[start : start + length] = bytes(length) if part < 0 else self.part[place : place + length]
        return bytes(shown)

    def under(self, *, counted: bool = True) -> live.Under:
        table = np.array(self.rows, np.int64)
        starts = table[:, 0].astype(np.uint64)
        return live.Under(
            starts,
            starts + table[:, 1].astype(np.uint64),
            table[:, 2].astype(np.uint64),
            np.where(table[:, 3] < 0, -1, self.files[1]).astype(np.int32),
            descriptor=self.files[0],
            block_map=self.map,
            counter=self.counter if counted else None,
            applied=int(self.counter[0]),
            kept=None,
        )


@pytest.fixture
def layers(tmp_path: Path, rng: random.Random) -> _Layers:
    return _Layers(tmp_path, rng)


def test_every_range_is_what_its_layer_has(layers: _Layers, rng: random.Random) -> None:
    content = layers.content()
    under = layers.under()
    edges = [0, SIZE, *(row[0] for row in layers.rows), *(row[0] + row[1] for row in layers.rows)]
    for _ in range(400):
        start = min(max(rng.choice(edges) + rng.randrange(-600, 600), 0), SIZE - 1)
        length = rng.randrange(1, min(SIZE - start, rng.choice([1000, 3 * MIB])) + 1)
        out = bytearray(length)
        assert under.read_into(out, start)
        assert out == content[start : start + length]


def test_change_of_the_base_makes_stale_what_was_read_of_it_alone(layers: _Layers) -> None:
    under, unwatched = layers.under(), layers.under(counted=False)
    layers.counter += 1
    assert under.read_into(bytearray(PAGE), PAGE)  # a part
    assert under.read_into(bytearray(PAGE), 2 * MIB)  # zeros of a part
    assert not under.read_into(bytearray(PAGE), 3 * PAGE)  # an absent block of the base
    assert not under.read_into(bytearray(PAGE), MIB + PAGE * 4)
    assert not under.read_into(bytearray(2 * PAGE), 2 * PAGE)  # a part's last page, and one of the base
    assert unwatched.read_into(bytearray(SIZE), 0)
    assert layers.under().read_into(bytearray(SIZE), 0)


def test_failure_of_a_base_that_changes_is_a_change(layers: _Layers) -> None:
    """A place that is not there any more: what led there was of another moment."""
    layers.map.entries[1] = 64 * MIB | 6
    under = layers.under()
    with pytest.raises(OSError) as caught:
        under.read_into(bytearray(PAGE), MIB + PAGE * 4)
    assert caught.value.errno == errno.EIO
    layers.counter += 1
    assert not under.read_into(bytearray(PAGE), MIB + PAGE * 4)


def test_columns_must_agree() -> None:
    one, none = np.zeros(1, np.uint64), np.zeros(0, np.uint64)
    with pytest.raises(ValueError, match="columns"):
        live.Under(
            one,
            one,
            none,
            np.zeros(1, np.int32),
            descriptor=0,
            block_map=None,
            counter=None,
            applied=0,
            kept=None,
        )


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_read_goes_on_with_another_index(layers: _Layers, *, structured: bool, late: bool) -> None:
    """A read that is stale before its first byte left, or after what the buffer held has gone out."""
    content = layers.content()
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    exported = live.NbdExport(
        -1, None, live.Gate(), None, virtual_bytes=SIZE, has_parent=False, read_only=True
    )
    connection = live.NbdConnection(exported, theirs.fileno(), structured=structured)
    connection.under = layers.under()
    refreshed = []

    def serve() -> None:
        while (event := connection.serve()) is live.NbdEvent.REFRESH:
            refreshed.append(event)
            connection.under = layers.under()
        assert event is live.NbdEvent.CLOSED

    def receive(count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += ours.recv(count - len(data))
        return data

    if not late:
        layers.counter += 1
    thread = threading.Thread(target=serve)
    thread.start()
    ours.sendall(READ.pack(0x25609513, 0, 0, 7, 0, SIZE))
    head = receive(28 if structured else 16)
    assert len(head)
    if late:
        layers.counter += 1  # the server waits for us with most of its buffer unsent
    assert receive(SIZE) == content
    ours.sendall(READ.pack(0x25609513, 0, 0, 8, PAGE, PAGE))
    receive(28 if structured else 16)
    assert receive(PAGE) == content[PAGE : 2 * PAGE]
    ours.close()
    thread.join()
    theirs.close()
    assert len(refreshed) == 1


@pytest.mark.parametrize("structured", [False, True])
def test_extents_that_only_the_caller_can_read_are_asked_for(layers: _Layers, *, structured: bool) -> None:
    """A short read is the caller's as a whole; of one longer than the buffer what holds such bytes."""
    content = layers.content()
    ours, theirs = socket.socketpair()
    exported = live.NbdExport(
        -1, None, live.Gate(), None, virtual_bytes=SIZE, has_parent=False, read_only=True
    )
    connection = live.NbdConnection(exported, theirs.fileno(), structured=structured)
    rows = np.array([[2 * MIB + PAGE, 2 * MIB + 3 * PAGE]], np.uint64)
    (layers.base_folder / "all").write_bytes(content)
    whole = os.open(layers.base_folder / "all", os.O_RDONLY)
    under = live.Under(
        rows[:, 0].copy(),
        rows[:, 1].copy(),
        np.zeros(1, np.uint64),
        np.array([live.ELSEWHERE], np.int32),
        descriptor=whole,
        block_map=None,
        counter=None,
        applied=0,
        kept=None,
    )
    with pytest.raises(OSError):
        under.read_into(bytearray(PAGE), 2 * MIB + PAGE)
    connection.under = under
    filled: list[tuple[int, int]] = []

    def serve() -> None:
        while (event := connection.serve()) is not live.NbdEvent.CLOSED:
            if event is live.NbdEvent.FILL:
                room, start = connection.room, connection.piece_offset
                room[:] = content[start : start + len(room)]
                filled.append((start, len(room)))
            else:
                assert event is live.NbdEvent.COMMAND
                filled.append((connection.offset, connection.length))
                head = bytes(28 if structured else 16)
                data = content[connection.offset : connection.offset + connection.length]
                assert connection.send(head + data) == 0

    def receive(count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += ours.recv(count - len(data))
        return data

    thread = threading.Thread(target=serve)
    thread.start()
    for start, length in ((0, SIZE), (2 * MIB + 2 * PAGE, PAGE), (PAGE, PAGE)):
        ours.sendall(READ.pack(0x25609513, 0, 0, 8, start, length))
        receive(28 if structured else 16)
        assert receive(length) == content[start : start + length]
    ours.close()
    thread.join()
    theirs.close()
    os.close(whole)
    assert [length for _, length in filled] == [MIB, PAGE]
    assert filled[0][0] <= 2 * MIB + PAGE < filled[0][0] + MIB
