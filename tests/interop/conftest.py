"""What the tests against other programs share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.specimens import Shelf

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def shelf(specimens: Path, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Return the images made by others, unpacked for reading only."""
    assert (specimens / "expected.json").is_file()
    return Shelf(tmp_path_factory.mktemp("shelf"))
