"""What people and files say in words: the trust list, the primary's state, names, sizes, addresses."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

from hvreplica import native
from hvreplica.address import parse_address
from hvreplica.disk.paths import candidate_paths
from hvreplica.errors import HvReplicaError
from hvreplica.formats import fingerprint
from hvreplica.replication.state import StateFolder
from hvreplica.store.layout import folder_name, vm_name
from hvreplica.transport.trust import TrustList
from hvreplica.units import parse_size
from tests.fuzz.registry import Fuzzer
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

_TRUST = b'[[allow]]\ncertificate = "sha256:%s"\nvm = ["web*", "\xc3\xbc 1"]\n' % (b"ab" * 32)
_DISK = {
    "path": "a",
    "virtual_bytes": 1024,
    "logical_sector_bytes": 512,
    "physical_sector_bytes": 4096,
    "block_bytes": 0,
}


def _attack_trust(data: bytes) -> None:
    files = FaultFiles()
    files.load("/t/trust.toml", data)
    TrustList.load(files, Path("/t/trust.toml"))


def _state_seeds() -> list[bytes]:
    state = {
        "version": 1,
        "vm": "web01",
        "relationship_id": str(uuid.UUID(int=1)),
        "generation": 1,
        "phase": "ready",
        "disks": [_DISK],
        "last_point": str(uuid.UUID(int=2)),
    }
    return [json.dumps(state).encode()]


def _attack_state(data: bytes) -> None:
    files = FaultFiles()
    files.load("/s/state.json", data)
    StateFolder(files, Path("/s"), clock=FakeClock()).load()


def _fingerprint_seeds() -> list[bytes]:
    header = fingerprint.FingerprintHeader(
        block_bytes=65_536, disk_index=0, virtual_bytes=1 << 30, point_id=uuid.UUID(int=1)
    )
    return [fingerprint.pack_header(header)]


def _fingerprint_repair(data: bytes) -> bytes:
    at = fingerprint.HEADER.offset_of("checksum")
    blank = data[:at] + bytes(4) + data[at + 4 :]
    checksum = native.crc32c(blank[: fingerprint.HEADER.size])
    return data[:at] + checksum.to_bytes(4, "little") + data[at + 4 :]


def _attack_fingerprints(data: bytes) -> None:
    header = fingerprint.unpack_header(data)
    assert header.block_count * header.block_bytes >= header.virtual_bytes > 0


def _attack_vm_name(data: bytes) -> None:
    name = data.decode("utf-8", "surrogateescape")
    for strict in (False, True):
        folder = folder_name(name, strict=strict)
        path = Path("/store") / folder
        assert path.parent == Path("/store")
        assert folder not in {"", ".", ".."}
        assert "\0" not in folder
        assert len(folder.encode()) <= 255
        assert vm_name(folder) in {name, None}


def _attack_parent_names(data: bytes) -> None:
    """Take lines as the names in a disk: what is to be looked at has no NUL, is bounded, and never a folder."""
    names = data.decode().split("\n") if _is_text(data) else [data.decode("latin-1")]
    child = Path("/vm/sub/child.avhdx")
    paths = candidate_paths(child, names)
    assert len(paths) <= 2 * len(names)
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert path.is_absolute()
        assert "\0" not in str(path)
        assert len(str(path)) <= 4096 + len(str(child))
        os.fsencode(path)


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _attack_words(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    for parse in (parse_size, parse_address):
        try:
            parse(text)
        except (ValueError, HvReplicaError):
            continue


FUZZERS = (
    Fuzzer("trust", lambda: [_TRUST, b""], _attack_trust),
    Fuzzer("state", _state_seeds, _attack_state),
    Fuzzer("fingerprints", _fingerprint_seeds, _attack_fingerprints, _fingerprint_repair),
    Fuzzer(
        "vm_name",
        lambda: [b"web01", "wéb 01/..".encode(), b"CON.x", b"..", b"a" * 100, b"%2e"],
        _attack_vm_name,
    ),
    Fuzzer(
        "parent_names",
        lambda: [
            b".\\a.vhdx\nC:\\vm\\a.vhdx",
            b"..\\..\\x\\a.vhd",
            b"\\\\host\\share\\a.vhdx",
            b"file:///vm/a%20b.vhd\nfile://./a.vhd",
            b"/vm/a.vhdx",
        ],
        _attack_parent_names,
    ),
    Fuzzer(
        "words", lambda: [b"10G", b"1.5 TiB", b"127.0.0.1:8084", b"[::1]:1", b"host:99999"], _attack_words
    ),
)
