"""The demo's story: a guest, its replica, a first copy, a delta, nothing, the proof; failovers."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

import hvreplica
from hvreplica.cli import demo_guest, demo_process
from hvreplica.cli.demo_life import EVERY_POINT, VM, Life, LifeProof
from hvreplica.cli.exit import Unequal
from hvreplica.clock import SYSTEM
from hvreplica.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.cli.render import Steps

_WORDS = {
    "initial": "replicating the whole disk",
    "delta": "finding and shipping what changed",
    "none": "looking again",
}


class Step(msgspec.Struct, frozen=True):
    """One replicate run. on_disk_bytes: room that the primary's disk takes. changed_bytes: guest bytes."""

    name: str
    kind: str
    on_disk_bytes: int
    changed_bytes: int
    wire_bytes: int
    seconds: float
    point: str


class Proof(msgspec.Struct, frozen=True):
    """What shows both sides equal. qemu_img_identical: None where there is no qemu-img."""

    primary_sha256: str
    replica_sha256: str
    qemu_img_identical: bool | None

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return self.primary_sha256 == self.replica_sha256 and self.qemu_img_identical is not False


class DemoResult(msgspec.Struct, frozen=True):
    """The whole demo. folder: where its files were kept, or None."""

    equal: bool
    size_bytes: int
    guest: str
    guest_files: int
    guest_data_bytes: int
    guest_change: str
    guest_changed_bytes: int
    steps: list[Step]
    proof: Proof
    life: LifeProof
    seconds: float
    folder: str | None


class Story:
    """Runs the demo in a folder, telling each step as it is done. One owner."""

    def __init__(self, folder: Path, size_bytes: int, steps: Steps) -> None:
        self._folder = folder
        self._size_bytes = size_bytes
        self._shown = steps
        self._disk = folder / f"{VM}.vhdx"
        self._steps: list[Step] = []
        self._since_s = SYSTEM.monotonic_s()

    def run(self, *, kept: bool) -> DemoResult:
        """Run it all. Raises: Unequal if a step did something else than it should have."""
        start_s = SYSTEM.monotonic_s()
        guest = self._make_guest()
        self._begin("making certificates and starting the replica's server")
        tls = self._folder / "tls"
        hvreplica.tls_init(tls)
        with demo_process.serving(self._folder / "store", tls, self._folder / "serve.log") as (
            address,
            process_id,
        ):
            self._done("replica", f"serve listens on {address}, a process of its own ({process_id})")
            self._replicate("initial", address)
            before = demo_guest.data_digest(self._disk)
            words, changed_bytes = self._change(guest)
            self._replicate("delta", address)
            self._replicate("none", address)
            proof = self._prove()
            digests = (before, demo_guest.data_digest(self._disk))
            points = {step.point: held for step, held in zip(self._steps[:2], digests, strict=True)}
            life = Life(self._folder, guest, self._tell).run(address, points)
        return DemoResult(
            equal=proof.equal and life.equal,
            size_bytes=self._size_bytes,
            guest=guest.kind,
            guest_files=len(guest.files),
            guest_data_bytes=guest.data_bytes,
            guest_change=words,
            guest_changed_bytes=changed_bytes,
            steps=self._steps,
            proof=proof,
            life=life,
            seconds=SYSTEM.monotonic_s() - start_s,
            folder=os.fspath(self._folder) if kept else None,
        )

    def _make_guest(self) -> demo_guest.Guest:
        self._begin("installing the guest")
        guest = demo_guest.make_guest(self._folder / f"{VM}.img", self._size_bytes)
        self._done(
            "guest",
            f"{format_size(self._size_bytes)} of {guest.kind} with {len(guest.files)} real files"
            f" ({format_size(guest.data_bytes)})",
        )
        self._begin("putting it into a VHDX")
        hvreplica.disk_convert(guest.image, self._disk, format="vhdx", type="dynamic")
        self._done("disk", f"the same as a dynamic VHDX: {format_size(allocated_bytes(self._disk))} on disk")
        return guest

    def _replicate(self, kind: str, address: str) -> None:
        self._begin(_WORDS[kind])
        folder = self._folder
        answer = demo_process.ask(
            "replicate",
            *("--vm", VM, "--disk", self._disk, "--to", address, "--once", *EVERY_POINT),
            *("--tls", folder / "tls", "--state", folder / "state"),
        )
        step = Step(
            name=kind,
            kind=answer["kind"],
            on_disk_bytes=allocated_bytes(self._disk),
            changed_bytes=sum(disk["changed_bytes"] for disk in answer["disks"]),
            wire_bytes=answer["wire_bytes"],
            seconds=answer["seconds"],
            point=answer["point"],
        )
        self._steps.append(step)
        if step.kind != kind:
            raise Unequal(
                "replicate did something else than the demo expects",
                field="kind",
                expected=kind,
                actual=step.kind,
            )
        self._done(kind, _step_words(step, answer["logs"]))

    def _change(self, guest: demo_guest.Guest) -> tuple[str, int]:
        self._begin("letting the guest work")
        words = demo_guest.change_guest(guest)
        changed_bytes = demo_guest.write_changes(guest.image, self._disk)
        grains = changed_bytes // demo_guest.GRAIN_BYTES
        self._done("change", f"the guest {words}: {grains} blocks of 4 KiB")
        return words, changed_bytes

    def _prove(self) -> Proof:
        """Export the newest point and compare: all bytes that a guest reads, by hash and by qemu-img."""
        self._begin("exporting the newest point")
        exported = self._folder / "export.vhdx"
        store = self._folder / "store"
        hvreplica.point_export(store, VM, exported)
        self._done("export", f"point {self._steps[-1].point} as a VHDX of its own: {exported.name}")
        self._begin("comparing every byte of both sides")
        with ThreadPoolExecutor(2) as pool:
            primary, replica = pool.map(demo_guest.digest, (self._disk, exported))
        identical = demo_guest.images_identical(self._disk, exported)
        proof = Proof(primary_sha256=primary, replica_sha256=replica, qemu_img_identical=identical)
        self._done(
            "proof",
            "both sides hashed" if identical is None else "both sides hashed, and compared by qemu-img",
        )
        return proof

    @contextlib.contextmanager
    def _tell(self, begin: str, name: str) -> Iterator[list[str]]:
        """Show a step from its beginning to its end, when the list must hold what to say of it."""
        self._begin(begin)
        said: list[str] = []
        yield said
        self._done(name, said[0])

    def _begin(self, words: str) -> None:
        self._shown.begin(words)
        self._since_s = SYSTEM.monotonic_s()

    def _done(self, name: str, words: str) -> None:
        self._shown.done(name, words, SYSTEM.monotonic_s() - self._since_s)


def allocated_bytes(path: Path) -> int:
    """Return the room that a file takes on its file system; holes take none."""
    return path.stat().st_blocks * 512


def _step_words(step: Step, logs: list[dict[str, str]]) -> str:
    if step.kind == "none":
        return "nothing changed, nothing shipped"
    words = f"{format_size(step.changed_bytes)} shipped as {format_size(step.wire_bytes)}"
    names = ", ".join(os.path.basename(log["path"]) for log in logs)
    return f"{words} in {names}" if names else words
