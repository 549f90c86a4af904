"""What a guest's ext4 holds, read by e2fsprogs from an image of the bare disk; nothing is mounted."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from tests.support.tools import run_tool

if TYPE_CHECKING:
    from pathlib import Path


def replay_journal(image: Path) -> None:
    """Do to an image what the next mount does after a power cut, and nothing beyond it."""
    run_tool("e2fsck", "-y", "-E", "journal_only", image, expected=(0, 1))


def require_clean(image: Path) -> None:
    """Fail the test unless a full check finds nothing to repair and no journal to replay."""
    told = run_tool("e2fsck", "-f", "-n", image).stdout
    assert "journal" not in told, told


def content_sums(image: Path, folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every regular file by its path in the guest, read by way of an empty `folder`."""
    folder.mkdir()
    run_tool("debugfs", "-R", f"rdump / {folder}", image)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
