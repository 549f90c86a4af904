"""The policy picks what the link and the CPU make cheapest, and does not waver; codecs are exact."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

from hvreplica.errors import FieldOutOfRange
from hvreplica.formats.wire import Codec
from hvreplica.transport import CodecPolicy
from hvreplica.transport.codec import LZ4, NONE, ZSTD, ZSTD_3, Choice, Codecs, worth_it

MIB = 1 << 20
# ns for each byte of data, and the share that is left: what real files show on one core of a recent machine
FILES: dict[Choice, tuple[float, float]] = {
    NONE: (0, 1),
    LZ4: (1.3, 0.5),
    ZSTD: (1.6, 0.37),
    ZSTD_3: (4, 0.34),
}
NOISE: dict[Choice, tuple[float, float]] = {NONE: (0, 1), LZ4: (0.3, 1), ZSTD: (0.6, 1), ZSTD_3: (0.8, 1)}


def run(
    policy: CodecPolicy, content: dict[Choice, tuple[float, float]], *, wire_ns: float, frames: int
) -> list[Choice]:
    """Drive the policy as encoders and channels do, over a link of `wire_ns` for each byte; return its choices."""
    choices = []
    for _ in range(frames):
        choice, samples = policy.choose()
        for each, data_bytes in [*((sample, MIB // 8) for sample in samples), (choice, 2 * MIB)]:
            encode_ns, share = content[each]
            policy.observe_encode(
                each,
                data_bytes=data_bytes,
                encoded_bytes=int(data_bytes * share),
                seconds=encode_ns * data_bytes / 1e9,
            )
        wire_bytes = int(2 * MIB * content[choice][1])
        policy.observe_send(wire_bytes=wire_bytes, seconds=wire_ns * wire_bytes / 1e9)
        choices.append(choice)
    return choices


@pytest.mark.parametrize(
    ("wire_ns", "expected"),
    [(0.5, NONE), (1.5, NONE), (8, ZSTD), (40, ZSTD), (800, ZSTD_3)],
    ids=["16 Gbit/s", "5 Gbit/s", "1 Gbit/s", "200 Mbit/s", "10 Mbit/s"],
)
def test_auto_picks_by_the_speed_of_the_link(wire_ns: float, expected: Choice) -> None:
    choices = run(CodecPolicy("auto"), FILES, wire_ns=wire_ns, frames=60)
    assert set(choices[10:]) == {expected}


def test_auto_takes_lz4_where_it_is_much_cheaper() -> None:
    content = FILES | {LZ4: (0.4, 0.5), ZSTD: (3, 0.37)}
    assert set(run(CodecPolicy("auto"), content, wire_ns=8, frames=60)[10:]) == {LZ4}


@pytest.mark.parametrize("wire_ns", [0.5, 8, 800])
def test_auto_sends_incompressible_data_as_it_is(wire_ns: float) -> None:
    assert set(run(CodecPolicy("auto"), NOISE, wire_ns=wire_ns, frames=60)[10:]) == {NONE}


def test_auto_follows_a_link_that_becomes_slow_and_fast_again() -> None:
    policy = CodecPolicy("auto")
    assert run(policy, FILES, wire_ns=1, frames=20)[-1] == NONE
    assert run(policy, FILES, wire_ns=20, frames=40)[-1] == ZSTD
    assert run(policy, FILES, wire_ns=0.5, frames=60)[-1] == NONE


def test_auto_follows_content_that_becomes_incompressible_and_back() -> None:
    policy = CodecPolicy("auto")
    assert run(policy, FILES, wire_ns=20, frames=40)[-1] == ZSTD
    assert run(policy, NOISE, wire_ns=20, frames=10)[-1] == NONE
    assert run(policy, FILES, wire_ns=20, frames=200)[-1] == ZSTD


def test_data_that_one_codec_cannot_shrink_is_not_tried_with_the_next() -> None:
    policy = CodecPolicy("auto")
    assert run(policy, FILES, wire_ns=3.5, frames=40)[-1] == ZSTD
    choices = run(policy, NOISE, wire_ns=3.5, frames=20)
    assert set(choices) == {ZSTD, NONE}
    assert choices.count(ZSTD) <= 3


def test_auto_does_not_waver_between_equals() -> None:
    content = FILES | {LZ4: (0.0, 0.95)}
    choices = run(CodecPolicy("auto"), content, wire_ns=1, frames=200)
    assert sum(1 for one, two in itertools.pairwise(choices) if one != two) == 0


def test_time_in_which_the_receiver_was_too_slow_does_not_count_for_the_link() -> None:
    policy = CodecPolicy("auto")
    for _ in range(40):
        for each in policy.choose()[1]:
            encode_ns, share = FILES[each]
            policy.observe_encode(
                each, data_bytes=MIB, encoded_bytes=int(MIB * share), seconds=encode_ns * MIB / 1e9
            )
        policy.observe_send(wire_bytes=2 * MIB, seconds=0.1, receiver_s=0.099)
    assert policy.current == NONE


def test_samples_are_rare_and_reach_every_candidate() -> None:
    policy = CodecPolicy("auto")
    first = policy.choose()[1]
    later = [sample for _ in range(480) for sample in policy.choose()[1]]
    assert set(first) == {LZ4, ZSTD, ZSTD_3}
    assert set(later) == {LZ4, ZSTD, ZSTD_3}
    assert len(later) == 30


@pytest.mark.parametrize(("name", "choice"), [("none", NONE), ("lz4", LZ4), ("zstd", ZSTD)])
def test_named_compression_never_changes(name: str, choice: Choice) -> None:
    policy = CodecPolicy(name)
    assert set(run(policy, FILES, wire_ns=0.1, frames=40)) == {choice}
    assert set(run(policy, NOISE, wire_ns=1000, frames=40)) == {choice}


def test_unknown_compression_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="auto, zstd, lz4, none"):
        CodecPolicy("gzip")


def test_policy_is_shared_by_threads() -> None:
    policy = CodecPolicy("auto")
    failures: list[BaseException] = []

    def drive() -> None:
        try:
            run(policy, FILES, wire_ns=20, frames=300)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert policy.current == ZSTD


@pytest.mark.parametrize("choice", [NONE, LZ4, ZSTD, ZSTD_3])
@pytest.mark.parametrize("length", [1, 100, 70_000, 4 * MIB])
def test_codec_round_trips(choice: Choice, length: int) -> None:
    data = memoryview(np.random.default_rng(3).integers(0, 9, length, dtype=np.uint8).tobytes())
    codecs, out = Codecs(), memoryview(bytearray(length))
    encoded = memoryview(codecs.encode(choice, data))
    codecs.decode(Codec(choice.codec), encoded, out)
    assert out == data


@pytest.mark.parametrize("choice", [LZ4, ZSTD])
def test_cut_data_does_not_decode(choice: Choice) -> None:
    codecs = Codecs()
    encoded = memoryview(bytes(codecs.encode(choice, memoryview(b"abcd" * 1000 + bytes(range(256))))))
    for length in range(len(encoded)):
        with pytest.raises(FieldOutOfRange):
            codecs.decode(Codec(choice.codec), encoded[:length], memoryview(bytearray(4256)))


def test_zstd_of_two_mebibytes_is_smaller_than_the_default_window_makes_it() -> None:
    # The second half repeats the first at a distance of 1 MiB: out of reach of level 1's own 512 KiB.
    half = np.random.default_rng(4).bytes(MIB)
    assert len(bytes(Codecs().encode(ZSTD, memoryview(half + half)))) < 1.1 * MIB


def test_small_gain_is_not_worth_it() -> None:
    assert worth_it(96, 100)
    assert not worth_it(97, 100)
    assert not worth_it(100, 100)
