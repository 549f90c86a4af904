"""What older peers send is read as they meant it, and what they do not know does not disturb them."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
import pytest

from hvreplica.formats import messages

ONE, TWO, THREE = (uuid.UUID(int=number) for number in (1, 2, 3))
TEXT_OF_ID = "00000000-0000-0000-0000-00000000000"
SHAPE = {
    "index": 0,
    "virtual_bytes": 1 << 20,
    "logical_sector_bytes": 512,
    "physical_sector_bytes": 4096,
    "block_bytes": 0,
    "label": "a.vhdx",
}
# As a primary of revision 1 sends them, and what they mean now.
OLD_QUESTIONS: list[tuple[dict[str, Any], messages.Question]] = [
    (
        {
            "is": "claim",
            "protocol": 1,
            "software": "hvreplica 0.1",
            "vm": "web01",
            "relationship_id": TEXT_OF_ID + "1",
            "generation": 7,
            "disks": [SHAPE],
        },
        messages.Claim(
            1,
            "hvreplica 0.1",
            "web01",
            ONE,
            7,
            [messages.DiskShape(0, 1 << 20, 512, 4096, 0, "a.vhdx", None)],
            [],
        ),
    ),
    (
        {
            "is": "initial",
            "transfer_id": TEXT_OF_ID + "1",
            "point_id": TEXT_OF_ID + "2",
            "instant_s": 5.5,
            "positions": [0],
        },
        messages.BeginInitial(ONE, TWO, 5.5, [0], consistent=True, joining=[]),
    ),
    (
        {
            "is": "logs",
            "transfer_id": TEXT_OF_ID + "1",
            "point_id": TEXT_OF_ID + "2",
            "previous_point_id": TEXT_OF_ID + "3",
            "instant_s": 5.5,
            "logs": [
                {
                    "disk_index": 0,
                    "log_id": TEXT_OF_ID + "1",
                    "previous_log_id": TEXT_OF_ID + "2",
                    "log_bytes": 8192,
                }
            ],
            "positions": [4096],
        },
        messages.BeginLogs(ONE, TWO, THREE, 5.5, [messages.LogShape(0, ONE, TWO, 8192)], [4096], disks=[]),
    ),
]
OLD_CLAIMED = {
    "is": "claimed",
    "protocol": 1,
    "software": "hvreplica 0.1",
    "session": b"s" * 16,
    "phase": "ready",
    "last_point": TEXT_OF_ID + "1",
    "transfer": None,
    "disks": [{"index": 0, "last_log_id": TEXT_OF_ID + "2"}],
    "damage": [],
    "connections_max": 16,
}
# As this version sends them: a change of these bytes is a change of the wire.
GOLDEN: list[tuple[messages.Message, str]] = [
    (
        messages.BeginInitial(ONE, TWO, 5.5, [0, 512], consistent=False, joining=[3, 5]),
        (
            "88a26973a7696e697469616cab7472616e736665725f6964d92430303030303030302d303030302d303030302d303030"
            "302d303030303030303030303031a8706f696e745f6964d92430303030303030302d303030302d303030302d30303030"
            "2d303030303030303030303032a9696e7374616e745f73cb4016000000000000a9706f736974696f6e739200cd0200aa"
            "636f6e73697374656e74c2ab636f6e73697374656e6379a56372617368a76a6f696e696e67920305"
        ),
    ),
    (
        messages.BeginLogs(
            ONE,
            TWO,
            THREE,
            5.5,
            [messages.LogShape(3, ONE, TWO, 8192)],
            [0],
            disks=[messages.DiskSize(0, 1 << 20), messages.DiskSize(3, 2 << 20)],
            kind="planned",
            consistency="app",
        ),
        (
            "8aa26973a46c6f6773ab7472616e736665725f6964d92430303030303030302d303030302d303030302d303030302d30"
            "3030303030303030303031a8706f696e745f6964d92430303030303030302d303030302d303030302d303030302d3030"
            "30303030303030303032b170726576696f75735f706f696e745f6964d92430303030303030302d303030302d30303030"
            "2d303030302d303030303030303030303033a9696e7374616e745f73cb4016000000000000a46c6f67739184aa646973"
            "6b5f696e64657803a66c6f675f6964d92430303030303030302d303030302d303030302d303030302d30303030303030"
            "3030303031af70726576696f75735f6c6f675f6964d92430303030303030302d303030302d303030302d303030302d30"
            "3030303030303030303032a96c6f675f6279746573cd2000a9706f736974696f6e739100a56469736b739282a5696e64"
            "657800ad7669727475616c5f6279746573ce0010000082a5696e64657803ad7669727475616c5f6279746573ce002000"
            "00a46b696e64a7706c616e6e6564ab636f6e73697374656e6379a3617070"
        ),
    ),
    (
        messages.Claim(
            1,
            "hvreplica",
            "web01",
            ONE,
            7,
            [messages.DiskShape(0, 1 << 20, 512, 4096, 0, "a.vhdx", THREE)],
            [2],
            messages.PointPolicy(recovery_points=3, recovery_point_every_s=900, keep_logs_s=60),
        ),
        (
            "8ba26973a5636c61696da870726f746f636f6c01a8736f667477617265a968767265706c696361a2766da57765623031"
            "af72656c6174696f6e736869705f6964d92430303030303030302d303030302d303030302d303030302d303030303030"
            "303030303031aa67656e65726174696f6e07a56469736b739187a5696e64657800ad7669727475616c5f6279746573ce"
            "00100000b46c6f676963616c5f736563746f725f6279746573cd0200b5706879736963616c5f736563746f725f627974"
            "6573cd1000ab626c6f636b5f627974657300a56c6162656ca6612e76686478af7669727475616c5f6469736b5f6964d9"
            "2430303030303030302d303030302d303030302d303030302d303030303030303030303033a772656d6f7665649102a6"
            "706f6c69637983af7265636f766572795f706f696e747303b67265636f766572795f706f696e745f65766572795f73cd"
            "0384ab6b6565705f6c6f67735f733ca772657665727365c2a6726573796e63c2"
        ),
    ),
    (
        messages.Claimed(
            1,
            "hvreplica",
            b"s" * 16,
            "ready",
            ONE,
            None,
            [messages.DiskState(0, TWO, 1 << 20, in_point=False)],
            [],
            16,
            2,
        ),
        (
            "8ca26973a7636c61696d6564a870726f746f636f6c01a8736f667477617265a968767265706c696361a773657373696f"
            "6ec41073737373737373737373737373737373a57068617365a57265616479aa6c6173745f706f696e74d92430303030"
            "303030302d303030302d303030302d303030302d303030303030303030303031a87472616e73666572c0a56469736b73"
            "9184a5696e64657800ab6c6173745f6c6f675f6964d92430303030303030302d303030302d303030302d303030302d30"
            "3030303030303030303032ad7669727475616c5f6279746573ce00100000a8696e5f706f696e74c2a664616d61676590"
            "af636f6e6e656374696f6e735f6d617810a87265766973696f6e02a761646f70746564c0"
        ),
    ),
    (
        messages.Applied(ONE, damaged=[0, 3]),
        (
            "83a26973a76170706c696564a8706f696e745f6964d92430303030303030302d303030302d303030302d303030302d30"
            "3030303030303030303031a764616d61676564920003"
        ),
    ),
    (
        messages.RepairBlocks(2, [7, 9], b"ab"),
        ("84a26973a6726570616972aa6469736b5f696e64657802a6626c6f636b73920709a464617461c4026162"),
    ),
    (
        messages.RepairEnd(2, proven=True),
        ("83a26973aa7265706169725f656e64aa6469736b5f696e64657802a670726f76656ec3"),
    ),
    (
        messages.Repaired(whole=False),
        ("82a26973a87265706169726564a577686f6c65c2"),
    ),
]


@pytest.mark.parametrize(("sent", "meant"), OLD_QUESTIONS, ids=lambda value: getattr(value, "get", str)("is"))
def test_question_of_an_older_primary_means_what_it_did(
    sent: dict[str, Any], meant: messages.Question
) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=messages.Question) == meant


def test_answer_of_an_older_replica_says_that_it_is_one() -> None:
    claimed = msgspec.msgpack.decode(msgspec.msgpack.encode(OLD_CLAIMED), type=messages.Answer)
    assert isinstance(claimed, messages.Claimed)
    assert claimed.revision == 1
    assert (claimed.disks[0].virtual_bytes, claimed.disks[0].in_point) == (None, True)


@pytest.mark.parametrize(("message", "octets"), GOLDEN, ids=lambda value: type(value).__name__)
def test_bytes_on_the_wire_are_frozen(message: messages.Message, octets: str) -> None:
    assert msgspec.msgpack.encode(message).hex() == octets


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"joining": [64]}, "joining"),
        ({"joining": [*list(range(64)), 1]}, "joining"),
        ({"consistent": 2}, "consistent"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any], field: str) -> None:
    sent = {**OLD_QUESTIONS[1][0], **change}
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=messages.Question)


@pytest.mark.parametrize("size", [0, 511, 513, messages.DISK_BYTES_MAX + 512])
def test_sizes_that_no_disk_has_are_refused(size: int) -> None:
    sent = {**OLD_QUESTIONS[2][0], "disks": [{"index": 0, "virtual_bytes": size}]}
    with pytest.raises(msgspec.ValidationError, match="virtual_bytes"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=messages.Question)
