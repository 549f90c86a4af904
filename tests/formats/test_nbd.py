"""The structures of NBD: their bytes as the protocol document has them, and what is refused."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.errors import BadSignature, FieldOutOfRange, FormatError, Truncated
from hvreplica.formats import nbd, nbd_options
from hvreplica.formats.nbd import (
    BlockState,
    ChunkType,
    Command,
    CommandFlag,
    NbdError,
    Request,
    TransmissionFlag,
)
from hvreplica.formats.nbd_options import ClientFlag, ContextRequest, ExportRequest, Info, Option, OptionReply

TEXTS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=40)


def test_handshake_packs_to_the_bytes_of_the_protocol() -> None:
    assert nbd_options.pack_greeting().hex() == "4e42444d4147494349484156454f50540003"
    assert nbd_options.pack_option(Option.GO, b"ab").hex() == "49484156454f505400000007000000026162"
    assert nbd_options.pack_option_reply(Option.LIST, OptionReply.ERR_UNSUP).hex() == (
        "0003e889045565a9000000038000000100000000"
    )
    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FAST_ZERO
    packed = nbd_options.pack_export_name_reply(1 << 40, flags, padded=False)
    assert packed.hex() == "00000100000000000801"
    assert nbd_options.pack_export_name_reply(1 << 40, flags, padded=True) == packed + bytes(124)
    assert nbd_options.pack_server("0", "web01").hex() == "00000001307765623031"
    assert nbd_options.pack_info_text(Info.DESCRIPTION, "a").hex() == "000261"
    assert nbd_options.pack_context(1, "base:allocation") == b"\0\0\0\1base:allocation"
    assert nbd_options.pack_export_request("0", [3]).hex() == "000000013000010003"
    assert nbd_options.pack_context_request("0", ["a:"]).hex() == "00000001300000000100000002613a"


def test_transmission_packs_to_the_bytes_of_the_protocol() -> None:
    request = Request(Command.WRITE, CommandFlag.FUA, 0x0102030405060708, 1 << 40, 4096)
    packed = nbd.pack_request(request)
    assert packed.hex() == "25609513000100010102030405060708000001000000000000001000"
    assert nbd.unpack_request(packed) == request
    assert nbd.pack_simple_reply(7, NbdError.EIO).hex() == "67446698000000050000000000000007"
    assert nbd.unpack_simple_reply(nbd.pack_simple_reply(7, 5)) == (7, 5)
    header = nbd.pack_chunk_header(7, ChunkType.OFFSET_HOLE, 12, is_last=False)
    assert header.hex() == "668e33ef0000000200000000000000070000000c"
    assert nbd.unpack_chunk_header(header) == (7, ChunkType.OFFSET_HOLE, 12, False)
    assert nbd.pack_error_chunk(7, NbdError.EPERM, "no").hex() == (
        "668e33ef000180010000000000000007000000080000000100026e6f"
    )
    rows = np.array([[65_536, BlockState.HOLE | BlockState.ZERO], [(1 << 32) - 512, 0]], dtype=np.int64)
    status = nbd.pack_block_status(7, rows)
    assert status.hex() == (
        "668e33ef" "0001" "0005" "0000000000000007" "00000014"
        "00000001" "00010000" "00000003" "fffffe00" "00000000"
    )  # fmt: skip
    assert nbd.unpack_descriptors(status[20:]).tolist() == rows.tolist()


@pytest.mark.parametrize("magic", [b"NBDMAGIC", bytes(8), b"ihaveopt"])
def test_foreign_option_is_no_option(magic: bytes) -> None:
    with pytest.raises(BadSignature, match="option"):
        nbd_options.unpack_option_header(magic + bytes(8))


def test_structures_of_another_kind_are_refused_by_their_magic() -> None:
    reply = nbd.pack_simple_reply(1)
    for unpack, size in (
        (nbd.unpack_request, 28),
        (nbd.unpack_chunk_header, 20),
        (nbd_options.unpack_option_reply_header, 20),
    ):
        with pytest.raises(BadSignature):
            unpack(reply + bytes(12))
        with pytest.raises(Truncated):
            unpack(bytes(size - 1))
    with pytest.raises(BadSignature):
        nbd.unpack_simple_reply(bytes(16))


def test_option_data_is_bounded() -> None:
    packed = nbd_options.pack_option(Option.LIST)[:12]
    assert nbd_options.unpack_option_header(packed + (65_536).to_bytes(4, "big")) == (Option.LIST, 65_536)
    with pytest.raises(FieldOutOfRange, match="data_bytes"):
        nbd_options.unpack_option_header(packed + (65_537).to_bytes(4, "big"))


@pytest.mark.parametrize("flags", [4, 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flags_are_refused(flags: int) -> None:
    with pytest.raises(FieldOutOfRange, match="flags"):
        nbd_options.unpack_client_flags(flags.to_bytes(4, "big"))
    assert nbd_options.unpack_client_flags(bytes(3) + b"\2") == ClientFlag.NO_ZEROES


@given(TEXTS, st.lists(st.integers(0, 0xFFFF), max_size=8, unique=True))
def test_export_requests_come_back(name: str, infos: list[int]) -> None:
    packed = nbd_options.pack_export_request(name, infos)
    assert nbd_options.unpack_export_request(packed) == ExportRequest(name, frozenset(infos))


@given(TEXTS, st.lists(TEXTS, max_size=8))
def test_context_requests_come_back(name: str, queries: list[str]) -> None:
    packed = nbd_options.pack_context_request(name, queries)
    assert nbd_options.unpack_context_request(packed) == ContextRequest(name, tuple(queries))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_a_format_error(data: bytes) -> None:
    for unpack in (
        nbd_options.unpack_export_request,
        nbd_options.unpack_context_request,
        nbd_options.unpack_client_flags,
        nbd_options.unpack_option_header,
        nbd.unpack_request,
        nbd.unpack_descriptors,
    ):
        try:
            unpack(data)
        except FormatError:
            continue


@pytest.mark.parametrize("data", [b"\xff", b"a\0b", b"x" * 4097])
def test_text_from_outside_is_checked(data: bytes) -> None:
    with pytest.raises(FieldOutOfRange, match="field name"):
        nbd_options.unpack_text(data, "name")


def test_text_of_ours_always_fits() -> None:
    assert nbd.pack_text("web\udcff01\0.vhdx") == b"web?01?.vhdx"
    packed = nbd.pack_text("ä" * 3000)
    assert len(packed) == 4096
    assert packed.decode() == "ä" * 2048
    assert len(nbd.pack_text("x" + "ä" * 3000)) == 4095  # no half of a letter


@pytest.mark.parametrize(
    "rows",
    [
        np.empty((0, 2), np.int64),
        np.array([[0, 0]]),
        np.array([[1 << 32, 0]]),
        np.zeros(((1 << 20) + 1, 2), np.int64),
    ],
    ids=["none", "empty", "long", "many"],
)
def test_block_status_that_no_reply_can_hold_is_refused(
    rows: np.ndarray[tuple[int, int], np.dtype[np.int64]],
) -> None:
    with pytest.raises(FieldOutOfRange):
        nbd.pack_block_status(1, rows)


@pytest.mark.parametrize("payload", [bytes(4), bytes(11), bytes(13)])
def test_descriptors_come_in_whole_rows(payload: bytes) -> None:
    with pytest.raises(FieldOutOfRange):
        nbd.unpack_descriptors(payload)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, NbdError.ENOSPC),
        (errno.EDQUOT, NbdError.ENOSPC),
        (errno.EFBIG, NbdError.ENOSPC),
        (errno.EROFS, NbdError.EPERM),
        (errno.EIO, NbdError.EIO),
        (errno.EBADF, NbdError.EIO),
        (errno.ESTALE, NbdError.EIO),
    ],
)
def test_errors_of_the_system_become_errors_of_the_protocol(code: int, expected: NbdError) -> None:
    assert nbd.nbd_error(code) is expected
