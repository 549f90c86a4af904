"""The native half of live tracking, without a machine around it."""

from __future__ import annotations

import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.native import live
from hvreplica.units import GIB, TIB

if TYPE_CHECKING:
    from pathlib import Path

_DISK_COUNT = 6


class _Disks:
    """Sparse raw disks behind one gate, each with a connection; everything is armed, nothing logged.

    Large ones: what a cut does for a disk takes long enough then to be met between two of them.
    """

    def __init__(self, folder: Path, virtual_bytes: int) -> None:
        self.virtual_bytes = virtual_bytes
        self.gate = live.Gate()
        self.tracks, self.ends, self.threads, self.files = [], [], [], []
        for index in range(_DISK_COUNT):
            descriptor = os.open(folder / f"{index}.img", os.O_RDWR | os.O_CREAT)
            epoch = live.Epoch(virtual_bytes)
            track = live.Track(self.gate, epoch, np.full(len(epoch.touched), 0xFF, np.uint8), virtual_bytes)
            exported = live.NbdExport(
                descriptor,
                None,
                self.gate,
                track,
                virtual_bytes=virtual_bytes,
                has_parent=False,
                read_only=False,
            )
            ours, theirs = socket.socketpair()
            connection = live.NbdConnection(exported, theirs.fileno(), structured=False)
            thread = threading.Thread(target=self._serve, args=(connection,))
            thread.start()
            self.tracks.append(track)
            self.ends.append((ours, theirs))
            self.threads.append(thread)
            self.files.append(descriptor)

    def _serve(self, connection: live.NbdConnection) -> None:
        """Serve to the end; a write just after a cut comes back until the test has armed its region again."""
        while connection.serve() is live.NbdEvent.PIECE:
            pass

    def write(self, index: int, grain: int) -> None:
        ours = self.ends[index][0]
        head = struct.pack(">IHHQQI", 0x25609513, 0, 1, grain, grain * live.GRAIN_BYTES, 512)
        ours.sendall(head + b"x" * 512)
        assert ours.recv(16)[4:8] == bytes(4)

    def arm(self) -> None:
        for track in self.tracks:
            track._armed[:] = 0xFF

    def cut(self) -> tuple[list[live.Epoch], int]:
        epochs = [live.Epoch(self.virtual_bytes) for _ in self.tracks]
        old, _, held_ns = live.cut(self.gate, self.tracks, epochs)
        with self.gate.closed():
            for track in self.tracks:
                track.unguard()
            self.arm()
        return old, held_ns

    def close(self) -> None:
        for ours, _ in self.ends:
            ours.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        for pair in self.ends:
            for end in pair:
                end.close()
        for descriptor in self.files:
            os.close(descriptor)


def _grains(epoch: live.Epoch, count: int) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(epoch.dirty[: count // 8 + 1], bitorder="little")).tolist())


def test_cut_comes_between_no_two_disks(tmp_path: Path) -> None:
    """A guest writes grain n of the first disk, then of the last: no cut may have it of the last alone."""
    disks = _Disks(tmp_path, 16 * TIB)
    stop = threading.Event()
    written = [0]

    def write() -> None:
        while not stop.is_set():
            written[0] += 1
            disks.write(0, written[0])
            disks.write(_DISK_COUNT - 1, written[0])

    thread = threading.Thread(target=write)
    thread.start()
    first: set[int] = set()
    last: set[int] = set()
    try:
        for _ in range(60):
            old, _ = disks.cut()
            first |= _grains(old[0], written[0] + 8)
            last |= _grains(old[-1], written[0] + 8)
            assert last <= first, f"{sorted(last - first)} of the last disk alone"
            assert len(first - last) <= 1
    finally:
        stop.set()
        thread.join()
        disks.close()
    assert len(last) > 60, "the guest must have written between the cuts"


@pytest.mark.parametrize(
    "start", [0, 512, live.GRAIN_BYTES - 512, 63 * live.GRAIN_BYTES, live.REGION_BYTES - 1]
)
@pytest.mark.parametrize("length", [1, 512, live.GRAIN_BYTES, live.REGION_BYTES + 1, 9 * live.REGION_BYTES])
def test_mark_sets_each_grain_that_is_touched_and_no_other(start: int, length: int) -> None:
    gate, epoch = live.Gate(), live.Epoch(GIB)
    track = live.Track(gate, epoch, np.zeros(len(epoch.touched), np.uint8), GIB)
    with gate.writing(start, length):
        track.mark(start, length)
    for bitmap, unit in (
        (epoch.dirty, live.GRAIN_BYTES),
        (epoch.unlogged, live.GRAIN_BYTES),
        (epoch.touched, live.REGION_BYTES),
    ):
        found = np.flatnonzero(np.unpackbits(bitmap, bitorder="little"))
        assert found.tolist() == list(range(start // unit, (start + length - 1) // unit + 1))


def test_range_beyond_the_disk_is_an_error_and_not_ignored() -> None:
    gate, epoch = live.Gate(), live.Epoch(GIB)
    track = live.Track(gate, epoch, np.zeros(len(epoch.touched), np.uint8), GIB)
    for start, length in ((GIB, 1), (GIB - 1, 2), (1 << 62, 1 << 62), (-1, 1)):
        with pytest.raises(IndexError):
            track.mark(start, length)
    with pytest.raises(IndexError):
        live.clear_grains(epoch.dirty, 8 * len(epoch.dirty), 1)


def test_regions_that_an_epoch_did_not_touch_are_disarmed() -> None:
    gate, epoch = live.Gate(), live.Epoch(GIB)
    armed = np.zeros(len(epoch.touched), np.uint8)
    armed[0] = 0b111
    track = live.Track(gate, epoch, armed, GIB)
    with gate.writing(live.REGION_BYTES, 1):
        assert track.check(live.REGION_BYTES, 1) is live.TrackStatus.READY
        track.mark(live.REGION_BYTES, 1)
    _, disarmed, _ = live.cut(gate, [track], [live.Epoch(GIB)])
    assert (armed[0], disarmed[0][0]) == (0b010, 0b101)
    assert track.check(0, 1) is live.TrackStatus.ARM
    assert track.check(live.REGION_BYTES, 1) is live.TrackStatus.GUARDED
    track.unguard()
    assert track.check(live.REGION_BYTES, 1) is live.TrackStatus.READY
