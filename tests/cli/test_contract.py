"""The contract, line for line as a user types it, with real processes on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES
from tests.support.command_line import SOURCE, TIMEOUT_S, Run, environment
from tests.support.tools import require_tool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
SCRIPT = Path(sys.executable).with_name("hvreplica")


def noise(seed: int, length: int) -> bytes:
    return hashlib.shake_128(seed.to_bytes(4, "little")).digest(length)


def write(disk: Path, disk_offset: int, data: bytes) -> None:
    with open_disk(OS_FILES, disk, writable=True, clock=SYSTEM) as opened:
        opened.write(data, disk_offset)


class Site(NamedTuple):
    """A folder to work in, and a way to start the command in it."""

    folder: Path
    command: tuple[str, ...]

    def run(self, line: str) -> Run:
        """Run one line, words divided by blanks."""
        done = subprocess.run(
            [*self.command, *line.split()],
            cwd=self.folder,
            capture_output=True,
            text=True,
            env=environment(),
            timeout=TIMEOUT_S,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Run(done.returncode, done.stdout, done.stderr)

    def done(self, line: str) -> Run:
        """Run one line that must succeed."""
        run = self.run(line)
        assert run.code == 0, f"{line}: exit code {run.code}\n{run.err}"
        return run


class Served(NamedTuple):
    """A server that runs."""

    process: subprocess.Popen[str]
    address: str

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)


def start(site: Site, options: str = "") -> subprocess.Popen[str]:
    line = f"serve --store store --listen 127.0.0.1:0 --tls tls {options}"
    return subprocess.Popen(
        [*site.command, *line.split()],
        cwd=site.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Return who calls the installed script; `python -m hvreplica` is what all other tests of processes call."""
    if SCRIPT.exists():
        return Site(tmp_path, (str(SCRIPT),))
    project = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["hvreplica"].partition(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}())"  # what an installer writes
    return Site(tmp_path, (sys.executable, "-c", code))


@pytest.fixture
def module_site(tmp_path: Path) -> Site:
    return Site(tmp_path, (sys.executable, "-m", "hvreplica"))


def serving(site: Site) -> Iterator[Served]:
    process = start(site)
    assert process.stdout is not None
    try:
        words = process.stdout.readline().split()
        assert words[:2] == ["listening", "on"], process.communicate(timeout=TIMEOUT_S)
        yield Served(process, words[2])
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def served(module_site: Site) -> Iterator[Served]:
    module_site.done("tls init tls")
    yield from serving(module_site)


def replicate_line(served: Served, *, disk: str = "web01.vhdx", vm: str = "web01", tls: str = "tls") -> str:
    return f"replicate --vm {vm} --disk {disk} --to {served.address} --tls {tls} --state state --once --json"


def test_replication_from_the_first_certificate_to_the_exported_point(site: Site) -> None:
    site.done("tls init tls")
    site.done("disk create web01.vhdx --size 64M")
    site.done("disk create data.img --size 16M --format raw")
    write(site.folder / "web01.vhdx", 5 * MIB, noise(1, 3 * MIB))
    write(site.folder / "data.img", 4096, noise(2, MIB))
    for served in serving(site):
        line = (
            f"replicate --vm web01 --disk web01.vhdx --disk data.img --to {served.address}"
            " --tls tls --state state --once --compression zstd --json"
        )
        first = site.done(line).answer
        check_answer(first, "initial", changed_bytes=[3 * MIB, MIB])
        write(site.folder / "web01.vhdx", 6 * MIB, noise(3, 8192))
        write(site.folder / "web01.vhdx", 40 * MIB, noise(4, 4096))
        delta = site.done(line).answer
        check_answer(delta, "delta", changed_bytes=[12288, 0])
        assert delta["point"] != first["point"]
        none = site.done(line).answer
        check_answer(none, "none", changed_bytes=[0, 0])
        assert none["point"] == delta["point"]
        assert "nothing changed" in site.done(line.replace(" --json", "")).out
        look_at_the_store(site, delta["point"])
        assert served.end() == 0
    look_at_the_store(site, delta["point"])
    export_and_compare(site, delta["point"])


