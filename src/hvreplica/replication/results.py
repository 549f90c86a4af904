"""What the replication verbs return; the JSON of the command line is these structures, field by field."""

from __future__ import annotations

import msgspec


class DiskChange(msgspec.Struct, frozen=True):
    """One disk of a replicate call.

    changed_bytes: guest bytes shipped as new or different, zeros included.
    """

    path: str
    virtual_bytes: int
    changed_bytes: int


class ShippedLog(msgspec.Struct, frozen=True):
    """One .hrl of a cycle.

    id: its UniqueId. path: where it stood in the state folder until it was acknowledged.
    """

    id: str
    path: str


class ReplicateResult(msgspec.Struct, frozen=True):
    """The outcome of one replicate call.

    kind: "initial" (the whole disks were shipped), "delta" (logs were shipped) or "none" (nothing differed).
    wire_bytes: bytes that this side put on the network, all connections and TLS included. seconds: wall time.
    point: the id of the recovery point that the replica now holds.
    """

    vm: str
    kind: str
    disks: list[DiskChange]
    wire_bytes: int
    seconds: float
    logs: list[ShippedLog]
    point: str
