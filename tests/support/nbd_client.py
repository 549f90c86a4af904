"""A minimal NBD client with many requests under way, and what a server must keep of what it was answered.

Every written sector says which request wrote it and where it belongs, so that the content of a disk is an
array of request numbers. No two requests that overlap are ever under way at once: their order would be
nobody's promise.
"""

from __future__ import annotations

import random
import select
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

SECTOR = 512
READ, WRITE, DISCONNECT, FLUSH, TRIM, ZEROES = 0, 1, 2, 3, 4, 6
FUA, NO_HOLE = 1, 2
_REQUEST = struct.Struct(">IHHQQI")
_SIMPLE = struct.Struct(">IIQ")
_REQUEST_MAGIC, _SIMPLE_MAGIC, _OPTION_REPLY_MAGIC = 0x25609513, 0x67446698, 0x3E889045565A9
_GREETING_BYTES, _OPTION_HEADER = 18, struct.Struct(">QIII")
_GO, _ACK = 7, 1


def content(number: int, sector: int, count: int) -> bytes:
    """Return what request `number` writes to `count` sectors from `sector` on."""
    words = np.empty((count, SECTOR // 8), np.uint64)
    words[:, 0::2] = number
    words[:, 1::2] = np.arange(sector, sector + count, dtype=np.uint64)[:, None]
    return words.tobytes()


def numbers_of(data: bytes | bytearray | memoryview | NDArray[np.uint8], sector: int) -> NDArray[np.int64]:
    """Return the request that wrote each sector; 0 for zeros, -1 for bytes that nobody wrote there."""
    words = np.frombuffer(data, np.uint64).reshape(-1, SECTOR // 8)
    numbers = words[:, 0].astype(np.int64)
    places = np.arange(sector, sector + len(words), dtype=np.uint64)
    right = (words[:, 0::2] == words[:, :1]).all(axis=1)
    right &= (words[:, 1::2] == np.where(numbers > 0, places, 0)[:, None]).all(axis=1)
    numbers[~right] = -1
    return numbers


def request_bytes(
    number: int, command: int, offset: int, length: int, *, flags: int = 0, data: bytes = b""
) -> bytes:
    """Return a request as it is sent; its number is its cookie."""
    return _REQUEST.pack(_REQUEST_MAGIC, flags, command, number, offset, length) + data


class Connection:
    """One connection to an export, in the transmission phase, with simple replies."""

    def __init__(self, address: Path | tuple[str, int], export: str, *, timeout_s: float = 60) -> None:
        """Connect and choose. Raises: ConnectionError if the server does not let us."""
        family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(timeout_s)
        self.size_bytes = 0
        try:
            self.socket.connect(address if isinstance(address, tuple) else str(address))
            self._negotiate(export)
        except BaseException:
            self.socket.close()
            raise

    def _negotiate(self, export: str) -> None:
        magic, option_magic, _ = struct.unpack(">8s8sH", self.receive(_GREETING_BYTES))
        if (magic, option_magic) != (b"NBDMAGIC", b"IHAVEOPT"):
            message = "this is no NBD server"
            raise ConnectionError(message)
        name = export.encode()
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self.socket.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", _GO, len(data)) + data)
        while True:
            _, _, kind, length = _OPTION_HEADER.unpack(self.receive(_OPTION_HEADER.size))
            reply = self.receive(length)
            if kind == _ACK:
                break
            if kind & 0x80000000:
                message = f"the server refuses export {export!r}: {kind:#x} {reply!r}"
                raise ConnectionError(message)
            if reply[:2] == b"\0\0":
                self.size_bytes = int.from_bytes(reply[2:10], "big")

    def send(
        self, number: int, command: int, offset: int, length: int, *, flags: int = 0, data: bytes = b""
    ) -> None:
        """Send one request; its number is its cookie."""
        self.socket.sendall(request_bytes(number, command, offset, length, flags=flags, data=data))

    def reply(self, lengths: Callable[[int], int] = lambda _: 0) -> tuple[int, int, bytes]:
        """Return (number, error, data) of the next reply. lengths: what a request reads if it succeeds."""
        magic, error, number = _SIMPLE.unpack(self.receive(_SIMPLE.size))
        if magic != _SIMPLE_MAGIC:
            message = f"no reply begins with {magic:#x}"
            raise ConnectionError(message)
        return number, error, b"" if error else self.receive(lengths(number))

    def ask(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b""
    ) -> tuple[int, bytes]:
        """Send one request, with nothing else under way, and return (error, data)."""
        self.send(1, command, offset, length, flags=flags, data=data)
        _, error, answer = self.reply(lambda _: length if command == READ else 0)
        return error, answer

    def receive(self, count: int) -> bytes:
        """Return exactly `count` bytes. Raises: ConnectionError at the end of the stream."""
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            moved = self.socket.recv_into(view[done:])
            if not moved:
                message = f"the server left after {done} of {count} bytes"
                raise ConnectionError(message)
            done += moved
        return bytes(data)

    def close(self) -> None:
        """Say goodbye where that is still possible."""
        try:
            self.send(0, DISCONNECT, 0, 0)
        except OSError:
            pass
        self.socket.close()


@dataclass(slots=True)
class Request:
    """One request. issued, answered: steps of the client's own clock; answered is None while it is not.

    sector, count: of its disk. error: the NBD error of the answer.
    """

    number: int
    disk: int
    command: int
    flags: int
    sector: int
    count: int
    issued: int = 0
    answered: int | None = None
    error: int = 0

    @property
    def changes(self) -> bool:
        """Whether it changes the disk."""
        return self.command in {WRITE, TRIM, ZEROES}

    def overlaps(self, other: Request) -> bool:
        """Whether both touch one sector, at least one of them changing it."""
        return (
            self.disk == other.disk
            and self.sector < other.sector + other.count
            and other.sector < self.sector + self.count
            and (self.changes or other.changes)
        )


class Taste(NamedTuple):
    """What a workload likes: weights of its commands, sizes in sectors, and how many requests are under way."""

    write: int = 12
    flush: int = 1
    trim: int = 1
    zeroes: int = 1
    read: int = 2
    fua: float = 0.08
    sectors: Sequence[int] = (1, 1, 8, 8, 8, 8, 16, 128, 129, 1024)
    depth: int = 8


@dataclass(slots=True)
class Workload:
    """Requests drawn from a seed, over all connections of all disks of a VM, and their answers.

    sectors: of each disk. hot: parts of a disk, in sectors, where most requests go. cut_steps: the client's
    step at which each recorded cut was asked for; whoever cuts fills it.
    """

    seed: int
    sectors: Sequence[int]
    hot: Sequence[tuple[int, int]]
    taste: Taste = field(default_factory=Taste)
    first_number: int = 1
    requests: dict[int, Request] = field(default_factory=dict)
    step: int = 0
    model: list[NDArray[np.int64]] = field(default_factory=list)
    cut_steps: list[int] = field(default_factory=list)

    def run(
        self,
        connections: Sequence[tuple[int, Connection]],
        count: int,
        *,
        at: dict[int, Callable[[], None]] | None = None,
    ) -> None:
        """Send `count` requests and take all answers.

        connections: (disk, connection). at: what to call after so many requests, with others under way.
        Raises: ConnectionError if the server leaves; AssertionError if it reads what was not written.
        """
        rng = random.Random(f"{self.seed}/{self.first_number}/{len(self.requests)}")
        if not self.model:
            self.model = [np.zeros(sectors, np.int64) for sectors in self.sectors]
        waiting: dict[int, list[Request]] = {place: [] for place in range(len(connections))}
        for done in range(count):
            if at and done in at:
                at[done]()
            place = rng.randrange(len(connections))
            while len(waiting[place]) >= self.taste.depth:
                self._take(connections, waiting, place)
            request = self._draw(rng, connections[place][0])
            while any(request.overlaps(other) for others in waiting.values() for other in others):
                request = self._draw(rng, connections[place][0])
            self._send(connections, waiting, place, request)
            self._take_ready(connections, waiting)
        for place, requests in waiting.items():
            while requests:
                self._take(connections, waiting, place)

    def _draw(self, rng: random.Random, disk: int) -> Request:
        taste = self.taste
        commands = (WRITE, FLUSH, TRIM, ZEROES, READ)
        weights = (taste.write, taste.flush, taste.trim, taste.zeroes, taste.read)
        command = rng.choices(commands, weights)[0]
        number = self.first_number + len(self.requests)
        if command == FLUSH:
            return Request(number, disk, command, 0, 0, 0)
        low, high = rng.choice(self.hot) if rng.random() < 0.85 else (0, self.sectors[disk])
        low, high = min(low, self.sectors[disk] - 1), min(high, self.sectors[disk])
        count = min(rng.choice(taste.sectors), high - low)
        sector = rng.randrange(low, high - count + 1)
        if count % 8 == 0 and rng.random() < 0.9:
            sector = max(sector // 8 * 8, low)
        flags = FUA if command != READ and rng.random() < taste.fua else 0
        flags |= NO_HOLE if command == ZEROES and rng.random() < 0.4 else 0
        return Request(number, disk, command, flags, sector, count)

    def _send(
        self,
        connections: Sequence[tuple[int, Connection]],
        waiting: dict[int, list[Request]],
        place: int,
        request: Request,
    ) -> None:
        """Send a request, and take answers while there is no room: the server may have to get rid of them first."""
        self.step += 1
        request.issued = self.step
        self.requests[request.number] = request
        data = b""
        if request.command == WRITE:
            data = content(request.number, request.sector, request.count)
        offset, length = request.sector * SECTOR, request.count * SECTOR
        whole = request_bytes(request.number, request.command, offset, length, flags=request.flags, data=data)
        line, rest = connections[place][1].socket, memoryview(whole)
        while rest:
            readable, writable, _ = select.select([line] if waiting[place] else [], [line], [])
            if readable:
                self._take(connections, waiting, place)
            elif writable:
                rest = rest[line.send(rest, socket.MSG_DONTWAIT) :]
        waiting[place].append(request)

    def _take_ready(
        self, connections: Sequence[tuple[int, Connection]], waiting: dict[int, list[Request]]
    ) -> None:
        sockets = {each.socket: place for place, (_, each) in enumerate(connections) if waiting[place]}
        for ready in select.select(list(sockets), [], [], 0)[0]:
            self._take(connections, waiting, sockets[ready])

    def _take(
        self, connections: Sequence[tuple[int, Connection]], waiting: dict[int, list[Request]], place: int
    ) -> None:
        number, error, data = connections[place][1].reply(self.read_bytes)
        request = next(request for request in waiting[place] if request.number == number)
        waiting[place].remove(request)
        self.step += 1
        request.answered, request.error = self.step, error
        held = slice(request.sector, request.sector + request.count)
        if error:
            if request.changes:  # all of it may have happened, or any part
                self.model[request.disk][held] = -number
        elif request.command == WRITE:
            self.model[request.disk][held] = number
        elif request.command in {TRIM, ZEROES}:
            self.model[request.disk][held] = -number if request.command == TRIM else 0
        elif request.command == READ:
            self._check_read(request, data)

    def _check_read(self, request: Request, data: bytes) -> None:
        seen = numbers_of(data, request.sector)
        wanted = self.model[request.disk][request.sector : request.sector + request.count]
        free = (wanted < 0) & (seen >= 0)  # what a trim or a failed request leaves is the server's choice
        wrong = np.flatnonzero((seen != wanted) & ~free)
        assert not len(wrong), (
            f"sector {request.sector + wrong[0]} reads as of request {seen[wrong[0]]}, "
            f"{wanted[wrong[0]]} wrote it (seed {self.seed})"
        )

    def read_bytes(self, number: int) -> int:
        """Return the bytes that the answer to a request carries."""
        request = self.requests[number]
        return request.count * SECTOR if request.command == READ else 0

    # ---- what must be there

    def floor(self, disk: int, answered: Iterable[int]) -> NDArray[np.int64]:
        """Return for each sector the newest request that must have survived, 0 for none.

        answered: the numbers of the requests whose success had been sent.
        """
        requests = [self.requests[number] for number in answered]
        requests = [request for request in requests if request.disk == disk]
        flushes = [request.issued for request in requests if request.command == FLUSH]
        horizon = max(flushes, default=0)
        kept = [
            request
            for request in self.requests.values()
            if request.answered is not None and request.answered < horizon and not request.error
        ]
        return self._newest(disk, kept + [request for request in requests if request.flags & FUA])

    def floor_before(self, disk: int, step: int) -> NDArray[np.int64]:
        """Return for each sector the newest request that was answered before a step of the client's clock."""
        kept = [
            request
            for request in self.requests.values()
            if request.answered is not None and request.answered < step and not request.error
        ]
        return self._newest(disk, kept)

    def _newest(self, disk: int, requests: Iterable[Request]) -> NDArray[np.int64]:
        floor = np.zeros(self.sectors[disk], np.int64)
        for request in requests:
            if request.disk == disk and request.command in {WRITE, ZEROES}:
                part = floor[request.sector : request.sector + request.count]
                np.maximum(part, request.number, out=part)
        return floor

    def zeroed(self, disk: int) -> NDArray[np.int64]:
        """Return for each sector the newest request that may have made zeros of it, 0 for none."""
        newest = np.zeros(self.sectors[disk], np.int64)
        for request in self.requests.values():
            if request.disk == disk and request.command in {TRIM, ZEROES}:
                part = newest[request.sector : request.sector + request.count]
                np.maximum(part, request.number, out=part)
        return newest


def lost(seen: NDArray[np.int64], floor: NDArray[np.int64], zeroed: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sectors that are older than they must be, or hold what nobody wrote there.

    seen: request numbers, see numbers_of(). floor: what must be there at least. zeroed: see
    Workload.zeroed().
    """
    return np.flatnonzero((seen < 0) | np.where(seen > 0, seen < floor, (zeroed < floor) & (floor > 0)))


class Replies:
    """Find the replies in what a server sends through one socket, greeting and negotiation included."""

    def __init__(self, read_bytes: Callable[[int], int]) -> None:
        self._read_bytes = read_bytes
        self._data = bytearray()
        self._greeted = False
        self._skip = 0

    def feed(self, data: bytes) -> list[tuple[int, int]]:
        """Return (number, error) of each reply whose header is complete with `data`."""
        self._data += data
        found: list[tuple[int, int]] = []
        while True:
            drop = min(self._skip, len(self._data))
            del self._data[:drop]
            self._skip -= drop
            if self._skip or not self._take_one(found):
                return found

    def _take_one(self, found: list[tuple[int, int]]) -> bool:
        data = self._data
        if not self._greeted:
            if len(data) < _GREETING_BYTES:
                return False
            self._greeted, self._skip = True, _GREETING_BYTES
            return True
        if len(data) >= 8 and int.from_bytes(data[:8], "big") == _OPTION_REPLY_MAGIC:
            if len(data) < _OPTION_HEADER.size:
                return False
            self._skip = _OPTION_HEADER.size + _OPTION_HEADER.unpack_from(data)[3]
            return True
        if len(data) < _SIMPLE.size:
            return False
        magic, error, number = _SIMPLE.unpack_from(data)
        if magic != _SIMPLE_MAGIC:
            message = f"no reply begins with {magic:#x}"
            raise ValueError(message)
        found.append((number, error))
        self._skip = _SIMPLE.size + (0 if error else self._read_bytes(number))
        return True
