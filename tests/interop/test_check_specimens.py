"""VHDX files made by Windows, Hyper-V, Disk2VHD, qemu and openvmm check clean, but for what is known of each."""

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

NAMES = sorted(name for name in EXPECTED if "vhdx" in name)
CHILDREN = [name for name in NAMES if "with" in EXPECTED[name] or "refuse" in EXPECTED[name]]
WHOLE = [name for name in NAMES if name not in CHILDREN]
# Others: no finding at all. openvmm makes its files longer than what it has used of them.
_TAIL = {"file-tail-unused"}
_KNOWN = {
    "dfvfs/fat-differential.vhdx.bz2": {"parent-missing"},  # it is not unpacked beside it here
    "dissect/differencing.avhdx.gz": {"parent-missing"},
    "discutils/vhdx-log-replay.vhdx.gz": {"log-dirty"},
    "openvmm/om-512e-fixedflag.vhdx.bz2": _TAIL,
    "openvmm/om-anchor.vhdx.bz2": {"space-unused", *_TAIL},
    "openvmm/om-d512-child.vhdx.bz2": {"parent-missing", *_TAIL},
    "openvmm/om-d512-parent.vhdx.bz2": _TAIL,
    "openvmm/om-dirty-4k.vhdx.bz2": {"log-dirty", *_TAIL},
    "openvmm/om-dirty-wrap.vhdx.bz2": {"log-dirty", *_TAIL},
    "openvmm/om-dirty-zero-few.vhdx.bz2": {"log-dirty", *_TAIL},
    "openvmm/om-l4096-dyn.vhdx.bz2": _TAIL,
    "openvmm/om-l4096-p512.vhdx.bz2": _TAIL,
    "openvmm/om-trim.vhdx.bz2": {"space-unused", *_TAIL},
}


@pytest.mark.parametrize("name", NAMES)
def test_specimen_has_the_findings_that_are_known_of_it(specimens: Path, tmp_path: Path, name: str) -> None:
    path = unpack(specimens, name, tmp_path)
    before = file_content(path)
    report = check_disk(OS_FILES, path, clock=SYSTEM)
    assert set(report.codes()) == _KNOWN.get(name, set())
    status = 2 if "parent-missing" in report.codes() else 1 if "log-dirty" in report.codes() else 0
    assert report.status == status
    assert file_content(path) == before


@pytest.mark.parametrize("name", [name for name in WHOLE if name in _KNOWN])
def test_mended_specimen_holds_the_same_bytes(specimens: Path, tmp_path: Path, name: str) -> None:
    path = unpack(specimens, name, tmp_path)
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        expected = disk_content(disk)
    report = repair_disk(OS_FILES, path, clock=SYSTEM)
    assert report.after is not None
    assert set(report.after.codes()) <= {"space-unused"}
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        assert disk_content(disk) == expected


def test_differencing_specimens_are_checked_too() -> None:
    assert len(CHILDREN) >= 2 or not NAMES
