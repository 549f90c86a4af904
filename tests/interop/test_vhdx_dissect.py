"""dissect.hypervisor, a reader that is not ours, sees in our files what we wrote; it reads 4096-byte sectors too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.files import OS_FILES
from hvreplica.units import MIB
from tests.support.build import mixed_bytes
from tests.support.tools import missing

if TYPE_CHECKING:
    from pathlib import Path

try:
    from dissect.hypervisor.disk.vhdx import VHDX
except ImportError:
    VHDX = None


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
@pytest.mark.parametrize("sector_bytes", [512, 4096])
@pytest.mark.parametrize("block_bytes", [MIB, 32 * MIB])
def test_dissect_reads_what_we_wrote(tmp_path: Path, kind: str, sector_bytes: int, block_bytes: int) -> None:
    if VHDX is None:
        missing("dissect.hypervisor is not installed")
    path = tmp_path / "a.vhdx"
    size = 67 * MIB + 4096
    create_disk(
        OS_FILES,
        path,
        virtual_bytes=size,
        type=kind,
        block_bytes=block_bytes,
        logical_sector_bytes=sector_bytes,
        clock=SYSTEM,
    )
    expected = bytearray(size)
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        for offset, length in ((8192, 65536), (30 * MIB, 5 * MIB), (size - 8192, 8192)):
            data = mixed_bytes(length, seed=length)
            disk.write(data, offset)
            expected[offset : offset + length] = data
    with path.open("rb") as file:
        theirs = VHDX(file)
        assert theirs.size == size
        assert theirs.read(size) == expected