def check_answer(answer: dict[str, object], kind: str, *, changed_bytes: list[int]) -> None:
    assert list(answer) == [
        "vm",
        "kind",
        "disks",
        "wire_bytes",
        "seconds",
        "logs",
        "point",
        "gone",
        "warning",
        "prepared",
        "waits_for",
    ]
    assert (answer["vm"], answer["kind"]) == ("web01", kind)
    disks, logs = answer["disks"], answer["logs"]
    assert isinstance(disks, list)
    assert [list(disk) for disk in disks] == [["path", "virtual_bytes", "changed_bytes"]] * 2
    assert [disk["virtual_bytes"] for disk in disks] == [64 * MIB, 16 * MIB]
    assert [disk["changed_bytes"] for disk in disks] == changed_bytes
    assert isinstance(logs, list)
    assert bool(logs) == (kind == "delta")
    for log in logs:
        assert list(log) == ["id", "path"]
        assert not Path(log["path"]).exists(), "an acknowledged log is removed at the primary"


def look_at_the_store(site: Site, point: str) -> None:
    """Ask while it is served, and after."""
    status = site.done("store status --store store --json").answer
    assert [(vm["name"], vm["phase"]) for vm in status["vms"]] == [("web01", "ready")]
    listed = site.done("point list --store store --vm web01 --json").answer
    assert listed[-1]["id"] == point
    assert point in site.done("point list --store store --vm web01").out
    shown = site.done("store status --store store").out
    assert "web01" in shown
    assert "store: 1 VM, " in shown


def export_and_compare(site: Site, point: str) -> None:
    site.done("point export --store store --vm web01 --output out.vhdx")
    site.done(
        f"point export --store store --vm web01 --point {point} --disk 1 --output data.out --format raw"
    )
    refused = site.run("point export --store store --vm web01 --output out.vhdx")
    assert refused.code == 50, "never overwrites unasked"
    assert "--overwrite" in refused.err
    lost = site.run("point export --store store --vm web01 --output no/folder/out.vhdx --json")
    assert (lost.error["path"], lost.error["message"]) == ("no/folder", "no such folder")
    site.done("disk compare out.vhdx web01.vhdx")
    site.done("disk compare data.out data.img")
    qemu_img = require_tool("qemu-img")
    for ours, theirs in (
        ("out.vhdx", "web01.vhdx"),
        ("data.out", "data.img"),
        ("store/web01/disks/0.vhdx", "out.vhdx"),
    ):
        subprocess.run([qemu_img, "compare", ours, theirs], cwd=site.folder, check=True, capture_output=True)


def test_disk_verbs(site: Site) -> None:
    site.done("disk create a.vhdx --size 10G --format vhdx --type dynamic --block-size 2M")
    write(site.folder / "a.vhdx", 4 * MIB, noise(1, MIB))
    info = site.done("disk info a.vhdx --json").answer
    assert (info["format"], info["type"], info["virtual_bytes"], info["block_bytes"]) == (
        "vhdx",
        "dynamic",
        10 << 30,
        2 * MIB,
    )
    assert "10.0 GiB" in site.done("disk info a.vhdx").out
    entries = site.done("disk map a.vhdx --json").answer
    assert sum(entry["length"] for entry in entries) == 10 << 30
    assert {entry["zero"] for entry in entries if entry["start"] < 4 * MIB} == {True}
    assert next(entry["start"] for entry in entries if entry["data"]) == 4 * MIB
    assert len(site.done("disk map a.vhdx").out.splitlines()) == 1 + len(entries)
    site.done("disk convert a.vhdx b.img --format raw")
    site.done("disk convert b.img c.vhdx --type fixed --block-size 4M --json")
    assert site.done("disk compare a.vhdx c.vhdx").out.startswith("equal")
    write(site.folder / "c.vhdx", 7 * MIB, b"x" * 512)
    differ = site.run("disk compare b.img c.vhdx")
    assert (differ.code, differ.out) == (1, f"different: the first difference is at offset {7 * MIB}\n")
    answer = site.run("disk compare b.img c.vhdx --json")
    assert (answer.code, answer.answer["equal"], answer.answer["first_difference"]) == (1, False, 7 * MIB)


