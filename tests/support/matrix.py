"""Disk images made on the fly, with the truth beside them: what was written, kept apart from any reader.

Every written sector says which write it came from and which sector it is, so that one in a wrong place shows.
`QEMU_MADE` are recipes for qemu-img and qemu-io; `OURS` for our own create and write, chains of parents
included.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.files import OS_FILES
from hvreplica.units import GIB, KIB, MIB, TIB
from tests.support.images import Content, digest_ranges, ranges_to_ask
from tests.support.readers import Facts
from tests.support.sparse import SparseBytes
from tests.support.tools import run_tool

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.images import Range

SECTOR_BYTES = 512
Write = tuple[int, int, str]  # offset, length, tag; ZERO writes zeros, DISCARD gives the range back
ZERO, DISCARD = "=zero", "=discard"
Kind = Literal["dynamic", "fixed", "differencing"]


class Truth:
    """What a guest has written: bytes in memory, holes free."""

    def __init__(self, virtual_bytes: int, below: Truth | None = None) -> None:
        self.virtual_bytes = virtual_bytes
        self._bytes: SparseBytes = SparseBytes() if below is None else below._bytes.copy()
        self._bytes.resize(virtual_bytes)

    def apply(self, write: Write) -> bytes | None:
        """Take in a write; return its bytes, or None for zeros."""
        offset, length, tag = write
        if tag in {ZERO, DISCARD}:
            self._bytes.zero(offset, offset + length)
            return None
        octets = pattern(offset, length, tag)
        self._bytes.write(memoryview(octets), offset)
        return octets

    def read(self, offset: int, length: int) -> bytearray:
        """Return guest bytes."""
        buffer = bytearray(length)
        self._bytes.read_into(memoryview(buffer), offset)
        return buffer

    def ranges(self) -> list[Range]:
        """Return what may not be zero."""
        return list(self._bytes.extents(0, self.virtual_bytes))

    def content(self) -> Content:
        """Return what every right reader sees."""
        return Content(self.virtual_bytes, digest_ranges(self.read, self.ranges(), self.virtual_bytes))

    def to_ask(self) -> list[Range]:
        """Return what to ask of a reader that knows of no holes."""
        return ranges_to_ask(self.ranges(), self.virtual_bytes)

    def write_raw(self, path: Path) -> Path:
        """Write a raw disk with holes."""
        with path.open("xb") as file:
            for offset, length in self.ranges():
                file.seek(offset)
                file.write(self.read(offset, length))
            file.truncate(self.virtual_bytes)
        return path


def pattern(offset: int, length: int, tag: str) -> bytes:
    """Return sectors that each repeat the tag and their own number 32 times."""
    assert offset % SECTOR_BYTES == length % SECTOR_BYTES == 0
    words = np.empty((length // SECTOR_BYTES, 32, 2), "<u8")
    words[:, :, 0] = int.from_bytes(tag.encode()[:8], "little")
    words[:, :, 1] = (np.arange(length // SECTOR_BYTES, dtype=np.uint64) + offset // SECTOR_BYTES)[:, None]
    return words.tobytes()


@dataclass(frozen=True, slots=True)
class Made:
    """An image, what it is, and what it holds."""

    path: Path
    facts: Facts
    truth: Truth


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuRecipe:
    """How qemu makes an image: `writes` before the conversion from raw, `later` by qemu-io, the last one cut off."""

    name: str
    size: int
    options: str = ""
    writes: tuple[Write, ...] = ()
    later: tuple[Write, ...] = ()
    cut_bat_page: int | None = None  # the update of this page of the BAT stands in the log only
    type: Kind = "dynamic"

    @property
    def format(self) -> str:
        """By the name."""
        return self.name.rpartition(".")[2]

    def make(self, folder: Path) -> Made:
        """Make the image in an empty folder."""
        path, driver = folder / self.name, "vpc" if self.format == "vhd" else "vhdx"
        options = ["-o", self.options] if self.options else []
        truth = Truth(self.size)
        if self.writes:
            for write in self.writes:
                truth.apply(write)
            raw = truth.write_raw(folder / "source.raw")
            run_tool("qemu-img", "convert", "-f", "raw", "-O", driver, *options, raw, path)
            raw.unlink()
        else:
            run_tool("qemu-img", "create", "-f", driver, *options, path, str(self.size))
        self._write_later(path, driver, truth)
        if self.format == "vhd":
            truth = Truth(
                footer_bytes(path), truth
            )  # qemu rounds up to a product of cylinders, heads and sectors
        facts = Facts(
            format=self.format,
            type=self.type,
            virtual_bytes=truth.virtual_bytes,
            dirty=self.cut_bat_page is not None,
        )
        return Made(path, facts, truth)

    def _write_later(self, path: Path, driver: str, truth: Truth) -> None:
        commands: list[str] = []
        for index, write in enumerate(self.later):
            octets, (offset, length, tag) = truth.apply(write), write
            if octets is None:
                commands += ["-c", f"{'discard' if tag == DISCARD else 'write -z'} {offset} {length}"]
            else:
                piece = path.with_name(f"{index}.piece")
                piece.write_bytes(octets)
                commands += ["-c", f"write -s {piece} {offset} {length}"]
        if not commands:
            return
        if self.cut_bat_page is None:
            run_tool("qemu-io", "-f", driver, *commands, path)
        else:
            image = failing_image(path, bat_offset(path) + 4096 * self.cut_bat_page)
            done = run_tool("qemu-io", "--image-opts", image, *commands, expected=(0, 1))
            assert "Input/output error" in done.stdout + done.stderr, "the write was not cut off"
        for piece in path.parent.glob("*.piece"):
            piece.unlink()


def footer_bytes(path: Path) -> int:
    """Return the current size in the footer at the end of a VHD. Spec: VHD 1.0, Hard Disk Footer Format."""
    with path.open("rb") as file:
        file.seek(-512, os.SEEK_END)
        footer = file.read()
    assert footer.startswith(b"conectix")
    return int.from_bytes(footer[48:56], "big")


def bat_offset(path: Path) -> int:
    """Return where a VHDX's BAT stands, from the first region table. Spec: [MS-VHDX] 2.2.3.2."""
    with path.open("rb") as file:
        file.seek(192 * KIB)
        table = file.read(64 * KIB)
    at = table.index(bytes.fromhex("6677c22d23f600429d64115e9bfd4a08"))
    return int.from_bytes(table[at + 16 : at + 24], "little")


