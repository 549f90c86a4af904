"""Change by a dirty bitmap of QEMU: what a VM that QEMU serves itself wrote since the last log.

    node ──guest writes──> NAME        (until the instant)
     │                └──> NAME.next   (from the instant on)
     └─ job F, sync=none: before the guest overwrites a cluster, its old content goes to a scratch file
              │
        snapshot access: the disk at the instant ── job P, the clusters of NAME ──NBD──> LogSink ──> a log

One transaction begins NAME.next, stops NAME and starts F: that is the instant. Only when the log is durable
does settle() let NAME.next take the place of NAME, at once. Until then NAME and NAME.next together hold every
change that is in no durable log; whoever finds a NAME.next that an earlier run left puts the two together.
So a change may come twice and is never lost, but with QEMU itself: a bitmap lives in its memory.

F stands between P and the guest, because QEMU fails a guest's write whose old content it cannot put away:
with us as its target, our death would be the guest's error. docs/design/0013-qemu-bitmaps.md
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING

import msgspec

from hvreplica.capture.listen import NbdListener
from hvreplica.capture.log_sink import LogSink
from hvreplica.errors import HvReplicaError, QemuRefused, TrackingLost, kept
from hvreplica.files import OS_FILES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hvreplica.capture.qmp import Qmp
    from hvreplica.files import FileSystem
    from hvreplica.tracking.compare import ChangeSink

_CLIENTS_MAX = 4  # QEMU uses one; its reconnect may come before we saw the end of the last


class _Bitmap(msgspec.Struct):
    """A dirty bitmap. Those that jobs make for themselves have no name."""

    recording: bool
    busy: bool
    name: str = ""
    inconsistent: bool = False


class _Image(msgspec.Struct, rename="kebab"):
    virtual_size: int


class _Node(msgspec.Struct, rename="kebab"):
    node_name: str
    image: _Image
    dirty_bitmaps: list[_Bitmap] = []


class QemuBitmap:
    """A ChangeSource for one node of a QEMU and the bitmap that we keep on it. One owner.

    changes_into(), then settle() once the sink is durable, again and again. With `full`, everything that the
    node holds is a change: so tracking begins, or begins anew after it was lost.
    """

    def __init__(
        self,
        qmp: Qmp,
        node: str,
        bitmap: str,
        *,
        scratch: Path,
        full: bool = False,
        files: FileSystem = OS_FILES,
    ) -> None:
        """scratch: a folder in which QEMU may open our socket and our file; see docs/sources.md."""
        self._qmp = qmp
        self._node = node
        self._bitmap = bitmap
        self._next = f"{bitmap}.next"
        self._full = full
        self._files = files
        self.virtual_bytes = 0  # of the node, once changes_into() has looked
        # Names that a later run finds again, and that fit into the 31 bytes of a node's name.
        tag = hashlib.sha256(f"{node}\0{bitmap}".encode()).hexdigest()[:10]
        self._copy_job, self._push_job = f"hvr-{tag}-copy", f"hvr-{tag}-push"
        self._filter, self._access = f"hvr-{tag}-filter", f"hvr-{tag}-access"
        self._old_data, self._target = f"hvr-{tag}-old", f"hvr-{tag}-sink"
        self._socket, self._old_file = scratch / f".hvr-{tag}.sock", scratch / f".hvr-{tag}.old"

    def changes_into(self, sink: ChangeSink, *, on_read: Callable[[int], None]) -> int:
        """See ChangeSource: what changed since the last settled call, as the node held it at one instant.

        After a failure, or without a settle(), the next call tells of it again. Raises: TrackingLost where
        the bitmap is gone; QemuRefused, PeerClosed; what the sink raises.
        """
        self._clear_up()
        self._put_together()
        node = self._require_bitmap()
        self.virtual_bytes = node.image.virtual_size
        received = LogSink(sink, self.virtual_bytes, on_read)
        try:
            with NbdListener(
                self._socket,
                lambda: [received.export],
                received.serve,
                connections_max=_CLIENTS_MAX,
                files=self._files,
            ):
                self._push()
                self._clear_up()
        except BaseException as error:
            with contextlib.suppress(HvReplicaError):  # QEMU may be gone; the next call tries again
                self._clear_up()
                self._put_together()
            if isinstance(error, QemuRefused) and received.failure is not None:
                raise kept(received.failure) from None  # QEMU only told what it was told
            raise
        return received.changed_bytes

    def settle(self) -> None:
        """Let go of the changes that changes_into() told last: they are durable elsewhere."""
        bitmaps = self._bitmaps()
        if self._next not in bitmaps:
            return
        begin = "block-dirty-bitmap-clear" if self._bitmap in bitmaps else "block-dirty-bitmap-add"
        self._qmp.transact((begin, self._named(self._bitmap)), *self._joining())

    def _require_bitmap(self) -> _Node:
        """Return the node. Raises: TrackingLost unless its bitmap knows every change, or none is needed."""
        node = self._find_node()
        bitmap = self._bitmaps().get(self._bitmap)
        if bitmap is not None and bitmap.busy:
            raise QemuRefused(f"another job uses the bitmap {self._bitmap} of {self._node}")
        if self._full:
            if bitmap is not None and bitmap.inconsistent:
                self._qmp.execute("block-dirty-bitmap-remove", **self._named(self._bitmap))
            return node
        if bitmap is None or bitmap.inconsistent or not bitmap.recording:
            state = "no such bitmap" if bitmap is None else "one that missed writes"
            raise TrackingLost(
                "QEMU does not know what changed since the last log",
                field="bitmap",
                expected=f"{self._bitmap} on {self._node}, recording",
                actual=state,
                hint="a QEMU that ends forgets its bitmaps. Begin anew with --full, or compare the disk while"
                " the VM rests: `hvreplica replicate`",
            )
        return node

    def _push(self) -> None:
        """Take the instant, and have QEMU write what it held to our export."""
        execute = self._qmp.execute
        where = {"type": "unix", "path": str(self._socket)}
        execute("blockdev-add", driver="nbd", node_name=self._target, server=where)
        self._add_old_data()
        stop = (
            ()
            if self._bitmap not in self._bitmaps()
            else (("block-dirty-bitmap-disable", self._named(self._bitmap)),)
        )
        copy: dict[str, object] = {
            "job-id": self._copy_job,
            "device": self._node,
            "target": self._old_data,
            "sync": "none",
            "filter-node-name": self._filter,
            "auto-dismiss": False,
        }
        self._qmp.transact(
            ("block-dirty-bitmap-add", self._named(self._next)), *stop, ("blockdev-backup", copy)
        )
        execute("blockdev-add", driver="snapshot-access", node_name=self._access, file=self._filter)
        what: dict[str, object] = {"sync": "full"}
        if not self._full:
            on_access: dict[str, object] = {"node": self._access, "name": self._bitmap}
            execute("block-dirty-bitmap-add", **on_access, disabled=True)
            execute(
                "block-dirty-bitmap-merge",
                node=self._access,
                target=self._bitmap,
                bitmaps=[self._named(self._bitmap)],
            )
            what = {"sync": "bitmap", "bitmap": self._bitmap, "bitmap-mode": "never"}
        execute(
            "blockdev-backup",
            job_id=self._push_job,
            device=self._access,
            target=self._target,
            auto_dismiss=False,
            **what,
        )
        job = self._qmp.wait_for(self._push_job)
        if job.error is not None:
            raise QemuRefused(f"QEMU could not push the changes of {self._node}: {job.error}")

    def _add_old_data(self) -> None:
        """Give QEMU a sparse file for what the guest overwrites; it has no name once QEMU has it open."""
        file = self._files.open(self._old_file, create=True, mode=0o600)
        try:
            file.resize(self.virtual_bytes)
        finally:
            file.close()
        try:
            self._qmp.execute(
                "blockdev-add",
                driver="raw",
                node_name=self._old_data,
                file={"driver": "file", "filename": str(self._old_file)},
            )
        finally:
            self._files.unlink(self._old_file)

    def _clear_up(self) -> None:
        """End what this run, or one that died, has begun in QEMU; bitmaps stay."""
        self._end_job(self._push_job)
        self._remove_nodes(self._target, self._access)
        self._end_job(self._copy_job)
        self._remove_nodes(self._old_data)

    def _end_job(self, name: str) -> None:
        job = self._qmp.job(name)
        if job is None:
            return
        if job.status != "concluded":
            self._qmp.execute("job-cancel", id=name)
            self._qmp.wait_for(name)
        self._qmp.execute("job-dismiss", id=name)

    def _remove_nodes(self, *names: str) -> None:
        present = {node.node_name for node in self._nodes()}
        for name in names:
            if name in present:
                self._qmp.execute("blockdev-del", node_name=name)

    def _put_together(self) -> None:
        """Make one bitmap of the two that a run left which never came to settle()."""
        bitmaps = self._bitmaps()
        if self._next not in bitmaps:
            return
        if self._bitmap in bitmaps:
            self._qmp.transact(*self._joining())
        else:  # the first log of all, which nobody has: what came after it is of no use
            self._qmp.execute("block-dirty-bitmap-remove", **self._named(self._next))

    def _joining(self) -> tuple[tuple[str, dict[str, object]], ...]:
        merge: dict[str, object] = {"node": self._node, "target": self._bitmap, "bitmaps": [self._next]}
        return (
            ("block-dirty-bitmap-merge", merge),
            ("block-dirty-bitmap-enable", self._named(self._bitmap)),
            ("block-dirty-bitmap-remove", self._named(self._next)),
        )

    def _named(self, bitmap: str) -> dict[str, object]:
        return {"node": self._node, "name": bitmap}

    def _nodes(self) -> list[_Node]:
        return self._qmp.execute("query-named-block-nodes", list[_Node], flat=True)

    def _find_node(self) -> _Node:
        nodes = self._nodes()
        for node in nodes:
            if node.node_name == self._node:
                return node
        raise QemuRefused(
            f"this QEMU has no block node {self._node}",
            field="node",
            expected=", ".join(sorted(node.node_name for node in nodes)),
            actual=self._node,
            hint="give the disk a name in QEMU's command line: -blockdev node-name=NAME,...",
        )

    def _bitmaps(self) -> dict[str, _Bitmap]:
        return {bitmap.name: bitmap for bitmap in self._find_node().dirty_bitmaps}
