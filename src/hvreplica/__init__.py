"""hvreplica: a second, bootable copy of a virtual machine's disks at another site.

The public functions are loaded at first use, so that importing the package costs nothing; docs/embedding.md
shows them at work.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvreplica.formats.messages import PointPolicy
    from hvreplica.progress import Progress
    from hvreplica.replication.adopt_verb import store_adopt
    from hvreplica.replication.capture_verb import Capture
    from hvreplica.replication.disk_change import disk_compact, disk_resize
    from hvreplica.replication.disk_check import disk_check, disk_repair, disk_repair_undo
    from hvreplica.replication.disk_merge import disk_merge, disk_rebase
    from hvreplica.replication.disk_verbs import (
        disk_compare,
        disk_convert,
        disk_create,
        disk_info,
        disk_map,
    )
    from hvreplica.replication.extend_verb import Extender, extend
    from hvreplica.replication.failover_verbs import (
        failover_cancel,
        failover_commit,
        failover_status,
        failover_test_cleanup,
        failover_unplanned,
    )
    from hvreplica.replication.firedrill_server import FiredrillServer
    from hvreplica.replication.live_verbs import cut, pause, reset_statistics, resume, status
    from hvreplica.replication.log_import import log_import
    from hvreplica.replication.log_qemu import log_from_qemu
    from hvreplica.replication.log_sources import log_from_child
    from hvreplica.replication.log_verbs import log_apply, log_dump, log_info, log_recover, log_verify
    from hvreplica.replication.planned_verb import failover_planned
    from hvreplica.replication.point_server import PointServer
    from hvreplica.replication.prepare_verbs import cancel_prepare
    from hvreplica.replication.replicas import Replica
    from hvreplica.replication.resident import Replicator
    from hvreplica.replication.results import CutLog, CutResult, DiskChange, ReplicateResult, ShippedLog
    from hvreplica.replication.retention_verbs import (
        point_at,
        point_delete,
        point_instants,
        point_plan,
        store_policy,
    )
    from hvreplica.replication.reverse_verb import failover_reverse
    from hvreplica.replication.serve import Server
    from hvreplica.replication.statistics import ReplicationStatistics
    from hvreplica.replication.status import ReplicationStatus
    from hvreplica.replication.store_verbs import (
        point_diff,
        point_export,
        point_list,
        point_verify,
        store_status,
        store_verify,
    )
    from hvreplica.replication.tls_verbs import tls_init, tls_nbd, tls_trust
    from hvreplica.replication.verbs import replicate
    from hvreplica.replication.version import VERSION as __version__  # noqa: N811 - the name that Python tools look for

__all__ = [
    "Capture",
    "CutLog",
    "CutResult",
    "DiskChange",
    "Extender",
    "FiredrillServer",
    "PointPolicy",
    "PointServer",
    "Progress",
    "Replica",
    "ReplicateResult",
    "ReplicationStatistics",
    "ReplicationStatus",
    "Replicator",
    "Server",
    "ShippedLog",
    "__version__",
    "cancel_prepare",
    "cut",
    "disk_check",
    "disk_compact",
    "disk_compare",
    "disk_convert",
    "disk_create",
    "disk_info",
    "disk_map",
    "disk_merge",
    "disk_rebase",
    "disk_repair",
    "disk_repair_undo",
    "disk_resize",
    "extend",
    "failover_cancel",
    "failover_commit",
    "failover_planned",
    "failover_reverse",
    "failover_status",
    "failover_test_cleanup",
    "failover_unplanned",
    "log_apply",
    "log_dump",
    "log_from_child",
    "log_from_qemu",
    "log_import",
    "log_info",
    "log_recover",
    "log_verify",
    "pause",
    "point_at",
    "point_delete",
    "point_diff",
    "point_export",
    "point_instants",
    "point_list",
    "point_plan",
    "point_verify",
    "replicate",
    "reset_statistics",
    "resume",
    "status",
    "store_adopt",
    "store_policy",
    "store_status",
    "store_verify",
    "tls_init",
    "tls_nbd",
    "tls_trust",
]

_HOMES = {
    "failover_planned": "replication.planned_verb",
    "failover_reverse": "replication.reverse_verb",
    "store_adopt": "replication.adopt_verb",
    "cancel_prepare": "replication.prepare_verbs",
    "Capture": "replication.capture_verb",
    "CutLog": "replication.results",
    "CutResult": "replication.results",
    "FiredrillServer": "replication.firedrill_server",
    "PointServer": "replication.point_server",
    "Replica": "replication.replicas",
    "Replicator": "replication.resident",
    "ReplicationStatistics": "replication.statistics",
    "ReplicationStatus": "replication.status",
    "cut": "replication.live_verbs",
    "pause": "replication.live_verbs",
    "reset_statistics": "replication.live_verbs",
    "resume": "replication.live_verbs",
    "status": "replication.live_verbs",
    "DiskChange": "replication.results",
    "Extender": "replication.extend_verb",
    "extend": "replication.extend_verb",
    "PointPolicy": "formats.messages",
    "Progress": "progress",
    "ReplicateResult": "replication.results",
    "Server": "replication.serve",
    "ShippedLog": "replication.results",
    "__version__": "replication.version",
    "disk_check": "replication.disk_check",
    "disk_merge": "replication.disk_merge",
    "disk_rebase": "replication.disk_merge",
    "disk_compact": "replication.disk_change",
    "disk_repair": "replication.disk_check",
    "disk_repair_undo": "replication.disk_check",
    "disk_resize": "replication.disk_change",
    "log_from_child": "replication.log_sources",
    "log_from_qemu": "replication.log_qemu",
    "log_import": "replication.log_import",
    "point_at": "replication.retention_verbs",
    "point_instants": "replication.retention_verbs",
    "point_delete": "replication.retention_verbs",
    "point_plan": "replication.retention_verbs",
    "store_policy": "replication.retention_verbs",
    "replicate": "replication.verbs",
}
_FAMILIES = {
    "disk": "disk_verbs",
    "failover": "failover_verbs",
    "log": "log_verbs",
    "point": "store_verbs",
    "store": "store_verbs",
    "tls": "tls_verbs",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    home = _HOMES.get(name) or f"replication.{_FAMILIES[name.partition('_')[0]]}"
    module = import_module(f"{__name__}.{home}")
    value: object = getattr(module, "VERSION" if name == "__version__" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
