"""Declare an on-disk or wire structure once: size, fields, section; the documentation is made from it.

A mismatch between the declared size and the fields fails at import. `struct` is used nowhere else.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hvreplica.errors import Truncated

if TYPE_CHECKING:
    from typing_extensions import Buffer

GUID = "guid"  # a field code: 16 bytes, mixed-endian as Windows stores them
_TYPES = {
    "B": "u8",
    "H": "u16",
    "I": "u32",
    "Q": "u64",
    "b": "i8",
    "h": "i16",
    "i": "i32",
    "q": "i64",
    GUID: "GUID",
}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a Layout.

    name: the specification's name in snake_case. code: a struct code ("I", "16s") or GUID. rule: what holds.
    """

    name: str
    code: str
    rule: str = ""

    @property
    def struct_code(self) -> str:
        """The code as struct knows it."""
        return "16s" if self.code == GUID else self.code

    @property
    def type_name(self) -> str:
        """The type as documentation shows it."""
        if self.code.endswith("s"):
            return f"{self.code[:-1]} bytes"
        return _TYPES[self.code]


class Layout:
    """A packed structure of fixed size; reserved bytes are fields (code "12s", name "reserved…")."""

    def __init__(
        self, name: str, *, spec: str, size: int, fields: tuple[Field, ...], endian: str = "<"
    ) -> None:
        self.name = name
        self.spec = spec
        self.fields = fields
        self._struct = struct.Struct(endian + "".join(field.struct_code for field in fields))
        self.size = self._struct.size
        if self.size != size:
            message = f"{name}: declared {size} bytes, the fields have {self.size}"
            raise TypeError(message)

    def unpack(self, buffer: Buffer, at: int = 0) -> dict[str, Any]:
        """Return the fields at offset `at` of `buffer`, unchecked. Raises: Truncated if they do not fit."""
        view = memoryview(buffer)
        if at < 0 or view.nbytes - at < self.size:
            raise Truncated(
                f"the {self.name} does not fit",
                offset=at,
                expected=f"{self.size} bytes",
                actual=f"{max(view.nbytes - at, 0)} bytes",
                spec=self.spec,
            )
        values = self._struct.unpack_from(view, at)
        return {
            field.name: uuid.UUID(bytes_le=value) if field.code == GUID else value
            for field, value in zip(self.fields, values, strict=True)
        }

    def pack(self, **values: Any) -> bytes:
        """Return the bytes; fields that are not named are zero."""
        unknown = values.keys() - {field.name for field in self.fields}
        if unknown:
            message = f"{self.name} has no field {sorted(unknown)}"
            raise TypeError(message)
        row = []
        for field in self.fields:
            value = values.get(field.name, b"" if field.struct_code.endswith("s") else 0)
            row.append(value.bytes_le if isinstance(value, uuid.UUID) else value)
        return self._struct.pack(*row)

    def offset_of(self, name: str) -> int:
        """Return the offset of the field in bytes."""
        at = 0
        for field in self.fields:
            if field.name == name:
                return at
            at += struct.calcsize("<" + field.struct_code)
        raise KeyError(name)

    def table(self) -> str:
        """Return the structure as a Markdown table for docs/formats."""
        rows = [f"### {self.name} ({self.size} bytes, {self.spec})", ""]
        rows += ["| offset | size | type | field | rule |", "|---|---|---|---|---|"]
        for field in self.fields:
            size = struct.calcsize("<" + field.struct_code)
            row = (self.offset_of(field.name), size, field.type_name, field.name, field.rule)
            rows.append("| " + " | ".join(str(cell) for cell in row) + " |")
        return "\n".join(rows) + "\n"
