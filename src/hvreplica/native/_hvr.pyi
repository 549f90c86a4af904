# What cffi builds from native/hvr.h: its declarations are checked by the C compiler, not by mypy.
from typing import Any

ffi: Any
lib: Any