def test_name_that_ends_in_vhd_means_a_vhd(invoke: Callable[..., Run], tmp_path: Path) -> None:
    a, b, c = tmp_path / "a.vhd", tmp_path / "b.VHD", tmp_path / "c.vhdx"
    assert invoke("disk", "create", a, "--size", "40M", "--block-size", "512K").code == 0
    write(a, 4 * MIB, noise(1, MIB))
    assert invoke("disk", "convert", a, b, "--type", "fixed").code == 0
    assert invoke("disk", "convert", b, c).code == 0
    for path, kind, type_ in ((a, "vhd", "dynamic"), (b, "vhd", "fixed"), (c, "vhdx", "dynamic")):
        info = invoke("disk", "info", path, "--json").answer
        assert (info["format"], info["type"], info["virtual_bytes"]) == (kind, type_, 40 * MIB)
        assert invoke("disk", "compare", a, path).out.startswith("equal")
    refused = invoke("disk", "create", tmp_path / "d.vhd", "--size", "2041G")
    assert refused.code == 2
    assert "a VHD has at most 2040G" in refused.err


@pytest.mark.parametrize(
    ("size", "told"), [("4G", "100.0 MiB and 4.0 GiB"), ("104858112", "104857600 and 104858112 bytes")]
)
def test_equal_disks_of_different_sizes_are_told(
    size: str, told: str, invoke: Callable[..., Run], tmp_path: Path
) -> None:
    a, b = tmp_path / "a.vhdx", tmp_path / "b.img"
    assert invoke("disk", "create", a, "--size", "100M").code == 0
    assert invoke("disk", "create", b, "--size", size, "--format", "raw").code == 0
    run = invoke("disk", "compare", a, b)
    assert (run.code, run.out) == (0, f"equal content, different sizes: {told}; the rest is zero\n")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("c.raw", "raw"),
        ("c.IMG", "raw"),
        ("c.vhdx", "vhdx"),
        ("c", "vhdx"),
        ("c.raw --format vhdx --type fixed", "vhdx"),
        ("c.vhdx --format raw", "raw"),
    ],
)
def test_name_chooses_the_format_of_a_new_disk(
    line: str, kind: str, invoke: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = invoke("disk", "create", *line.split(), "--size", "16M", "--json")
    assert (made.code, made.answer["format"]) == (0, kind)


def test_existing_output_is_kept_and_the_option_named(invoke: Callable[..., Run], tmp_path: Path) -> None:
    source, target = tmp_path / "a.vhdx", tmp_path / "b.vhdx"
    assert invoke("disk", "create", source, "--size", "16M").code == 0
    target.write_bytes(b"mine")
    for arguments in (("create", target, "--size", "16M"), ("convert", source, target)):
        error = invoke("disk", *arguments, "--json").error
        assert (error["class"], error["exit_code"], error["path"]) == ("FileExistsError", 70, str(target))
        assert "--overwrite" in error["hint"]
        assert target.read_bytes() == b"mine"


def test_missing_folder_is_named_and_no_temporary_file(
    invoke: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("disk", "create", "a.vhdx", "--size", "16M").code == 0
    for line in (
        "disk create no/folder/b.vhdx --size 1G",
        "disk create no/folder/b.vhdx --size 1G --overwrite",
        "disk convert a.vhdx no/folder/b.vhdx",
        "tls trust no/folder --certificate primary --vm web*",
    ):
        error = invoke(*line.split(), "--json").error
        assert (error["exit_code"], error["path"], error["message"]) == (70, "no/folder", "no such folder")


def write_log(path: Path) -> Path:
    """Write a log of three entries, the last of which replaces half of the first."""
    import uuid  # noqa: PLC0415

    import numpy as np  # noqa: PLC0415

    from hvreplica.hrl import LogWriter  # noqa: PLC0415

    writer = LogWriter.create(
        OS_FILES,
        path,
        log_id=uuid.UUID(int=7),
        previous_log_id=uuid.UUID(int=6),
        data_write_guid=uuid.UUID(int=5),
        clock=SYSTEM,
    )
    extents = np.array([[0, 8192], [MIB, 4096], [4096, 4096]], np.int64)
    writer.append(extents, b"a" * 8192 + b"b" * 4096 + b"c" * 4096)
    writer.close()
    return path


def test_log_verbs(site: Site) -> None:
    write_log(site.folder / "web01-1.hrl")
    info = site.done("log info web01-1.hrl --json").answer
    assert (info["closed"], info["entries"], info["log_id"]) == (
        True,
        3,
        "00000000-0000-0000-0000-000000000007",
    )
    assert "00000000-0000-0000-0000-000000000007" in site.done("log info web01-1.hrl").out
    report = site.done("log verify web01-1.hrl --json").answer
    assert (report["entries"], report["data_bytes"], report["end"]) == (3, 16384, "clean")
    dump = site.done("log dump web01-1.hrl --json").answer
    assert [(entry["disk_offset"], entry["length"]) for entry in dump] == [
        (0, 8192),
        (MIB, 4096),
        (4096, 4096),
    ]
    assert len(site.done("log dump web01-1.hrl").out.splitlines()) == 4
    site.done("disk create disk.vhdx --size 16M")
    applied = site.done("log apply web01-1.hrl disk.vhdx --json").answer
    assert (applied["entries"], applied["bytes_logged"], applied["bytes_written"]) == (3, 16384, 12288)
    site.done("log apply web01-1.hrl disk.vhdx")
    with open_disk(OS_FILES, site.folder / "disk.vhdx", clock=SYSTEM) as disk:
        found = bytearray(12288)
        disk.read_into(found, 0)
    assert bytes(found) == b"a" * 4096 + b"c" * 4096 + bytes(4096)


def test_unclosed_log_is_refused_until_it_is_recovered(invoke: Callable[..., Run], tmp_path: Path) -> None:
    path = write_log(tmp_path / "web01-1.hrl")
    data = bytearray(path.read_bytes())
    data[44:52] = bytes(8)  # EOLLocation
    total = sum(data[:40]) + sum(data[44:4096])
    data[40:44] = (~total & 0xFFFFFFFF).to_bytes(4, "little")
    path.write_bytes(data)
    assert invoke("log", "verify", path).code == 21
    assert invoke("log", "recover", path).code == 0
    assert invoke("log", "verify", path).code == 0


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("disk info absent.vhdx", 70),
        ("disk map absent.vhdx", 70),
        ("disk compare absent.vhdx absent.img", 70),
        ("disk convert absent.vhdx b.img", 70),
        ("disk create a.vhdx --size 1000", 2),
        ("disk create a.vhdx --size 0", 2),
        ("disk create a.vhdx --size 65T", 2),
        ("disk create a.raw --size 1000", 2),
        ("disk create a.vhdx --size 1G --block-size 3M", 2),
        ("disk create a.vhdx --size 1G --block-size 512M", 2),
        ("disk create a.raw --size 1G --block-size 2M", 2),
        ("disk create a.img --size 1G --type dynamic", 2),
        ("disk create a.vhdx --size 1G --type fixed --format raw", 2),
        ("disk convert absent.img b.vhdx --block-size 3M", 2),
        ("disk create no/folder/a.vhdx --size 1G", 70),
        ("log info absent.hrl", 70),
        ("log verify absent.hrl", 70),
        ("log dump absent.hrl", 70),
        ("log apply absent.hrl absent.vhdx", 70),
        ("store status --store absent", 50),
        ("point list --store absent --vm web01", 50),
        ("point export --store absent --vm web01 --output o.vhdx", 50),
        ("tls trust absent --certificate primary --vm web*", 70),
    ],
)
def test_what_is_not_there_is_told(
    line: str, code: int, invoke: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = invoke(*line.split())
    assert (run.code, run.out) == (code, "")
    assert run.err.startswith("error: ")
    assert invoke(*line.split(), "--json").error["exit_code"] == code
    assert [path.name for path in tmp_path.iterdir()] == [], "nothing half-done is left"


@pytest.mark.parametrize("place", [65536 + 4, 3 * 65536 + 4])
def test_damaged_vhdx_is_told_with_place_and_values(
    place: int, invoke: Callable[..., Run], tmp_path: Path
) -> None:
    path = tmp_path / "a.vhdx"
    assert invoke("disk", "create", path, "--size", "1G").code == 0
    data = bytearray(path.read_bytes())
    for offset in (place, place + 65536):  # both copies of a header or of a region table
        data[offset] ^= 0x40
    path.write_bytes(data)
    run = invoke("disk", "info", path, "--json")
    assert 10 <= run.code <= 16
    assert run.error["path"] == str(path)
    assert run.error["spec"]


@pytest.mark.parametrize("keep_bytes", [600, 4095, 70000, 1 << 20])
def test_truncated_vhdx_is_told(keep_bytes: int, invoke: Callable[..., Run], tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    assert invoke("disk", "create", path, "--size", "1G").code == 0
    path.write_bytes(path.read_bytes()[:keep_bytes])
    run = invoke("disk", "compare", path, path, "--json")
    assert 10 <= run.code <= 16
    assert run.error["path"] == str(path)


def test_flipped_bit_in_a_log_is_told_by_verify_and_apply(invoke: Callable[..., Run], tmp_path: Path) -> None:
    path = write_log(tmp_path / "web01-1.hrl")
    disk = tmp_path / "disk.vhdx"
    assert invoke("disk", "create", disk, "--size", "16M").code == 0
    data = bytearray(path.read_bytes())
    data[8192 + 100] ^= 1
    path.write_bytes(data)
    for arguments in (("verify", path), ("apply", path, disk)):
        error = invoke("log", *arguments, "--json").error
        assert error["exit_code"] == 14
        assert error["path"] == str(path)
        assert error["offset"] is not None


def test_replicating_to_nobody_is_told_as_retryable(module_site: Site) -> None:
    module_site.done("tls init tls")
    module_site.done("disk create web01.vhdx --size 16M")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    nobody = Served(None, f"127.0.0.1:{port}")  # type: ignore[arg-type]
    assert module_site.run(replicate_line(nobody)).error["class"] == "Unreachable"


def test_unknown_authority_and_untrusted_vm_are_refused(served: Served, module_site: Site) -> None:
    module_site.done("disk create web01.vhdx --size 16M")
    module_site.done("tls init other")
    assert module_site.run(replicate_line(served, tls="other")).code == 45
    trust = module_site.folder / "tls" / "trust.toml"
    trust.write_text(trust.read_text(encoding="utf-8").replace('["*"]', '["mail*"]'), encoding="utf-8")
    refused = module_site.run(replicate_line(served))
    assert refused.error["class"] == "AuthorizationRefused"
    assert "tls trust" in (refused.error["hint"] or "")
    module_site.done("tls trust tls --certificate primary --vm web01")
    assert module_site.done(replicate_line(served)).answer["kind"] == "initial"


def test_unknown_vm_and_point_are_told(served: Served, module_site: Site) -> None:
    assert served.address
    for line in (
        "point list --store store --vm nobody",
        "point export --store store --vm nobody --output o.vhdx",
        "point export --store store --vm nobody --point not-an-id --output o.vhdx",
    ):
        assert module_site.run(f"{line} --json").error["exit_code"] == 52


def test_second_server_on_a_store_is_refused(served: Served, module_site: Site) -> None:
    assert served.address
    second = module_site.run("serve --store store --listen 127.0.0.1:0 --tls tls --json")
    assert second.error["class"] == "Locked"


def test_server_without_certificates_or_on_a_taken_port_is_refused(served: Served, module_site: Site) -> None:
    assert module_site.run("serve --store other --listen 127.0.0.1:0 --tls absent").code in {45, 70}
    taken = module_site.run(f"serve --store other --listen {served.address} --tls tls --json")
    assert taken.error["exit_code"] == 41


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_server_ends_by_signal_with_its_code(number: int, code: int, served: Served) -> None:
    assert served.end(number) == code


def test_server_tells_programs_in_json(module_site: Site) -> None:
    module_site.done("tls init tls")
    process = start(module_site, "--json --log-json")
    assert process.stdout is not None
    try:
        ready = json.loads(process.stdout.readline())
        served = Served(process, ready["address"])
        assert (ready["event"], ready["address"]) == ("listening", f"{ready['host']}:{ready['port']}")
        module_site.done("disk create web01.vhdx --size 16M")
        module_site.done(replicate_line(served))
        assert served.end() == 0
        assert process.stderr is not None
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    finally:
        process.kill()
        process.communicate()
    assert any("web01" in line["message"] for line in lines)


def test_reader_of_a_long_map_may_go_away(module_site: Site) -> None:
    module_site.done("disk create a.vhdx --size 8G --block-size 1M")
    with open_disk(OS_FILES, module_site.folder / "a.vhdx", writable=True, clock=SYSTEM) as disk:
        for block in range(0, 8192, 2):
            disk.write(b"x" * 512, block * MIB)
    line = " ".join(module_site.command) + " disk map a.vhdx | head -n 2; echo ${PIPESTATUS[0]}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=module_site.folder,
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "141"
