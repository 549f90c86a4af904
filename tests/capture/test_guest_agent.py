"""Whatever the agent says or does not say: the guest is thawed, or the error says that it may not be."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hvreplica.capture.guest_agent import STALE_BYTES_MAX, THAW_ATTEMPTS, GuestAgent
from hvreplica.errors import FreezeFailed, HvReplicaError, PeerClosed, ProtocolViolation, Unreachable
from hvreplica.replication import live_verbs
from tests.capture.agent import SILENT, FakeAgent, die, error, hang_up

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

WAIT_S = 30
SHORT_S = 0.15
STATUS, FREEZE, THAW = "guest-fsfreeze-status", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"
SYNC = "guest-sync-delimited"


@pytest.fixture
def path() -> Iterator[Path]:
    """Return a path short enough for a socket, wherever pytest keeps its folders."""
    with tempfile.TemporaryDirectory(prefix="hvr") as folder:
        yield Path(folder) / "agent.sock"


@pytest.fixture
def scripted(path: Path) -> Iterator[Callable[..., FakeAgent]]:
    """Return what starts the agent of this test, as its script says."""
    with contextlib.ExitStack() as stack:

        def start(**script: Any) -> FakeAgent:
            return stack.enter_context(contextlib.closing(FakeAgent(path, **script)))

        yield start


def without_sync(agent: FakeAgent) -> list[str]:
    return [command for command in agent.commands if command != SYNC]


def test_frozen_freezes_for_the_block_and_thaws_after_it(scripted: Callable[..., FakeAgent]) -> None:
    agent = scripted(file_systems=3)
    for _ in range(2):
        with GuestAgent(agent.path).frozen() as count:
            assert count == 3
            assert agent.is_frozen
        assert not agent.is_frozen
    assert agent.commands == [SYNC, STATUS, FREEZE, THAW] * 2
    assert agent.first_bytes == [b"\xff"] * 2, "half a command of somebody else is to be forgotten first"


@pytest.mark.parametrize("raised", [ValueError("cut failed"), KeyboardInterrupt(), SystemExit(3)])
def test_frozen_block_raises_guest_is_thawed(
    scripted: Callable[..., FakeAgent], raised: BaseException
) -> None:
    agent = scripted()
    with pytest.raises(type(raised)) as caught, GuestAgent(agent.path).frozen():
        raise raised
    assert caught.value is raised
    assert not agent.is_frozen
    assert without_sync(agent) == [STATUS, FREEZE, THAW]


def test_frozen_signal_while_it_freezes_guest_is_thawed(scripted: Callable[..., FakeAgent]) -> None:
    def interrupt(agent: FakeAgent, _connection: socket.socket) -> None:
        agent.is_frozen = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    agent = scripted(guest_fsfreeze_freeze=[interrupt])
    with pytest.raises(KeyboardInterrupt), GuestAgent(agent.path).frozen(limit_s=WAIT_S):
        pytest.fail("it was interrupted")
    assert not agent.is_frozen


def test_frozen_for_too_long_is_thawed_at_the_limit_and_raises(scripted: Callable[..., FakeAgent]) -> None:
    agent = scripted()
    with (
        pytest.raises(FreezeFailed, match=r"thawed after 0\.15 s"),
        GuestAgent(agent.path).frozen(limit_s=SHORT_S),
    ):
        assert agent.thawed.wait(WAIT_S), "nobody thawed while the block ran"
    assert without_sync(agent).count(THAW) == 1


@pytest.mark.parametrize("silence", [SILENT, hang_up])
def test_frozen_agent_without_answer_to_sync_is_unreachable(
    scripted: Callable[..., FakeAgent], silence: object
) -> None:
    agent = scripted(guest_sync_delimited=[silence])
    with pytest.raises(Unreachable) as caught, GuestAgent(agent.path, timeout_s=SHORT_S).frozen():
        pytest.fail("nothing was frozen")
    assert str(agent.path) in str(caught.value)
    assert "org.qemu.guest_agent.0" in str(caught.value.hint)
    assert without_sync(agent) == []


@pytest.mark.parametrize("name", ["agent.sock", "a" * 200])
def test_frozen_no_socket_is_unreachable(path: Path, name: str) -> None:
    with pytest.raises(Unreachable), GuestAgent(path.parent / name).frozen():
        pytest.fail("there is no agent")


def test_frozen_agent_silent_in_freeze_is_thawed_on_a_new_connection(
    scripted: Callable[..., FakeAgent],
) -> None:
    agent = scripted(guest_fsfreeze_freeze=[SILENT])
    with (
        pytest.raises(PeerClosed, match="did not answer guest-fsfreeze-freeze"),
        GuestAgent(agent.path).frozen(limit_s=SHORT_S),
    ):
        pytest.fail("it did not say that it froze")
    assert without_sync(agent) == [STATUS, FREEZE, THAW]
    assert agent.connections == 2


def test_frozen_agent_silent_for_ever_says_that_guest_may_be_frozen(
    scripted: Callable[..., FakeAgent],
) -> None:
    agent = scripted(guest_fsfreeze_freeze=[SILENT], guest_fsfreeze_thaw=[SILENT] * THAW_ATTEMPTS)
    with (
        pytest.raises(PeerClosed) as caught,
        GuestAgent(agent.path, timeout_s=SHORT_S).frozen(limit_s=SHORT_S),
    ):
        pytest.fail("it did not say that it froze")
    assert "may still be frozen" in caught.value.__notes__[0]
    assert without_sync(agent).count(THAW) == THAW_ATTEMPTS - 1, "the first has no connection to use"


def test_frozen_error_of_freeze_is_told_in_the_agents_words(scripted: Callable[..., FakeAgent]) -> None:
    agent = scripted(guest_fsfreeze_freeze=[error("failed to open /mnt\x1b[2J: " + "x" * 1000)])
    words = r"failed to open /mnt\?\[2J: x+\.\.\."
    with pytest.raises(FreezeFailed, match=words) as caught, GuestAgent(agent.path).frozen():
        pytest.fail("it refused")
    assert len(str(caught.value)) < 500
    assert not hasattr(caught.value, "__notes__")
    assert without_sync(agent)[-1] == THAW


def test_frozen_guest_that_somebody_else_froze_is_left_alone(scripted: Callable[..., FakeAgent]) -> None:
    agent = scripted()
    agent.is_frozen = True
    with pytest.raises(FreezeFailed, match="already frozen"), GuestAgent(agent.path).frozen():
        pytest.fail("somebody else's freeze")
    assert without_sync(agent) == [STATUS]
    assert agent.is_frozen


def test_frozen_answers_to_others_are_skipped(scripted: Callable[..., FakeAgent]) -> None:
    def stale_first(agent: FakeAgent, connection: socket.socket) -> None:
        connection.sendall(b'{"return": {}}\n\xff{"return": 7}\n{"error": {"class": "x", "desc": "y"}}\n\xff')
        connection.sendall(agent.answer_to_sync + b"\n")

    agent = scripted(guest_sync_delimited=[stale_first])
    with GuestAgent(agent.path).frozen() as count:
        assert count == 2
    assert not agent.is_frozen


@pytest.mark.parametrize("line", [b'\xff{"return": 7}\n', b"\xff{}\n", b"\n", b"\xff" * 9000 + b"\n"])
def test_frozen_never_the_right_sync_number_ends_within_its_bound(
    scripted: Callable[..., FakeAgent], line: bytes
) -> None:
    def flood(_agent: FakeAgent, connection: socket.socket) -> None:
        while True:
            connection.sendall(line * (STALE_BYTES_MAX // 16 // len(line)))

    agent = scripted(guest_sync_delimited=[flood])
    with pytest.raises(ProtocolViolation), GuestAgent(agent.path, timeout_s=WAIT_S).frozen():
        pytest.fail("nobody answered")
    assert without_sync(agent) == []


def test_frozen_answer_in_drops_ends_in_time(scripted: Callable[..., FakeAgent]) -> None:
    def drip(agent: FakeAgent, connection: socket.socket) -> None:
        while not agent.thawed.wait(SHORT_S / 10):
            connection.sendall(b" ")

    agent = scripted(guest_sync_delimited=[drip])
    with pytest.raises(Unreachable, match="in time"), GuestAgent(agent.path, timeout_s=SHORT_S).frozen():
        pytest.fail("nobody answered")


@pytest.mark.parametrize(
    "answer",
    [
        b"no json\n",
        b"{}\n",
        b"[]\n",
        b'{"return": "2"}\n',
        b'{"return": true}\n',
        b'{"return": -1}\n',
        b'{"return": 99999999999999999999999}\n',
        b'{"return": ' + b"[" * 60_000 + b"\n",
        b'{"error": 5}\n',
        b'{"return": 1, "return": ' + b"\xc3\x28" + b"}\n",
        b"x" * 200_000,
    ],
)
def test_frozen_answer_that_is_none_raises_and_guest_is_thawed(
    scripted: Callable[..., FakeAgent], answer: bytes
) -> None:
    def freeze_and_say(agent: FakeAgent, connection: socket.socket) -> None:
        agent.is_frozen = True
        connection.sendall(answer)

    agent = scripted(guest_fsfreeze_freeze=[freeze_and_say])
    with pytest.raises(ProtocolViolation), GuestAgent(agent.path).frozen():
        pytest.fail("that is no answer")
    assert not agent.is_frozen


@pytest.mark.parametrize("lost", [SILENT, hang_up, b"no json\n"])
def test_frozen_answer_to_thaw_lost_asks_again(scripted: Callable[..., FakeAgent], lost: object) -> None:
    agent = scripted(guest_fsfreeze_thaw=[lost])
    with GuestAgent(agent.path, timeout_s=SHORT_S).frozen() as count:
        assert count == 2
    assert not agent.is_frozen
    assert agent.connections == 2


def test_frozen_thaw_done_but_its_answer_lost_is_one_instant(scripted: Callable[..., FakeAgent]) -> None:
    def thaw_unheard(agent: FakeAgent, connection: socket.socket) -> None:
        agent.is_frozen = False
        hang_up(agent, connection)

    agent = scripted(guest_fsfreeze_thaw=[thaw_unheard])
    with GuestAgent(agent.path).frozen():
        pass
    assert agent.connections == 2


def test_frozen_agent_dies_while_frozen_raises_with_what_to_do(scripted: Callable[..., FakeAgent]) -> None:
    agent = scripted(guest_fsfreeze_thaw=[die])
    with pytest.raises(FreezeFailed, match="may still be frozen") as caught, GuestAgent(agent.path).frozen():
        pass
    assert "fsfreeze -u" in str(caught.value.hint)


def test_frozen_block_and_thaw_fail_tells_both(scripted: Callable[..., FakeAgent]) -> None:
    agent = scripted(guest_fsfreeze_thaw=[die])
    with pytest.raises(ValueError, match="cut failed") as caught, GuestAgent(agent.path).frozen():
        raise ValueError("cut failed")
    assert "may still be frozen" in caught.value.__notes__[0]


def test_frozen_thawed_by_somebody_else_raises(scripted: Callable[..., FakeAgent]) -> None:
    agent = scripted()
    with pytest.raises(FreezeFailed, match="not by us"), GuestAgent(agent.path).frozen():
        agent.is_frozen = False
    assert without_sync(agent)[-1] == THAW


def test_frozen_thaw_refused_by_a_guest_that_went_on_raises(scripted: Callable[..., FakeAgent]) -> None:
    agent = scripted(guest_fsfreeze_thaw=[error("fsfreeze is limited to 10 seconds")])
    with pytest.raises(FreezeFailed, match="limited to 10 seconds"), GuestAgent(agent.path).frozen():
        agent.is_frozen = False
    assert without_sync(agent) == [STATUS, FREEZE, THAW, STATUS]


def test_frozen_thaw_refused_while_frozen_asks_again(scripted: Callable[..., FakeAgent]) -> None:
    agent = scripted(guest_fsfreeze_thaw=[error("busy")])
    with GuestAgent(agent.path).frozen():
        pass
    assert not agent.is_frozen


def test_frozen_guest_without_file_systems_yields_zero(scripted: Callable[..., FakeAgent]) -> None:
    with GuestAgent(scripted(file_systems=0).path).frozen() as count:
        assert count == 0


def test_freeze_failed_may_be_tried_again() -> None:
    assert FreezeFailed("").retryable
    assert issubclass(FreezeFailed, HvReplicaError)


@pytest.mark.parametrize("limit_s", [0.0, -1.0, 3601.0, float("nan"), float("inf")])
def test_limit_that_is_none_freezes_nobody(tmp_path: Path, limit_s: float) -> None:
    with (
        pytest.raises(ValueError, match="stands still"),
        GuestAgent(tmp_path / "absent").frozen(limit_s=limit_s),
    ):
        pass
    with pytest.raises(ValueError, match="stands still"):
        live_verbs.cut(tmp_path / "absent", freeze=tmp_path / "agent", freeze_limit_s=limit_s)
