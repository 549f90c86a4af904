"""The rule that lets one primary write a VM and no other.

    stored               claim                               outcome
    unknown VM           any                                 first owner
    same relationship    generation > stored                 goes on
    same relationship    generation <= stored                Fenced: a copied or older state folder
    other relationship   generation <= stored                Fenced: another primary owns the VM
    other relationship   generation > stored                 takeover
    VM failed over here  any                                 Fenced: the replica is frozen (store/failover.py)

Each session of a primary is a new generation, recorded at the primary before it claims. So a state folder
that was copied, or restored from a backup, is fenced even if it lags by a single session.

The certificate is recorded and decides nothing here: it is renewed in the course of time, and who may write
which VM at all is the trust list's matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.clock import iso_time
from hvreplica.errors import Fenced, ReplicaDiverged
from hvreplica.store.failover import require_thawed, unpack_failover

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hvreplica.store.records import DiskRow, DiskSpec, Owner, VmRow


def validate_claim(row: VmRow, claim: Owner) -> None:
    """Refuse a claim that is not newer than who owns the VM, or of one that is frozen. Raises: Fenced."""
    require_thawed(row.name, unpack_failover(row.failover))
    owner = row.owner
    same_primary = claim.relationship_id == owner.relationship_id
    if claim.generation > owner.generation:
        return
    if same_primary:
        error = Fenced(
            f"a newer session of the same primary owns VM {row.name!r}, claimed {iso_time(row.claimed_s)}",
            field="generation",
            expected=f"above {owner.generation}",
            actual=claim.generation,
            hint="this state folder is an old copy: use the newer one, or make this the primary with"
            " `hvreplica replicate --takeover`",
        )
    else:
        error = Fenced(
            f"VM {row.name!r} belongs to another primary: relationship {owner.relationship_id},"
            f" certificate {owner.certificate}, claimed {iso_time(row.claimed_s)}",
            field="generation",
            expected=f"above {owner.generation} for a takeover",
            actual=claim.generation,
            hint="stop the other primary first; then `hvreplica replicate --takeover` makes this one the"
            " primary",
        )
    error.generation = owner.generation
    raise error


def validate_owner(row: VmRow, owner: Owner) -> None:
    """Refuse a change by a session that does not own the VM any more, or of a frozen one. Raises: Fenced."""
    require_thawed(row.name, unpack_failover(row.failover))
    if (row.owner.relationship_id, row.owner.generation) != (owner.relationship_id, owner.generation):
        raise fenced(row.name)


def fenced(name: str) -> Fenced:
    """Return the error of a session whose VM was claimed by a newer one."""
    return Fenced(
        f"a newer session has claimed VM {name!r}", hint="end this session; the newer one goes on from here"
    )


def validate_disks_follow(
    name: str, stored: Sequence[DiskRow], announced: Sequence[DiskSpec], removed: set[int]
) -> None:
    """Refuse disks that cannot be those that the replica holds, as they are now. Raises: ReplicaDiverged.

    Sizes may differ and disks may be new, but none may be missing unless it is among `removed`, and none may
    stand in another's place.
    """
    held = {row.spec.index: row for row in stored}
    offered = {spec.index: spec for spec in announced}
    owners = {row.spec.virtual_disk_id: row.spec.index for row in stored if row.is_held}
    for index in sorted(held.keys() | offered.keys()):
        row, spec = held.get(index), offered.get(index)
        if spec is None:
            wrong = row is not None and row.is_held and index not in removed
        elif row is not None and row.removed_s is not None:
            wrong = index not in removed
        else:
            other = offered.get(owners.get(spec.virtual_disk_id, index))
            # A file that was copied has the identity of its original, which is then announced too.
            is_elsewhere = other is None or other.virtual_disk_id != spec.virtual_disk_id
            has_sectors = row is None or not row.is_held or row.spec.key == spec.key
            wrong = (spec.virtual_disk_id is not None and is_elsewhere) or not has_sectors
        if wrong:
            diverged = ReplicaDiverged(
                f"the disks of VM {name!r} are not those that the replica holds",
                field=f"disk {index}",
                expected=_describe(row),
                actual="no such disk" if spec is None else _describe_spec(spec),
                hint="give the same disks as before; say which one is gone with --remove-disk",
            )
            if row is not None and row.removed_s is not None:
                diverged.removed_disk = index
            raise diverged


def _describe(row: DiskRow | None) -> str:
    if row is None:
        return "no such disk"
    return "none, it was removed" if row.removed_s is not None else _describe_spec(row.spec)


def _describe_spec(spec: DiskSpec) -> str:
    text = f"{spec.virtual_bytes} bytes in sectors of {spec.logical_sector_bytes}"
    return text if spec.virtual_disk_id is None else f"{text}, VirtualDiskId {spec.virtual_disk_id}"
