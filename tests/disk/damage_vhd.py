"""Kinds of damage to a VHD, each with the codes that a check must find in it and in nothing else."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from hvreplica.disk import create_disk, open_disk
from hvreplica.files import OS_FILES
from hvreplica.formats.vhd_footer import Footer, unpack_footer
from hvreplica.formats.vhd_header import DynamicHeader, unpack_dynamic_header
from hvreplica.units import KIB, MIB
from tests.support.build import random_bytes
from tests.support.fakeclock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE = 21 * MIB
BLOCK = 512 * KIB
ABSENT, FIRST, SECOND, FAR = 9, 0, 1, 20


class VhdPatient:
    """A VHD file that is operated on. Every method reads and writes the file at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def read(self, at: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(at)
            return file.read(length)

    def write(self, at: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(data)

    def resize(self, size_bytes: int) -> None:
        with self.path.open("r+b") as file:
            file.truncate(size_bytes)

    @property
    def footer(self) -> Footer:
        return unpack_footer(self.read(self.size - 512, 512), file_offset=0)

    def set_footers(self, **changes: Any) -> None:
        """Change fields of footer and copy, and make their checksums right."""
        packed = dataclasses.replace(self.footer, **changes).pack()
        self.write(self.size - 512, packed)
        self.write(0, packed)

    @property
    def header(self) -> DynamicHeader:
        return unpack_dynamic_header(self.read(512, 1024), file_offset=512)

    def set_header(self, **changes: Any) -> None:
        self.write(512, dataclasses.replace(self.header, **changes).pack())

    def set_locators(self, **changes: Any) -> None:
        self.set_header(locators=tuple(dataclasses.replace(each, **changes) for each in self.header.locators))

    def entry(self, block: int) -> int:
        return int.from_bytes(self.read(self.header.table_offset + 4 * block, 4), "big")

    def set_entry(self, block: int, sector: int) -> None:
        self.write(self.header.table_offset + 4 * block, sector.to_bytes(4, "big"))

    def grow(self, length: int, byte: bytes = b"\xaa") -> None:
        """Put bytes that nothing uses before the footer."""
        footer, at = self.read(self.size - 512, 512), self.size - 512
        self.write(at, byte * length + footer)


def make_dynamic(path: Path) -> VhdPatient:
    create_disk(
        OS_FILES,
        path,
        virtual_bytes=SIZE,
        format="vhd",
        block_bytes=BLOCK,
        clock=FakeClock(seed=1),
        overwrite=True,
    )
    return _filled(path)


def make_child(path: Path) -> VhdPatient:
    parent = parent_of(path)
    if not parent.exists():
        make_dynamic(parent)
    create_disk(
        OS_FILES,
        path,
        virtual_bytes=None,
        format="vhd",
        type="differencing",
        block_bytes=BLOCK,
        parent=parent,
        clock=FakeClock(seed=3),
        overwrite=True,
    )
    return _filled(path)


def make_fixed(path: Path) -> VhdPatient:
    create_disk(
        OS_FILES,
        path,
        virtual_bytes=SIZE,
        format="vhd",
        type="fixed",
        clock=FakeClock(seed=1),
        overwrite=True,
    )
    return _filled(path)


def _filled(path: Path) -> VhdPatient:
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock(seed=2)) as disk:
        disk.write(random_bytes(2 * BLOCK, seed=5), 0)
        disk.write(random_bytes(70_000, seed=6), FAR * BLOCK)
    return VhdPatient(path)


def parent_of(path: Path) -> Path:
    return path.with_name("parent.vhd")


def old_footer(patient: VhdPatient) -> None:
    """Take away the last byte, as Virtual PC before 2004 did."""
    patient.resize(patient.size - 1)


class Damage(NamedTuple):
    """codes: what a check finds. make: the sound disk that `harm` is done to."""

    codes: tuple[str, ...]
    harm: Callable[[VhdPatient], object]
    make: Callable[[Path], VhdPatient] = make_dynamic


MENDABLE: dict[str, Damage] = {
    "footer gone": Damage(("footer-missing",), lambda p: p.resize(p.size - 512)),
    "footer checksum": Damage(("footer-missing",), lambda p: p.write(p.size - 100, b"x")),
    "footer torn away by growth": Damage(
        ("footer-missing",), lambda p: (p.write(p.size - 512, bytes(512)), p.resize(p.size + 3 * MIB))
    ),
    "footer gone, junk behind": Damage(
        ("footer-missing",), lambda p: p.write(p.size - 512, b"\xaa" * 100_001)
    ),
    "copy gone": Damage(("footer-copy-invalid",), lambda p: p.write(0, bytes(512))),
    "copy checksum": Damage(("footer-copy-invalid",), lambda p: p.write(400, b"x")),
    "copy of another time": Damage(
        ("footer-copy-differs",),
        lambda p: p.write(0, dataclasses.replace(p.footer, time_stamp=77).pack()),
    ),
    "leaked tail": Damage(("file-tail-unused",), lambda p: p.grow(3 * MIB)),
    "leaked tail and no copy": Damage(
        ("file-tail-unused", "footer-copy-invalid"), lambda p: (p.grow(3 * MIB), p.write(0, bytes(8)))
    ),
    "child without a footer": Damage(("footer-missing",), lambda p: p.resize(p.size - 300), make_child),
}

CORRUPT: dict[str, Damage] = {
    "both footers": Damage(
        ("no-valid-footer",), lambda p: (p.write(8, b"x"), p.write(p.size - 504, b"x"))
    ),
    "nothing": Damage(("no-valid-footer",), lambda p: p.resize(0)),
    "fixed without a footer": Damage(
        ("no-valid-footer",), lambda p: p.write(p.size - 512, bytes(512)), make_fixed
    ),
    "fixed and cut": Damage(
        ("footer-file-too-short",),
        lambda p: (p.write(p.size - 512 - MIB, p.read(p.size - 512, 512)), p.resize(p.size - MIB)),
        make_fixed,
    ),
    "version": Damage(("footer-version",), lambda p: p.set_footers(file_format_version=0x20000)),
    "disk type": Damage(("footer-disk-type",), lambda p: p.set_footers(disk_type=5)),
    "disk size": Damage(("footer-disk-size",), lambda p: p.set_footers(current_size=SIZE + 1)),
    "header offset": Damage(("footer-data-offset",), lambda p: p.set_footers(data_offset=100)),
    "header outside": Damage(("footer-file-too-short",), lambda p: p.set_footers(data_offset=1 << 40)),
    "header gone": Damage(("dynamic-header-cookie",), lambda p: p.write(512, bytes(1024))),
    "header checksum": Damage(("dynamic-header-checksum",), lambda p: p.write(1400, b"x")),
    "header version": Damage(("dynamic-header-version",), lambda p: p.set_header(header_version=0x20000)),
    "block size": Damage(("dynamic-header-block-size",), lambda p: p.set_header(block_size=3 * MIB)),
    "table too small": Damage(
        ("dynamic-header-table-entries",), lambda p: p.set_header(max_table_entries=41)
    ),
    "table misaligned": Damage(("dynamic-header-table-offset",), lambda p: p.set_header(table_offset=1537)),
    "table over the header": Damage(
        ("dynamic-header-table-offset",), lambda p: p.set_header(table_offset=1024)
    ),
    "table outside": Damage(("bat-too-short",), lambda p: p.set_header(table_offset=1 << 30)),
    "block outside": Damage(("bat-block-outside-file",), lambda p: p.set_entry(ABSENT, p.size // 512)),
    "block far outside": Damage(("bat-block-outside-file",), lambda p: p.set_entry(ABSENT, 0xFFFF_FFFE)),
    "block in the header": Damage(
        ("bat-block-in-structure", "bat-block-overlap", "bat-blocks-unaligned"), lambda p: p.set_entry(ABSENT, 1)
    ),
    "block over the footer": Damage(
        ("bat-block-in-structure", "bat-block-overlap", "bat-blocks-unaligned"), lambda p: p.set_entry(ABSENT, p.entry(FAR) + 1)
    ),
    "two blocks in one place": Damage(("bat-block-overlap",), lambda p: p.set_entry(ABSENT, p.entry(FIRST))),
    "parent gone": Damage(("parent-missing",), lambda p: parent_of(p.path).unlink(), make_child),
    "parent of another id": Damage(
        ("parent-linkage",), lambda p: p.set_header(parent_unique_id=p.footer.unique_id), make_child
    ),
    "parent damaged": Damage(
        ("parent-damaged",), lambda p: VhdPatient(parent_of(p.path)).write(512, b"x"), make_child
    ),
    "no parent named": Damage(
        ("parent-locator-missing",),
        lambda p: (p.set_locators(platform_code=bytes(4)), p.set_header(parent_name="")),
        make_child,
    ),
}  # fmt: skip

HARMLESS: dict[str, Damage] = {
    "footer of 511 bytes": Damage(("footer-old",), old_footer),
    "footer of 511 bytes, fixed": Damage(("footer-old",), old_footer, make_fixed),
    "batmap damaged": Damage(("batmap-invalid",), lambda p: p.set_footers(creator_application=b"tap\0")),
    "blocks unaligned": Damage(
        ("bat-blocks-unaligned",),
        lambda p: (p.grow(8 * 512), p.write((p.entry(FAR) + 1) * 512, p.read(p.entry(FAR) * 512, 513 * 1024)),
                   p.set_entry(FAR, p.entry(FAR) + 1)),
    ),
    "entries beyond the disk": Damage(
        ("bat-entry-beyond-disk",), lambda p: (p.set_header(max_table_entries=44), p.set_entry(43, 0))
    ),
    "gap": Damage(("space-unused",), lambda p: p.set_entry(FIRST, 0xFFFF_FFFF)),
    "room behind a fixed disk": Damage(("space-unused",), lambda p: p.grow(4096), make_fixed),
    "pad before the footer": Damage((), lambda p: p.grow(7 * 512)),
    "one locator damaged": Damage(
        ("parent-locator-malformed",),
        lambda p: p.set_header(
            locators=(
                dataclasses.replace(p.header.locators[0], platform_data_length=1 << 20),
                *p.header.locators[1:],
            )
        ),
        make_child,
    ),
    "parent written": Damage((), lambda p: VhdPatient(parent_of(p.path)).set_entry(ABSENT, 0xFFFF_FFFF), make_child),
}  # fmt: skip

DAMAGES = {**MENDABLE, **CORRUPT, **HARMLESS}


def harmed(path: Path, name: str) -> VhdPatient:
    """Make a disk with the damage of this name."""
    damage = DAMAGES[name]
    patient = damage.make(path)
    damage.harm(patient)
    return patient
