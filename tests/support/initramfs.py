"""A Linux guest's first file system: an archive in the form of cpio, with programs, their libraries and modules."""

from __future__ import annotations

import lzma
import re
import stat
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_HEADER_FIELDS = 13


class Initramfs:
    """An archive in the making; folders of what is added come by themselves."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def add(self, name: str, content: bytes, *, mode: int = 0o755) -> None:
        """Add a file under its name without the leading slash; a second one of that name is left out."""
        if name in self._names:
            return
        folder = ""
        for part in name.split("/")[:-1]:
            folder = f"{folder}/{part}" if folder else part
            self.add_folder(folder)
        self._add(name, stat.S_IFREG | mode, content)

    def add_folder(self, name: str) -> None:
        """Add a folder; one that is there stays."""
        if name not in self._names:
            self._add(name, stat.S_IFDIR | 0o755, b"")

    def add_program(self, name: str, path: Path) -> None:
        """Add a program and the shared libraries that this machine would run it with, at their places here."""
        self.add(name, path.read_bytes())
        for library in libraries(path):
            with open(library, "rb") as file:
                self.add(library.lstrip("/"), file.read())

    def pack(self) -> bytes:
        """Return the archive: the kernel reads the portable form with new ASCII headers."""
        return b"".join([*self._parts, self._entry("TRAILER!!!", 0, b"", 0)])

    def _add(self, name: str, mode: int, content: bytes) -> None:
        self._names.add(name)
        self._parts.append(self._entry(name, mode, content, len(self._names)))

    @staticmethod
    def _entry(name: str, mode: int, content: bytes, inode: int) -> bytes:
        fields = [inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
        assert len(fields) == _HEADER_FIELDS
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        return _padded(head) + _padded(content)


def _padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 4)


def libraries(program: Path) -> list[str]:
    """Return the paths of the loader and of all shared libraries of a program, as this machine finds them."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    if "not a dynamic executable" in done.stdout + done.stderr:
        return []
    if done.returncode != 0 or "not found" in done.stdout:
        raise FileNotFoundError(f"libraries of {program}: {done.stdout}{done.stderr}")
    return re.findall(r"(/\S+) \(0x", done.stdout)


def modules_in_order(folder: Path, wanted: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the wanted modules, each after those that it needs; built-in ones are left
    out.

    folder: with `modules.builtin` and the modules, compressed or not. Raises: FileNotFoundError for one that
    is neither.
    """
    built_in = {_module_name(line) for line in (folder / "modules.builtin").read_text().split()}
    files = {_module_name(path.name): path for path in folder.glob("*.ko*")}
    seen: set[str] = set()

    def with_needs(name: str) -> Iterator[tuple[str, bytes]]:
        if name in seen or name in built_in:
            return
        seen.add(name)
        if name not in files:
            raise FileNotFoundError(f"the kernel has no module {name}")
        content = files[name].read_bytes()
        if files[name].suffix == ".xz":
            content = lzma.decompress(content)
        for needed in re.findall(rb"\0depends=([^\0]*)\0", b"\0" + content):
            for each in filter(None, needed.decode().split(",")):
                yield from with_needs(_module_name(each))
        yield name, content

    for name in wanted:
        yield from with_needs(name)


def _module_name(path: str) -> str:
    return path.rpartition("/")[2].split(".")[0].replace("-", "_")
