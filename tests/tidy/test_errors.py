"""Exit codes are a promise to scripts: unique, in their family's ten, and documented."""

from __future__ import annotations

import pytest

from hvreplica import errors
from hvreplica.cli.exit import CODES
from scripts.make_docs import error_classes


def test_exit_codes_are_unique() -> None:
    codes = [each.exit_code for _, each in error_classes()]
    codes += [
        code for code, _, _ in CODES if code not in {errors.IO_ERROR_EXIT_CODE, errors.NO_SPACE_EXIT_CODE}
    ]
    codes += [errors.IO_ERROR_EXIT_CODE, errors.NO_SPACE_EXIT_CODE]
    assert sorted(codes) == sorted(set(codes))


def test_exit_codes_lie_in_their_family() -> None:
    families = [each for depth, each in error_classes() if depth == 1]
    for _, each in error_classes():
        if each is not errors.HvReplicaError:
            family = next(base for base in families if issubclass(each, base))
            assert family.exit_code % 10 == 0
            assert family.exit_code <= each.exit_code < family.exit_code + 10
        assert 0 < each.exit_code < 128  # above stand signals


def test_every_error_says_what_it_means() -> None:
    for _, each in error_classes():
        assert "exit_code" in vars(each), each
        assert each.__doc__, each
        assert each.__doc__ != errors.HvReplicaError.__doc__ or each is errors.HvReplicaError


def test_message_carries_place_values_and_section() -> None:
    error = errors.BadSignature(
        "not a VHDX",
        offset=65536,
        field="signature",
        expected="head",
        actual="haed",
        spec="[MS-VHDX] 2.2.2",
        hint="x",
    ).at("a.vhdx")
    text = str(error.at("b.vhdx"))
    assert text == (
        "a.vhdx: not a VHDX (field signature, offset 65536, expected head, found haed, [MS-VHDX] 2.2.2)"
    )
    assert error.hint == "x"


@pytest.mark.parametrize("family", [errors.FormatError, errors.BadSignature])
def test_format_errors_are_value_errors(family: type[errors.FormatError]) -> None:
    assert issubclass(family, ValueError)
