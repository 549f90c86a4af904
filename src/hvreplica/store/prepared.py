"""A planned failover as the replica knows it: the VM is off at its primary, its newest point is all of it.

claim ──> … ──> Prepare ──> PreparedForFailover, the newest point is of kind "planned"
│ any claim: the primary goes on; the point is a usual one again
│ failover planned: promoted without loss
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.errors import FailoverRefused
from hvreplica.store.failover import begin, pack_failover, unpack_failover

if TYPE_CHECKING:
    import uuid

    from hvreplica.store.catalog import Catalog
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import Owner, VmRow

PREPARED = "PreparedForFailover"


def record_prepared(home: VmHome, owner: Owner, point_id: uuid.UUID) -> None:
    """Record that the VM is off and that its newest point, which is applied, is all of it; durable on return.

    Raises: FailoverRefused where the point is another one, Fenced.
    """
    with home.catalog.transaction():
        home.require_owner(owner)
        points = home.catalog.points(home.vm_id)
        if not points or points[-1].id != point_id or points[-1].state != "complete":
            raise FailoverRefused(
                f"VM {home.name!r} is not on the point that its primary calls its last",
                path=home.paths.folder,
                expected=point_id,
                actual=f"{points[-1].id}, {points[-1].state}" if points else "no point",
                hint="prepare the failover again at the primary",
            )
        home.catalog.set_point_kind(home.vm_id, point_id, "planned")
        record = home.failover()
        if record.state != PREPARED:
            home.set_failover(begin(home.name, record, "prepare"))


def forget_prepared(catalog: Catalog, row: VmRow) -> None:
    """Take note that the primary goes on after all; inside the transaction that takes its claim."""
    record = unpack_failover(row.failover)
    if record.state != PREPARED or record.intent is not None:
        return
    catalog.set_failover(row.id, pack_failover(begin(row.name, record, "cancel")))
    points = catalog.points(row.id)
    if points and points[-1].kind == "planned":
        catalog.set_point_kind(row.id, points[-1].id, "standard")
