"""The counter of changes that readers watch: it means nothing after a restart, and must never be in their way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.files import OS_FILES
from hvreplica.store.counter import COUNTER_BYTES, Counter
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    from pathlib import Path


def test_reader_opens_a_counter_whose_length_was_lost_with_the_power(tmp_path: Path) -> None:
    path = tmp_path / "applied"
    path.write_bytes(b"")
    memory = FaultFiles(tmp_path)
    memory.load(path, b"\x01")
    for files in (OS_FILES, memory):
        with Counter(files, path) as reader, Counter(files, path, writable=True) as writer:
            before = reader.value()
            writer.increment()
            assert reader.value() == before + 1
    assert path.stat().st_size == COUNTER_BYTES
