"""The NBD clients that others wrote, against a disk under capture: they read what was written, and so does a replica.

A model in memory follows each change. At the end the export, the file after a clean stop, and what the cuts hold agree
with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.files import OS_FILES
from hvreplica.hrl import apply_log
from hvreplica.units import KIB, MIB
from tests.support.command_line import Running, ask_verb
from tests.support.tools import missing, require_tool, run_tool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.disk.open import Format

DISK_BYTES = 24 * MIB + 64 * KIB
STEPS = 60


class Site:
    """A captured disk, the model of its content, and a copy that follows the cuts."""

    def __init__(self, folder: Path, form: Format) -> None:
        self.folder = folder
        self.path = folder / f"web01.{form}"
        self.socket = folder / "web01.sock"
        self.model = bytearray(DISK_BYTES)
        options = {"block_bytes": MIB} if form == "vhdx" else {}
        create_disk(OS_FILES, self.path, virtual_bytes=DISK_BYTES, format=form, clock=SYSTEM, **options)
        self.running = Running(
            *("capture", "--vm", "web01", "--disk", self.path, "--socket", self.socket),
            *("--state", folder / "state", "--json"),
        )
        assert self.running.ready, self.running.errors()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///0?socket={self.socket}"

    def check(self) -> None:
        """Compare export, cuts and, after a clean stop, the file with the model."""
        output = self.folder / "export.raw"
        run_tool("nbdcopy", self.uri, output)
        assert output.read_bytes() == self.model
        logs = [log["path"] for log in ask_verb("cut", "--state", self.folder / "state")["logs"]]
        code, said = self.running.end(signal.SIGTERM)
        assert code == 0, said
        with open_disk(OS_FILES, self.path, clock=SYSTEM) as disk:
            content = bytearray(DISK_BYTES)
            disk.read_into(content, 0)
            assert content == self.model
        copy = self.folder / "copy.raw"
        create_disk(OS_FILES, copy, virtual_bytes=DISK_BYTES, format="raw", clock=SYSTEM)
        with open_disk(OS_FILES, copy, writable=True, clock=SYSTEM) as disk:
            for log in logs:
                apply_log(OS_FILES, log, disk)
        assert copy.read_bytes() == self.model


@pytest.fixture(params=["vhdx", "vhd", "raw"])
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    made = Site(tmp_path, request.param)
    with made.running:
        yield made


def steps(seed: int, *, unit: int = 512) -> Iterator[tuple[str, int, int, int]]:
    """Yield (command, offset, length, pattern) of changes that clients make."""
    rng = random.Random(seed)
    for _ in range(STEPS):
        command = rng.choice(("write", "write", "write", "fua", "zero", "zero-hole", "trim", "flush"))
        length = rng.choice((1, 1, 3, 8, 8, 100, 3000)) * unit
        yield command, rng.randrange((DISK_BYTES - length) // unit) * unit, length, rng.randrange(1, 256)


def follow(model: bytearray, command: str, offset: int, length: int, pattern: int) -> None:
    if command in {"write", "fua"}:
        model[offset : offset + length] = bytes([pattern]) * length
    elif command != "flush":
        model[offset : offset + length] = bytes(length)


def test_qemu_io_writes_and_verifies(site: Site, seed: int) -> None:
    commands = []
    words = {
        "write": "write -P {2} {0} {1}",
        "fua": "write -f -P {2} {0} {1}",
        "zero": "write -z {0} {1}",
        "zero-hole": "write -z -u {0} {1}",
        "trim": "discard {0} {1}",
        "flush": "flush",
    }
    for command, offset, length, pattern in steps(seed):
        commands.append(words[command].format(offset, length, pattern))
        follow(site.model, command, offset, length, pattern)
        if command in {"write", "fua"}:
            commands.append(f"read -P {pattern} {offset} {length}")
    arguments = [word for command in commands for word in ("-c", command)]
    done = run_tool("qemu-io", "-f", "raw", *arguments, site.uri)
    assert "verification failed" not in done.stdout
    assert "failed" not in done.stderr
    site.check()


def test_libnbd_shell_with_many_requests_under_way(site: Site, seed: int) -> None:
    """Asynchronous calls over two connections, each change awaited only before one that overlaps it."""
    require_tool("nbdsh")
    script = [
        "import nbd",
        "one, two = nbd.NBD(), nbd.NBD()",
        f"one.connect_uri({site.uri!r}); two.connect_uri({site.uri!r})",
        "assert one.can_multi_conn() and one.get_structured_replies_negotiated()",
        "under_way = []",
        "def settle():",
        "    for handle, cookie in under_way:",
        "        while not handle.aio_command_completed(cookie): handle.poll(-1)",
        "    under_way.clear()",
    ]
    busy: list[tuple[int, int]] = []
    for number, (command, offset, length, pattern) in enumerate(steps(seed)):
        handle = ("one", "two")[number % 2]
        if command == "flush" or any(low < offset + length and offset < high for low, high in busy):
            script.append("settle()")
            busy.clear()
        calls = {
            "write": f"aio_pwrite(nbd.Buffer.from_bytearray(bytearray([{pattern}]) * {length}), {offset})",
            "fua": f"aio_pwrite(nbd.Buffer.from_bytearray(bytearray([{pattern}]) * {length}), {offset}, "
            "flags=nbd.CMD_FLAG_FUA)",
            "zero": f"aio_zero({length}, {offset}, flags=nbd.CMD_FLAG_NO_HOLE)",
            "zero-hole": f"aio_zero({length}, {offset})",
            "trim": f"aio_trim({length}, {offset})",
            "flush": "aio_flush()",
        }
        script.append(f"under_way.append(({handle}, {handle}.{calls[command]}))")
        busy.append((offset, offset + length))
        follow(site.model, command, offset, length, pattern)
    script += [
        "settle()",
        "one.flush()",
        f"data = two.pread({8 * MIB}, {MIB}) + two.pread(4096, 0)",
        "import hashlib; print(hashlib.sha256(data).hexdigest())",
        "one.shutdown(); two.shutdown()",
    ]
    done = subprocess.run(
        [require_tool("nbdsh"), "-n", "-c", "\n".join(script)],
        # It runs `python3`, which has to be the system's: only that one has the module.
        env={**os.environ, "PATH": f"/usr/bin:/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = site.model[MIB : 9 * MIB] + site.model[:4096]
    assert done.stdout.split() == [hashlib.sha256(expected).hexdigest()]
    site.check()


def test_nbdcopy_fills_the_disk_and_finds_its_holes(site: Site, seed: int) -> None:
    source = site.folder / "source.raw"
    for command, offset, length, pattern in steps(seed, unit=4096):
        follow(site.model, command, offset, length, pattern)
    source.write_bytes(site.model)
    run_tool("nbdcopy", "--flush", "--connections=4", "--requests=16", source, site.uri)
    extents = json.loads(run_tool("nbdinfo", "--map", "--json", site.uri).stdout)
    assert sum(extent["length"] for extent in extents) == DISK_BYTES
    for extent in extents:
        if extent["type"] & 2:  # says that it is zeros
            assert not any(site.model[extent["offset"] : extent["offset"] + extent["length"]])
    dump = run_tool("nbddump", "--length=65536", site.uri).stdout
    assert dump.count("\n") >= 1
    site.check()


def test_fio_verifies_what_it_wrote(site: Site) -> None:
    if "nbd" not in run_tool("fio", "--enghelp").stdout:
        missing("this fio has no engine for NBD")
    for block in ("4k", "3k"):
        run_tool(
            "fio",
            *("--name=capture", "--ioengine=nbd", f"--uri={site.uri}", "--rw=randrw", f"--bs={block}"),
            *("--iodepth=16", "--size=6m", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1"),
            *("--fsync=64", "--randseed=42", "--verify_state_save=0", "--output-format=terse"),
            cwd=site.folder,
            timeout_s=120,
        )
    output = site.folder / "seen.raw"
    run_tool("nbdcopy", site.uri, output)
    site.model[:] = output.read_bytes()  # fio knows what it should be, and has looked
    assert any(site.model)
    site.check()
