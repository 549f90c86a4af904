"""Each variant of the kernels that this machine can run, by name."""

from __future__ import annotations

from typing import cast

import pytest

from hvreplica.native.kernels import Kernels
from hvreplica.native.library import available_variants


@pytest.fixture(params=available_variants())
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Return one variant; a test that takes it runs once for each."""
    return Kernels(cast("str", request.param))
