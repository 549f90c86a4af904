"""What compressing the undo parts of older points saves, what it costs, and what reading them then costs.

One point whose part has scattered 4 KiB pages of real files, those of this machine's Python, in an order that
a seed gives. Read is through the point, in this process: by way of NBD each read costs the same more.
"""

from __future__ import annotations

import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.harness import SEED, Figure, Report, scratch
from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk
from hvreplica.files import OS_FILES
from hvreplica.hrl import LogWriter
from hvreplica.store.catalog import Catalog
from hvreplica.store.home import StoreParts, VmHome
from hvreplica.store.layout import CATALOG_NAME
from hvreplica.store.open_point import open_point
from hvreplica.store.press import press_part
from hvreplica.store.records import DiskRow, DiskSpec, Owner, PointRow, UndoRow
from hvreplica.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE_BYTES = 4096
_READS = 2000


def run(*, smoke: bool) -> Report:
    """Measure, verify and report."""
    churn_bytes = 4 * MIB if smoke else 128 * MIB
    report = Report(f"a point of {churn_bytes // MIB} MiB of scattered pages of files, compressed")
    rng = np.random.default_rng(SEED)
    pages = _pages(churn_bytes)[rng.permutation(churn_bytes // PAGE_BYTES)]
    places = np.sort(rng.permutation(4 * len(pages))[: len(pages)]) * PAGE_BYTES
    with scratch() as folder:
        home = _make(folder, places, pages)
        (row,) = home.catalog.undo_rows(home.vm_id)
        path = home.paths.undo(row.id)
        report.add_limit("space, by what changed", _held(path) / churn_bytes, at_most=1.05)
        order = rng.permutation(len(pages))[:_READS]
        report.samples["read"] = [_read_s(home, places, pages, order)]
        start, cpu = time.perf_counter(), time.process_time()
        press_part(home, row)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        (row,) = home.catalog.undo_rows(home.vm_id)
        share = _held(home.paths.undo(row.id)) / churn_bytes
        report.add_limit("space, compressed, by what changed", share, at_most=0.6)
        report.figures.append(Figure("compressing 1 GiB, CPU", f"{cpu * GIB / churn_bytes:.1f} s"))
        report.figures.append(Figure("compressing 1 GiB", f"{seconds * GIB / churn_bytes:.1f} s"))
        report.samples["read, compressed"] = [_read_s(home, places, pages, order)]
        report.add_limit("opening the point", _open_s(home), at_most=1.0, unit=" s")
        for name, samples in report.samples.items():
            text = f"{1e6 * samples[0] / len(order):.0f} us"
            report.figures.append(Figure(f"4 KiB at random: {name}", text))
        home.catalog.close()
    return report


def _pages(length: int) -> np.ndarray:
    """Return pages of this Python's files, the same for each run on one machine."""
    data = bytearray()
    while len(data) < length:
        for file in _files():
            data += file.read_bytes()
            data += bytes(-len(data) % PAGE_BYTES)
            if len(data) >= length:
                break
    return np.frombuffer(data, np.uint8)[:length].reshape(-1, PAGE_BYTES)


def _files() -> Iterator[Path]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*")):
        if path.suffix in {".py", ".so", ".txt"} and path.is_file():
            yield path


def _make(folder: Path, places: np.ndarray, pages: np.ndarray) -> VmHome:
    catalog = Catalog(OS_FILES, folder / CATALOG_NAME, create=True)
    virtual_bytes = 4 * pages.size
    spec = DiskSpec(0, virtual_bytes, block_bytes=MIB)
    with catalog.transaction():
        catalog.insert_vm("web01", "web01", "web01", Owner(SYSTEM.guid(), 1, ""), 0.0)
    vm = catalog.vm("web01")
    assert vm is not None
    home = VmHome(StoreParts(OS_FILES, folder, catalog, SYSTEM), vm)
    OS_FILES.make_directory(home.paths.points)
    OS_FILES.make_directory(home.paths.disks)
    create_disk(OS_FILES, home.paths.disk(0), virtual_bytes=virtual_bytes, block_bytes=MIB, clock=SYSTEM)
    home.paths.counter.write_bytes(bytes(8))
    ids = [SYSTEM.guid(), SYSTEM.guid()]
    part_id = SYSTEM.guid()
    path = home.paths.undo(part_id)
    with LogWriter.create_undo(
        OS_FILES, path, part_id=part_id, log_id=None, data_write_guid=None, clock=SYSTEM
    ) as writer:
        rows = np.column_stack((places, np.full(len(places), PAGE_BYTES)))
        writer.append(rows, np.ascontiguousarray(pages).reshape(-1), holes=True)
    with catalog.transaction():
        catalog.insert_disk(home.vm_id, spec)
        catalog.set_disk_state(home.vm_id, DiskRow(spec, home.paths.disk(0).stat().st_size))
        for point_id in ids:
            catalog.insert_point(
                home.vm_id,
                PointRow(point_id, 0, 0.0, "standard", "crash", "complete", None, 0, 0.0, 0.0),
            )
            catalog.set_members(home.vm_id, point_id, {0: virtual_bytes})
        catalog.add_undo(
            home.vm_id, UndoRow(ids[0], 0, part_id, "undo", path.stat().st_size, int(pages.size))
        )
    return home


def _held(path: Path) -> int:
    return path.stat().st_blocks * 512


def _oldest(home: VmHome) -> str:
    return str(home.catalog.points(home.vm_id)[0].id)


def _open_s(home: VmHome) -> float:
    start = time.perf_counter()
    with open_point(home, _oldest(home)) as point:
        point.disks[0].read_into(bytearray(PAGE_BYTES), 0)
        return time.perf_counter() - start


def _read_s(home: VmHome, places: np.ndarray, pages: np.ndarray, order: np.ndarray) -> float:
    """Return the seconds that reads of single pages take, each compared with what it should be."""
    seconds, page = 0.0, bytearray(PAGE_BYTES)
    with open_point(home, _oldest(home)) as point:
        for number in order.tolist():
            start = time.perf_counter()
            point.disks[0].read_into(page, int(places[number]))
            seconds += time.perf_counter() - start
            if page != pages[number].tobytes():
                message = f"page {number} is not what was written"
                raise RuntimeError(message)
    return seconds
