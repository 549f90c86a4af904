"""What every test gets: hypothesis profiles, the seed in the header, and the folder of specimens."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.support.tools import missing, tools_are_required

# dev: quick, new examples each time. ci: the same idea, wider, no deadline on a busy machine. deep: before a
# release.
settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=60, deadline=None, print_blob=True, database=None)
settings.register_profile(
    "deep",
    max_examples=5000,
    deadline=None,
    print_blob=True,
    phases=tuple(Phase),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
_PROFILE = os.environ.get("HVREPLICA_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
settings.load_profile(_PROFILE)

# Temporary files go to memory where there is room for them: nothing here is proven by what a sync costs, and to
# remove a file that was just synced waits for the device, on some file systems for half a second. TMPDIR decides
# where it is set. Worker processes inherit it.
_MEMORY, _MEMORY_BYTES_MIN = "/dev/shm", 3 << 30


def _has_room() -> bool:
    """Return whether /dev/shm and the machine's memory have enough left."""
    try:
        held = os.statvfs(_MEMORY)
        with open("/proc/meminfo", encoding="ascii") as lines:
            known = dict(line.split(":", 1) for line in lines)
    except OSError:
        return False
    available_bytes = int(known.get("MemAvailable", "0 kB").split()[0]) * 1024
    free_bytes = min(held.f_bavail * held.f_frsize, available_bytes)
    return os.access(_MEMORY, os.W_OK) and free_bytes >= _MEMORY_BYTES_MIN


if "TMPDIR" not in os.environ and _has_room():
    os.environ["TMPDIR"] = _MEMORY
    tempfile.tempdir = None  # asked for anew

# Run with nohup, or in the background of a script, some signals come ignored; processes under test inherit that.
for _signal in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, signal.default_int_handler if _signal == signal.SIGINT else signal.SIG_DFL)

SEED = int(os.environ.get("HVREPLICA_SEED", "42"))


def pytest_report_header() -> str:
    """Say what a failure needs to be replayed."""
    tools = "required" if tools_are_required() else "skipped where absent"
    where = tempfile.gettempdir()
    return f"hvreplica: HVREPLICA_SEED={SEED} HVREPLICA_PROFILE={_PROFILE}, outside tools {tools}, files in {where}"


@pytest.fixture
def seed() -> int:
    """Return the seed of this run; HVREPLICA_SEED sets it."""
    return SEED


@pytest.fixture
def rng() -> random.Random:
    """Return randomness that HVREPLICA_SEED repeats."""
    return random.Random(SEED)


@pytest.fixture(scope="session")
def specimens() -> Path:
    """Return the folder of disk images made by others; skip loudly without, fail where it was promised."""
    named = os.environ.get("HVREPLICA_SPECIMENS", "")
    folder = Path(named)
    if named and folder.is_dir():
        return folder.resolve()
    if named and tools_are_required():
        pytest.fail(f"HVREPLICA_SPECIMENS={named} is not a folder", pytrace=False)
    if named:
        missing(f"HVREPLICA_SPECIMENS={named} is not a folder")
    pytest.skip("NOT TESTED: images made by others; set HVREPLICA_SPECIMENS to the folder that holds them")
