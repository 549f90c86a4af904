"""A VM whose disks are modelled: a file system that e2fsprogs writes, and a disk of scattered bytes."""

from __future__ import annotations

import contextlib
import math
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import hvreplica
from hvreplica.cli.demo_guest import write_changes
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES
from tests.support.command_line import Running, ask_verb
from tests.support.live_client import SocketGuest
from tests.support.tools import run_tool

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MIB = 1 << 20
VM = ("--vm", "web01")
SYSTEM_BYTES, DATA_BYTES = 12 * MIB, 3 * MIB
FILE_BYTES = 24 << 10
PAGE_BYTES = 4096


class Content(NamedTuple):
    """What both disks hold at an instant, and which files are on the first one."""

    disks: tuple[bytes, ...]
    files: tuple[str, ...]


class ModelVM:
    """Two models that change, and whichever disks the VM runs on, which are made to follow."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self._folder, self._rng = folder, rng
        self._images = [folder / "system.img", folder / "data.img"]
        self._files: tuple[str, ...] = ()
        self._guests: Sequence[SocketGuest] = ()
        self._images[0].write_bytes(bytes(SYSTEM_BYTES))
        run_tool("mkfs.ext4", "-q", "-F", "-O", "^has_journal", self._images[0])
        self._images[1].write_bytes(rng.randbytes(DATA_BYTES // 2) + bytes(DATA_BYTES // 2))
        self.disks = [folder / "web01.vhdx", folder / "data.vhdx"]
        for path, size_bytes in zip(self.disks, (SYSTEM_BYTES, DATA_BYTES), strict=True):
            hvreplica.disk_create(path, size_bytes, block_bytes=MIB)

    @property
    def content(self) -> Content:
        """What it holds now."""
        return Content(tuple(image.read_bytes() for image in self._images), self._files)

    def start(self, content: Content, disks: Sequence[Path]) -> None:
        """Run on these disks from now on, which hold `content` or will when `work` has run."""
        for image, data in zip(self._images, content.disks, strict=True):
            image.write_bytes(data)
        self._files, self.disks = content.files, list(disks)

    @contextlib.contextmanager
    def served(self, socket: Path) -> Iterator[None]:
        """Write through a server's exports instead of to the disks, in order and flushed, for as long."""
        with contextlib.ExitStack() as stack:
            self._guests = [
                stack.enter_context(SocketGuest(socket, str(index))) for index in range(len(self._images))
            ]
            stack.callback(setattr, self, "_guests", ())
            yield

    def work(self, name: str) -> Content:
        """Write a new file, remove an old one, scatter some bytes; return what it holds then."""
        source, commands = self._folder / name, self._folder / "commands"
        before = self.content
        source.write_bytes(self._rng.randbytes(FILE_BYTES))
        removed = self._files[:-2]
        lines = [*(f"rm /{old}" for old in removed), f"write {source} {name}"]
        commands.write_text("\n".join(lines) + "\n", encoding="ascii")
        run_tool("debugfs", "-w", "-f", commands, self._images[0])
        self._files = (*self._files[len(removed) :], name)
        with self._images[1].open("r+b") as data:
            for _ in range(12):
                data.seek(self._rng.randrange((DATA_BYTES - 4096) // 512) * 512)
                data.write(self._rng.randbytes(4096))
        if self._guests:
            for guest, old, new in zip(self._guests, before.disks, self.content.disks, strict=True):
                write_as_guest(guest, old, new)
        else:
            for image, disk in zip(self._images, self.disks, strict=True):
                write_changes(image, disk)
        return self.content


def write_as_guest(guest: SocketGuest, old: bytes, new: bytes) -> None:
    """Write what differs, one page after the other; it is durable on return."""
    for offset in range(0, len(new), PAGE_BYTES):
        page = new[offset : offset + PAGE_BYTES]
        if page != old[offset : offset + PAGE_BYTES]:
            guest.write(offset, page)
    guest.flush()


def let_second_end() -> float:
    """Wait until the second that it is has passed, for whatever is written next; return the one that passed."""
    second = math.floor(SYSTEM.now_s())
    while SYSTEM.now_s() < second + 1:
        threading.Event().wait(second + 1 - SYSTEM.now_s())
    return float(second)


class Site(NamedTuple):
    """A store, served by a process: where that listens, with the certificates of all."""

    store: Path
    address: str
    tls: Path

    @property
    def link(self) -> tuple[object, ...]:
        """The options that lead here."""
        return ("--to", self.address, "--tls", self.tls)

    @property
    def active(self) -> list[Path]:
        """The disks from which the VM runs here after a failover."""
        return [self.store / "web01/active" / f"{index}.vhdx" for index in range(2)]

    @property
    def primary(self) -> Path:
        """The state folder that a reversal makes here."""
        return self.store / "web01/primary"

    def ask(self, verb: str, *options: object) -> Any:
        """Run a verb of the store, such as "failover status"; return its answer."""
        return ask_verb(*verb.split(), "--store", self.store, *VM, *options)

    def require(self, points: dict[str, Content]) -> None:
        """Fail the test unless each of these points is listed, complete, and holds what it should."""
        listed = {point.id: point.state for point in hvreplica.point_list(self.store, VM[1])}
        copy = self.store.parent / "copy.raw"
        for number, (point, content) in enumerate(points.items()):
            assert listed.get(point) == "complete", f"point {number}, {point}, of {listed}"
            for index, wanted in enumerate(content.disks):
                hvreplica.point_export(
                    self.store, VM[1], copy, point=point, disk=index, format="raw", overwrite=True
                )
                assert copy.read_bytes() == wanted, f"disk {index} of point {number}, {point}"


@contextlib.contextmanager
def served_site(store: Path, tls: Path) -> Iterator[Site]:
    """Serve a store in a process of its own, which must end cleanly."""
    with Running("serve", "--store", store, "--listen", "127.0.0.1:0", "--tls", tls, "--json") as server:
        yield Site(store, server.ready["address"], tls)
        code, errors = server.end()
        assert (code, "Traceback" in errors) == (0, False), errors


def require_content(disks: Sequence[Path], content: Content) -> None:
    """Fail the test unless the disks, opened with their parents, hold what they should."""
    for index, (path, wanted) in enumerate(zip(disks, content.disks, strict=True)):
        with contextlib.closing(open_disk(OS_FILES, path, clock=SYSTEM)) as disk:
            found = bytearray(disk.virtual_bytes)
            disk.read_into(found, 0)
        assert found == wanted, f"disk {index}, {path}"


def require_sound(image: Path, files: Sequence[str]) -> None:
    """Fail the test unless the image is a clean file system with these files and no other of ours."""
    run_tool("e2fsck", "-f", "-n", image)
    listed = run_tool("debugfs", "-R", "ls -p /", image).stdout
    names = [line.split("/")[5] for line in listed.splitlines() if line.startswith("/")]
    assert sorted(set(names) - {".", "..", "lost+found"}) == sorted(files)
