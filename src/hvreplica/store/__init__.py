"""The replica store: what was received, what it means, and who may change it. Start at store.Store."""

from hvreplica.store.failover_status import ActiveDiskStatus, FailoverStatus, FiredrillStatus, failover_status
from hvreplica.store.open_point import OpenPoint
from hvreplica.store.point_diff import DiskDiff, PointDiff
from hvreplica.store.points import ExportReport
from hvreplica.store.promotion import Wish, cancel, commit, fail_over
from hvreplica.store.records import AlreadyHave, DiskRow, DiskSpec, LogSpec
from hvreplica.store.replica import VmReplica
from hvreplica.store.sinks import InitialSink, LogSink
from hvreplica.store.status import (
    DiskStatus,
    OwnerStatus,
    PointStatus,
    StoreStatus,
    TransferStatus,
    VmStatus,
)
from hvreplica.store.store import RecoveredVm, Store
from hvreplica.store.verify import PointVerdict, StoreVerdict, VmVerdict

__all__ = [
    "ActiveDiskStatus",
    "AlreadyHave",
    "DiskDiff",
    "DiskRow",
    "DiskSpec",
    "DiskStatus",
    "ExportReport",
    "FailoverStatus",
    "FiredrillStatus",
    "InitialSink",
    "LogSink",
    "LogSpec",
    "OpenPoint",
    "OwnerStatus",
    "PointDiff",
    "PointStatus",
    "PointVerdict",
    "RecoveredVm",
    "Store",
    "StoreStatus",
    "StoreVerdict",
    "TransferStatus",
    "VmReplica",
    "VmStatus",
    "VmVerdict",
    "Wish",
    "cancel",
    "commit",
    "fail_over",
    "failover_status",
]
