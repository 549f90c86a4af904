"""Addresses as people write them."""

from __future__ import annotations

import pytest

from hvreplica.transport import Address, parse_address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8084", "127.0.0.1", 8084),
        ("replica.example:1", "replica.example", 1),
        ("[::1]:8084", "::1", 8084),
        (" localhost:0 ", "localhost", 0),
        ("h:65535", "h", 65535),
    ],
)
def test_address_parses_and_prints_the_same(text: str, host: str, port: int) -> None:
    address = parse_address(text)
    assert address == Address(host, port)
    assert str(address) == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host:",
        ":80",
        "host:65536",
        "host:-1",
        "host:8x",
        "::1:8084",
        "host:\uff18\uff10",
        "[]:80",
        "h:000001",
    ],
)
def test_other_text_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:8084"):
        parse_address(text)
