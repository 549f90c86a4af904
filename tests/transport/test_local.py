"""Questions over a Unix socket: answers, progress, errors of the same class, and callers that misbehave."""

from __future__ import annotations

import contextlib
import json
import socket
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hvreplica import errors
from hvreplica.errors import Fenced, HvReplicaError, Locked, PeerClosed, ProtocolViolation
from hvreplica.files import short_name
from hvreplica.transport import local
from hvreplica.transport.local import LINE_BYTES_MAX, LocalServer
from hvreplica.transport.local import Owner as Line
from tests.support.threads import own_threads

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from hvreplica.transport.local import Tell


def ask(path: Path, verb: str, arguments: dict[str, Any] | None = None, **options: Any) -> Any:
    line = Line.find(path)
    assert line is not None
    return line.ask(verb, arguments, **options)


class Owner:
    """A handler with a verb for each case."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.released = threading.Event()
        self.failure: BaseException = ValueError("no failure was set")

    def __call__(self, verb: str, arguments: dict[str, Any], tell: Tell) -> object:
        if verb == "echo":
            return arguments
        if verb == "count":
            for number in range(arguments["to"]):
                tell({"at": number})
            return arguments["to"]
        if verb == "wait":
            self.entered.set()
            assert self.released.wait(20)
            tell("after")
            return "done"
        if verb == "large":
            return "x" * arguments["bytes"]
        if verb == "strange":
            return object()
        raise self.failure


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a place whose name is longer than a socket's address."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    return folder / "control.sock"


@pytest.fixture
def server(path: Path, owner: Owner) -> Iterator[LocalServer]:
    with own_threads("hvreplica c"), LocalServer(path, owner) as made:
        yield made
        owner.released.set()
    assert not path.exists()


@contextlib.contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection, short_name(path) as name:
        connection.settimeout(20)
        connection.connect(name)
        yield connection


def raw(path: Path, data: bytes, *, end: bool = True) -> dict[str, Any]:
    with connected(path) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
            if end:
                connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as answer:
            line = answer.readline()
    return json.loads(line) if line else {}


@pytest.mark.usefixtures("server")
def test_question_is_answered_with_progress_before(path: Path) -> None:
    told: list[Any] = []
    assert ask(path, "echo", {"a": [1, None, "ä"], "p": Path("/x")}) == {"a": [1, None, "ä"], "p": "/x"}
    assert ask(path, "count", {"to": 3}, on_progress=told.append) == 3
    assert told == [{"at": 0}, {"at": 1}, {"at": 2}]


@pytest.mark.usefixtures("server")
def test_socket_is_for_its_user_alone(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_ISSOCK(path.stat().st_mode)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    "failure",
    [
        Locked("held", path="/a/lock", hint="wait"),
        errors.ChecksumMismatch(
            "wrong", path=b"/b", offset=5, field="crc", expected=7, actual=b"\1", spec="[X] 1"
        ),
        OSError(28, "No space left on device", "/c"),
        ValueError("a number must be positive"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_error_comes_out_as_the_same_class(path: Path, owner: Owner, failure: Exception) -> None:
    failure.add_note("write /c at offset 5")
    owner.failure = failure
    with pytest.raises(type(failure)) as caught:
        ask(path, "fail")
    error = caught.value
    assert str(error) == str(failure).replace("b'/b'", "/b")
    assert error.__notes__ == ["write /c at offset 5"]
    if isinstance(failure, HvReplicaError):
        assert isinstance(error, HvReplicaError)
        assert (error.hint, error.offset, error.spec) == (failure.hint, failure.offset, failure.spec)
    if isinstance(failure, OSError):
        assert isinstance(error, OSError)
        assert (error.errno, error.filename) == (28, "/c")


@pytest.mark.usefixtures("server")
def test_owners_generation_and_bugs_are_told(
    path: Path, owner: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    fenced = Fenced("newer")
    fenced.generation = 9
    owner.failure = fenced
    with pytest.raises(Fenced) as caught:
        ask(path, "fail")
    assert caught.value.generation == 9
    owner.failure = ZeroDivisionError("oh")
    with pytest.raises(HvReplicaError, match="ZeroDivisionError: oh"):
        ask(path, "fail")
    with pytest.raises(HvReplicaError, match="NotImplementedError"):
        ask(path, "strange")
    assert "cannot be answered" in caplog.text


def test_nobody_there_is_none_and_a_dead_owners_name_is_replaced(path: Path, owner: Owner) -> None:
    assert Line.find(path) is None
    assert Line.find(path.parent / "absent" / "folder" / path.name) is None
    with socket.socket(socket.AF_UNIX) as dead, short_name(path) as name:
        dead.bind(name)
    assert Line.find(path) is None
    with LocalServer(path, owner):
        assert ask(path, "echo", {}) == {}


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"not json\n", "belongs"),
        (b"[]\n", "belongs"),
        (b'{"verb": 5}\n', "belongs"),
        (b'{"verb": "echo", "more": 1}\n', "belongs"),
        (b'{"verb": "' + b"v" * 65 + b'"}\n', "belongs"),
        (b'{"verb": "\xff"}\n', "belongs"),
        (b'{"verb": "echo"}', "breaks off"),
        (b"[" * 100_000 + b"\n", "belongs"),
        (b"x" * (LINE_BYTES_MAX + (64 << 10)), "too long"),
    ],
)
def test_hostile_bytes_are_refused_with_the_reason(path: Path, data: bytes, reason: str) -> None:
    answer = raw(path, data)
    if answer:  # the rest of a question that is too long may close the connection before its answer
        assert answer["error"]["kind"] == "ProtocolViolation"
        assert reason in answer["error"]["message"]
    else:
        assert reason == "too long"
    assert ask(path, "echo", {"still": "there"}) == {"still": "there"}


@pytest.mark.usefixtures("server")
def test_random_bytes_disturb_nobody(path: Path, rng: random.Random) -> None:
    for _ in range(30):
        raw(path, rng.randbytes(rng.randrange(200)))
    assert raw(path, b"") == {}
    assert ask(path, "echo", {}) == {}


@pytest.mark.usefixtures("server")
def test_caller_that_goes_away_does_not_stop_its_verb(path: Path, owner: Owner) -> None:
    with connected(path) as connection:
        connection.sendall(b'{"verb": "wait"}\n')
        assert owner.entered.wait(20)
    owner.released.set()
    assert ask(path, "wait") == "done"


@pytest.mark.usefixtures("server")
def test_caller_that_is_silent_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_QUESTION_S", 0.05)
    assert raw(path, b'{"verb"', end=False)["error"]["message"].startswith("no whole line")


@pytest.mark.usefixtures("server")
def test_caller_that_does_not_read_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_ANSWER_S", 0.05)
    with connected(path) as connection:
        connection.sendall(b'{"verb": "count", "arguments": {"to": 100000}}\n')
        assert ask(path, "echo", {}) == {}
        # The verb comes to its end although nobody takes what it tells: only then does the line end.
        while connection.recv(1 << 20):
            pass


@pytest.mark.usefixtures("server")
def test_too_many_callers_are_told_so(path: Path, owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "CALLERS_MAX", 1)
    with connected(path) as connection:
        connection.sendall(b'{"verb": "wait"}\n')
        assert owner.entered.wait(20)
        with pytest.raises(Locked, match="too many"):
            ask(path, "echo")
        owner.released.set()
        with connection.makefile("rb") as lines:
            assert json.loads(lines.read().splitlines()[-1]) == {"result": "done"}


@pytest.mark.usefixtures("server")
def test_answer_that_is_too_long_is_an_error(path: Path) -> None:
    with pytest.raises(ProtocolViolation, match="too long"):
        ask(path, "large", {"bytes": LINE_BYTES_MAX})
    with pytest.raises(ValueError, match="at most"):
        ask(path, "echo", {"text": "x" * LINE_BYTES_MAX})


def test_owner_that_ends_before_its_answer_is_told(path: Path, owner: Owner) -> None:
    listening = socket.socket(socket.AF_UNIX)
    with listening, short_name(path) as name:
        listening.bind(name)
        listening.listen()

        def end() -> None:
            connection, _ = listening.accept()
            connection.close()

        thread = threading.Thread(target=end)
        thread.start()
        with pytest.raises(PeerClosed, match="before it answered"):
            ask(path, "echo")
        thread.join()
    assert not owner.entered.is_set()
