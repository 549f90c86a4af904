"""What a plain call cannot show: short transfers, buffers at the edge of memory, demands that cannot be met."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hvreplica.native.library import VARIANTS, available_variants, choose_variant
from tests.support.tools import missing

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python as this process would find the package, with other environment variables."""
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, **variables}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if sys.platform != "linux" or shutil.which(compiler[0]) is None:
        missing("a C compiler on Linux, for a library that shortens transfers")
    target = tmp_path_factory.mktemp("shim") / "shim.so"
    source = str(HERE / "shim.c")
    subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-o", str(target), source, "-ldl"], check=True)
    return target


def test_payload_survives_short_transfers_interrupts_and_errors(shim: Path, tmp_path: Path) -> None:
    loaded = os.pathsep.join(filter(None, [os.environ.get("LD_PRELOAD", ""), str(shim)]))
    result = run_python(str(HERE / "under_shim.py"), str(tmp_path), LD_PRELOAD=loaded)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_no_kernel_touches_a_byte_outside_its_buffers() -> None:
    result = run_python(str(HERE / "guarded.py"))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_environment_demands_a_variant() -> None:
    for variant in available_variants():
        result = run_python(
            "-c", "from hvreplica import native; print(native.kernel_variant())", HVREPLICA_KERNELS=variant
        )
        assert result.stdout.strip() == variant, result.stderr


def test_a_demand_that_cannot_be_met_fails_the_import_and_says_why() -> None:
    result = run_python("-c", "import hvreplica.native", HVREPLICA_KERNELS="mmx")
    assert result.returncode != 0
    assert "HVREPLICA_KERNELS=mmx: no such kernels" in result.stderr
    for variant in set(VARIANTS) - set(available_variants()):
        with pytest.raises(ImportError, match=f"HVREPLICA_KERNELS={variant}: this "):
            choose_variant(variant)


def test_without_a_demand_the_fastest_variant_is_chosen() -> None:
    assert choose_variant(None) == choose_variant("") == available_variants()[-1]
