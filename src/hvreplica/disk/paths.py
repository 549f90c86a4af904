r"""Names of parents: Windows paths and URLs as they stand in a disk, and the files here that they may mean.

A name comes from outside. It only says where to look: what is found must prove by its identity that it is the
parent. Drive letters, shares and volumes mean nothing here, so of such a name only the last part is looked
for, beside the child, where somebody who moved a chain as a whole has put it. Pure but for os.path.abspath().
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from hvreplica.errors import FieldOutOfRange

if TYPE_CHECKING:
    from collections.abc import Iterable

_WINDOWS_ABSOLUTE = re.compile(r"(?:[A-Za-z]:|[\\/]{2})")
# Linux takes names of 255 bytes and paths of 4096; longer ones cannot be files here.
_NAME_LENGTH_MAX = 4096


def candidate_paths(child: Path, names: Iterable[str]) -> list[Path]:
    """Return the files to look at for the parent of `child`, in order, each once.

    names: as they stand in the child. First each name as it is meant, then the last part of each beside the
    child.
    """
    names = [name for name in names if name and "\0" not in name and len(name) <= _NAME_LENGTH_MAX]
    meant = [path for name in names if (path := _meant(child, name)) is not None]
    beside = [child.parent / last for name in names if (last := _last_part(name))]
    return list(dict.fromkeys([*meant, *beside]))


def _meant(child: Path, name: str) -> Path | None:
    if name.startswith("file://"):
        return _meant_by_url(child, name)
    if name.startswith("/") and not name.startswith("//"):
        return Path(name)
    if _WINDOWS_ABSOLUTE.match(name) or name.startswith("\\"):
        return None
    return Path(os.path.normpath(child.parent / name.replace("\\", "/")))


def _meant_by_url(child: Path, name: str) -> Path | None:
    try:
        parts = urlsplit(name)
    except ValueError:
        return None
    path = unquote(parts.path)
    if "\0" in path:
        return None
    if parts.netloc == ".":  # "file://./name": relative, as VHD writers mean it
        return Path(os.path.normpath(child.parent / path.lstrip("/")))
    return Path(path) if path.startswith("/") else None


def _last_part(name: str) -> str:
    last = re.split(r"[\\/]", unquote(name) if name.startswith("file://") else name)[-1]
    return "" if last in {"", ".", ".."} or "\0" in last else last


def relative_windows_path(child: Path, parent: Path) -> str:
    r"""Return the path of `parent` from the folder of `child` as Windows spells it, such as ".\a.vhdx".

    Raises: FieldOutOfRange for a name that would be read as another one, or is no text.
    """
    relative = os.path.relpath(os.path.abspath(parent), os.path.abspath(child.parent))
    try:
        relative.encode("utf-16-le")
    except UnicodeEncodeError:
        is_text = False
    else:
        is_text = True
    if not is_text or "\\" in relative:
        raise FieldOutOfRange(
            "the name of the parent cannot be written into its child",
            path=parent,
            field="parent",
            expected="Unicode without \\",
            actual=repr(relative),
            hint="give the parent another name",
        )
    return relative.replace("/", "\\") if relative.startswith("..") else ".\\" + relative.replace("/", "\\")