def failing_image(path: Path, offset: int) -> str:
    """Return how qemu opens a VHDX in which writes to the sector at `offset` fail, as at a power cut."""
    return json_image(
        {
            "driver": "vhdx",
            "file": {
                "driver": "blkdebug",
                "image": {"driver": "file", "filename": os.fspath(path)},
                "inject-error": [
                    {
                        "event": "none",
                        "iotype": "write",
                        "sector": offset // 512,
                        "errno": 5,
                        "immediately": False,
                    }
                ],
            },
        }
    )


def json_image(options: dict[str, Any]) -> str:
    """Return qemu's dotted form of nested options."""

    def flat(value: Any, prefix: str) -> list[str]:
        if isinstance(value, dict):
            return [part for key, each in value.items() for part in flat(each, f"{prefix}.{key}".strip("."))]
        if isinstance(value, list):
            return [part for index, each in enumerate(value) for part in flat(each, f"{prefix}.{index}")]
        text = {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
        return [f"{prefix}={text.replace(',', ',,')}"]

    return ",".join(flat(options, ""))


def _shuffled(tag: str, *places_mib: int, length: int) -> tuple[Write, ...]:
    return tuple((place * MIB, length, f"{tag}{place}") for place in places_mib)


ODD = 10 * MIB + 3584
CHS_MAX_BYTES = 65535 * 16 * 255 * 512
_PRE = _shuffled("pre", 10, 20, length=MIB)

QEMU_MADE = (
    QemuRecipe(
        name="dyn-1m.vhdx",
        size=ODD,
        options="subformat=dynamic,block_size=1M",
        writes=((0, 4096, "A"), (MIB - 4096, 8192, "B"), (3 * MIB, MIB, "C"), (10 * MIB, 3584, "TAIL")),
    ),
    QemuRecipe(
        name="dyn-2m.vhdx",
        size=33 * MIB + 512,
        options="block_size=2M",
        writes=((2 * MIB - 512, 1024, "A"), (7 * MIB, 5 * MIB, "B"), (33 * MIB, 512, "LAST")),
    ),
    QemuRecipe(
        name="dyn-32m-odd.vhdx",
        size=100 * MIB + 4096,
        options="block_size=32M",
        writes=((0, 512, "A"), (32 * MIB - 512, 1024, "B"), (100 * MIB, 4096, "TAIL")),
    ),
    QemuRecipe(
        name="dyn-256m.vhdx",
        size=300 * MIB,
        options="block_size=256M",
        writes=((0, 65536, "A"), (256 * MIB, 65536, "B"), (300 * MIB - 512, 512, "LAST")),
    ),
    QemuRecipe(name="default.vhdx", size=24 * MIB, writes=_shuffled("D", 1, 23, length=MIB)),
    QemuRecipe(
        name="fixed.vhdx",
        size=9 * MIB + 512,
        options="subformat=fixed,block_size=1M",
        writes=((0, MIB, "A"), (9 * MIB, 512, "LAST")),
        type="fixed",
    ),
    QemuRecipe(
        name="zero-off.vhdx",
        size=16 * MIB,
        options="block_size=1M,block_state_zero=off",
        writes=((5 * MIB, 3 * MIB, "A"),),
    ),
    QemuRecipe(
        name="zero-on.vhdx",
        size=16 * MIB,
        options="block_size=1M,block_state_zero=on",
        writes=((5 * MIB, 3 * MIB, "A"),),
        later=((6 * MIB, MIB, ZERO), (12 * MIB, 2 * MIB, ZERO)),
    ),
    QemuRecipe(
        name="biglog.vhdx", size=8 * MIB, options="block_size=1M,log_size=16M", writes=((0, 2 * MIB, "A"),)
    ),
    QemuRecipe(
        name="chunk-1m.vhdx",
        size=5 * GIB,
        options="block_size=1M",
        writes=((0, 4096, "A"), (4 * GIB - 4096, 8192, "EDGE"), (5 * GIB - 4096, 4096, "LAST")),
    ),
    QemuRecipe(
        name="chunk-256m.vhdx",
        size=5 * GIB,
        options="block_size=256M",
        writes=((4 * GIB - 4096, 8192, "EDGE"),),
    ),
    QemuRecipe(
        name="64t.vhdx",
        size=64 * TIB,
        options="block_size=256M",
        later=((64 * TIB - 4096, 4096, "LAST"),),
    ),
    QemuRecipe(name="empty.vhdx", size=40 * MIB, options="block_size=2M"),
    QemuRecipe(
        name="shuffle.vhdx",
        size=64 * MIB,
        options="block_size=1M",
        later=(*_shuffled("s", 60, 3, 61, 0, 17, 2, 33, 1, length=512 * KIB), (17 * MIB + 512, 1536, "mid")),
    ),
    QemuRecipe(
        name="discard.vhdx",
        size=16 * MIB,
        options="block_size=1M",
        writes=((0, 8 * MIB, "A"),),
        later=((2 * MIB, 2 * MIB, ZERO), (4 * MIB + 512, 1024, ZERO), (4 * MIB + 1024, 512, "again")),
    ),
    QemuRecipe(
        name="dirty.vhdx",
        size=16 * MIB,
        options="block_size=1M",
        later=((4 * MIB, 512 * KIB, "DIRTY"),),
        cut_bat_page=0,
    ),
    QemuRecipe(
        name="dirty-after-stale.vhdx",
        size=GIB,
        options="block_size=1M,log_size=4M",
        later=(*_PRE, (600 * MIB, 512 * KIB, "DIRTY")),
        cut_bat_page=1,
    ),
    QemuRecipe(
        name="dyn-chs.vhd",
        size=40 * MIB,
        options="subformat=dynamic",
        writes=((0, 4096, "A"), (2 * MIB, 512, "B"), (40 * MIB - 512, 512, "LAST")),
    ),
    QemuRecipe(
        name="dyn-force.vhd",
        size=40 * MIB,
        options="subformat=dynamic,force_size=on",
        writes=((0, 4096, "A"), (2 * MIB, 512, "B"), (40 * MIB - 512, 512, "LAST")),
    ),
    QemuRecipe(
        name="dyn-force-odd.vhd",
        size=ODD,
        options="subformat=dynamic,force_size=on",
        writes=((0, 4096, "A"), (10 * MIB, 3584, "TAIL")),
    ),
    QemuRecipe(
        name="fixed-chs.vhd",
        size=5 * MIB + 512,
        options="subformat=fixed",
        writes=((0, 4096, "A"), (5 * MIB, 512, "LAST")),
        type="fixed",
    ),
    QemuRecipe(
        name="fixed-force.vhd",
        size=5 * MIB + 512,
        options="subformat=fixed,force_size=on",
        writes=((0, 4096, "A"), (5 * MIB, 512, "LAST")),
        type="fixed",
    ),
    QemuRecipe(name="empty.vhd", size=40 * MIB, options="force_size=on"),
    QemuRecipe(
        name="shuffle.vhd",
        size=64 * MIB,
        options="force_size=on",
        later=(
            *_shuffled("s", 60, 4, 62, 0, 18, 2, length=65536),
            (18 * MIB + 512, 1536, "mid"),
            (4 * MIB, 4096, ZERO),
        ),
    ),
    QemuRecipe(
        name="over-chs.vhd",
        size=128 * GIB,
        options="force_size=on",
        later=((CHS_MAX_BYTES, 4096, "OVER"), (128 * GIB - 4096, 4096, "LAST")),
    ),
    QemuRecipe(
        name="2040g.vhd",
        size=2040 * GIB,
        options="force_size=on",
        later=((2040 * GIB - 4096, 4096, "LAST"),),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OurRecipe:
    """How we make an image: `writes` in their order, a flush in the middle; `parent` is made first."""

    name: str
    size: int
    type: Kind = "dynamic"
    block_bytes: int | None = None
    sector_bytes: int = 512
    physical_bytes: int = 4096
    writes: tuple[Write, ...] = ()
    parent: OurRecipe | None = None
    dirty: bool = False  # left as by a process that ended without closing it

    @property
    def format(self) -> Literal["vhd", "vhdx"]:
        """By the name."""
        return "vhd" if self.name.endswith(".vhd") else "vhdx"

    @property
    def depth(self) -> int:
        """How many parents it has below."""
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def facts(self) -> Facts:
        """What the image will be."""
        return Facts(
            format=self.format,
            type=self.type,
            virtual_bytes=self.size,
            logical_sector_bytes=self.sector_bytes,
            dirty=self.dirty,
            depth=self.depth,
            bitmap_absent=self.parent is not None and not self.writes,
        )

    def make(self, folder: Path) -> Made:
        """Make the image, and its parents beside it."""
        below = self.parent.make(folder) if self.parent is not None else None
        path = folder / self.name
        more: dict[str, Any] = {} if below is None else {"parent": below.path}
        create_disk(
            OS_FILES,
            path,
            virtual_bytes=self.size,
            format=self.format,  # type: ignore[arg-type, unused-ignore]
            type=self.type,  # type: ignore[arg-type, unused-ignore]
            block_bytes=self.block_bytes,
            logical_sector_bytes=self.sector_bytes,
            physical_sector_bytes=self.physical_bytes,
            clock=SYSTEM,
            **more,
        )
        truth = Truth(self.size, None if below is None else below.truth)
        disk = open_disk(OS_FILES, path, writable=True, clock=SYSTEM)
        for index, write in enumerate(self.writes):
            octets = truth.apply(write)
            if octets is None:
                disk.write_zeroes(write[0], write[1])
            else:
                disk.write(octets, write[0])
            if index == len(self.writes) // 2:
                disk.flush()
        if self.dirty:
            disk.flush()
            disk.abandon()
        else:
            disk.close()
        return Made(path, self.facts, truth)


def _usual(size: int, sector: int = 512) -> tuple[Write, ...]:
    """Return writes over block borders, rewrites, zeros over data, and the last sectors, out of order."""
    last = size // sector * sector
    return (
        (size // 2 // sector * sector, 64 * KIB, "half"),
        (0, 8 * sector, "first"),
        (last - 4 * sector, 4 * sector, "last"),
        (2 * MIB - sector, 2 * sector, "edge"),
        (3 * MIB, MIB, "long"),
        (3 * MIB + 8 * sector, 16 * sector, ZERO),
        (3 * MIB + 9 * sector, sector, "inside"),
        (2 * sector, sector, ZERO),
    )


def _child(size: int, sector: int = 512) -> tuple[Write, ...]:
    """Return writes of a child: lone sectors, runs over bytes of the bitmap, zeros over the parent's data."""
    return (
        (3 * MIB + 32 * sector, sector, "lone"),
        (3 * MIB + 40 * sector, 11 * sector, "run"),
        (3 * MIB + 128 * sector, 8 * sector, ZERO),
        (5 * sector, sector, "second"),
        (size // sector * sector - sector, sector, "end"),
        (size // 2 // sector * sector + 4 * sector, 3 * sector, ZERO),
    )


def _vhdx(name: str, size: int, **more: Any) -> OurRecipe:
    return OurRecipe(
        name=f"{name}.vhdx", size=size, writes=_usual(size, more.get("sector_bytes", 512)), **more
    )


def _vhd(name: str, size: int, **more: Any) -> OurRecipe:
    return OurRecipe(name=f"{name}.vhd", size=size, writes=_usual(size), **more)


def _on(parent: OurRecipe, name: str, **more: Any) -> OurRecipe:
    size, sector = more.pop("size", parent.size), parent.sector_bytes
    return OurRecipe(
        name=f"{name}.{parent.format}",
        size=size,
        type="differencing",
        sector_bytes=sector,
        writes=_child(size, sector),
        parent=parent,
        **more,
    )


_VHDX_BASE = _vhdx("base", 12 * MIB + 512, block_bytes=2 * MIB)
_VHDX_FIXED = _vhdx("base fixed", 12 * MIB, block_bytes=MIB, type="fixed")
_VHDX_4096 = _vhdx("base 4096", 16 * MIB, block_bytes=MIB, sector_bytes=4096)
_VHD_BASE = _vhd("base", 12 * MIB + 512)
_VHD_FIXED = _vhd("base fixed", 12 * MIB, type="fixed")

OURS = (
    _vhdx("dynamic-1m", ODD, block_bytes=MIB),
    _vhdx("dynamic-2m", 33 * MIB + 512, block_bytes=2 * MIB),
    _vhdx("dynamic-32m", 100 * MIB + 4096, block_bytes=32 * MIB),
    _vhdx("dynamic-256m", 300 * MIB, block_bytes=256 * MIB),
    _vhdx("dynamic-default", GIB),
    _vhdx("fixed-1m", 9 * MIB + 512, block_bytes=MIB, type="fixed"),
    _vhdx("fixed-32m", 70 * MIB, block_bytes=32 * MIB, type="fixed"),
    _vhdx("physical-512", 20 * MIB, block_bytes=MIB, physical_bytes=512),
    _vhdx("sector-4096", 40 * MIB, block_bytes=MIB, sector_bytes=4096),
    _vhdx("sector-4096-odd", 40 * MIB + 4096, block_bytes=2 * MIB, sector_bytes=4096),
    _vhdx("sector-4096-fixed", 16 * MIB, block_bytes=MIB, sector_bytes=4096, type="fixed"),
    _vhdx("chunk-edge", 5 * GIB, block_bytes=MIB),
    _vhdx("chunk-edge-256m", 5 * GIB, block_bytes=256 * MIB),
    OurRecipe(name="64t.vhdx", size=64 * TIB, writes=((64 * TIB - 4096, 4096, "LAST"), (0, 4096, "FIRST"))),
    _vhdx("dirty", 64 * MIB, block_bytes=MIB, dirty=True),
    _on(_VHDX_BASE, "child", block_bytes=2 * MIB),
    _on(_VHDX_BASE, "child of other blocks", block_bytes=MIB),
    _on(_VHDX_FIXED, "child of fixed"),
    _on(_VHDX_4096, "child-4096", block_bytes=MIB),
    _on(_on(_VHDX_BASE, "child-1", block_bytes=2 * MIB), "child-2", block_bytes=32 * MIB),
    OurRecipe(
        name="untouched.vhdx",
        size=_VHDX_BASE.size,
        type="differencing",
        parent=_VHDX_BASE,
        block_bytes=2 * MIB,
    ),
    _vhd("dynamic", 40 * MIB),
    _vhd("dynamic-odd", ODD),
    _vhd("dynamic-512k", 20 * MIB + 512, block_bytes=512 * KIB),
    _vhd("fixed", 5 * MIB + 512, type="fixed"),
    OurRecipe(
        name="over-chs.vhd",
        size=128 * GIB,
        writes=((CHS_MAX_BYTES, 4096, "OVER"), (128 * GIB - 4096, 4096, "LAST")),
    ),
    OurRecipe(name="2040g.vhd", size=2040 * GIB, writes=((2040 * GIB - 4096, 4096, "LAST"),)),
    _on(_VHD_BASE, "child"),
    _on(_VHD_FIXED, "child of fixed"),
    _on(_on(_VHD_BASE, "child-1"), "child-2"),
    OurRecipe(name="untouched.vhd", size=_VHD_BASE.size, type="differencing", parent=_VHD_BASE),
)
MISREAD = ("child.vhd", "child-2.vhdx", "untouched.vhdx")  # which readers misread, each in its own way
