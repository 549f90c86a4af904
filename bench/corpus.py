"""The data that benchmarks run on: a file system with real files, and random changes with a fixed seed."""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from bench.harness import SEED

GIB = 1 << 30


def file_system_image(*, smoke: bool) -> Path:
    """Return a raw ext4 image of 6 GiB with about 0.9 GiB of this machine's own files; made once and kept.

    smoke: 64 MiB with a few files.
    """
    name = "hvreplica-bench-smoke.raw" if smoke else "hvreplica-bench-fs.raw"
    image = Path(tempfile.gettempdir()) / name
    if image.exists():
        return image
    part = image.with_suffix(".part")
    with tempfile.TemporaryDirectory() as folder:
        if smoke:
            shutil.copytree("/usr/share/doc/bash", Path(folder) / "doc", symlinks=True) if Path(
                "/usr/share/doc/bash"
            ).is_dir() else (Path(folder) / "a").write_bytes(b"a" * 100_000)
        else:
            for source in (f"/usr/lib/{platform.machine()}-linux-gnu", "/usr/share/doc"):
                subprocess.run(["cp", "-a", source, folder], check=False, stderr=subprocess.DEVNULL)
        with part.open("wb") as file:
            file.truncate(64 << 20 if smoke else 6 * GIB)
        subprocess.run(["mkfs.ext4", "-q", "-d", folder, str(part)], check=True)
    part.replace(image)
    return image


def random_blocks(count: int, *, disk_bytes: int, block_bytes: int = 4096) -> np.ndarray:
    """Return `count` different block offsets in ascending order, the same ones in each run."""
    rng = np.random.default_rng(SEED)
    picked = rng.choice(disk_bytes // block_bytes, size=count, replace=False)
    return np.sort(picked).astype(np.int64) * block_bytes
