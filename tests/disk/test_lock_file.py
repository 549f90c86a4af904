"""Locks of files beside a full file system."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from hvreplica.errors import Locked
from hvreplica.files import OS_FILES

if TYPE_CHECKING:
    from pathlib import Path


def test_lock_is_taken_and_given_back_where_its_number_finds_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "lock"
    monkeypatch.setattr(os, "pwrite", no_room)
    lock = OS_FILES.lock(path)
    with pytest.raises(Locked, match="another process holds this lock"):
        OS_FILES.lock(path)
    lock.release()
    monkeypatch.undo()
    OS_FILES.lock(path).release()
