"""The way back between real processes: 64 GiB of sparse disk, small writes on each side, both directions."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES
from tests.support.command_line import Running, ask_verb, run_verb

if TYPE_CHECKING:
    import random
    from pathlib import Path

MIB, GIB = 1 << 20, 1 << 30
DISK_BYTES = 64 * GIB
PIECE_BYTES = 64 << 10
VM = ("--vm", "web01")


class Written:
    """What was written to a sparse disk; the rest of it is zeros."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.pieces: dict[int, bytes] = {}

    def write(self, path: Path, count: int) -> None:
        """Write pieces at random places, half of them where something was written before."""
        with contextlib.closing(open_disk(OS_FILES, path, writable=True, clock=SYSTEM)) as disk:
            for number in range(count):
                at = self.rng.randrange(DISK_BYTES // PIECE_BYTES) * PIECE_BYTES
                if number % 2 and self.pieces:
                    at = self.rng.choice(sorted(self.pieces))
                self.pieces[at] = self.rng.randbytes(PIECE_BYTES)
                disk.write(self.pieces[at], at)
            disk.flush()

    def is_in(self, path: Path) -> bool:
        """Return whether the disk at `path` holds that and nothing else."""
        with contextlib.closing(open_disk(OS_FILES, path, clock=SYSTEM)) as disk:
            buffer = bytearray(PIECE_BYTES)
            for start, length in disk.extents(0, DISK_BYTES).tolist():
                first = start // PIECE_BYTES * PIECE_BYTES
                for at in range(first, start + length, PIECE_BYTES):
                    disk.read_into(buffer, at)
                    if bytes(buffer) != self.pieces.get(at, bytes(PIECE_BYTES)):
                        return False
            for at, piece in self.pieces.items():
                disk.read_into(buffer, at)
                if bytes(buffer) != piece:
                    return False
        return True


def test_union_of_both_sides_travels_in_either_direction(
    tmp_path: Path, tls: Path, rng: random.Random
) -> None:
    disk, state = tmp_path / "web01.vhdx", tmp_path / "state"
    store_a, store_b = tmp_path / "a", tmp_path / "b"
    hvreplica.disk_create(disk, DISK_BYTES)
    guest = Written(rng)
    guest.write(disk, 40)
    with served(store_b, tls) as at_b:
        cycle(at_b, state, tls, "--disk", disk)
        pieces = dict(guest.pieces)
        guest.write(disk, 60)  # which the replica never sees
        guest.pieces = pieces
        ask_verb("failover", "unplanned", "--store", store_b, *VM)
        active_b = store_b / "web01/active/0.vhdx"
        guest.write(active_b, 60)
        refused = run_verb(
            *("replicate", *VM, "--state", state, "--to", at_b, "--tls", tls, "--once", "--json")
        )
        assert refused.code == 56, "the old primary is fenced"
        assert "failed over" in refused.error["message"]

        adopted = ask_verb("store", "adopt", "--store", store_a, *VM, "--state", state)
        assert adopted["changed_bytes"] <= 60 * PIECE_BYTES
        with served(store_a, tls) as at_a:
            reverse_and_check(store_b, at_a, tls, piece_count=120)
            assert guest.is_in(store_a / "web01/disks/0.vhdx")

            guest.write(active_b, 20)
            primary_b = store_b / "web01/primary"
            answer = cycle(at_a, primary_b, tls, "--prepare-failover")
            assert answer["prepared"]
            assert run_verb("replicate", *VM, "--state", primary_b, "--to", at_a, "--tls", tls,
                            "--once", "--json").code == 61  # fmt: skip
            ask_verb("failover", "planned", "--store", store_a, *VM)
            active_a = store_a / "web01/active/0.vhdx"
            assert guest.is_in(active_a), "a planned failover loses nothing"
            guest.write(active_a, 60)
            adopted = ask_verb("store", "adopt", "--store", store_b, *VM, "--state", primary_b)
            assert adopted["changed_bytes"] == 0
            reverse_and_check(store_a, at_b, tls, piece_count=60)
            assert guest.is_in(store_b / "web01/disks/0.vhdx")


def reverse_and_check(store: Path, address: str, tls: Path, *, piece_count: int) -> None:
    """Reverse, and hold what travels to at most 1.1 times of what either side wrote."""
    answer = ask_verb("failover", "reverse", "--store", store, *VM, "--to", address, "--tls", tls)
    assert answer["compared"] == []
    assert 0 < answer["union_bytes"] <= piece_count * PIECE_BYTES
    assert answer["wire_bytes"] <= 1.1 * answer["union_bytes"]
    again = ask_verb("failover", "reverse", "--store", store, *VM, "--to", address, "--tls", tls)
    assert (again["kind"], again["point"]) == ("none", answer["point"])


def cycle(address: str, state: Path, tls: Path, *options: object) -> Any:
    """Run one cycle."""
    link = ("--to", address, "--tls", tls)
    return ask_verb("replicate", *VM, "--state", state, *link, "--once", *options)


@contextlib.contextmanager
def served(store: Path, tls: Path) -> Any:
    """Serve a store in a process; yield its address."""
    with Running("serve", "--store", store, "--listen", "127.0.0.1:0", "--tls", tls, "--json") as server:
        ready = server.ready
        yield ready["address"] if "address" in ready else f"{ready['host']}:{ready['port']}"
        server.end()
