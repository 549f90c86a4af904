"""Images made on the fly: what qemu makes we read and change, what we make every other reader opens.

The truth is what was written, kept in memory; no reader's answer is believed for it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import convert_disk, open_disk
from hvreplica.files import OS_FILES
from hvreplica.units import MIB, TIB
from tests.support.images import disk_content, file_content
from tests.support.matrix import (
    MISREAD,
    OURS,
    QEMU_MADE,
    ZERO,
    Made,
    OurRecipe,
    QemuRecipe,
    footer_bytes,
    pattern,
)
from tests.support.readers import READERS, Refused, doubts, qemu_image, vhdiinfo_bytes
from tests.support.tools import run_tool

if TYPE_CHECKING:
    from pathlib import Path

_RAW_BYTES_MAX = 4 * TIB  # a larger file is more than some file systems hold, be it empty


def convert(made: Made, folder: Path) -> None:
    """Convert to raw, or a disk of many terabytes to the other block size, and find the truth in it."""
    if made.facts.virtual_bytes > _RAW_BYTES_MAX:
        convert_disk(OS_FILES, made.path, folder / "out.vhdx", block_bytes=64 * MIB, clock=SYSTEM)
        with open_disk(OS_FILES, folder / "out.vhdx", clock=SYSTEM) as disk:
            assert disk_content(disk) == made.truth.content()
    else:
        report = convert_disk(OS_FILES, made.path, folder / "out.raw", format="raw", clock=SYSTEM)
        assert report.virtual_bytes == made.truth.virtual_bytes
        assert file_content(folder / "out.raw") == made.truth.content()


def ask_others(made: Made, folder: Path) -> None:
    """Every reader that may be believed for the image sees the truth, and there is one."""
    asked = []
    for reader in READERS:
        if not doubts(reader, made.facts) and made.facts.virtual_bytes <= reader.virtual_bytes_max:
            answer = reader.read(made.path, made.facts, made.truth.to_ask(), folder)
            assert answer == made.truth.content(), reader.name
            asked.append(reader.name)
    assert asked


def check_by_qemu(made: Made) -> None:
    """qemu-img finds nothing to repair, where it can look: it checks no VHD and opens no 4096-byte sectors."""
    if made.facts.format == "vhdx" and not made.facts.dirty and not doubts(READERS[0], made.facts):
        run_tool("qemu-img", "check", "-f", "vhdx", made.path)


@pytest.mark.parametrize("recipe", QEMU_MADE, ids=lambda recipe: recipe.name)
def test_what_qemu_made_we_read(tmp_path: Path, recipe: QemuRecipe) -> None:
    made = recipe.make(tmp_path)
    before = file_content(made.path)
    with open_disk(OS_FILES, made.path, clock=SYSTEM) as disk:
        info = disk.info()
    assert (info.format, info.type, info.virtual_bytes) == (
        recipe.format,
        recipe.type,
        made.truth.virtual_bytes,
    )
    assert (info.log == "replayed") == made.facts.dirty
    convert(made, tmp_path)
    assert file_content(made.path) == before
    ask_others(made, tmp_path)


@pytest.mark.parametrize("recipe", QEMU_MADE, ids=lambda recipe: recipe.name)
def test_what_qemu_made_we_change_and_all_read_it(tmp_path: Path, recipe: QemuRecipe) -> None:
    made = recipe.make(tmp_path)
    size = made.truth.virtual_bytes // 512 * 512
    with open_disk(OS_FILES, made.path, writable=True, clock=SYSTEM) as disk:
        for write in (
            (MIB - 1024, 2048, "ours"),
            (4 * MIB + 512, 512, "lone"),
            (4 * MIB, min(3 * MIB // 2, size - 4 * MIB), ZERO),
            (size - 512, 512, "ourend"),
            (4 * MIB + 8192, 512, "again"),
        ):
            octets = made.truth.apply(write)
            if octets is None:
                disk.write_zeroes(write[0], write[1])
            else:
                disk.write(octets, write[0])
    changed = Made(made.path, replace(made.facts, dirty=False), made.truth)
    check_by_qemu(changed)
    ask_others(changed, tmp_path)


@pytest.mark.parametrize("recipe", OURS, ids=lambda recipe: recipe.name)
def test_what_we_made_others_read(tmp_path: Path, recipe: OurRecipe) -> None:
    made = recipe.make(tmp_path)
    with open_disk(OS_FILES, made.path, clock=SYSTEM) as disk:
        assert (disk.info().format, disk.info().type) == (recipe.format, recipe.type)
    check_by_qemu(made)
    ask_others(made, tmp_path)
    convert(made, tmp_path)
    assert vhdiinfo_bytes(made.path) == recipe.size


@pytest.mark.parametrize(
    "recipe", [each for each in OURS if each.format == "vhd"], ids=lambda recipe: recipe.name
)
def test_vhd_that_we_made_has_the_same_size_by_either_rule_of_qemu(tmp_path: Path, recipe: OurRecipe) -> None:
    """By default qemu takes the size from cylinders, heads and sectors unless it knows the creator: it must not lose the end."""
    made = recipe.make(tmp_path)
    assert footer_bytes(made.path) == recipe.size
    for image in (
        qemu_image(made.path, "vhd"),
        qemu_image(made.path, "vhd").replace("force_size_calc=current_size,", ""),
    ):
        answer = json.loads(run_tool("qemu-img", "info", "--output=json", "--image-opts", image).stdout)
        assert answer["virtual-size"] == recipe.size


@pytest.mark.parametrize("name", MISREAD)
def test_readers_doubted_for_our_chains_do_misread_them(tmp_path: Path, name: str) -> None:
    """A lone sector in a byte of a bitmap, a partial block over another, a child without any bitmap."""
    made = next(recipe for recipe in OURS if recipe.name == name).make(tmp_path)
    wrong = []
    for reader in READERS:
        try:
            right = reader.read(made.path, made.facts, made.truth.to_ask(), tmp_path) == made.truth.content()
        except (AssertionError, Refused):  # fewer bytes than asked for, or none
            right = False
        wrong += [] if right else [reader.name]
    assert wrong == [reader.name for reader in READERS if doubts(reader, made.facts)]
    assert len(wrong) > 1


def test_pattern_names_its_sector() -> None:
    octets = pattern(3 * 512, 1024, "tag")
    assert octets[:16] == octets[496:512] == b"tag".ljust(8, b"\0") + (3).to_bytes(8, "little")
    assert octets[512:528] == b"tag".ljust(8, b"\0") + (4).to_bytes(8, "little")
