"""The rule that lets one primary write a VM and no other.

    stored               claim                               outcome
    unknown VM           any                                 first owner
    same relationship    generation > stored                 goes on
    same relationship    generation <= stored                Fenced: a copied or older state folder
    other relationship   generation <= stored                Fenced: another primary owns the VM
    other relationship   generation > stored                 takeover

Each session of a primary is a new generation, recorded at the primary before it claims. So a state folder
that was copied, or restored from a backup, is fenced even if it lags by a single session.

The certificate is recorded and decides nothing here: it is renewed in the course of time, and who may write
which VM at all is the trust list's matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.clock import iso_time
from hvreplica.errors import Fenced, ReplicaDiverged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hvreplica.store.records import DiskRow, DiskSpec, Owner, VmRow


def validate_claim(row: VmRow, claim: Owner) -> None:
    """Refuse a claim that is not newer than who owns the VM. Raises: Fenced."""
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
    """Refuse a change by a session that does not own the VM any more. Raises: Fenced."""
    if (row.owner.relationship_id, row.owner.generation) != (owner.relationship_id, owner.generation):
        raise fenced(row.name)


def fenced(name: str) -> Fenced:
    """Return the error of a session whose VM was claimed by a newer one."""
    return Fenced(
        f"a newer session has claimed VM {name!r}", hint="end this session; the newer one goes on from here"
    )


def validate_same_disks(name: str, stored: Sequence[DiskRow], announced: Sequence[DiskSpec]) -> None:
    """Refuse disks other than those that the replica holds. Raises: ReplicaDiverged."""
    held = {row.spec.index: row.spec.shape for row in stored}
    offered = {spec.index: spec.shape for spec in announced}
    if held == offered:
        return
    different = sorted(
        index for index in held.keys() | offered.keys() if held.get(index) != offered.get(index)
    )
    raise ReplicaDiverged(
        f"the disks of VM {name!r} are not those that the replica holds",
        field=f"disk {different[0]}",
        expected=_describe(held.get(different[0])),
        actual=_describe(offered.get(different[0])),
        hint="give the same disks in the same order as at first; resizing or adding one is not possible yet",
    )


def _describe(shape: tuple[int, int, int] | None) -> str:
    return "no such disk" if shape is None else f"{shape[1]} bytes in sectors of {shape[2]}"
