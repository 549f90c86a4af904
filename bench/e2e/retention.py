"""Many points on one VM: listing them, dropping any one, and dropping nearly all in any order.

Each point has one undo part of scattered 4 KiB grains, as a busy guest leaves them, most of them written
again and again. A drop is timed whole: the catalog, the files that go, and the parts that its heir gets
written anew. Half of those that are timed leave all to one heir; what is merged after a cycle is not in them,
but in the drops that follow. What it is measured against is writing the point's own part twice, as apply
writes it, durable.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

import numpy as np

import hvreplica
from bench.harness import SEED, Figure, Report, scratch
from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.formats.hrl import FILE_TYPE_UNDO
from hvreplica.hrl import LogReader, LogWriter
from hvreplica.store.catalog import Catalog
from hvreplica.store.home import StoreParts, VmHome
from hvreplica.store.layout import CATALOG_NAME
from hvreplica.store.points_kept import chain, kept_points
from hvreplica.store.records import Owner, PointRow, UndoRow
from hvreplica.store.retain import compact_many, let_go
from hvreplica.units import MIB

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

GRAIN_BYTES = 4096
LIST_S_MAX = 0.05
DROP_MAX = 1.0  # of writing the point's own churn twice
_DISK_GRAINS = 1 << 18  # 1 GiB
_HOT_GRAINS = 1 << 14  # 64 MiB, which half of the writes go to


def run(*, smoke: bool) -> Report:
    """Measure, verify and report."""
    count, churn_bytes, drops = (40, 64 << 10, 8) if smoke else (1000, MIB, 100)
    report = Report(f"{count} points of {churn_bytes >> 10} KiB each on one VM")
    rng = np.random.default_rng(SEED)
    with scratch() as folder:
        home = _make(folder, count, churn_bytes // GRAIN_BYTES, rng)
        _measure_list(report, folder, count)
        in_a_row = np.arange(1, 1 + drops // 2)  # all of them to one heir
        samples = np.concatenate((in_a_row, rng.permutation(np.arange(1 + drops // 2, count - 1))))
        watched = [int(samples[-1]), 0]
        points = [point.id for point in kept_points(home)]
        before = [_digest(home, points[place]) for place in watched]
        _measure_drops(report, home, [points[place] for place in samples[:drops]])
        rest = [points[place] for place in rng.permutation(samples[drops:-1])]
        written_bytes, seconds = 0, time.perf_counter()
        for point_id in rest:
            written_bytes += let_go(home, point_id, merge=True).written_bytes
        seconds = time.perf_counter() - seconds
        if [_digest(home, points[place]) for place in watched] != before:
            message = "a point that stayed is not what it was"
            raise RuntimeError(message)
        share = written_bytes / (len(rest) * churn_bytes)
        report.figures.append(Figure("written by all other drops, of their churn", f"{share:.2f} x"))
        report.figures.append(Figure("a drop of those", f"{1000 * seconds / max(len(rest), 1):.2f} ms"))
        home.catalog.close()
    return report


def _make(folder: Path, count: int, grains: int, rng: np.random.Generator) -> VmHome:
    catalog = Catalog(OS_FILES, folder / CATALOG_NAME, create=True)
    with catalog.transaction():
        catalog.insert_vm("web01", "web01", "web01", Owner(SYSTEM.guid(), 1, ""), 0.0)
    row = catalog.vm("web01")
    assert row is not None
    home = VmHome(StoreParts(OS_FILES, folder, catalog, SYSTEM), row)
    OS_FILES.make_directory(home.paths.points)
    for number in range(count):
        point_id = SYSTEM.guid()
        instant_s = 1.7e9 + 300 * number
        with catalog.transaction():
            catalog.insert_point(
                home.vm_id,
                PointRow(
                    point_id, 0, instant_s, "standard", "crash", "complete", None, 0, instant_s, instant_s
                ),
            )
            catalog.set_members(home.vm_id, point_id, {0: _DISK_GRAINS * GRAIN_BYTES})
        if number < count - 1:
            hot = rng.integers(0, _HOT_GRAINS, grains // 2)
            cold = rng.integers(0, _DISK_GRAINS, grains)
            places = np.unique(np.concatenate((hot, cold)))
            places = np.sort(rng.permutation(places)[:grains])
            part = _write_part(home, places, rng.bytes(len(places) * GRAIN_BYTES), point_id)
            with catalog.transaction():
                catalog.add_undo(home.vm_id, part)
    return home


def _write_part(home: VmHome, places: np.ndarray, data: bytes, point_id: uuid.UUID) -> UndoRow:
    """Write one part as apply does it, durable on return."""
    part_id = SYSTEM.guid()
    partial = home.paths.partial_undo(part_id)
    writer = LogWriter.create_undo(
        OS_FILES,
        partial,
        part_id=part_id,
        log_id=None,
        data_write_guid=None,
        clock=SYSTEM,
        entry_count=len(places),
    )
    with writer:
        rows = np.column_stack((places * GRAIN_BYTES, np.full(len(places), GRAIN_BYTES)))
        writer.append(rows, data, holes=True)
        summary = writer.close()
    OS_FILES.replace(partial, home.paths.undo(part_id))
    OS_FILES.sync_directory(home.paths.points)
    return UndoRow(point_id, 0, part_id, "undo", summary.log_bytes, len(places) * GRAIN_BYTES)


def _measure_list(report: Report, folder: Path, count: int) -> None:
    samples = []
    for _ in range(6):
        start = time.perf_counter()
        listed = hvreplica.point_list(folder, "web01")
        samples.append(time.perf_counter() - start)
        if len(listed) != count:
            message = f"{len(listed)} points were listed, not {count}"
            raise RuntimeError(message)
    report.samples["list"] = samples[1:]
    report.add_limit("list, opening the store included", report.median("list"), at_most=LIST_S_MAX, unit=" s")


def _measure_drops(report: Report, home: VmHome, points: list[uuid.UUID]) -> None:
    """Drop each point, and before it write its own part twice, beside the others."""
    drops, writes = [], []
    for point_id in points:
        rows = home.catalog.undo_rows(home.vm_id, point_id=point_id)
        places, data = _read(home, rows[0])
        start = time.perf_counter()
        made = [_write_part(home, places, data, point_id) for _ in range(2)]
        writes.append(time.perf_counter() - start)
        for part in made:
            OS_FILES.unlink(home.paths.undo(part.id))
        start = time.perf_counter()
        let_go(home, point_id)
        drops.append(time.perf_counter() - start)
        compact_many(home)
    report.samples["drop a point"] = drops
    report.samples["write its churn twice"] = writes
    ratios = [drop / write for drop, write in zip(drops, writes, strict=True)]
    report.add_limit("drop, of writing its churn twice, median", float(np.median(ratios)), at_most=DROP_MAX)
    report.add_limit("drop, of writing its churn twice, worst", max(ratios), at_most=DROP_MAX)


def _read(home: VmHome, row: UndoRow) -> tuple[np.ndarray, bytes]:
    places, data = [], []
    with LogReader(OS_FILES, home.paths.undo(row.id), file_type=FILE_TYPE_UNDO) as reader:
        for entries in reader.entries():
            for entry in entries:
                start, length = int(entry["byte_offset"]), int(entry["data_length"])
                places += range(start // GRAIN_BYTES, (start + length) // GRAIN_BYTES)
                data.append(reader.file.read(int(entry["log_offset"]), length))
    return np.array(places, np.int64), b"".join(data)


def _digest(home: VmHome, point_id: uuid.UUID) -> str:
    """Return a digest of what the point's parts hold: the first that covers a grain has it."""
    found: dict[int, bytes] = {}
    for row in chain(home, point_id, 0):
        places, data = _read(home, row)
        for number, place in enumerate(places.tolist()):
            if place not in found:
                piece = data[number * GRAIN_BYTES : (number + 1) * GRAIN_BYTES]
                found[place] = hashlib.blake2b(piece, digest_size=16).digest()
    total = hashlib.blake2b()
    for place in sorted(found):
        total.update(place.to_bytes(8, "little") + found[place])
    return total.hexdigest()
