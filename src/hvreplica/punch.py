"""Holes in files, by the call that Python does not have."""

from __future__ import annotations

import ctypes
import errno
import os

_PUNCH_HOLE = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def _load_fallocate() -> object:
    try:
        function = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int
    return function


_FALLOCATE = _load_fallocate()


def punch(descriptor: int, file_offset: int, length: int) -> bool:
    """Punch a hole; False where the file system or the system cannot."""
    if not callable(_FALLOCATE):
        return False
    if _FALLOCATE(descriptor, _PUNCH_HOLE, file_offset, length) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code))
