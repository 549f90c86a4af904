"""What is printed: plain text that cannot steer a terminal, JSON that any name survives in."""

from __future__ import annotations

import io
import json
import uuid
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hvreplica.cli.exit import Failure, OutputClosed
from hvreplica.cli.render import Output, encode_json, failure_text, make_table, plain, ratio, rendered


class Sample(msgspec.Struct):
    name: str
    virtual_bytes: int
    writable: bool
    note: str | None = None
    children: list[Sample] = []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("web01", "web01"),
        ("büro ☕", "büro ☕"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x9b31m", "\\x9b31m"),
        ("right\u202eleft", "right\\u202eleft"),
        ("raw\udcff", "raw\\udcff"),
    ],
)
def test_plain_shows_control_characters_as_escapes(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_json_takes_paths_guids_and_numpy_numbers() -> None:
    guid = uuid.UUID(int=7)
    value = {"path": Path("a/b"), "id": guid, "count": np.uint64(2**63), "flag": np.bool_(True)}
    assert json.loads(encode_json(value)) == {"path": "a/b", "id": str(guid), "count": 2**63, "flag": True}


def test_json_keeps_a_name_that_is_not_utf8() -> None:
    text = encode_json(Sample("disk\udcff.vhdx", 1, True))
    assert json.loads(text)["name"] == "disk\udcff.vhdx"
    text.encode("ascii")


def test_json_stream_is_one_array(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=True).stream_json({"offset": n} for n in range(3))
    out = capsys.readouterr().out
    assert json.loads(out) == [{"offset": 0}, {"offset": 1}, {"offset": 2}]
    assert out.splitlines()[1] == '{"offset":0},'
    Output(json=True).stream_json([])
    assert json.loads(capsys.readouterr().out) == []


def test_failure_names_place_and_details_on_lines_of_their_own() -> None:
    failure = Failure(
        "Truncated", "cut short", 11, "a.hrl", 4096, "DataLength", 512, 100, "[MS-HRL] 2.4", "copy again"
    )
    assert failure_text(failure).splitlines() == [
        "error: a.hrl: cut short",
        "  field     DataLength",
        "  offset    4096",
        "  expected  512",
        "  found     100",
        "  spec      [MS-HRL] 2.4",
        "hint: copy again",
    ]


def test_failure_as_json_has_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=True).failure(Failure("Locked", "busy", 51, "store"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err) == {
        "error": {
            "class": "Locked",
            "message": "busy",
            "exit_code": 51,
            "path": "store",
            "offset": None,
            "field": None,
            "expected": None,
            "actual": None,
            "spec": None,
            "hint": None,
        }
    }


def test_structure_shows_sizes_answers_and_lists(capsys: pytest.CaptureFixture[str]) -> None:
    Output().structure(Sample("web", 10 << 30, False, children=[Sample("\x1b]0;x", 512, True)]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "web"]
    assert lines[1].split() == ["virtual", "size", "10.0", "GiB"]
    assert lines[2].split() == ["writable", "no"]
    assert "children" in lines
    assert lines[-1].split()[:3] == ["\\x1b]0;x", "512", "B"]


def test_table_is_not_broken_where_a_program_reads(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 500
    Output().table(("name", ">size"), [(long, 1), ("[red]not markup[/red]", None)])
    lines = capsys.readouterr().out.splitlines()
    assert any(long in line for line in lines)
    assert any("[red]not markup[/red]" in line for line in lines)
    assert not any("\x1b" in line for line in lines)


def test_table_uses_ascii_where_the_stream_is_ascii() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    rendered(make_table(("name",), [("ü",)]), stream).encode("ascii", "backslashreplace").decode("ascii")
    assert "\u2500" not in rendered(make_table(("name",), [("a",)]), stream)


def test_output_that_nobody_reads_ends_the_verb_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(text)

    monkeypatch.setattr("sys.stdout", Closed())
    with pytest.raises(OutputClosed):
        Output().line("x")


@pytest.mark.parametrize(
    ("raw_bytes", "wire_bytes", "text"),
    [
        (3 << 20, 1 << 20, "3.0:1"),
        (1 << 20, 4 << 20, "0.2:1"),
        ((1 << 20) - 1, 100, None),
        (1 << 30, 0, None),
    ],
)
def test_ratio_is_told_only_where_it_says_something(
    raw_bytes: int, wire_bytes: int, text: str | None
) -> None:
    assert ratio(raw_bytes, wire_bytes) == text
