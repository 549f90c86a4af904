"""The check and the repair of damaged disks: they never raise, never contradict an open, and never change data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.check import check_disk, repair_disk, undo_repair
from hvreplica.disk.open import open_layer
from hvreplica.errors import HvReplicaError, UnsupportedVersion
from hvreplica.units import MIB
from tests.fuzz import scenes_vhd, scenes_vhdx
from tests.fuzz.damage import stored
from tests.fuzz.registry import Fuzzer
from tests.support.fakeclock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fuzz.damage import Scene
    from tests.support.faultfile import FaultFiles

_SHOWN_BYTES = 10 * MIB
_PARENT = 0xA5  # fills what the file leaves to its parent


def _own_bytes(world: FaultFiles, path: Path) -> bytes:
    """Return the first of the guest's bytes as this file alone has them. Raises: what an open raises."""
    with open_layer(world, path, clock=FakeClock()) as disk:
        disk.info()
        end = min(disk.virtual_bytes, _SHOWN_BYTES)
        data = bytearray([_PARENT]) * end
        disk.read_spans(np.array([[0, end, 0]], np.int64), data)
        return bytes(data)


def _attack_check(scene: Scene, data: bytes) -> None:
    """Check whatever is there: a report comes back, and what it calls clean can be opened and read."""
    world = scene.damaged(data)
    path = scene.paths[0]
    before = stored(world, path)
    report = check_disk(world, path, clock=FakeClock())
    assert stored(world, path) == before, "a check changed the file"
    assert report.status == {"clean": 0, "repairable": 1, "corrupt": 2}[report.verdict]
    if report.status == 0:
        _own_bytes(world, path)


def _attack_repair(scene: Scene, data: bytes) -> None:
    """Repair whatever is there: what the guest had stays, nothing gets worse, an undo brings all back."""
    world = scene.damaged(data)
    path = scene.paths[0]
    original = stored(world, path)
    shown: bytes | None
    try:
        shown = _own_bytes(world, path)
    except HvReplicaError:
        shown = None
    report = repair_disk(world, path, backup=path.with_name("backup"), clock=FakeClock())
    assert report.status <= report.before.status
    assert report.before.status != 1 or report.status == 0, "called repairable, and is not repaired"
    if shown is not None:
        assert _own_bytes(world, path) == shown, "a repair changed what the guest had"
    if report.backup is not None:
        undo_repair(world, path, report.backup)
        assert stored(world, path) == original, "an undo does not bring the file back"


def _fuzzer(name: str, attack: Callable[[Scene, bytes], None], scene: Callable[[], Scene]) -> Fuzzer:
    return Fuzzer(
        name, lambda: scene().seeds(), lambda data: attack(scene(), data), allowed=(UnsupportedVersion,)
    )


FUZZERS = (
    _fuzzer("check_vhdx", _attack_check, scenes_vhdx.chain_scene),
    _fuzzer("check_vhd", _attack_check, scenes_vhd.chain_scene),
    _fuzzer("repair_vhd", _attack_repair, scenes_vhd.chain_scene),
    _fuzzer("repair_vhdx", _attack_repair, scenes_vhdx.chain_scene),
)
