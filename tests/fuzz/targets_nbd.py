"""What an NBD client may send before its first request, and the parsers behind it."""

from __future__ import annotations

import socket

from hvreplica.capture.export import ExportInfo
from hvreplica.capture.handshake import negotiate
from hvreplica.errors import BadSignature, FieldOutOfRange
from hvreplica.formats import nbd, nbd_options
from hvreplica.formats.nbd_options import Info, Option, pack_context_request, pack_export_request, pack_option
from tests.fuzz.registry import Fuzzer

_EXPORTS = (
    ExportInfo("0", 1 << 40, preferred_block_bytes=1 << 20, description="web01.vhdx"),
    ExportInfo("1", 4096 * 77, read_only=True, minimum_block_bytes=4096),
)
_FLAGS = b"\0\0\0\3"
_BASE = "base:allocation"
_TIME_LIMIT_S = 2.0  # of a negotiation whose client has said all; a round may take longer, and then it hangs


def _talk_seeds() -> list[bytes]:
    infos = tuple(Info)
    whole = [
        pack_option(Option.STRUCTURED_REPLY),
        pack_option(Option.LIST),
        pack_option(Option.LIST_META_CONTEXT, pack_context_request("0", ["base:"])),
        pack_option(Option.SET_META_CONTEXT, pack_context_request("0", [_BASE, "qemu:x"])),
        pack_option(Option.INFO, pack_export_request("0", infos)),
        pack_option(Option.EXTENDED_HEADERS),
        pack_option(Option.STARTTLS),
        pack_option(Option.GO, pack_export_request("0", infos)),
    ]
    return [
        _FLAGS + b"".join(whole),
        _FLAGS + whole[0] + pack_option(Option.EXPORT_NAME, b"1"),
        b"\0\0\0\1" + pack_option(Option.EXPORT_NAME),
        _FLAGS + pack_option(Option.ABORT),
    ]


def _attack_talk(data: bytes) -> None:
    client, server = socket.socketpair()
    with client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        client.setblocking(False)  # what does not fit into the kernel's buffers is cut off
        if data:
            client.send(data)
        client.shutdown(socket.SHUT_WR)
        chosen = negotiate(server, _EXPORTS, time_limit_s=_TIME_LIMIT_S)
        if chosen is not None:
            assert chosen.export == _EXPORTS[chosen.export_index]
            assert chosen.structured or not chosen.base_allocation
            chosen.close()
        assert server.fileno() == -1


def _option_seeds() -> list[bytes]:
    return [
        pack_export_request("web01", tuple(Info)),
        pack_context_request("0", [_BASE, "base:", "x-a:b"]),
        pack_context_request("", []),
    ]


def _attack_options(data: bytes) -> None:
    refused = 0
    for parse in (nbd_options.unpack_export_request, nbd_options.unpack_context_request):
        try:
            parsed = parse(data)
        except FieldOutOfRange:
            refused += 1
            continue
        if isinstance(parsed, nbd_options.ContextRequest):
            assert pack_context_request(parsed.name, parsed.queries) == data
    if refused == 2:
        raise FieldOutOfRange("neither request")


def _request_seeds() -> list[bytes]:
    request = nbd.Request(command=7, flags=8, cookie=1 << 63, disk_offset=1 << 40, length=1 << 31)
    return [nbd.pack_request(request), b"\0\0\0\1" + b"\0\0\x10\0\0\0\0\3" * 5]


def _attack_requests(data: bytes) -> None:
    try:
        assert nbd.pack_request(nbd.unpack_request(data)) == data[: nbd.REQUEST.size]
    except BadSignature:
        rows = nbd.unpack_descriptors(data)
        assert rows.shape == ((len(data) - 4) // 8, 2)


FUZZERS = (
    Fuzzer("nbd_talk", _talk_seeds, _attack_talk),
    Fuzzer("nbd_options", _option_seeds, _attack_options),
    Fuzzer("nbd_request", _request_seeds, _attack_requests),
)
