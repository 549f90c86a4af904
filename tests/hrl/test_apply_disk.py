"""A log applied to a real disk, raw and VHDX, is what qemu made of the same writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest

from hvreplica.disk import create_disk, open_disk
from hvreplica.errors import FieldOutOfRange
from hvreplica.files import OS_FILES
from hvreplica.hrl import apply_log
from tests.hrl.support import new_writer, rows
from tests.support.build import random_extents
from tests.support.fakeclock import FakeClock
from tests.support.tools import run_tool

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

Format = Literal["raw", "vhdx"]

MIB = 1 << 20
DISK_BYTES = 64 * MIB


def make_disk(path: Path, kind: Format, *, block_bytes: int | None = None) -> None:
    create_disk(
        OS_FILES, path, virtual_bytes=DISK_BYTES, format=kind, block_bytes=block_bytes, clock=FakeClock()
    )


def history(seed: int, count: int = 400) -> list[tuple[int, int, int]]:
    """Return (disk_offset, length, pattern byte), 0 for zeroes; with writes over block borders and long runs."""
    extents: NDArray[np.uint64] = random_extents(
        count, disk_bytes=DISK_BYTES, seed=seed, length_bytes_max=256 << 10
    )
    writes = [(offset, length, index % 255 + 1) for index, (offset, length) in enumerate(extents.tolist())]
    writes[::9] = [(offset, length, 0) for offset, length, _ in writes[::9]]
    writes.insert(count // 2, (5 * MIB + 512, 20 * MIB, 0))
    writes.insert(count // 3, (30 * MIB - 4096, 5 * MIB, 0x5A))
    return writes


def write_history(path: Path, writes: list[tuple[int, int, int]]) -> None:
    with new_writer(OS_FILES, path) as writer:
        for offset, length, pattern in writes:
            if pattern == 0:
                writer.append_zeroes(offset, length)
            else:
                writer.append(rows((offset, length)), bytes([pattern]) * length)


def model_of(writes: list[tuple[int, int, int]], before: bytes) -> bytearray:
    model = bytearray(before)
    for offset, length, pattern in writes:
        model[offset : offset + length] = bytes([pattern]) * length
    return model


def read_whole(path: Path) -> bytes:
    with open_disk(OS_FILES, path, clock=FakeClock()) as disk:
        content = bytearray(disk.virtual_bytes)
        disk.read_into(content, 0)
        return bytes(content)


@pytest.mark.parametrize(("kind", "block_bytes"), [("raw", None), ("vhdx", MIB), ("vhdx", 32 * MIB)])
def test_log_on_a_disk_with_content_equals_the_model_and_qemu(
    tmp_path: Path, kind: Format, block_bytes: int | None
) -> None:
    first, second = history(1), history(2)
    image, expected = tmp_path / f"disk.{kind}", tmp_path / "expected.raw"
    make_disk(image, kind, block_bytes=block_bytes)
    model = bytearray(DISK_BYTES)
    for index, writes in enumerate((first, second)):
        log = tmp_path / f"{index}.hrl"
        write_history(log, writes)
        with open_disk(OS_FILES, image, writable=True, clock=FakeClock()) as disk:
            report = apply_log(OS_FILES, log, disk)
            disk.flush()
        assert report.bytes_zeroed > 10 * MIB
        model = model_of(writes, bytes(model))
        assert read_whole(image) == model
    expected.write_bytes(model)
    run_tool("qemu-img", "compare", "-f", "raw", "-F", kind, expected, image)
    if kind == "vhdx":
        run_tool("qemu-img", "check", "-f", "vhdx", image)


def test_qemu_io_writes_and_the_log_apply_alike(tmp_path: Path) -> None:
    """The same history through a program that is not ours, write by write."""
    writes = [(offset, length, pattern) for offset, length, pattern in history(3, 120)]
    ours, theirs, log = tmp_path / "ours.vhdx", tmp_path / "theirs.raw", tmp_path / "a.hrl"
    make_disk(ours, "vhdx")
    make_disk(theirs, "raw")
    write_history(log, writes)
    with open_disk(OS_FILES, ours, writable=True, clock=FakeClock()) as disk:
        apply_log(OS_FILES, log, disk)
        disk.flush()
    commands: list[str] = []
    for offset, length, pattern in writes:
        commands += ["-c", f"write -P {pattern} {offset} {length}"]
    run_tool("qemu-io", "-f", "raw", *commands, theirs)
    run_tool("qemu-img", "compare", "-f", "vhdx", "-F", "raw", ours, theirs)


def test_zeroes_give_whole_blocks_of_a_vhdx_back(tmp_path: Path) -> None:
    image = tmp_path / "disk.vhdx"
    make_disk(image, "vhdx", block_bytes=MIB)
    write_history(tmp_path / "full.hrl", [(0, DISK_BYTES, 1)])
    write_history(tmp_path / "zeroes.hrl", [(0, DISK_BYTES - 512, 0)])
    allocated = []
    for name in ("full.hrl", "zeroes.hrl"):
        with open_disk(OS_FILES, image, writable=True, clock=FakeClock()) as disk:
            apply_log(OS_FILES, tmp_path / name, disk)
            disk.flush()
            allocated.append(disk.info().allocated_bytes)
    assert allocated == [DISK_BYTES, MIB]
    assert read_whole(image) == bytes(DISK_BYTES - 512) + b"\x01" * 512


@pytest.mark.parametrize("kind", ["raw", "vhdx"])
def test_log_of_a_larger_disk_changes_nothing(tmp_path: Path, kind: Format) -> None:
    image = tmp_path / f"disk.{kind}"
    make_disk(image, kind)
    write_history(tmp_path / "a.hrl", [(0, 4096, 7), (DISK_BYTES, 512, 7)])
    with open_disk(OS_FILES, image, writable=True, clock=FakeClock()) as disk:
        with pytest.raises(FieldOutOfRange):
            apply_log(OS_FILES, tmp_path / "a.hrl", disk)
        disk.flush()
    assert read_whole(image) == bytes(DISK_BYTES)


@pytest.mark.parametrize("kind", ["raw", "vhdx"])
def test_many_small_writes_through_two_threads_equal_the_model(tmp_path: Path, kind: Format) -> None:
    image, log = tmp_path / f"disk.{kind}", tmp_path / "a.hrl"
    make_disk(image, kind, block_bytes=MIB if kind == "vhdx" else None)
    generator = np.random.default_rng(5)
    count = 20000
    offsets = generator.integers(0, DISK_BYTES // 512, count) * 512
    data = generator.integers(0, 256, count * 512, np.uint8)
    extents = np.stack((offsets, np.full(count, 512)), axis=1)
    with new_writer(OS_FILES, log) as writer:
        for at in range(0, count, 1000):
            writer.append(extents[at : at + 1000], data[at * 512 : (at + 1000) * 512])
    model = np.zeros((DISK_BYTES // 512, 512), np.uint8)
    for offset, sector in zip((offsets // 512).tolist(), data.reshape(-1, 512), strict=True):
        model[offset] = sector
    with open_disk(OS_FILES, image, writable=True, clock=FakeClock()) as disk:
        apply_log(OS_FILES, log, disk)
        disk.flush()
    assert read_whole(image) == model.tobytes()
