"""Many threads on one VHDX: allocation, zeroing and listing of disjoint ranges at once lose nothing."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from typing import TYPE_CHECKING

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.files import OS_FILES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 1 << 20
DISK_BYTES = 2 << 30


def run_at_once(*works: Callable[[], None]) -> None:
    """Run each in a thread of its own and raise the first thing that one of them raised."""
    raised: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def test_writes_zeroes_and_extents_at_once_give_the_model(tmp_path: Path, seed: int) -> None:
    """One thread fills the even blocks, one writes and zeroes the odd ones, one lists and flushes all."""
    path = tmp_path / "a.vhdx"
    create_disk(OS_FILES, path, virtual_bytes=DISK_BYTES, block_bytes=MIB, clock=SYSTEM)
    rng = random.Random(seed)
    piece = rng.randbytes(4096)
    count = DISK_BYTES // (2 * MIB)
    with contextlib.closing(open_disk(OS_FILES, path, writable=True, clock=SYSTEM)) as disk:

        def fill() -> None:
            for index in range(count):
                disk.write(piece, 2 * index * MIB)

        def churn() -> None:
            for index in range(count):
                disk.write(piece, (2 * index + 1) * MIB + 8192)
                disk.write_zeroes((2 * index + 1) * MIB, MIB)

        def look() -> None:
            for _ in range(200):
                disk.extents(0, DISK_BYTES)
                disk.flush()

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)  # threads change places wherever they can
        try:
            run_at_once(fill, churn, look, look)
        finally:
            sys.setswitchinterval(interval)
        disk.flush()
    with contextlib.closing(open_disk(OS_FILES, path, clock=SYSTEM)) as disk:
        for index in rng.sample(range(count), 200):
            content = bytearray(2 * MIB)
            disk.read_into(content, 2 * index * MIB)
            assert content[:4096] == piece
            assert not any(content[4096:])
