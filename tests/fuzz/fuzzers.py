"""Every fuzzer of the project."""

from __future__ import annotations

from tests.fuzz import (
    targets_check,
    targets_disk,
    targets_hrl,
    targets_journal,
    targets_nbd,
    targets_pressed,
    targets_text,
    targets_times,
    targets_vhd,
    targets_vhdx,
    targets_wire,
)

FUZZERS = (
    *targets_vhdx.FUZZERS,
    *targets_vhd.FUZZERS,
    *targets_disk.FUZZERS,
    *targets_check.FUZZERS,
    *targets_hrl.FUZZERS,
    *targets_wire.FUZZERS,
    *targets_nbd.FUZZERS,
    *targets_pressed.FUZZERS,
    *targets_text.FUZZERS,
    *targets_journal.FUZZERS,
    *targets_times.FUZZERS,
)
