"""How many files this process may have open: a thousand points have as many parts."""

from __future__ import annotations

import contextlib
import resource

_OPEN_FILES_MAX = 1 << 16


def expect_open_files() -> None:
    """Let this process have as many files open as it may allow itself, up to _OPEN_FILES_MAX."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
