"""The second half of the demo: an older point, failovers in both directions, and that nothing was lost.

The same verbs as a user has, with a process that serves each side, on the folders of the first half. The
model of what a disk must hold is a hash of what the guest read from it when a point was made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

import hvreplica
from hvreplica.cli import demo_guest, demo_live, demo_process
from hvreplica.clock import instant_time
from hvreplica.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

VM = "web01"
EVERY_POINT = ("--recovery-points", 24, "--recovery-point-every", 0)
_ACTIVE, _DISK, _STATE = f"{VM}/active/0.vhdx", f"{VM}/disks/0.vhdx", f"{VM}/primary"


class LifeProof(msgspec.Struct, frozen=True):
    """What the failovers left. points_kept: of before them, which are still what they were.

    file_system_sound: e2fsck's word on the older point's ext4; None where there is no ext4 or no tool for it.
    union_bytes, wire_bytes: what the two reversals found to differ, and what they sent for it.
    """

    equal: bool
    file_system_sound: bool | None
    points_kept: int
    union_bytes: int
    wire_bytes: int


class Life:
    """Fails the demo's VM over, back, and over again. One owner.

    tell: shows a step from its beginning to its end, with its name and what is put into the list.
    """

    def __init__(
        self,
        folder: Path,
        guest: demo_guest.Guest,
        tell: Callable[[str, str], AbstractContextManager[list[str]]],
    ) -> None:
        self._folder, self._guest, self._tell = folder, guest, tell
        self._tls = folder / "tls"
        self._replica, self._old = folder / "store", folder / "old-store"
        self._points: dict[str, str] = {}
        self._equal = True
        self._union_bytes = self._wire_bytes = 0

    def run(self, address: str, points: dict[str, str]) -> LifeProof:
        """Run it all. address: of the replica's server; points: hashes by their ids, oldest first."""
        self._points = points
        first = next(iter(points))
        sound = self._open(first)
        with demo_process.serving(self._old, self._tls, self._folder / "old-serve.log") as (old_address, _):
            self._move("planned", self._folder / "state", (self._replica, address), (self._old, old_address))
            state = self._replica / _STATE
            self._move("back", state, (self._old, old_address), (self._replica, address))
        self._lose_primary(first, *self._run_live(address))
        kept = self._count_kept()
        return LifeProof(
            equal=self._equal and sound is not False and kept == len(points),
            file_system_sound=sound,
            points_kept=kept,
            union_bytes=self._union_bytes,
            wire_bytes=self._wire_bytes,
        )

    def _open(self, point: str) -> bool | None:
        """Open the point for a test failover and have its file system checked, where there are tools."""
        with self._tell("opening the older point for a test failover", "test") as said:
            socket = self._folder / "test.sock"
            verb = ("failover", "test", "--store", self._replica, "--vm", VM, "--point", point)
            with demo_process.running((*verb, "--socket", socket), self._folder / "test.log"):
                image = self._folder / "test.img"
                copied = demo_guest.copy_export(socket, image)
                sound = demo_guest.file_system_sound(image) if copied and self._guest.kind == "ext4" else None
                if copied:
                    self._require(image, self._points[point])
                    image.unlink()
            hvreplica.failover_test_cleanup(self._replica, VM)
            words = {True: "e2fsck finds it sound", False: "e2fsck finds it DAMAGED", None: "not checked"}[
                sound
            ]
            said.append(f"point {point} over NBD: {words}")
        return sound

    def _move(self, name: str, state: Path, to: tuple[Path, str], back: tuple[Path, str]) -> None:
        """Move the VM on purpose, let the guest work there, and let the side that it left follow."""
        (there, address), (here, back_address) = to, back
        with self._tell("moving the VM to the other side", name) as said:
            before = self._digest_of_guest()
            self._replicate(state, address, "--prepare-failover")
            hvreplica.failover_planned(there, VM)
            self._require(there / _ACTIVE, before)
            said.append("prepared, shipped, promoted: the VM runs at the other side, and nothing is lost")
        with self._tell("letting the side that it left follow", "reverse") as said:
            demo_guest.change_guest(self._guest, turn=1 if name == "planned" else 2)
            demo_guest.write_changes(self._guest.image, there / _ACTIVE)
            hvreplica.store_adopt(here, VM, state=state)
            answer = hvreplica.failover_reverse(there, VM, to=back_address, tls=self._tls)
            self._require(here / _DISK, self._digest_of_guest())
            union_bytes, wire_bytes = answer.union_bytes or 0, answer.wire_bytes
            self._union_bytes += union_bytes
            self._wire_bytes += wire_bytes
            said.append(f"{format_size(union_bytes)} differ and were sent as {format_size(wire_bytes)}")

    def _run_live(self, address: str) -> tuple[str, str]:
        """Let the VM run on capture, and work before and after an instant between two cycles; return that.

        With it a hash of what the guest's disk held then.
        """
        with self._tell("letting the VM run on capture", "live") as said:
            state, socket, image = self._old / _STATE, self._folder / "live.sock", self._guest.image
            verb = ("capture", "--vm", VM, "--state", state, "--socket", socket, "--keep-logs", "1h")
            with demo_process.running(verb, self._folder / "capture.log"):
                self._replicate(state, address)
                demo_guest.change_guest(self._guest, turn=3)
                demo_live.write_live(image, socket)
                instant, held = instant_time(demo_live.let_second_end()), self._digest_of_guest()
                demo_guest.change_guest(self._guest, turn=4)
                demo_live.write_live(image, socket)
                self._replicate(state, address)
            said.append(f"it wrote before and after {instant}, between two cycles")
        return instant, held

    def _lose_primary(self, point: str, instant: str, held: str) -> None:
        """Bring the replica up as the VM was at the instant, then as it was at the first copy instead."""
        with self._tell("losing the primary", "lost") as said:
            hvreplica.failover_unplanned(self._replica, VM, point=instant)
            self._require(self._replica / _ACTIVE, held)
            hvreplica.failover_cancel(self._replica, VM, point=point)
            self._require(self._replica / _ACTIVE, self._points[point])
            hvreplica.failover_commit(self._replica, VM)
            said.append(f"ran from {instant}, then from point {point}, and stays there")

    def _count_kept(self) -> int:
        """Return how many points of before the failovers are still what they were."""
        with self._tell("exporting the points of before again", "points") as said:
            kept = 0
            for number, (point, wanted) in enumerate(self._points.items()):
                copy = self._folder / f"point-{number}.vhdx"
                hvreplica.point_export(self._replica, VM, copy, point=point)
                kept += demo_guest.data_digest(copy) == wanted
            listed = len(hvreplica.point_list(self._replica, VM))
            said.append(
                f"{kept} of {len(self._points)} of before the failovers are what they were; {listed} listed"
            )
        return kept

    def _digest_of_guest(self) -> str:
        return demo_guest.data_digest(self._guest.image)

    def _require(self, disk: Path, wanted: str) -> None:
        self._equal = self._equal and demo_guest.data_digest(disk) == wanted

    def _replicate(self, state: Path, address: str, *options: object) -> None:
        link = ("--to", address, "--tls", self._tls)
        demo_process.ask("replicate", "--vm", VM, "--state", state, *link, "--once", *options)
