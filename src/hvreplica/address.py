"""Addresses as people write them: host:port, with brackets around IPv6."""

from __future__ import annotations

from dataclasses import dataclass

PORT_MAX = 0xFFFF


@dataclass(frozen=True, slots=True)
class Address:
    """A host name or IP address, and a TCP port. Port 0 asks a listener for any free port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Return the address that `text` names: "replica.example:8084", "127.0.0.1:8084", "[::1]:8084".

    Raises: ValueError with what was expected.
    """
    host, colon, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""  # an IPv6 address without brackets: which colon ends it cannot be told
    if (
        not colon
        or not host
        or not (port.isascii() and port.isdigit())
        or len(port) > 5
        or int(port) > PORT_MAX
    ):
        message = f"{text!r} is not an address; write host:port, for example 127.0.0.1:8084 or [::1]:8084"
        raise ValueError(message)
    return Address(host, int(port))
