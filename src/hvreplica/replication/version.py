"""How this software names itself to the other side and to people."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("hvreplica")
except PackageNotFoundError:  # run from a source tree that was never installed
    VERSION = "0"
SOFTWARE = f"hvreplica {VERSION}"
