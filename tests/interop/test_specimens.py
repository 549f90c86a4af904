"""Images by Windows, Hyper-V, Disk2VHD, Virtual PC, VirtualBox, XenServer, qemu, blktap and openvmm read as their makers meant them.

Each is converted to raw and must give the bytes that expected.json tells; it stays as it was, and so do its
parents; every reader that may be believed for it (tests/support/readers.py) sees the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import compare_disks, convert_disk, open_disk
from hvreplica.errors import FormatError, ParentError, ParentMissing
from hvreplica.files import OS_FILES
from tests.support.images import disk_content, file_content, unpacked_name
from tests.support.matrix import MISREAD, OURS
from tests.support.readers import READERS, Refused, doubts, vhdiinfo_bytes
from tests.support.source import ROOT
from tests.support.specimens import (
    EITHER,
    EXPECTED,
    MANIFEST,
    READABLE,
    REFUSED,
    expected_content,
    facts,
    parents,
    unpack_family,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.specimens import Shelf

DOUBTS = [  # those about images of ours are shown in test_matrix.py
    (reader, doubt)
    for reader in READERS
    for doubt in reader.doubts
    if not any(doubt.applies(recipe.facts) for recipe in OURS if recipe.name in MISREAD)
]
BY_COMMAND = [  # one of each kind goes through the command line too
    name
    for name in READABLE
    if unpacked_name(name)
    in {
        "ext2.vhd",
        "fixed.vhd",
        "ntfs-differential.vhd",
        "fat-differential.vhdx",
        "om-dirty-4k.vhdx",
        "test.vhdx",
    }
]


def test_specimens_are_there(specimens: Path) -> None:
    assert all((specimens / name).is_file() for name in (*EXPECTED, *MANIFEST))
    assert len(READABLE) >= 40
    assert {facts(name).format for name in READABLE} == {"vhd", "vhdx"}
    assert sum(bool(parents(name)) for name in READABLE) >= 6


@pytest.mark.parametrize("name", READABLE)
def test_converted_to_raw_holds_the_bytes_expected_and_leaves_the_image_alone(
    shelf: Shelf, name: str
) -> None:
    before = shelf.state(name)
    assert file_content(shelf.raw(name)) == expected_content(name)
    assert shelf.state(name) == before


@pytest.mark.parametrize("name", READABLE)
def test_opened_in_either_way_it_reads_alike_and_only_a_log_is_emptied(
    tmp_path: Path, shelf: Shelf, name: str
) -> None:
    expected, known = expected_content(name), facts(name)
    with open_disk(OS_FILES, shelf.image(name), clock=SYSTEM) as disk:
        info = disk.info()
    assert (info.format, info.type) == (known.format, known.type)
    assert info.logical_sector_bytes == known.logical_sector_bytes
    assert (info.parent is not None) == (known.type == "differencing")
    assert (info.log == "replayed") == known.dirty
    path = shelf.copy(name, tmp_path)
    before = path.stat().st_mtime_ns
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        assert disk_content(disk) == expected
    assert (path.stat().st_mtime_ns != before) == known.dirty
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        assert disk.info().log == ("clean" if known.format == "vhdx" else "none")


@pytest.mark.parametrize("name", READABLE)
def test_a_write_changes_nothing_else(tmp_path: Path, shelf: Shelf, name: str) -> None:
    path, copy = shelf.copy(name, tmp_path), tmp_path / "copy.vhdx"
    others = [other for other in tmp_path.iterdir() if other != path]
    before = [file_content(other) for other in others]
    convert_disk(OS_FILES, shelf.image(name), copy, clock=SYSTEM)
    for target in (path, copy):
        with open_disk(OS_FILES, target, writable=True, clock=SYSTEM) as disk:
            size, sector = disk.virtual_bytes, disk.logical_sector_bytes
            disk.write(b"\xa5" * sector, size - sector)
            disk.write_zeroes(size // 2 // sector * sector, min(size // 4, 64 << 20))
            disk.flush()
            disk.write(b"\x5a" * sector, size // 2 // sector * sector)
            disk.write_zeroes(0, sector)
    assert compare_disks(OS_FILES, path, copy, clock=SYSTEM).equal
    assert [file_content(other) for other in others] == before


@pytest.mark.parametrize("name", READABLE)
def test_readers_that_may_be_believed_see_the_same(tmp_path: Path, shelf: Shelf, name: str) -> None:
    known, ours = facts(name), file_content(shelf.raw(name))
    asked = 0
    for reader in READERS:
        if doubts(reader, known) or known.virtual_bytes > reader.virtual_bytes_max:
            continue
        assert reader.read(shelf.image(name), known, shelf.ranges(name), tmp_path) == ours, reader.name
        asked += 1
    assert asked or known.dirty or known.raw_parent, "nobody else may be believed for this image"
    if not known.raw_parent:
        assert vhdiinfo_bytes(shelf.image(name)) == ours.virtual_bytes


@pytest.mark.parametrize(
    ("reader", "doubt"), DOUBTS, ids=[f"{reader.name} {doubt.reason[:40]}" for reader, doubt in DOUBTS]
)
def test_doubts_about_readers_are_deserved(
    tmp_path: Path, shelf: Shelf, reader: object, doubt: object
) -> None:
    """A reader that learned better should be believed again: the rule can go."""
    images = [name for name in (*READABLE, *EITHER) if doubt.applies(facts(name))]
    for name in images:
        try:
            answer = reader.read(shelf.image(name), facts(name), [(0, facts(name).virtual_bytes)], tmp_path)
        except Refused:
            if doubt.refuses:
                return
        else:
            if answer != expected_content(name) and not doubt.refuses:
                return
    pytest.skip(f"{reader.name} reads these right: {images}; {doubt.reason}")


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("writable", [False, True])
def test_image_without_its_parent_is_refused_by_the_name_of_the_parent(
    shelf: Shelf, name: str, *, writable: bool
) -> None:
    path = shelf.image(name)
    before = shelf.state(name)
    with pytest.raises(ParentMissing, match=r"49C4BAF3-4B25-4406-8C4B-D39E65C32385\.avhdx") as caught:
        open_disk(OS_FILES, path, writable=writable, clock=SYSTEM)
    assert caught.value.path == path
    assert caught.value.hint
    assert shelf.state(name) == before


@pytest.mark.parametrize("name", EITHER)
@pytest.mark.parametrize("writable", [False, True])
def test_image_with_wrong_sums_is_read_right_or_refused_with_the_field(
    tmp_path: Path, name: str, *, writable: bool
) -> None:
    path = unpack_family(name, tmp_path)
    before = file_content(path)
    try:
        with open_disk(OS_FILES, path, writable=writable, clock=SYSTEM) as disk:
            assert disk_content(disk) == expected_content(name)
    except (FormatError, ParentError) as error:
        assert error.path == path
        assert error.hint or error.field
    assert file_content(path) == before


@pytest.mark.parametrize("name", BY_COMMAND)
def test_command_line_converts_alike(tmp_path: Path, shelf: Shelf, name: str) -> None:
    done = _command("disk", "convert", shelf.image(name), tmp_path / "out.raw")
    assert done.returncode == 0, done.stderr
    assert file_content(tmp_path / "out.raw") == expected_content(name)


@pytest.mark.parametrize("name", REFUSED)
def test_command_line_says_what_to_do_about_a_missing_parent(tmp_path: Path, shelf: Shelf, name: str) -> None:
    done = _command("disk", "convert", shelf.image(name), tmp_path / "out.raw")
    assert done.returncode == ParentMissing.exit_code
    assert "Traceback" not in done.stderr
    assert "parent" in done.stderr
    assert list(tmp_path.iterdir()) == []


def _command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hvreplica", *(str(argument) for argument in arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        timeout=60,
        check=False,
    )
