"""What an exception becomes: its code and its words."""

from __future__ import annotations

import errno

import pytest

from hvreplica import errors
from hvreplica.cli import exit as exits


def every_class(root: type[errors.HvReplicaError]) -> list[type[errors.HvReplicaError]]:
    below = [each for child in root.__subclasses__() for each in every_class(child)]
    return [root, *below]


@pytest.mark.parametrize("kind", every_class(errors.HvReplicaError))
def test_own_error_keeps_its_class_code_and_fields(kind: type[errors.HvReplicaError]) -> None:
    error = kind(
        "wrong",
        path="a.vhdx",
        offset=65536,
        field="Checksum",
        expected=1,
        actual=b"x",
        spec="[MS-VHDX] 2",
        hint="do",
    )
    assert exits.describe(error) == exits.Failure(
        kind.__name__, "wrong", kind.exit_code, "a.vhdx", 65536, "Checksum", 1, "'x'", "[MS-VHDX] 2", "do"
    )


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOENT, 70), (errno.EACCES, 70), (errno.EIO, 70), (errno.ENOSPC, 71), (errno.EDQUOT, 71)],
)
def test_system_error_tells_path_and_what_was_tried(number: int, code: int) -> None:
    error = OSError(number, "The Reason", "/store/0.vhdx")
    error.add_note("write /store/0.vhdx at offset 4096")
    failure = exits.describe(error)
    assert failure.exit_code == code
    assert failure.path == "/store/0.vhdx"
    assert failure.message == "the Reason (write at offset 4096)"
    assert failure.hint == ("make room, then run the same command again" if code == 71 else None)


@pytest.mark.parametrize(
    ("value", "text"),
    [(b"vhdxfile", "'vhdxfile'"), (b"msctlog\0", "'msctlog'"), (b"\0\0", "0x0000"), (7, 7), (1.5, "1.5")],
)
def test_values_of_fields_are_readable(value: object, text: object) -> None:
    assert exits.describe(errors.BadSignature("x", actual=value)).actual == text


def test_system_error_without_errno_keeps_its_words() -> None:
    assert exits.describe(TimeoutError("handshake took too long")).message == "handshake took too long"


@pytest.mark.parametrize("error", [AssertionError("x"), KeyError("x"), RecursionError(), TypeError("a\nb")])
def test_anything_else_is_a_bug_on_one_line(error: Exception) -> None:
    failure = exits.describe(error)
    assert failure.exit_code == exits.INTERNAL
    assert "\n" not in failure.message
    assert "HVREPLICA_DEBUG=1" in (failure.hint or "")


def test_codes_of_the_command_line_and_of_errors_are_apart() -> None:
    own = {
        kind.exit_code for kind in every_class(errors.HvReplicaError) if kind.__module__ == errors.__name__
    }
    codes = [code for code, _, _ in exits.CODES]
    assert len(codes) == len(set(codes))
    assert not own & set(codes)
