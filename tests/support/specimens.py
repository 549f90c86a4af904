"""The disk images that others made: unpacked once in a run, with what is known of each from elsewhere.

expected.json of their folder says what a guest sees, which parents an image needs, and which images must be
refused; manifest.json tells facts that were read by other programs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvreplica.clock import SYSTEM
from hvreplica.disk import convert_disk
from hvreplica.files import OS_FILES
from tests.support.images import Content, copy_sparse, file_content, file_ranges, ranges_to_ask, unpack
from tests.support.readers import Facts

if TYPE_CHECKING:
    from tests.support.images import Range

_HASHED_BYTES_MAX = 32 << 20  # of a file's data; the time of change alone tells of larger ones
FOLDER = Path(os.environ.get("HVREPLICA_SPECIMENS") or os.devnull)


def _load(name: str) -> Any:
    path = FOLDER / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


EXPECTED: dict[str, dict[str, Any]] = _load("expected.json") or {}
MANIFEST: dict[str, dict[str, Any]] = {row["file"]: row for row in _load("manifest.json") or []}
REFUSED = sorted(name for name, entry in EXPECTED.items() if "refuse" in entry)
EITHER = sorted(name for name, entry in EXPECTED.items() if entry.get("either"))
READABLE = sorted(set(EXPECTED) - set(REFUSED) - set(EITHER))


def expected_content(name: str) -> Content:
    """Return what the guest sees in an image."""
    return Content(EXPECTED[name]["virtual_bytes"], EXPECTED[name]["nz4k"])


def parents(name: str) -> list[str]:
    """Return the images that have to lie beside this one."""
    return list(EXPECTED[name].get("with", []))


def facts(name: str) -> Facts:
    """Return what other programs tell of an image."""
    row = MANIFEST[name]
    return Facts(
        format=row["format"].lower(),
        type=row["type"],
        virtual_bytes=EXPECTED[name]["virtual_bytes"],
        logical_sector_bytes=row["logical_sector"],
        dirty=row.get("dirty_log", False),
        raw_parent=any(MANIFEST[parent]["format"] == "RAW" for parent in parents(name)),
        depth=len(parents(name)),
        sums_good=row.get("checksum_ok", True),
    )


def unpack_family(name: str, target: Path) -> Path:
    """Unpack an image and its parents into a folder; return the image."""
    for parent in parents(name):
        unpack(FOLDER, parent, target)
    return unpack(FOLDER, name, target)


class Shelf:
    """Images unpacked for reading only, and their raw copies as we read them; each made once, on first use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._raw: dict[str, Path] = {}

    def image(self, name: str) -> Path:
        """Return an image with its parents beside it."""
        target = self._folder / name.replace("/", "+")
        target.mkdir(exist_ok=True)
        return unpack_family(name, target)

    def state(self, name: str) -> list[tuple[str, int, int, Content | None]]:
        """Return what stands in the image and its parents: name, length, time of change, bytes of small ones."""
        found = []
        for path in sorted(self.image(name).parent.iterdir()):
            seen = path.stat()
            small = seen.st_blocks * 512 <= _HASHED_BYTES_MAX
            found.append((path.name, seen.st_size, seen.st_mtime_ns, file_content(path) if small else None))
        return found

    def copy(self, name: str, target: Path) -> Path:
        """Return a copy of an image and its parents that may be changed."""
        image = self.image(name)
        for path in image.parent.iterdir():
            copy_sparse(path, target / path.name)
        return target / image.name

    def raw(self, name: str) -> Path:
        """Return the raw disk that we read from an image."""
        if name not in self._raw:
            target = self._folder / f"{name.replace('/', '+')}.raw"
            convert_disk(OS_FILES, self.image(name), target, format="raw", clock=SYSTEM)
            self._raw[name] = target
        return self._raw[name]

    def ranges(self, name: str) -> list[Range]:
        """Return what to ask of readers that know of no holes."""
        return ranges_to_ask(file_ranges(self.raw(name)), EXPECTED[name]["virtual_bytes"])
