"""Power cuts of `hvreplica capture` itself, with its state folder: two calls of replicate make the replica equal again.

The process that the command line starts is recorded under load, with cuts among it. From a sample of the worlds that
come back the VM goes on, with a new capture or without one, against a replica that is as before.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.disk.check import check_disk
from hvreplica.files import OS_FILES
from hvreplica.units import MIB
from tests.replication.sites import Served
from tests.support.capture_scene import FIRST_NUMBER, disk_numbers, fast_folder
from tests.support.command_line import environment
from tests.support.crash import crash_states
from tests.support.nbd_client import SECTOR, Connection, Replies, Workload, content, lost
from tests.support.recorder import build, recording
from tests.support.replay import Note, Recording, lay_out, photograph, read_recording

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.support.memfiles import FaultFiles

VM = "web01"
SIZES = (12 * MIB + 4096, 8 * MIB)
HOT = ((0, 1024), (6000, 9000), (16_000, 16_392))  # in sectors
REQUESTS = 160
WORLDS = 400 if os.environ.get("HVREPLICA_PROFILE") == "deep" else 24


class Site:
    """Two disks of a VM, their state folder, and a replica that holds what they held at first."""

    def __init__(self, folder: Path, tls: Path) -> None:
        self.folder, self.tls = folder, tls
        self.root = folder / "root"
        self.root.mkdir()
        self.state = self.root / "state"
        self.disks = [self.root / "a.vhdx", self.root / "b.raw"]
        self.base: list[NDArray[np.int64]] = []
        for path, size in zip(self.disks, SIZES, strict=True):
            create_disk(OS_FILES, path, virtual_bytes=size, clock=SYSTEM)
            with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
                disk.write(content(1, 0, 700), 0)
                disk.write(content(2, 6500, 300), 6500 * SECTOR)
            self.base.append(disk_numbers(path))
        with self.served() as served, self.capturing():
            for _ in range(2):  # the first cycle is the copy, the second finds nothing left to ask
                hvreplica.replicate(VM, self.disks, to=served.address, tls=tls, state=self.state)
        shutil.copytree(folder / "store", folder / "store.base")

    @contextlib.contextmanager
    def served(self) -> Iterator[Served]:
        server = Served(self.folder / "store", self.tls)
        try:
            yield server
        finally:
            server.close()

    @contextlib.contextmanager
    def capturing(self) -> Iterator[hvreplica.Capture]:
        """Capture in this process."""
        with hvreplica.Capture(VM, self.disks, state=self.state, socket=self.folder / "here.sock") as capture:
            thread = threading.Thread(target=capture.serve_forever)
            thread.start()
            try:
                yield capture
            finally:
                capture.stop()
                thread.join()

    def record(self, library: Path, workload: Workload) -> tuple[Recording, list[Note]]:
        """Run the command line's capture under load; it is killed in the end."""
        before = photograph(self.root)
        place = self.folder / "nbd.sock"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "hvreplica", "capture", "--vm", VM, "--state", self.state),
                *("--socket", place, "--disk", self.disks[0], "--disk", self.disks[1], "--json"),
            ],
            env=environment(**recording(library, trace=self.folder / "trace", roots=[self.root])),
            stdout=subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline(), "it did not begin to serve"
            with contextlib.ExitStack() as stack:
                connections = [(disk, Connection(place, str(disk))) for disk in (0, 1, 0, 1)]
                for _, connection in connections:
                    stack.callback(connection.close)
                cuts = {at: lambda: hvreplica.cut(self.state) for at in (REQUESTS // 4, REQUESTS // 2)}
                workload.run(connections, REQUESTS, at=cuts)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(60)
            assert process.stdout is not None
            process.stdout.close()
        kept = read_recording(self.folder / "trace", before)
        assert kept.differences(photograph(self.root)) == []
        streams: dict[int, Replies] = {}
        notes = []
        for sent in kept.sends:
            if sent.socket not in streams and not sent.data.startswith(b"NBDMAGIC"):
                continue  # the answers to other verbs
            stream = streams.setdefault(sent.socket, Replies(workload.read_bytes))
            found = stream.feed(sent.data)
            notes += [Note(sent.position, "acknowledged", number) for number, error in found if not error]
        assert {note.value for note in notes} == set(workload.requests)
        return kept, notes

    def hold(self, world: FaultFiles, workload: Workload, *, with_capture: bool) -> None:
        """Go on from a world: nothing promised is lost, and two calls make the replica equal."""
        lay_out(world, [self.root])
        shutil.rmtree(self.folder / "store")
        shutil.copytree(self.folder / "store.base", self.folder / "store")
        for index, path in enumerate(self.disks):
            floor = np.maximum(workload.floor(index, world.acknowledged), self.base[index])
            gone = lost(disk_numbers(path), floor, workload.zeroed(index))
            assert not len(gone), f"disk {index}, sector {gone[0]} is lost; {world.story}"
        with self.served() as served, contextlib.ExitStack() as stack:
            if with_capture:
                stack.enter_context(self.capturing())
            for _ in range(2):  # the first call may end with a cut that waited
                hvreplica.replicate(VM, self.disks, to=served.address, tls=self.tls, state=self.state)
            stack.close()
            for index, path in enumerate(self.disks):
                with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
                    held = bytearray(disk.virtual_bytes)
                    disk.read_into(held, 0)
                assert served.content(VM, index) == held, f"disk {index} differs; {world.story}"
                assert check_disk(OS_FILES, path, clock=SYSTEM).status == 0 or not with_capture, world.story


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with fast_folder(tmp_path) as place:
        yield place


def test_replicate_after_any_power_cut_makes_the_replica_equal(
    folder: Path, tmp_path: Path, seed: int
) -> None:
    hvreplica.tls_init(tmp_path / "tls")
    site = Site(folder, tmp_path / "tls")
    workload = Workload(seed, [size // SECTOR for size in SIZES], HOT, first_number=FIRST_NUMBER)
    workload.model = [base.copy() for base in site.base]
    kept, notes = site.record(build(tmp_path), workload)
    worlds = [world for _, world in crash_states(kept.trace(notes), seed=seed, limit=1000)]
    rng = random.Random(seed)
    for number, world in enumerate(rng.sample(worlds, min(WORLDS, len(worlds)))):
        site.hold(world, workload, with_capture=number % 2 == 0)
