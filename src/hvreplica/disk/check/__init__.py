"""Check the file of a disk for damage, and mend what can be mended without a guess.

findings.py   what a check says: findings, report, statistics      codes.py   every code and what it means
check.py      which format, which levels                           vhdx*.py   the checks of a VHDX
repair.py     plan, backup, changes, undo                          repair_vhdx.py   what a VHDX allows
"""

from __future__ import annotations

from hvreplica.disk.check.check import check_disk
from hvreplica.disk.check.codes import LEVELS, Level
from hvreplica.disk.check.findings import CheckReport, Finding, Statistics
from hvreplica.disk.check.repair import RepairReport, UndoReport, repair_disk, undo_repair

__all__ = [
    "LEVELS",
    "CheckReport",
    "Finding",
    "Level",
    "RepairReport",
    "Statistics",
    "UndoReport",
    "check_disk",
    "repair_disk",
    "undo_repair",
]
