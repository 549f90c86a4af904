"""Run `python -m hvreplica` exactly like `hvreplica`."""

from __future__ import annotations

from hvreplica.cli.main import main

if __name__ == "__main__":
    main()
