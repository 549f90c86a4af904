"""How this software names itself to the other side and to people; pyproject.toml reads it from here."""

from __future__ import annotations

VERSION = "0.1.0"
SOFTWARE = "hvreplica " + VERSION
