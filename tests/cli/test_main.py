"""The frame around the verbs: help, usage, signals, closed pipes, and that no traceback reaches a user."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest

import hvreplica as package
from hvreplica.cli import exit as exits
from hvreplica.cli.main import cli
from hvreplica.errors import ChecksumMismatch
from tests.support.command_line import environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.command_line import Run


def verbs(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, (*path, name))
        else:
            yield (*path, name)


@pytest.mark.parametrize("verb", list(verbs()), ids=" ".join)
def test_every_verb_has_help_and_json(verb: tuple[str, ...], invoke: Callable[..., Run]) -> None:
    run = invoke(*verb, "--help")
    assert run.code == 0
    assert "--json" in run.out
    assert "--quiet" in run.out


def test_every_verb_of_the_contract_is_there() -> None:
    wanted = """demo,tls init,serve,replicate,store status,point list,point export,disk info,disk map,disk create,
    disk convert,disk compare,log info,log verify,log apply,log dump,completion"""
    assert {tuple(verb.split()) for verb in wanted.split(",")} <= set(verbs())


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["disk", "nonsense"],
        ["disk", "info"],
        ["disk", "create", "x", "--size", "10Q"],
        ["--nonsense"],
    ],
)
def test_wrong_usage_ends_with_2_and_words_on_stderr(
    arguments: list[str], invoke: Callable[..., Run]
) -> None:
    run = invoke(*arguments)
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("error: ")
    with_json = invoke(*arguments, "--json")
    assert (with_json.code, with_json.out) == (2, "")
    assert (with_json.error["class"], with_json.error["exit_code"]) == ("UsageError", 2)


@pytest.mark.parametrize("arguments", [[], ["disk"], ["log"]])
def test_no_verb_shows_the_help(arguments: list[str], invoke: Callable[..., Run]) -> None:
    run = invoke(*arguments)
    assert "Usage: hvreplica" in run.out + run.err
    assert "error" not in run.err


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(package, "disk_info", fail, raising=False)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ChecksumMismatch("bad", path="d", offset=7), 14),
        (OSError(2, "No such file", "d"), 70),
        (OSError(28, "No space left", "d"), 71),
        (RuntimeError("surprise"), exits.INTERNAL),
        (KeyboardInterrupt(), 130),
        (exits.Signalled(signal.SIGTERM), 143),
        (exits.OutputClosed(), 141),
    ],
)
def test_errors_become_codes(
    error: BaseException, code: int, invoke: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(monkeypatch, error)
    run = invoke("disk", "info", "d")
    assert (run.code, run.out) == (code, "")
    assert "Traceback" not in run.err
    if isinstance(error, Exception):
        assert invoke("disk", "info", "d", "--json").error["exit_code"] == code
        assert invoke("disk", "info", "d", env={"HVREPLICA_JSON": "1"}).error["exit_code"] == code


def test_debug_shows_where(invoke: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, RuntimeError("surprise"))
    run = invoke("disk", "info", "d", env={"HVREPLICA_DEBUG": "1"})
    assert "Traceback" in run.err
    assert run.err.splitlines()[-2].startswith("error: ")


def test_version_is_the_packages(hvreplica: Callable[..., Run]) -> None:
    assert hvreplica("--version").out == f"hvreplica {package.__version__}\n"


def test_help_starts_without_the_libraries_of_the_data_plane() -> None:
    heavy = "{'numpy', 'rich', 'msgspec', 'ssl', 'cryptography', 'sqlite3', 'zstandard', 'lz4', 'xxhash', 'logging'}"
    code = (
        "import sys\nfrom hvreplica.cli.main import cli\n"
        "try:\n    cli.main(['--help'])\n"
        f"except SystemExit:\n    print('loaded:', sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize("arguments", [["--help"], ["completion", "bash"], ["replicate", "--help"]])
def test_reader_that_goes_away_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "hvreplica", *arguments],
            stdout=closed,
            stderr=subprocess.PIPE,
            env=environment(),
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_full_output_is_told() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hvreplica", "completion", "zsh"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            check=False,
        )
    assert done.returncode == 71
    assert done.stderr.startswith("error: no space left on device")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_the_shell_can_use(shell: str, hvreplica: Callable[..., Run]) -> None:
    script = hvreplica("completion", shell)
    assert script.code == 0
    assert f"_HVREPLICA_COMPLETE={shell}_complete" in script.out
    assert hvreplica("completion", shell, "--json").answer["shell"] == shell


def complete(words: str, hvreplica: Callable[..., Run]) -> list[str]:
    env = {
        "_HVREPLICA_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    return [line.partition(",")[2] for line in hvreplica(env=env).out.splitlines()]


def test_completion_knows_verbs_options_and_choices(hvreplica: Callable[..., Run]) -> None:
    assert complete("hvreplica di", hvreplica) == ["disk"]
    assert set(complete("hvreplica disk co", hvreplica)) == {"compact", "compare", "convert"}
    assert "--compression" in complete("hvreplica replicate --json --co", hvreplica)
    assert complete("hvreplica replicate --compression l", hvreplica) == ["lz4"]


def test_error_of_a_hostile_name_cannot_steer_the_terminal(
    hvreplica: Callable[..., Run], tmp_path: Path
) -> None:
    run = hvreplica("disk", "info", tmp_path / "\x1b[2Jx")
    assert run.code == 70
    assert "\x1b" not in run.err
    told = hvreplica("disk", "info", tmp_path / "\x1b[2Jx", "--json").err
    assert json.loads(told)["error"]["path"].endswith("\x1b[2Jx")
