"""Disks made by Windows, Hyper-V, Disk2VHD, XenServer, VirtualBox, qemu and openvmm check clean.

But for what is known of each: openvmm makes its files longer than what it has used of them, qemu and VirtualBox do not
align blocks of a VHD, two files were edited by hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.disk.check import check_disk, repair_disk
from hvreplica.files import OS_FILES
from tests.support.images import disk_content, file_content, unpack
from tests.support.specimens import EXPECTED

if TYPE_CHECKING:
    from pathlib import Path

NAMES = sorted(name for name in EXPECTED if "vhd" in name)
# Others: no finding at all.
_TAIL = {"file-tail-unused"}
_KNOWN = {
    "dfvfs/ext2.vhd.bz2": {"bat-blocks-unaligned"},
    "dfvfs/image-differential.vhd.bz2": {"no-valid-footer"},
    "dfvfs/image.vhd.bz2": {"no-valid-footer"},
    "dissect/differencing.avhdx.gz": {"parent-missing"},
    "discutils/vhdx-log-replay.vhdx.gz": {"log-dirty"},
    "openvmm/om-512e-fixedflag.vhdx.bz2": _TAIL,
    "openvmm/om-anchor.vhdx.bz2": {"space-unused", *_TAIL},
    "openvmm/om-d512-child.vhdx.bz2": _TAIL,
    "openvmm/om-d512-parent.vhdx.bz2": _TAIL,
    "openvmm/om-dirty-4k.vhdx.bz2": {"log-dirty", *_TAIL},
    "openvmm/om-dirty-wrap.vhdx.bz2": {"log-dirty", *_TAIL},
    "openvmm/om-dirty-zero-few.vhdx.bz2": {"log-dirty", *_TAIL},
    "openvmm/om-l4096-dyn.vhdx.bz2": _TAIL,
    "openvmm/om-l4096-p512.vhdx.bz2": _TAIL,
    "openvmm/om-trim.vhdx.bz2": {"space-unused", *_TAIL},
    "virtualbox/vbm-child.vhd.bz2": {"bat-blocks-unaligned"},
    "virtualbox/vbm-dynamic.vhd.bz2": {"bat-blocks-unaligned"},
}
_CORRUPT = {"parent-missing", "no-valid-footer"}
MENDED = [name for name in NAMES if {"log-dirty", *_TAIL} & _KNOWN.get(name, set())]


def unpacked(specimens: Path, name: str, folder: Path) -> Path:
    """Unpack an image, and the parents that are known of it beside it."""
    for parent in EXPECTED[name].get("with", []):
        unpack(specimens, parent, folder)
    return unpack(specimens, name, folder)


@pytest.mark.parametrize("name", NAMES)
def test_specimen_has_the_findings_that_are_known_of_it(specimens: Path, tmp_path: Path, name: str) -> None:
    path = unpacked(specimens, name, tmp_path)
    before = file_content(path)
    report = check_disk(OS_FILES, path, clock=SYSTEM)
    codes = set(report.codes())
    assert codes == _KNOWN.get(name, set())
    assert report.status == (2 if codes & _CORRUPT else 1 if "log-dirty" in codes else 0)
    assert len(report.statistics.parents or []) == ("with" in EXPECTED[name] and not codes & _CORRUPT)
    assert file_content(path) == before


@pytest.mark.parametrize("name", MENDED)
def test_mended_specimen_holds_the_same_bytes(specimens: Path, tmp_path: Path, name: str) -> None:
    path = unpacked(specimens, name, tmp_path)
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        expected = disk_content(disk)
    report = repair_disk(OS_FILES, path, clock=SYSTEM)
    assert report.after is not None
    assert set(report.after.codes()) <= {"space-unused"}
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        assert disk_content(disk) == expected
