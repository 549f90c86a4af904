"""Measure the transport between two processes over loopback, against a plain TCP copy in the same run.

    python bench/micro/transport.py [--mib 256] [--connections 4] [--file PATH]

Prints GB/s of data, CPU seconds of both ends for a GB, data per wire byte and the share of the plain copy's
rate, for each compression. Both ends share this machine. Every byte that arrives is written to memory and
compared with what was sent, outside the timed part. --file takes real data; otherwise a mixture is made: a
third random, a third text-like, a third records, seed 42.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.transport import (
    COMPRESSIONS,
    Channel,
    CodecPolicy,
    FrameEncoder,
    Listener,
    client_context,
    connect,
    server_context,
)

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
from hvreplica.transport.certificates import init_tls

FRAME_BYTES = 2 << 20
PLAIN_BYTES = 1 << 20


class Nothing(msgspec.Struct, tag="nothing"):
    """The one message: both directions' types need one."""


DECODER = msgspec.msgpack.Decoder(Nothing)


def mixed(size_bytes: int) -> np.ndarray:
    """Return the same mixture on every machine."""
    generator = np.random.default_rng(42)
    words = generator.integers(97, 123, (4096, 8), dtype=np.uint8)
    third = size_bytes // 3 // 8 * 8
    text = words[generator.zipf(1.3, third // 8).clip(max=4096) - 1].reshape(-1)
    records = np.cumsum(generator.integers(0, 3, third // 8), dtype=np.uint64).view(np.uint8)
    noise = generator.integers(0, 256, size_bytes - len(text) - len(records), dtype=np.uint8)
    data = np.concatenate([noise, text, records])
    frames = data[: len(data) // FRAME_BYTES * FRAME_BYTES].reshape(-1, FRAME_BYTES)
    return np.ascontiguousarray(generator.permutation(frames)).reshape(-1)


def shared(size_bytes: int) -> np.ndarray:
    """Return memory that a forked process writes and we read; its pages are there before the timed part."""
    memory = np.frombuffer(mmap.mmap(-1, size_bytes), np.uint8)
    memory[:] = 1
    return memory


def serve(folder: Path, memory: np.ndarray, pipe: Connection) -> None:
    """Receive frames into `memory` until asked to end; one Nothing after each connection's last frame."""

    def handle(channel: Channel[Nothing]) -> None:
        while (frame := channel.receive_frame()) is not None:
            memory[frame.window_offset : frame.window_offset + frame.window_bytes] = frame.data
        channel.send_message(Nothing())

    listener = Listener("127.0.0.1:0", server_context(folder), handle, decoder=DECODER)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    pipe.send(listener.address.port)
    while pipe.recv():
        pipe.send(time.process_time())
    listener.stop()
    thread.join()


def send(
    folder: Path, port: int, data: np.ndarray, *, compression: str, connections: int
) -> tuple[float, int]:
    """Send `data` and return (seconds until all of it was written there, wire bytes)."""
    policy = CodecPolicy(compression)
    context = client_context(folder)
    channels = [connect(f"127.0.0.1:{port}", context, decoder=DECODER) for _ in range(connections)]
    offsets = iter(range(0, len(data), FRAME_BYTES))
    lock = threading.Lock()

    def run(channel: Channel[Nothing]) -> None:
        encoder = FrameEncoder(policy, clock=SYSTEM)
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                break
            piece = data[offset : offset + FRAME_BYTES]
            buffers = encoder.encode(
                sequence=offset // FRAME_BYTES,
                target=0,
                window_offset=offset,
                window_bytes=len(piece),
                runs=np.array([[offset, len(piece)]]),
                data=piece,
            )
            channel.send_frame(buffers, policy)
        channel.finish_sending()
        channel.receive_message()

    threads = [threading.Thread(target=run, args=(channel,)) for channel in channels]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    wire_bytes = sum(channel.wire_bytes_sent for channel in channels)
    for channel in channels:
        channel.close()
    return seconds, wire_bytes


def serve_plain(memory: np.ndarray, pipe: Connection) -> None:
    """Receive one plain TCP stream into `memory`, again and again until asked to end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(server.getsockname()[1])
        while pipe.recv():
            connection, _ = server.accept()
            with connection:
                view, done = memoryview(memory), 0
                while done < len(view):
                    done += connection.recv_into(view[done : done + PLAIN_BYTES])
                connection.sendall(b"k")


def send_plain(port: int, data: np.ndarray, pipe: Connection) -> float:
    """Send `data` as one plain TCP stream and return the seconds until all of it was there."""
    pipe.send(1)
    view = memoryview(data)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        start = time.perf_counter()
        for at in range(0, len(view), PLAIN_BYTES):
            connection.sendall(view[at : at + PLAIN_BYTES])
        connection.recv(1)
        return time.perf_counter() - start


def both_cpu_s(pipe: Connection) -> float:
    """Return the CPU seconds that both processes have used so far."""
    pipe.send(1)
    return float(pipe.recv()) + time.process_time()


def verify(data: np.ndarray, memory: np.ndarray, what: str) -> None:
    """End the program unless all of `data` arrived; make the memory wrong again for the next run."""
    if not np.array_equal(data, memory):
        sys.exit(f"{what}: what arrived is not what was sent")
    memory[:] = 1


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--compressions", nargs="+", default=COMPRESSIONS, choices=COMPRESSIONS)
    parser.add_argument("--rounds", type=int, default=3, help="the median is printed")
    parser.add_argument("--file", type=Path, help="real data instead of the mixture")
    options = parser.parse_args()
    if options.file:
        data = np.fromfile(options.file, np.uint8, options.mib << 20)
    else:
        data = mixed(options.mib << 20)
    memory = shared(len(data))
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        init_tls(OS_FILES, folder, clock=SYSTEM)
        pipe, other = context.Pipe()
        plain = context.Process(target=serve_plain, args=(memory, other))
        plain.start()
        port = pipe.recv()
        rates = []
        for _ in range(options.rounds):
            rates.append(len(data) / send_plain(port, data, pipe) / 1e9)
            verify(data, memory, "plain TCP")
        pipe.send(0)
        plain.join()
        base = sorted(rates)[options.rounds // 2]
        print(f"{len(data) >> 20} MiB, {options.connections} connections; plain TCP {base:.2f} GB/s")
        pipe, other = context.Pipe()
        server = context.Process(target=serve, args=(folder, memory, other))
        server.start()
        port = pipe.recv()
        for compression in options.compressions:
            results = []
            for _ in range(options.rounds):
                cpu_s = both_cpu_s(pipe)
                seconds, wire_bytes = send(
                    folder, port, data, compression=compression, connections=options.connections
                )
                results.append((seconds, wire_bytes, both_cpu_s(pipe) - cpu_s))
                verify(data, memory, compression)
            seconds, wire_bytes, cpu_s = sorted(results)[options.rounds // 2]
            rate = len(data) / seconds / 1e9
            print(
                f"{compression:5} {rate:5.2f} GB/s  {cpu_s * 1e9 / len(data):5.2f} CPU s/GB"
                f"  data/wire {len(data) / wire_bytes:5.3f}  {rate / base:4.2f} of plain"
            )
        pipe.send(0)
        server.join()


if __name__ == "__main__":
    main()
