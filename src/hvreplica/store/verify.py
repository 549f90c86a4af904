"""Read a VM's replica again, all of it or one point, and say what is damaged.

    files     what the catalog names and is missing or has another length; what it does not name
    logs      those that wait to be applied and those that are kept: structure and data
    parts     the undo parts of older points: structure and data
    disks     a scan of each (store/scan.py)
    points    judged from all that (store/judge.py), and marked in the catalog: damaged, or not any more

Everything may go on meanwhile. A scan that was cut is gone on with.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

import msgspec

from hvreplica.errors import HvReplicaError
from hvreplica.store.apply import is_cut
from hvreplica.store.check import find_damage
from hvreplica.store.digest import Digest, digest_of
from hvreplica.store.follow import expected_digest
from hvreplica.store.judge import Verdict, causes, disk_at, hold_point, judge_disk
from hvreplica.store.kept_times import read_times
from hvreplica.store.layout import PARTIAL_SUFFIX
from hvreplica.store.pace import Pace
from hvreplica.store.part_check import Fault, check_log, check_part
from hvreplica.store.points_kept import chain, kept_points, part_path
from hvreplica.store.scan import scan_disk

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

    from hvreplica.store.home import VmHome
    from hvreplica.store.records import PointRow, UndoRow


class PointVerdict(msgspec.Struct, frozen=True):
    """Of a recovery point. state: "ok", "damaged", or "unproven" where no digest of it is known yet.

    reason: why it is damaged.
    """

    id: str
    state: str
    reason: str | None = None


class VmVerdict(msgspec.Struct, frozen=True):
    """What reading a VM's replica again has found. points: oldest first; those that were looked at.

    damage: a sentence for each damaged file. unknown_files: those that nothing speaks of. read_bytes: how
    much was read.
    """

    vm: str
    points: list[PointVerdict]
    damage: list[str]
    unknown_files: list[str]
    read_bytes: int

    @property
    def is_damaged(self) -> bool:
        """Whether any damage was found."""
        return bool(self.damage) or any(point.state == "damaged" for point in self.points)


class StoreVerdict(msgspec.Struct, frozen=True):
    """What reading a store again has found."""

    root: str
    vms: list[VmVerdict]

    @property
    def is_damaged(self) -> bool:
        """Whether any damage was found."""
        return any(vm.is_damaged for vm in self.vms)


def verify_vm(home: VmHome, pace: Pace, *, since_s: float | None = None) -> VmVerdict:
    """Read everything of a VM again, but for disks that were read whole since `since_s`.

    Gives way while a point is applied. Raises: Locked where it changes too fast; Stopped.
    """
    read_before = pace.read_bytes
    pace.give_way = lambda: is_cut(home)
    damage = find_damage(home)
    spooled = _check_logs(home, pace)
    faults = _check_parts(home, pace)
    verdicts: dict[uuid.UUID, list[Verdict]] = {}
    for disk_index in _disks(home):
        scan = home.catalog.scans(home.vm_id).get(disk_index)
        if scan is None or since_s is None or (scan.ended_s or 0.0) < since_s or scan.started_s is not None:
            scan = scan_disk(home, disk_index, pace)
        if scan.damage is not None:
            damage.append(scan.damage)
        elif scan.is_damaged:
            damage.append(f"{home.paths.disk(disk_index)} does not hold what was written to it")
        for point_id, verdict in judge_disk(home, disk_index, faults, pace).items():
            verdicts.setdefault(point_id, []).append(verdict)
    for point_id, sentence in spooled.items():
        verdicts.setdefault(point_id, []).append(Verdict(sentence, is_proven=True))
    _record(home, verdicts)
    damage += [fault.sentence for fault in faults.values()] + list(spooled.values())
    return VmVerdict(
        vm=home.name,
        points=_verdicts(home, verdicts),
        damage=list(dict.fromkeys(damage)),
        unknown_files=_unknown_files(home),
        read_bytes=pace.read_bytes - read_before,
    )


def verified_s(home: VmHome) -> float:
    """Return when every disk of a VM had been read again; 0 where one was not yet."""
    scans = home.catalog.scans(home.vm_id)
    ended = [scans[index].ended_s if index in scans else None for index in _disks(home)]
    return min((each or 0.0 for each in ended), default=0.0)


def judge_vm(home: VmHome) -> None:
    """Judge the points again from what the last scans have found, for a disk was repaired since."""
    pace = Pace(home.clock, lambda _: False)
    faults = _check_parts(home, pace)
    verdicts: dict[uuid.UUID, list[Verdict]] = {}
    for disk_index in _disks(home):
        for point_id, verdict in judge_disk(home, disk_index, faults, pace).items():
            verdicts.setdefault(point_id, []).append(verdict)
    _record(home, verdicts)


def verify_point(home: VmHome, point: PointRow, pace: Pace) -> VmVerdict:
    """Read one point through the files that make it, and hold it against its digest.

    Raises: Locked, Stopped; what opening it raises if it goes meanwhile.
    """
    read_before = pace.read_bytes
    verdicts = []
    damage = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(hold_point(home, point.id))
        for disk_index, virtual_bytes in home.catalog.members(home.vm_id, point.id).items():
            verdict = _verify_disk(home, point, disk_index, virtual_bytes, pace)
            verdicts.append(verdict)
            damage += [] if verdict.sentence is None else [verdict.sentence]
    _record(home, {point.id: verdicts})
    return VmVerdict(
        vm=home.name,
        points=_verdicts(home, {point.id: verdicts}),
        damage=damage,
        unknown_files=[],
        read_bytes=pace.read_bytes - read_before,
    )


def _verify_disk(home: VmHome, point: PointRow, disk_index: int, virtual_bytes: int, pace: Pace) -> Verdict:
    parts = chain(home, point.id, disk_index)
    row = next(row for row in home.catalog.disks(home.vm_id) if row.spec.index == disk_index)
    if not parts or row.digest is None:
        scan_anew(home, disk_index)
        scan = scan_disk(home, disk_index, pace)
        if not parts:
            sentence = scan.damage or f"{home.paths.disk(disk_index)} does not hold what was written to it"
            return Verdict(sentence if scan.is_damaged else None, is_proven=True)
    try:
        with disk_at(home, point.id, disk_index, virtual_bytes) as disk:
            content = digest_of(disk, on_read=pace.spend)
    except (HvReplicaError, OSError) as error:
        return Verdict(str(error), is_proven=True)
    expected = expected_digest(home, point.id, disk_index)
    if expected == content:
        return Verdict(None, is_proven=True)
    # Only now, for the names: what was read is not what it should be, or nobody knows.
    parts = chain(home, point.id, disk_index)
    found = causes(home, parts, _faults(home, parts, pace))
    if not found and expected is not None:
        found = [f"disk {disk_index} does not have its digest: {content.hex()}, not {expected.hex()}"]
    return Verdict("; ".join(found) or None, is_proven=expected is not None)


def scan_anew(home: VmHome, disk_index: int) -> None:
    """Let the next scan of a disk begin at its start."""
    with home.catalog.transaction():
        row = home.catalog.scans(home.vm_id).get(disk_index)
        if row is not None:
            home.catalog.set_scan(
                home.vm_id, dataclasses.replace(row, position=0, digest=Digest(), started_s=None)
            )


def _disks(home: VmHome) -> list[int]:
    """Return the disks that points are read from."""
    members = {index for point in kept_points(home) for index in home.catalog.members(home.vm_id, point.id)}
    rows = [row for row in home.catalog.disks(home.vm_id) if row.file_bytes is not None]
    return [row.spec.index for row in rows if row.removed_s is None or row.spec.index in members]


def _check_logs(home: VmHome, pace: Pace) -> dict[uuid.UUID, str]:
    """Return what is damaged of logs: by the point that needs them to come, or by their own id."""
    found: dict[uuid.UUID, str] = {}
    waiting = [
        (point.id, home.paths.log(log.log_id), log.log_bytes)
        for point in home.catalog.points(home.vm_id)
        for log in home.catalog.logs(home.vm_id, point.id)
    ]
    rows = home.catalog.kept_logs(home.vm_id)
    kept = [(log.log_id, home.paths.kept_log(log.log_id), log.log_bytes) for log in rows]
    for row in rows:
        read_times(home, row)  # warns of damage; it costs no point, only parts of seconds of those to come
    for owner_id, path, log_bytes in (*waiting, *kept):
        fault = check_log(home.files, path, pace, log_bytes=log_bytes)
        if fault is not None and _is_log_there(home, path):
            found.setdefault(owner_id, fault.sentence)
    return found


def _is_log_there(home: VmHome, path: Path) -> bool:
    """Return whether the catalog still names a log: it may have been applied or have gone meanwhile."""
    named = {home.paths.log(log_id) for log_id in home.catalog.log_ids(home.vm_id)}
    named |= {home.paths.kept_log(log.log_id) for log in home.catalog.kept_logs(home.vm_id)}
    return path in named


def _check_parts(home: VmHome, pace: Pace) -> dict[uuid.UUID, Fault]:
    return _faults(home, home.catalog.undo_rows(home.vm_id), pace)


def _faults(home: VmHome, parts: list[UndoRow], pace: Pace) -> dict[uuid.UUID, Fault]:
    """Return what is wrong with the files of parts that the catalog still names; of whole ones the length."""
    found: dict[uuid.UUID, Fault] = {}
    for part in parts:
        path = part_path(home, part)
        if part.kind == "undo":
            fault = check_part(home.files, path, pace, part_id=part.id, file_bytes=part.file_bytes)
        elif home.files.exists(path):
            fault = None  # its points are read whole
        else:
            fault = Fault(f"{path} is missing")
        if fault is not None and any(row.id == part.id for row in home.catalog.undo_rows(home.vm_id)):
            found[part.id] = fault
    return found


def _record(home: VmHome, verdicts: dict[uuid.UUID, list[Verdict]]) -> None:
    """Mark points in the catalog. One that was damaged and is proven to be whole can be had again."""
    with home.catalog.transaction():
        for point_id, found in verdicts.items():
            sentence = _sentence(found)
            if sentence is not None:
                home.catalog.judge_point(home.vm_id, point_id, sentence)
            elif _is_judged(home, point_id, found) and all(verdict.is_proven for verdict in found):
                home.catalog.judge_point(home.vm_id, point_id, None)


def _is_judged(home: VmHome, point_id: uuid.UUID, found: list[Verdict]) -> bool:
    """Return whether every disk of a point was looked at; some were not of one that came meanwhile."""
    return len(found) >= len(home.catalog.members(home.vm_id, point_id))


def _sentence(found: list[Verdict]) -> str | None:
    sentences = dict.fromkeys(verdict.sentence for verdict in found if verdict.sentence is not None)
    return "; ".join(sentences) or None


def _verdicts(home: VmHome, verdicts: dict[uuid.UUID, list[Verdict]]) -> list[PointVerdict]:
    found = []
    for point in home.catalog.points(home.vm_id):
        own = verdicts.get(point.id, [])
        sentence = _sentence(own)
        if sentence is not None:
            found.append(PointVerdict(str(point.id), "damaged", sentence))
        elif own and _is_judged(home, point.id, own):
            is_proven = all(verdict.is_proven for verdict in own)
            found.append(PointVerdict(str(point.id), "ok" if is_proven else "unproven"))
    return found


def _unknown_files(home: VmHome) -> list[str]:
    """Return files of the VM that nothing speaks of; what is being made has names of its own."""
    catalog, paths = home.catalog, home.paths
    with catalog.snapshot():
        known = {part_path(home, part) for part in catalog.undo_rows(home.vm_id)}
        for log in catalog.kept_logs(home.vm_id):
            known |= {paths.kept_log(log.log_id), paths.kept_times(log.log_id)}
        for log_id in catalog.log_ids(home.vm_id):
            known |= {paths.log(log_id), paths.times(log_id)}
        known |= {paths.disk(row.spec.index) for row in catalog.disks(home.vm_id)}
    found = [
        folder / name
        for folder, suffixes in (
            (paths.disks, (".vhdx",)),
            (paths.points, (".hru", ".vhdx")),
            (paths.folder / "logs", (".hrl", ".hrt")),
            (paths.spool, (".hrl", ".hrt")),
        )
        for name in home.files.names(folder)
        if name.endswith(suffixes) and not name.endswith(PARTIAL_SUFFIX)
    ]
    # Looked at again: a file is there before its row is, and goes after it.
    return sorted(str(path) for path in found if path not in known and home.files.exists(path))
