"""Every world that a power cut may leave, made from one trace; the fault model stands in faultfile.py."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.support.memfiles import FaultFiles
from tests.support.sparse import CHUNK_BYTES, SparseBytes
from tests.support.trace import SECTOR_BYTES, Event, FileTree

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.support.trace import Trace

_DATA_KINDS = {"write", "zero", "resize"}
_NAME_KINDS = {"create", "link", "rename", "unlink"}
_BARRIERS = {"sync", "sync_directory", "link", "rename", "note", "unlink"}

# (data, names) of the first subsets at every prefix; the later ones draw both. Data lost under a new name is
# the classic mistake (rename before sync), so it stands early.
_FIXED_MODES = (("none", "none"), ("all", "all"), ("none", "all"), ("draw", "draw"), ("all", "none"))
_DATA_MODES = ("none", "all", "few", "half", "most", "prefix", "prefix")
_KEEP = {"few": 0.1, "half": 0.5, "most": 0.9}


def crash_states(
    trace: Trace,
    *,
    seed: int = 0,
    subsets_per_prefix: int = 5,
    limit: int | None = 2000,
    distinct: bool = False,
) -> Iterator[tuple[int, FaultFiles]]:
    """Yield (index, world): power was lost after `index` events, 0..len(trace), and this came back.

    The same arguments give the same worlds. Where nothing was pending one world is given instead of
    `subsets_per_prefix`. limit: at most so many worlds; the prefixes are then a sample that prefers the
    places just before and after a sync, a rename and a note. world.story says how it came about.

    distinct: leave out a world with the names, contents and notes of one that was given before, which is up
    to half of them: for whoever does not look at the times of files, and does not count worlds.
    """
    chosen = _choose_prefixes(trace.events, seed, subsets_per_prefix, limit)
    replay = _Replay(trace.start.copy())
    notes: list[tuple[str, Any]] = list(trace.notes)
    given: set[int] = set()
    for index in range(len(trace.events) + 1):
        if index > 0:
            event = trace.events[index - 1]
            replay.feed(event)
            if event.kind == "note":
                notes.append((event.label, event.value))
        if index not in chosen:
            continue
        subsets = subsets_per_prefix if replay.is_pending() else 1
        for subset in range(subsets):
            world = replay.world(f"{seed}/{index}/{subset}", subset)
            if distinct:
                known = hash((world.digest(), len(notes)))
                if known in given:
                    continue
                given.add(known)
            world.notes = list(notes)
            last = trace.events[index - 1] if index else "nothing"
            world.story = f"power lost after {index} of {len(trace.events)} events ({last}); {world.story}"
            world.settle()
            yield index, world


def worlds_after(trace: Trace, *, seed: int = 0, subsets: int = 5) -> list[FaultFiles]:
    """Return worlds that a power cut after the last event may leave: the end of crash_states(), without the way."""
    replay = _Replay(trace.start.copy())
    notes: list[tuple[str, Any]] = list(trace.notes)
    for event in trace.events:
        replay.feed(event)
        if event.kind == "note":
            notes.append((event.label, event.value))
    worlds = []
    for subset in range(subsets if replay.is_pending() else 1):
        world = replay.world(f"{seed}/{subset}", subset)
        world.notes = list(notes)
        world.story = f"power lost after {len(trace.events)} events; {world.story}"
        world.settle()
        worlds.append(world)
    return worlds


def _choose_prefixes(events: Sequence[Event], seed: int, subsets: int, limit: int | None) -> set[int]:
    count = len(events) + 1
    if limit is None or count * subsets <= limit:
        return set(range(count))
    wanted = max(limit // subsets, 1)
    near = {0, len(events)}
    for index, event in enumerate(events):
        if event.kind in _BARRIERS:
            near.update((index, index + 1))
    far = sorted(set(range(count)) - near)
    rng = random.Random(f"{seed}/prefixes")
    near_count = min(len(near), max(wanted * 2 // 3, wanted - len(far)))
    return set(rng.sample(sorted(near), near_count)) | set(
        rng.sample(far, min(len(far), wanted - near_count))
    )


@dataclass(slots=True)
class _Inode:
    durable: SparseBytes = field(default_factory=SparseBytes)
    pending: list[Event] = field(default_factory=list)
    mtime_ns: int = 0  # of what is durable
    done: int = 0  # steps that are no longer pending
    begun: dict[int, int] = field(default_factory=dict)  # by token: the steps that a sync under way covers

    def begin(self, token: int) -> None:
        self.begun[token] = self.done + len(self.pending)

    def sync(self, token: int) -> None:
        end = self.begun.pop(token) if token else self.done + len(self.pending)
        count = max(end - self.done, 0)
        for event in self.pending[:count]:
            apply_to_content(self.durable, event)
            self.mtime_ns = event.time_ns
        self._drop(count)

    def lose(self) -> None:
        self._drop(len(self.pending))

    def _drop(self, count: int) -> None:
        del self.pending[:count]
        self.done += count


class _Replay:
    """The durable half of the world at one place of the trace, and what is still pending."""

    def __init__(self, start: FileTree) -> None:
        self._folders = start.folders
        self._names = start.names
        self._pending: list[Event] = []
        self._begun: dict[int, list[Event]] = {}  # by token: the names that a sync under way covers
        self._inodes = {
            inode: _Inode(content, mtime_ns=start.mtimes_ns.get(inode, 0))
            for inode, content in start.contents.items()
        }

    def feed(self, event: Event) -> None:
        if event.kind == "create":
            self._inodes[event.inode] = _Inode(mtime_ns=event.time_ns)
        if event.kind in _NAME_KINDS:
            self._pending.append(event)
        elif event.kind in _DATA_KINDS:
            self._inodes[event.inode].pending.append(event)
        elif event.kind == "sync_begin" and event.inode:
            self._inodes[event.inode].begin(event.token)
        elif event.kind == "sync_begin":
            self._begun[event.token] = list(self._pending)
        elif event.kind == "sync":
            self._inodes[event.inode].sync(event.token)
        elif event.kind == "sync_failed":
            self._inodes[event.inode].lose()
        elif event.kind == "mkdir":
            self._folders.add(event.path)
        elif event.kind == "sync_directory":
            covered = self._begun.pop(event.token) if event.token else self._pending
            self._sync_folder(event.path, covered)

    def is_pending(self) -> bool:
        return bool(self._pending) or any(inode.pending for inode in self._inodes.values())

    def world(self, seed: str, subset: int) -> FaultFiles:
        rng = random.Random(seed)
        data_mode, name_mode = _FIXED_MODES[subset] if subset < len(_FIXED_MODES) else ("draw", "draw")
        names = dict(self._names)
        kept = 0
        for group in _groups(self._pending):
            count = {"none": 0, "all": len(group)}.get(name_mode, rng.randint(0, len(group)))
            kept += count
            for event in group[:count]:
                apply_to_names(names, event)
        contents, mtimes = {}, {}
        story = [f"names kept {kept} of {len(self._pending)}"]
        for path, number in sorted(names.items()):
            inode = self._inodes[number]
            contents[number] = inode.durable.copy()
            mtimes[number] = inode.mtime_ns
            if inode.pending:
                # The inode's time is no part of its data: any of them may have come to the disk by itself.
                times = [inode.mtime_ns, *(event.time_ns for event in inode.pending)]
                mtimes[number] = random.Random(f"{seed}/{number}").choice(times)
                mode = rng.choice(_DATA_MODES) if data_mode == "draw" else data_mode
                _survive(contents[number], inode.pending, mode, rng)
                story.append(f"{path} {mode} of {len(inode.pending)} pending steps")
        world = FaultFiles(tree=FileTree(set(self._folders), names, contents, mtimes))
        world.story = ", ".join([*story, f"seed {seed}"])
        return world

    def _sync_folder(self, folder: Path, covered: list[Event]) -> None:
        still = {id(event) for event in self._pending}
        for group in _groups([event for event in covered if id(event) in still]):
            if any(folder in _folders_of(event) for event in group):
                for event in group:
                    apply_to_names(self._names, event)
                done = {id(event) for event in group}
                self._pending = [event for event in self._pending if id(event) not in done]


def _folders_of(event: Event) -> set[Path]:
    return {event.path.parent} | ({event.target.parent} if event.target is not None else set())


def _groups(pending: Sequence[Event]) -> list[list[Event]]:
    """Split name steps by folder; folders that a pending rename joins stay together, since it is whole."""
    groups: list[tuple[set[Path], list[Event]]] = []
    for event in pending:
        folders, steps = _folders_of(event), [event]
        apart = []
        for other_folders, other_steps in groups:
            if folders & other_folders:
                folders |= other_folders
                steps = other_steps + steps
            else:
                apart.append((other_folders, other_steps))
        groups = [*apart, (folders, steps)]
    order = {id(event): index for index, event in enumerate(pending)}
    return [sorted(steps, key=lambda event: order[id(event)]) for _, steps in groups]


def apply_to_names(names: dict[Path, int], event: Event) -> None:
    """Take one step of names: create, link, rename or unlink."""
    if event.kind in {"rename", "unlink"}:
        names.pop(event.path, None)
    if event.kind in {"create", "link"}:
        names[event.path] = event.inode
    if event.target is not None:
        names[event.target] = event.inode


def apply_to_content(content: SparseBytes, event: Event) -> None:
    """Take one step of data: write, zero or resize."""
    if event.kind == "write":
        content.write(memoryview(event.data), event.offset)
    elif event.kind == "zero":
        content.zero(event.offset, event.offset + event.length)
    else:
        content.resize(event.length)


def _survive(content: SparseBytes, pending: list[Event], mode: str, rng: random.Random) -> None:
    """Turn the durable `content` into what came back."""
    if mode == "all":
        for event in pending:
            apply_to_content(content, event)
    elif mode == "prefix":
        count = rng.randint(0, len(pending))
        for event in pending[:count]:
            apply_to_content(content, event)
        if count < len(pending) and pending[count].kind == "write":
            torn = pending[count]
            ends = -(-(torn.offset + torn.length) // SECTOR_BYTES) - torn.offset // SECTOR_BYTES
            end = (torn.offset // SECTOR_BYTES + rng.randint(0, ends)) * SECTOR_BYTES
            content.write(memoryview(torn.data)[: max(end - torn.offset, 0)], torn.offset)
    elif mode != "none":
        _draw_sectors(content, pending, _KEEP[mode], rng)


def _draw_sectors(content: SparseBytes, pending: list[Event], keep: float, rng: random.Random) -> None:
    """Give each sector one of its versions and the file one of its sizes."""
    sizes = [content.size_bytes]
    spans = []
    for event in pending:
        start, end = _span(event, sizes[-1])
        spans.append((start, end))
        size = event.length if event.kind == "resize" else sizes[-1]
        sizes.append(max(size, end) if event.kind == "write" else size)
    sectors, counts = _touched(content, pending, spans)
    numbers = np.random.default_rng(rng.getrandbits(64))
    versions = np.where(
        numbers.random(len(sectors)) < keep, counts, numbers.integers(0, np.maximum(counts, 1))
    )
    seen = np.zeros(len(sectors), dtype=np.int64)
    for event, (start, end) in zip(pending, spans, strict=True):
        low, high = _sector_slice(sectors, start, end)
        if low == high:
            continue
        seen[low:high] += 1
        for first, last in _runs(sectors[low:high][seen[low:high] <= versions[low:high]]):
            piece_start, piece_end = max(first * SECTOR_BYTES, start), min(last * SECTOR_BYTES, end)
            if event.kind == "write":
                data = memoryview(event.data)[piece_start - event.offset : piece_end - event.offset]
                content.write(data, piece_start)
            else:
                content.zero(piece_start, piece_end)
    size = sizes[-1] if rng.random() < keep else rng.choice(sizes)
    content.size_bytes = max(content.size_bytes, size)  # so that the cut below clears what lies behind it
    content.resize(size)


def _span(event: Event, size: int) -> tuple[int, int]:
    """Return the bytes whose content the step changes; a cut clears all behind it, a growth nothing."""
    if event.kind == "resize":
        return (event.length, size) if event.length < size else (event.length, event.length)
    return event.offset, event.offset + event.length


def _touched(
    content: SparseBytes, pending: list[Event], spans: list[tuple[int, int]]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the sectors that matter, sorted, and by how many steps each is touched.

    Zeroing what holds nothing changes nothing, so that only held and written sectors count: a hole of
    terabytes is free.
    """
    per_chunk = CHUNK_BYTES // SECTOR_BYTES
    pieces = [
        np.arange(start // SECTOR_BYTES, -(-end // SECTOR_BYTES))
        for event, (start, end) in zip(pending, spans, strict=True)
        if event.kind == "write"
    ]
    if any(event.kind != "write" and end > start for event, (start, end) in zip(pending, spans, strict=True)):
        chunks = np.array(sorted(content.chunk_indexes()), dtype=np.int64)
        pieces.append((chunks[:, None] * per_chunk + np.arange(per_chunk)).ravel())
    sectors = np.unique(np.concatenate(pieces)) if pieces else np.zeros(0, dtype=np.int64)
    counts = np.zeros(len(sectors), dtype=np.int64)
    for start, end in spans:
        low, high = _sector_slice(sectors, start, end)
        counts[low:high] += 1
    return sectors, counts


def _sector_slice(sectors: np.ndarray[Any, Any], start: int, end: int) -> tuple[int, int]:
    if end <= start:
        return 0, 0
    low, high = np.searchsorted(sectors, [start // SECTOR_BYTES, -(-end // SECTOR_BYTES)])
    return int(low), int(high)


def _runs(sectors: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Return [first, last) of each run of neighbouring numbers in a sorted array."""
    if len(sectors) == 0:
        return []
    breaks = np.flatnonzero(np.diff(sectors) != 1) + 1
    firsts = sectors[np.concatenate(([0], breaks))]
    lasts = sectors[np.concatenate((breaks - 1, [len(sectors) - 1]))] + 1
    return [(int(first), int(last)) for first, last in zip(firsts, lasts, strict=True)]
