"""The negotiation, driven by a client that knows only the protocol document."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.capture.export import ExportInfo
from hvreplica.capture.handshake import OPTIONS_MAX, Negotiated, negotiate
from hvreplica.errors import BadSignature, FieldOutOfRange, HvReplicaError, PeerClosed, ProtocolViolation
from tests.capture.nbd_client import (
    ABORT,
    ACK,
    ERR_INVALID,
    ERR_POLICY,
    ERR_TLS_REQD,
    ERR_UNKNOWN,
    ERR_UNSUP,
    EXPORT_NAME,
    EXTENDED_HEADERS,
    FIXED,
    GO,
    INFO,
    INFO_OPTION,
    LIST,
    LIST_META,
    META_CONTEXT,
    NO_ZEROES,
    SERVER,
    SET_META,
    STARTTLS,
    STRUCTURED,
    Client,
    context_request,
    counted,
    export_request,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

EXPORTS = (
    ExportInfo(
        "0", 1 << 40, minimum_block_bytes=512, preferred_block_bytes=1 << 21, description="web01.vhdx"
    ),
    ExportInfo("1", 4096 * 77, minimum_block_bytes=4096, read_only=True, description="data.vhdx"),
)
BASE = b"base:allocation"
JOIN_TIMEOUT_S = 30


class Server:
    """A negotiation in a thread, and what became of it."""

    def __init__(self, connection: socket.socket, **options: Any) -> None:
        self.connection = connection
        self.chosen: Negotiated | None = None
        self.error: BaseException | None = None
        self.options = options
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        try:
            self.chosen = negotiate(self.connection, EXPORTS, **self.options)
        except BaseException as error:
            self.error = error

    def outcome(self) -> Negotiated | BaseException | None:
        self.thread.join(JOIN_TIMEOUT_S)
        assert not self.thread.is_alive(), "the negotiation did not end"
        return self.error or self.chosen


@contextlib.contextmanager
def negotiating(**options: Any) -> Iterator[tuple[Client, Server]]:
    ours, theirs = socket.socketpair()
    server = Server(theirs, **options)
    with ours:
        yield Client(ours), server
    outcome = server.outcome()
    if isinstance(outcome, Negotiated):
        outcome.close()
    assert theirs.fileno() == -1, "the socket is still open"


def chosen(server: Server) -> Negotiated:
    outcome = server.outcome()
    assert isinstance(outcome, Negotiated), repr(outcome)
    return outcome


def test_go_gives_size_and_flags_and_leads_to_transmission() -> None:
    with negotiating() as (client, server):
        assert client.greet() == 0b11
        replies = client.option(GO, export_request(b"1"))
        assert [reply.kind for reply in replies] == [INFO, ACK]
        # HAS_FLAGS, READ_ONLY, SEND_FLUSH, CAN_MULTI_CONN, SEND_CACHE
        assert struct.unpack(">HQH", replies[0].data) == (0, 4096 * 77, 0b101_0000_0111)
        outcome = chosen(server)
        assert (outcome.export_index, outcome.export) == (1, EXPORTS[1])
        assert (outcome.structured, outcome.base_allocation, outcome.tls) == (False, False, None)
        assert outcome.socket.gettimeout() is None
        client.send(b"first request")
        assert outcome.socket.recv(100) == b"first request"


def test_nothing_is_read_beyond_the_last_option() -> None:
    with negotiating() as (client, server):
        client.send(struct.pack(">I", FIXED | NO_ZEROES))
        data = export_request(b"0")
        client.send(b"IHAVEOPT" + struct.pack(">II", GO, len(data)) + data + b"first request")
        assert chosen(server).socket.recv(100) == b"first request"


@pytest.mark.parametrize(("name", "index"), [(b"", 0), (b"0", 0), (b"1", 1)])
def test_the_empty_name_is_the_first_export(name: bytes, index: int) -> None:
    with negotiating() as (client, server):
        client.greet()
        assert client.kinds(GO, export_request(name)) == [INFO, ACK]
        assert chosen(server).export_index == index


def test_info_tells_what_was_asked_for_and_goes_on() -> None:
    with negotiating() as (client, server):
        client.greet()
        replies = client.option(INFO_OPTION, export_request(b"", 3, 1, 2, 77))
        assert sorted(reply.data for reply in replies[:-1]) == sorted(
            [
                struct.pack(">HQH", 0, 1 << 40, 0b101_0110_1101),
                struct.pack(">H", 1) + b"0",
                struct.pack(">H", 2) + b"web01.vhdx",
                struct.pack(">HIII", 3, 512, 1 << 21, 32 << 20),
            ]
        )
        assert client.kinds(INFO_OPTION, export_request(b"")) == [INFO, ACK]
    assert server.outcome() is None


@pytest.mark.parametrize("option", [INFO_OPTION, GO])
def test_unknown_export_is_refused_with_the_names_there_are(option: int) -> None:
    with negotiating() as (client, server):
        client.greet()
        (reply,) = client.option(option, export_request(b"web02"))
        assert reply.kind == ERR_UNKNOWN
        assert reply.data == b"there is no export 'web02'; there are: 0, 1"
        assert client.kinds(GO, export_request(b"0"))[-1] == ACK
        assert chosen(server).export_index == 0


@pytest.mark.parametrize(
    ("flags", "padding"), [(FIXED | NO_ZEROES, 0), (FIXED, 124), (NO_ZEROES, 0), (0, 124)]
)
def test_export_name_is_answered_as_the_client_flags_say(flags: int, padding: int) -> None:
    with negotiating() as (client, server):
        client.greet(flags)
        client.send(b"IHAVEOPT" + struct.pack(">II", EXPORT_NAME, 1) + b"0")
        assert client.receive(10 + padding) == struct.pack(">QH", 1 << 40, 0b101_0110_1101) + bytes(padding)
        chosen(server).socket.sendall(b"x")
        assert client.receive(1) == b"x"


def test_export_name_that_is_unknown_ends_the_connection() -> None:
    with negotiating() as (client, server):
        client.greet()
        client.send(b"IHAVEOPT" + struct.pack(">II", EXPORT_NAME, 5) + b"web02")
        assert client.is_ended()
    error = server.outcome()
    assert isinstance(error, ProtocolViolation)
    assert "'web02'" in error.message


@pytest.mark.parametrize("option", [GO, EXPORT_NAME])
def test_choice_is_told_before_the_client_learns_of_it(option: int) -> None:
    told = threading.Event()
    with negotiating(on_choice=told.set) as (client, server):
        client.greet()
        client.option(INFO_OPTION, export_request(b"0"))
        assert not told.is_set()
        data = export_request(b"0") if option == GO else b"0"
        client.send(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)
        client.receive(33 if option == GO else 1)  # to the first byte of what says yes
        assert told.is_set()
        chosen(server)


def test_list_names_every_export_with_its_description() -> None:
    with negotiating() as (client, _):
        client.greet()
        *servers, last = client.option(LIST)
        assert [(reply.kind, reply.data) for reply in servers] == [
            (SERVER, counted(b"0") + b"web01.vhdx"),
            (SERVER, counted(b"1") + b"data.vhdx"),
        ]
        assert (last.kind, last.data) == (ACK, b"")


@pytest.mark.parametrize("option", [4, EXTENDED_HEADERS, 12, 0, 0xFFFFFFFF])
def test_unknown_option_is_refused_and_its_data_skipped(option: int) -> None:
    with negotiating() as (client, server):
        client.greet()
        assert client.kinds(option, b"IHAVEOPT" * 100) == [ERR_UNSUP]
        assert client.kinds(GO, export_request(b"0"))[-1] == ACK
        chosen(server)


@pytest.mark.parametrize("data", [b"", b"why"])
def test_abort_is_acknowledged_and_ends(data: bytes) -> None:
    with negotiating() as (client, server):
        client.greet()
        assert client.kinds(ABORT, data) == [ACK]
        assert client.is_ended()
    assert server.outcome() is None


@pytest.mark.parametrize("sent", [0, 4])
def test_client_that_leaves_between_options_is_no_error(sent: int) -> None:
    with negotiating() as (client, server):
        client.receive(18)
        client.send(struct.pack(">I", FIXED)[:sent])
    assert server.outcome() is None


@pytest.mark.parametrize("option", [LIST, STRUCTURED, STARTTLS])
def test_options_without_data_refuse_data(option: int) -> None:
    with negotiating() as (client, _):
        client.greet()
        assert client.kinds(option, b"x") == [ERR_INVALID]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        struct.pack(">I", 7) + b"0" + bytes(2),  # the name is longer than the data
        struct.pack(">I", 0xFFFFFFFF) + b"0" + bytes(2),
        counted(b"0") + struct.pack(">H", 2) + bytes(2),  # fewer requests than announced
        export_request(b"0") + b"x",
        export_request(b"\xff"),
        export_request(b"a\0b"),
        export_request(b"x" * 4097),
    ],
)
def test_malformed_go_is_invalid_and_the_next_one_counts(data: bytes) -> None:
    with negotiating() as (client, server):
        client.greet()
        assert client.kinds(GO, data) == [ERR_INVALID]
        assert client.kinds(GO, export_request(b"0"))[-1] == ACK
        chosen(server)


def test_structured_replies_bring_the_df_flag() -> None:
    with negotiating() as (client, server):
        client.greet()
        assert client.kinds(STRUCTURED) == [ACK]
        replies = client.option(GO, export_request(b"0"))
        assert struct.unpack(">HQH", replies[0].data)[2] & 1 << 7
        assert chosen(server).structured


def test_fast_zero_is_offered_only_where_it_is_meant() -> None:
    assert ExportInfo("0", 512, fast_zero=True).flags(structured=False) & 1 << 11
    assert not ExportInfo("0", 512).flags(structured=False) & 1 << 11
    assert not ExportInfo("0", 512, fast_zero=True, read_only=True).flags(structured=False) & 1 << 11


def test_allocation_context_is_chosen_with_an_id() -> None:
    with negotiating() as (client, server):
        client.greet()
        client.option(STRUCTURED)
        replies = client.option(SET_META, context_request(b"0", b"qemu:dirty-bitmap:x", BASE, b"base:x"))
        assert [(reply.kind, reply.data) for reply in replies] == [
            (META_CONTEXT, struct.pack(">I", 1) + BASE),
            (ACK, b""),
        ]
        client.option(GO, export_request(b"0"))
        assert chosen(server).base_allocation


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ((), True),
        ((b"base:",), True),
        ((BASE,), True),
        ((b"x-a:b", b"base:x"), False),
        ((b"junk", b""), False),
    ],
)
def test_contexts_are_listed_by_query(queries: tuple[bytes, ...], *, found: bool) -> None:
    with negotiating() as (client, _):
        client.greet()
        client.option(STRUCTURED)
        replies = client.option(LIST_META, context_request(b"", *queries))
        expected = [(META_CONTEXT, bytes(4) + BASE)] if found else []
        assert [(reply.kind, reply.data) for reply in replies] == [*expected, (ACK, b"")]


@pytest.mark.parametrize(
    "then",
    [
        (SET_META, context_request(b"0")),
        (SET_META, context_request(b"0", b"base:")),
        (SET_META, context_request(b"1", BASE)),
        (SET_META, context_request(b"7", BASE)),
        (SET_META, b"junk"),
    ],
)
def test_a_later_choice_of_contexts_replaces_the_first(then: tuple[int, bytes]) -> None:
    with negotiating() as (client, server):
        client.greet()
        client.option(STRUCTURED)
        client.option(SET_META, context_request(b"0", BASE))
        client.option(*then)
        client.option(GO, export_request(b"0"))
        assert not chosen(server).base_allocation


@pytest.mark.parametrize("option", [LIST_META, SET_META])
@pytest.mark.parametrize(
    ("is_structured", "data", "expected"),
    [
        (False, context_request(b"0", BASE), ERR_INVALID),
        (True, context_request(b"7", BASE), ERR_UNKNOWN),
        (True, counted(b"0") + struct.pack(">I", 1 << 31), ERR_INVALID),
        (True, counted(b"0") + struct.pack(">I", 2) + counted(BASE) + b"\0\0\0", ERR_INVALID),
        (True, context_request(b"0", BASE) + b"x", ERR_INVALID),
        (True, b"", ERR_INVALID),
    ],
)
def test_context_options_refuse(option: int, data: bytes, expected: int, *, is_structured: bool) -> None:
    with negotiating() as (client, _):
        client.greet()
        if is_structured:
            client.option(STRUCTURED)
        assert client.kinds(option, data) == [expected]


def test_tls_without_a_certificate_is_refused_by_policy() -> None:
    with negotiating() as (client, _):
        client.greet()
        assert client.kinds(STARTTLS) == [ERR_POLICY]


def test_nothing_is_served_before_tls_where_it_is_required(tls_server: Any) -> None:
    with negotiating(tls_context=tls_server, require_tls=True) as (client, server):
        client.greet()
        for option in (LIST, INFO_OPTION, GO, STRUCTURED, LIST_META, SET_META, EXTENDED_HEADERS):
            assert client.kinds(option, export_request(b"0")) == [ERR_TLS_REQD]
        client.send(b"IHAVEOPT" + struct.pack(">II", EXPORT_NAME, 1) + b"0")
        assert client.is_ended()
    assert isinstance(server.outcome(), ProtocolViolation)


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (struct.pack(">I", 1 << 2 | FIXED), FieldOutOfRange),
        (struct.pack(">I", FIXED) + b"HAVEOPT!" + bytes(8), BadSignature),
        (struct.pack(">I", FIXED) + b"IHAVEOPT" + struct.pack(">II", LIST, 65_537), FieldOutOfRange),
        (
            struct.pack(">I", FIXED) + b"IHAVEOPT" + struct.pack(">II", EXPORT_NAME, 1) + b"\xff",
            FieldOutOfRange,
        ),
        (struct.pack(">I", FIXED) + b"IHAVE", PeerClosed),
        (struct.pack(">I", FIXED) + b"IHAVEOPT" + struct.pack(">II", GO, 9) + b"1234", PeerClosed),
        (b"\0", PeerClosed),
    ],
)
def test_what_breaks_the_protocol_ends_the_connection(sent: bytes, error: type[HvReplicaError]) -> None:
    with negotiating() as (client, server):
        client.receive(18)
        client.send(sent)
        client.connection.shutdown(socket.SHUT_WR)
        assert isinstance(server.outcome(), error)


def test_options_are_bounded() -> None:
    with negotiating() as (client, server):
        client.greet()
        for _ in range(OPTIONS_MAX):
            assert client.kinds(LIST, b"x") == [ERR_INVALID]
        assert client.is_ended()
    assert isinstance(server.outcome(), ProtocolViolation)


def test_silent_client_is_given_up() -> None:
    with negotiating(time_limit_s=0.05) as (client, server):
        client.greet()
        assert client.is_ended()
        assert isinstance(server.outcome(), PeerClosed)


def test_dripping_client_cannot_stretch_the_limit() -> None:
    # Each byte comes in time, the negotiation does not.
    with negotiating(time_limit_s=0.2) as (client, server):
        client.greet()
        client.send(b"IHAVEOPT" + struct.pack(">II", EXTENDED_HEADERS, 65_536))
        stop = threading.Event()
        for _ in range(65_536):
            try:
                client.send(b"x")
            except OSError:
                break
            stop.wait(0.01)
        else:
            pytest.fail("the server still listens")
        assert isinstance(server.outcome(), PeerClosed)


def test_client_that_never_reads_is_given_up() -> None:
    with negotiating(time_limit_s=0.3) as (client, server):
        client.connection.settimeout(None)
        client.send(struct.pack(">I", FIXED))
        with contextlib.suppress(OSError):
            for _ in range(OPTIONS_MAX):
                client.send(b"IHAVEOPT" + struct.pack(">II", LIST, 0))
        assert isinstance(server.outcome(), (PeerClosed, ProtocolViolation))


OPTION_NUMBERS = st.one_of(st.integers(0, 12), st.integers(0, (1 << 32) - 1))
REQUESTS = st.one_of(
    st.binary(max_size=64),
    st.sampled_from([export_request(b"0", 3), context_request(b"1", BASE), context_request(b"", b"base:")]),
)
OPTIONS = st.builds(
    lambda option, data: b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data, OPTION_NUMBERS, REQUESTS
)
STREAMS = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda flags, options, tail: struct.pack(">I", flags) + b"".join(options) + tail,
        st.integers(0, 3),
        st.lists(OPTIONS, max_size=12),
        st.binary(max_size=20),
    ),
)


@given(STREAMS)
def test_any_bytes_end_in_a_choice_or_an_error_of_ours(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(sent)
        ours.shutdown(socket.SHUT_WR)
        try:
            outcome = negotiate(theirs, EXPORTS, time_limit_s=5)
        except HvReplicaError as error:
            outcome = None
            assert "in time" not in error.message
        if outcome is not None:
            assert not outcome.base_allocation or outcome.structured
            outcome.close()
        assert theirs.fileno() == -1


@pytest.mark.parametrize(
    "wrong",
    [
        {"minimum_block_bytes": 0},
        {"minimum_block_bytes": 768},
        {"minimum_block_bytes": 1 << 17},
        {"preferred_block_bytes": 256},
        {"minimum_block_bytes": 8192, "preferred_block_bytes": 4096},
        {"preferred_block_bytes": 64 << 20},
        {"size_bytes": -1},
    ],
)
def test_exports_that_no_client_would_believe_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        ExportInfo(**{"name": "0", "size_bytes": 512, **wrong})  # type: ignore[arg-type]
