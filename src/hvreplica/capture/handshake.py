"""Agree with an NBD client which export it uses and how, from the greeting to the first request.

Fixed newstyle, from the server's side. Whatever a client sends, it gets an answer or the connection ends: one
time limit holds for the whole of it, one bound for the number of options, one for the length of each, and
nothing is read beyond what was asked for, so that no plain byte can be taken for one that came under TLS.

Spec: the NBD protocol, "Handshake", "TLS support", "Metadata querying".
docs/formats/nbd.md says what is served.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.capture.export import choose_export
from hvreplica.capture.tls_bridge import TlsBridge
from hvreplica.clock import SYSTEM
from hvreplica.errors import FieldOutOfRange, FormatError, PeerClosed, ProtocolViolation, TransportError
from hvreplica.formats.nbd import BASE_ALLOCATION_ID, PAYLOAD_BYTES_MAX, pack_text
from hvreplica.formats.nbd_options import (
    BASE_ALLOCATION,
    BASE_WILDCARD,
    CLIENT_FLAGS,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPTION,
    ClientFlag,
    Info,
    Option,
    OptionReply,
    pack_context,
    pack_export_name_reply,
    pack_greeting,
    pack_info_text,
    pack_option_reply,
    pack_server,
    unpack_client_flags,
    unpack_context_request,
    unpack_export_request,
    unpack_option_header,
    unpack_text,
)

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable, Iterator, Sequence

    from hvreplica.capture.export import ExportInfo
    from hvreplica.clock import Clock
    from hvreplica.formats.nbd_options import ContextRequest

TIME_LIMIT_S = 10.0
OPTIONS_MAX = 1000
_FAREWELL_S = 1.0  # for the last reply to a client that leaves under TLS


@dataclass(frozen=True, slots=True)
class Negotiated:
    """A client that has chosen, and how it is to be served.

    export_index: which of the exports that were offered; export: as it was described to the client.
    structured: reads must be answered in chunks. base_allocation: block status may be asked for, and is
    answered under BASE_ALLOCATION_ID. socket: blocking, and plain: under TLS it is the inner end of `tls`.
    """

    export_index: int
    export: ExportInfo
    structured: bool
    base_allocation: bool
    socket: socket.socket
    tls: TlsBridge | None

    def close(self) -> None:
        """End the connection; what was written to the socket still goes out."""
        self.socket.close()
        if self.tls is not None:
            self.tls.close()


def negotiate(
    connection: socket.socket,
    exports: Sequence[ExportInfo],
    *,
    tls_context: ssl.SSLContext | None = None,
    require_tls: bool = False,
    time_limit_s: float = TIME_LIMIT_S,
    on_choice: Callable[[], None] = lambda: None,
    clock: Clock = SYSTEM,
) -> Negotiated | None:
    """Return what a new client has chosen, or None if it left in good order without a choice.

    connection: taken over, and closed unless a choice is returned. tls_context: of a server; without one TLS
    is refused. require_tls: serve nothing before TLS. time_limit_s: for all of it. on_choice: called before
    the client learns that its choice stands.
    Raises: FormatError, ProtocolViolation for what no client may send; PeerClosed for silence, slowness and a
    lost connection; AuthenticationFailed.
    """
    line = _Line(connection, clock.monotonic_s() + time_limit_s, clock)
    handshake = _Handshake(line, exports, tls_context, require_tls=require_tls, on_choice=on_choice)
    chosen: Negotiated | None = None
    try:
        chosen = handshake.run()
    finally:
        if chosen is None:
            handshake.close()
    return chosen


class _Line:
    """A connection whose every wait ends at the same deadline."""

    def __init__(self, connection: socket.socket, deadline_s: float, clock: Clock) -> None:
        self.connection = connection
        self.deadline_s = deadline_s
        self.clock = clock
        self.is_lost = False

    def receive(self, count: int, *, may_end: bool = False) -> bytes:
        """Return `count` bytes, never one more taken; b"" for an end before the first, if it may be there."""
        buffer = bytearray(count)
        view, done = memoryview(buffer), 0
        while done < count:
            with self._within():
                received = self.connection.recv_into(view[done:])
            if not received and done == 0 and may_end:
                return b""
            if not received:
                raise PeerClosed("the client ended the connection in the middle of the negotiation")
            done += received
        return bytes(buffer)

    def send(self, data: bytes) -> None:
        with self._within():
            self.connection.sendall(data)

    @contextlib.contextmanager
    def _within(self) -> Iterator[None]:
        try:
            left_s = self.deadline_s - self.clock.monotonic_s()
            if left_s <= 0:
                raise TimeoutError
            self.connection.settimeout(left_s)
            yield
        except TimeoutError:
            raise PeerClosed("the client did not finish the negotiation in time") from None
        except OSError as error:
            self.is_lost = True
            raise PeerClosed(f"the connection broke: {error.strerror or error}") from None


class _Handshake:
    """The state of one negotiation; each _method named after an option answers it."""

    def __init__(
        self,
        line: _Line,
        exports: Sequence[ExportInfo],
        tls_context: ssl.SSLContext | None,
        *,
        require_tls: bool,
        on_choice: Callable[[], None],
    ) -> None:
        self._line = line
        self._exports = exports
        self._tls_context = tls_context
        self._require_tls = require_tls
        self._on_choice = on_choice
        self._client_flags = ClientFlag(0)
        self._tls: TlsBridge | None = None
        self._structured = False
        self._context_index: int | None = None  # the export for which base:allocation was chosen
        self._answers: dict[int, Callable[[int, bytes], int | None]] = {
            Option.LIST: self._list,
            Option.STARTTLS: self._start_tls,
            Option.INFO: self._info,
            Option.GO: self._info,
            Option.STRUCTURED_REPLY: self._structured_reply,
            Option.LIST_META_CONTEXT: self._list_contexts,
            Option.SET_META_CONTEXT: self._set_contexts,
        }

    def close(self) -> None:
        """Give up what negotiate() took over."""
        self._line.connection.close()
        if self._tls is not None:
            self._tls.close(last_words_s=_FAREWELL_S)

    def run(self) -> Negotiated | None:
        """Return the choice, or None for a client that left."""
        try:
            self._line.send(pack_greeting())
            packed = self._line.receive(CLIENT_FLAGS.size, may_end=True)
        except PeerClosed:
            if self._line.is_lost:
                return None  # it only looked whether somebody listens
            raise
        if not packed:
            return None
        self._client_flags = unpack_client_flags(packed)
        for _ in range(OPTIONS_MAX):
            header = self._line.receive(OPTION.size, may_end=True)
            if not header:
                return None
            option, data_bytes = unpack_option_header(header)
            data = self._line.receive(data_bytes)
            if option == Option.ABORT:
                with contextlib.suppress(TransportError):  # it may be gone already
                    self._reply(option, OptionReply.ACK)
                return None
            index = self._export_name(data) if option == Option.EXPORT_NAME else self._answer(option, data)
            if index is not None:
                return self._chosen(index)
        raise ProtocolViolation(f"the client sent {OPTIONS_MAX} options and chose nothing")

    def _chosen(self, index: int) -> Negotiated:
        self._line.connection.settimeout(None)
        return Negotiated(
            export_index=index,
            export=self._exports[index],
            structured=self._structured,
            base_allocation=self._context_index == index,
            socket=self._line.connection,
            tls=self._tls,
        )

    def _answer(self, option: int, data: bytes) -> int | None:
        answer = self._answers.get(option)
        if self._lacks_tls() and option != Option.STARTTLS:
            self._reply(option, OptionReply.ERR_TLS_REQD, "this server serves nothing without TLS")
        elif answer is None:
            self._reply(option, OptionReply.ERR_UNSUP)
        else:
            try:
                return answer(option, data)
            except FormatError as error:
                self._reply(option, OptionReply.ERR_INVALID, str(error))
        return None

    def _export_name(self, data: bytes) -> int:
        """Choose by the old option, which knows no errors but the end of the connection."""
        name = unpack_text(data, "name")
        index = choose_export(self._exports, name)
        if self._lacks_tls():
            raise ProtocolViolation(
                "the client chose an export without TLS", hint="it must use STARTTLS first"
            )
        if index is None:
            raise ProtocolViolation(f"the client asks for the export {name!r}", expected=self._names())
        export = self._exports[index]
        padded = ClientFlag.NO_ZEROES not in self._client_flags
        flags = export.flags(structured=self._structured)
        self._on_choice()
        self._line.send(pack_export_name_reply(export.size_bytes, flags, padded=padded))
        return index

    def _list(self, option: int, data: bytes) -> None:
        _require_empty(data)
        for export in self._exports:
            self._send(option, OptionReply.SERVER, pack_server(export.name, export.description))
        self._reply(option, OptionReply.ACK)

    def _start_tls(self, option: int, data: bytes) -> None:
        _require_empty(data)
        if self._tls is not None:
            self._reply(option, OptionReply.ERR_INVALID, "TLS is on already")
        elif self._tls_context is None:
            self._reply(option, OptionReply.ERR_POLICY, "this server has no certificate")
        elif ClientFlag.FIXED_NEWSTYLE not in self._client_flags:
            self._reply(option, OptionReply.ERR_POLICY, "TLS needs fixed newstyle")
        else:
            self._reply(option, OptionReply.ACK)
            # Nothing that was agreed on in the clear may count: somebody else may have said it.
            self._structured, self._context_index = False, None
            outside = self._line
            self._tls = TlsBridge(outside.connection, self._tls_context)
            self._tls.handshake(deadline_s=outside.deadline_s, clock=outside.clock)
            self._line = _Line(self._tls.start(), outside.deadline_s, outside.clock)

    def _info(self, option: int, data: bytes) -> int | None:
        request = unpack_export_request(data)
        index = choose_export(self._exports, request.name)
        if index is None:
            self._reply(option, OptionReply.ERR_UNKNOWN, self._unknown(request.name))
            return None
        export = self._exports[index]
        flags = export.flags(structured=self._structured)
        self._send(
            option,
            OptionReply.INFO,
            INFO_EXPORT.pack(info=Info.EXPORT, size_bytes=export.size_bytes, flags=flags),
        )
        if Info.NAME in request.infos:
            self._send(option, OptionReply.INFO, pack_info_text(Info.NAME, export.name))
        if Info.DESCRIPTION in request.infos:
            self._send(option, OptionReply.INFO, pack_info_text(Info.DESCRIPTION, export.description))
        if Info.BLOCK_SIZE in request.infos:
            sizes = INFO_BLOCK_SIZE.pack(
                info=Info.BLOCK_SIZE,
                minimum_bytes=export.minimum_block_bytes,
                preferred_bytes=export.preferred_block_bytes,
                payload_bytes_max=PAYLOAD_BYTES_MAX,
            )
            self._send(option, OptionReply.INFO, sizes)
        if option == Option.GO:
            self._on_choice()
        self._reply(option, OptionReply.ACK)
        return index if option == Option.GO else None

    def _structured_reply(self, option: int, data: bytes) -> None:
        _require_empty(data)
        self._structured = True
        self._reply(option, OptionReply.ACK)

    def _list_contexts(self, option: int, data: bytes) -> None:
        request, index = self._context_request(option, data)
        if index is None:
            return
        if not request.queries or {BASE_ALLOCATION, BASE_WILDCARD}.intersection(request.queries):
            self._send(option, OptionReply.META_CONTEXT, pack_context(0, BASE_ALLOCATION))
        self._reply(option, OptionReply.ACK)

    def _set_contexts(self, option: int, data: bytes) -> None:
        self._context_index = None  # it replaces what was set before, even when it fails
        request, index = self._context_request(option, data)
        if index is None:
            return
        if BASE_ALLOCATION in request.queries:
            self._context_index = index
            self._send(option, OptionReply.META_CONTEXT, pack_context(BASE_ALLOCATION_ID, BASE_ALLOCATION))
        self._reply(option, OptionReply.ACK)

    def _context_request(self, option: int, data: bytes) -> tuple[ContextRequest, int | None]:
        """Return the request and its export's index, or None for the latter when the client was refused."""
        request = unpack_context_request(data)
        index = choose_export(self._exports, request.name)
        if not self._structured:
            self._reply(option, OptionReply.ERR_INVALID, "structured replies come first")
            return request, None
        if index is None:
            self._reply(option, OptionReply.ERR_UNKNOWN, self._unknown(request.name))
        return request, index

    def _lacks_tls(self) -> bool:
        return self._require_tls and self._tls is None

    def _names(self) -> str:
        return ", ".join(export.name for export in self._exports)

    def _unknown(self, name: str) -> str:
        return f"there is no export {name!r}; there are: {self._names()}"

    def _reply(self, option: int, reply: OptionReply, message: str = "") -> None:
        self._send(option, reply, pack_text(message))

    def _send(self, option: int, reply: OptionReply, data: bytes) -> None:
        self._line.send(pack_option_reply(option, reply, data))


def _require_empty(data: bytes) -> None:
    if data:
        raise FieldOutOfRange("this option has no data", field="data_bytes", expected=0, actual=len(data))
