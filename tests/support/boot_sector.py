"""A disk that boots into a few instructions: read a sector, print it, write it elsewhere, end the machine."""

from __future__ import annotations

import struct

SECTOR_BYTES = 512
EXIT_PORT, DONE, FAILED = 0xF4, 0x10, 0x11  # QEMU's isa-debug-exit ends with twice the number, plus 1
_ORIGIN, _BUFFER = 0x7C00, 0x8000

# [INT13] extended read and write: AH = 42h and 43h, DL = the drive that the firmware booted, DS:SI = the
# packet.
_CODE = """
    31 c0       xor ax, ax
    8e d8       mov ds, ax
    fc          cld
    be {read}   mov si, packet of the read
    b4 42       mov ah, 42h
    cd 13       int 13h
    72 1a       jc failed
    be {text}   mov si, buffer
    ac          lodsb                   ; print:
    84 c0       test al, al
    74 04       jz printed
    e6 e9       out e9h, al             ; QEMU's debugcon
    eb f7       jmp print
    be {write}  mov si, packet of the write ; printed:
    b8 00 43    mov ax, 4300h
    cd 13       int 13h
    72 04       jc failed
    b0 {done}   mov al, DONE
    e6 f4       out f4h, al
    b0 {failed}  mov al, FAILED         ; failed:
    e6 f4       out f4h, al
    eb fe       jmp here
"""


def boot_sector(*, read_lba: int, write_lba: int) -> bytes:
    """Return the first sector of a disk that prints sector read_lba, up to its first NUL, and copies it."""
    packets_offset = SECTOR_BYTES // 2
    packets = [struct.pack("<BxHHHQ", 16, 1, _BUFFER, 0, lba) for lba in (read_lba, write_lba)]
    words = {
        "text": _word(_BUFFER),
        "read": _word(_ORIGIN + packets_offset),
        "write": _word(_ORIGIN + packets_offset + len(packets[0])),
        "done": f"{DONE:02x}",
        "failed": f"{FAILED:02x}",
    }
    lines = [line.strip().split("  ")[0].format_map(words) for line in _CODE.splitlines()]
    code = bytes.fromhex(" ".join(lines))
    return (code.ljust(packets_offset, b"\0") + b"".join(packets)).ljust(
        SECTOR_BYTES - 2, b"\0"
    ) + b"\x55\xaa"


def _word(number: int) -> str:
    return struct.pack("<H", number).hex(" ")
