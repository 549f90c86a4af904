"""capture, cut, status, pause, resume and replicate on the command line: their words, and their contract as processes."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES
from hvreplica.replication.results import CutResult
from tests.support.command_line import Running
from tests.support.live_client import SocketGuest

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.command_line import Run

MIB = 1 << 20


@pytest.fixture
def started() -> Iterator[Callable[..., Running]]:
    """Return a function that starts a verb; whatever still runs at the end is killed."""
    with contextlib.ExitStack() as running:
        yield lambda *arguments: running.enter_context(Running(*arguments))


@pytest.fixture
def site(tmp_path: Path, started: Callable[..., Running]) -> dict[str, Any]:
    """Return options of a VM with two disks and of a server for it."""
    tls = tmp_path / "tls"
    hvreplica.tls_init(tls)
    disks = [tmp_path / "a.vhdx", tmp_path / "b.raw"]
    hvreplica.disk_create(disks[0], 16 * MIB, block_bytes=MIB)
    hvreplica.disk_create(disks[1], 8 * MIB, format="raw")
    server = started(
        "serve", "--store", tmp_path / "store", "--tls", tls, "--listen", "127.0.0.1:0", "--json"
    )
    return {
        "disks": disks,
        "named": ("--disk", disks[0], "--disk", disks[1]),
        "vm": ("--vm", "web01", "--state", tmp_path / "state"),
        "state": ("--state", tmp_path / "state"),
        "to": ("--to", server.ready["address"], "--tls", tls),
        "socket": tmp_path / "web01.sock",
        "store": tmp_path / "store",
    }


def content(site: dict[str, Any], index: int) -> bytes:
    output = site["store"].parent / f"export-{index}.raw"
    hvreplica.point_export(site["store"], "web01", output, disk=index, format="raw", overwrite=True)
    return bytes(output.read_bytes())


def test_running_vm_is_captured_cut_killed_and_replicated(
    site: dict[str, Any], started: Callable[..., Running], hvreplica: Callable[..., Run], rng: random.Random
) -> None:
    models = [bytearray(16 * MIB), bytearray(8 * MIB)]

    def write(guest: SocketGuest, index: int, count: int) -> None:
        for _ in range(count):
            at, data = rng.randrange(len(models[index]) // 4096) * 4096, rng.randbytes(4096)
            guest.write(at, data)
            models[index][at : at + 4096] = data
        guest.flush()

    arguments = ("capture", *site["vm"], "--socket", site["socket"], "--json")
    capture = started(*arguments, *site["named"])
    assert capture.ready == {"event": "listening", "addresses": [str(site["socket"])], "metrics": None}
    with SocketGuest(site["socket"], "0") as first, SocketGuest(site["socket"], "1") as second:
        write(first, 0, 50)
        cut = hvreplica("cut", *site["state"], "--json")
        assert cut.code == 0
        assert [sorted(log) for log in cut.answer["logs"]] == [["bytes", "disk", "entries", "id", "path"]]
        assert cut.answer["held_us"] < 100_000
        assert hvreplica("log", "verify", cut.answer["logs"][0]["path"]).code == 0
        once = hvreplica("replicate", *site["vm"], *site["to"], "--once", "--json")
        assert (once.code, once.answer["kind"]) == (0, "initial")
        write(second, 1, 20)
        write(first, 0, 20)
        assert len(hvreplica("cut", *site["state"], "--json").answer["logs"]) == 2
        write(first, 0, 5)
        once = hvreplica("replicate", *site["vm"], *site["to"], "--once", "--json")
        assert (once.code, once.answer["kind"], len(once.answer["logs"])) == (0, "delta", 3)
        assert [content(site, 0), content(site, 1)] == models
        write(second, 1, 30)
        capture.end(signal.SIGKILL)
    left = hvreplica("status", *site["state"], "--json").answer
    assert left["disks"][1]["journal"] == {"marked_bytes": 8 * MIB, "clean": False}
    waits = left["statistics"]["pending_replication_size"]
    assert waits == sum(disk["journal"]["marked_bytes"] for disk in left["disks"]) >= 8 * MIB
    assert left["statistics"]["replication_health"] == "Warning"
    assert "was cut off" in left["statistics"]["replication_health_issues"][0]
    shown = hvreplica("status", *site["state"]).out
    assert "0 cuts, at most " in shown
    assert "journal left unclean" in shown
    capture = started(*arguments)
    once = hvreplica("replicate", *site["vm"], *site["to"], "--once", "--json")
    assert once.answer["kind"] == "delta"
    assert sum(disk["changed_bytes"] for disk in once.answer["disks"]) <= 30 * 4096
    assert [content(site, 0), content(site, 1)] == models
    code, err = capture.end()
    assert (code, "Traceback" in err) == (0, False)
    left = hvreplica("status", *site["state"], "--json").answer
    assert [disk["journal"] for disk in left["disks"]] == [{"marked_bytes": 0, "clean": True}] * 2
    assert left["statistics"]["replication_health_issues"] == ["capture does not run"]
    assert not site["socket"].exists()
    assert hvreplica("disk", "check", site["disks"][0]).code == 0


def test_capture_replicates_by_itself_and_status_shows_it(
    site: dict[str, Any], started: Callable[..., Running], hvreplica: Callable[..., Run]
) -> None:
    arguments = ("capture", *site["vm"], "--socket", site["socket"], *site["to"], "--metrics", "127.0.0.1:0")
    capture = started(*arguments, *site["named"], "--continuous", "--json")
    assert capture.ready["metrics"].startswith("127.0.0.1:")
    with SocketGuest(site["socket"], "") as guest:
        guest.write(4096, b"x" * 4096)
        once = hvreplica("replicate", *site["vm"], "--once", "--json")
        assert once.code == 0
        assert content(site, 0)[4096:8192] == b"x" * 4096
        shown = hvreplica("status", *site["state"], "--json").answer
        assert (shown["running"], shown["cycles"]["interval_s"], shown["disks"][0]["tracking"]["writes"]) == (
            "capture",
            0,
            1,
        )
        assert hvreplica("pause", *site["state"], "--json").answer["paused"]
        refused = hvreplica("replicate", *site["vm"], "--once", "--json")
        assert (refused.code, refused.error["class"]) == (61, "InvalidTransition")
        assert "resume" in refused.error["hint"]
        assert hvreplica("resume", *site["state"]).code == 0
    code, _ = capture.end(signal.SIGINT)
    assert code == 130
    words = hvreplica("status", *site["state"]).out
    assert "no process runs" in words
    assert "back to back" not in words


def test_replicate_without_once_runs_until_it_is_told(
    site: dict[str, Any], started: Callable[..., Running], hvreplica: Callable[..., Run]
) -> None:
    loop = started("replicate", *site["vm"], *site["named"], *site["to"], "--interval", "3600", "--json")
    assert loop.ready == {"event": "replicating", "metrics": None}
    with contextlib.closing(open_disk(OS_FILES, site["disks"][0], writable=True, clock=SYSTEM)) as disk:
        disk.write(b"y" * 512, 512)
        disk.flush()
    assert hvreplica("replicate", *site["vm"], *site["named"], "--once", "--json").code == 0
    assert content(site, 0)[512:1024] == b"y" * 512
    taken = hvreplica("capture", *site["vm"], "--socket", site["socket"], "--json")
    assert (taken.code, taken.error["class"]) == (51, "Locked")
    code, err = loop.end()
    assert code == 0
    assert re.search(r"web01: (first copy|nothing changed) in .* recovery point", err), err


def test_commands_around_a_cut_run_in_order_and_the_second_always(
    site: dict[str, Any], hvreplica: Callable[..., Run], tmp_path: Path
) -> None:
    note = tmp_path / "note"

    def noting(word: str, code: int = 0) -> str:
        return shlex.join(
            [sys.executable, "-c", f"open({str(note)!r}, 'a').write({word!r}); raise SystemExit({code})"]
        )

    assert hvreplica("replicate", *site["vm"], *site["named"], *site["to"], "--once").code == 0
    done = hvreplica("cut", *site["state"], "--before", noting("b"), "--after", noting("a"), "--json")
    assert (done.code, done.answer["logs"], note.read_text()) == (0, [], "ba")
    failed = hvreplica("cut", *site["state"], "--before", noting("b", 3), "--after", noting("a"), "--json")
    assert (failed.code, failed.error["class"], failed.error["actual"]) == (63, "FreezeFailed", 3)
    assert note.read_text() == "baba"
    hanging = shlex.join([sys.executable, "-c", "import threading; threading.Event().wait()"])
    late = hvreplica(
        "cut", *site["state"], "--before", hanging, "--after", noting("a"), "--command-limit", "0.2", "--json"
    )
    assert (late.code, late.error["class"], note.read_text()) == (63, "FreezeFailed", "babaa")
    assert "0.2 s" in late.error["message"]
    assert "--command-limit" in late.error["hint"]
    shutil.move(tmp_path / "state", tmp_path / "gone")
    assert hvreplica("cut", *site["state"], "--before", noting("b"), "--after", noting("a")).code == 60
    assert note.read_text() == "babaaba"


@pytest.mark.parametrize("as_json", [True, False])
def test_cut_that_froze_nothing_warns(
    invoke: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, as_json: bool
) -> None:
    result = CutResult([], 7.0, "2026-01-01T00:00:00Z", None, 0, ["the guest froze no file system"])
    monkeypatch.setattr(hvreplica, "cut", lambda *_, **__: result)
    run = invoke("cut", "--state", tmp_path, "--freeze", "s", *(["--json"] if as_json else []))
    if as_json:
        assert (run.answer["frozen"], run.answer["warnings"]) == (0, result.warnings)
    else:
        assert "warning: the guest froze no file system" in run.err
    assert run.code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("capture", "--vm", "a", "--state", "s"), "--socket or --tcp"),
        (("capture", "--vm", "a", "--state", "s", "--socket", "x", "--to", "h:1"), "belong together"),
        (("capture", "--vm", "a", "--state", "s", "--socket", "x", "--interval", "30"), "need --to"),
        (("capture", "--vm", "a", "--state", "s", "--socket", "x", "--nbd-tls", "t"), "needs --tcp"),
        (
            ("capture", "--vm", "a", "--state", "s", "--socket", "x", "--log-off", "--log-budget", "1G"),
            "exclude",
        ),
        (
            (
                "capture",
                "--vm",
                "a",
                "--state",
                "s",
                "--socket",
                "x",
                "--to",
                "h:1",
                "--tls",
                "t",
                "--interval",
                "5",
                "--continuous",
            ),
            "exclude",
        ),
        (("capture", "--vm", "a", "--state", "s", "--socket", "x", "--interval", "0"), "0"),
        (("capture", "--vm", "a", "--state", "s", "--socket", "x", "--disk", "d", "--disk", "d"), "twice"),
        (("replicate", "--vm", "a", "--state", "s", "--once", "--interval", "5"), "without --once"),
        (("replicate", "--vm", "a", "--state", "s", "--once", "--tls", "t"), "belong together"),
        (("replicate", "--vm", "a", "--state", "s"), "say where"),
        (("replicate", "--vm", "a", "--state", "s", "--to", "h:1", "--tls", "t", "--resync"), "pass --once"),
        (("cut", "--state", "s", "--before", "'"), "--before"),
        (("cut", "--state", "s", "--freeze-limit", "nan"), "--freeze-limit"),
        (("cut", "--state", "s", "--freeze-limit", "inf"), "--freeze-limit"),
        (("cut", "--state", "s", "--command-limit", "nan"), "--command-limit"),
        (("cut", "--state", "s", "--command-limit", "0"), "--command-limit"),
        (("replicate", "--vm", "a", "--state", "s", "--interval", "nan"), "--interval"),
        (("cut",), "--state"),
    ],
)
def test_options_that_do_not_fit_are_usage_errors(
    invoke: Callable[..., Run], arguments: tuple[str, ...], words: str
) -> None:
    run = invoke(*arguments)
    assert run.code == 2, run.err
    assert words in run.err


@pytest.mark.parametrize("verb", ["cut", "status", "pause", "resume"])
def test_verbs_without_a_state_say_so(invoke: Callable[..., Run], tmp_path: Path, verb: str) -> None:
    run = invoke(verb, "--state", tmp_path / "absent", "--json")
    assert (run.code, run.error["class"]) == (60, "StateError")
    assert not os.path.exists(tmp_path / "absent")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--vm", "v"), 60, "does not know the VM's disks"),
        (("--vm", "a\nb", "--disk", "x.vhdx"), 2, "printable"),
        (("--vm", "v", *(word for n in range(65) for word in ("--disk", f"{n}.vhdx"))), 2, "64 disks"),
    ],
    ids=["no disk", "name", "65 disks"],
)
def test_capture_that_is_called_wrongly_is_no_bug(
    tmp_path: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    command = [sys.executable, "-m", "hvreplica", "capture", *words, "--socket", "s", "--state", "st"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert said in done.stderr
    assert "bug" not in done.stderr
    assert done.returncode == code
