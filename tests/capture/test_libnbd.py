"""Programs that others wrote against our handshake, and against the plain server that is its oracle."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import hvreplica
from hvreplica.address import Address
from hvreplica.capture.listen import NbdListener
from hvreplica.transport import server_context
from tests.support.plain_nbd import PlainDisk
from tests.support.tools import missing, run_tool

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.capture.export import ExportInfo


class World:
    """Two disks, a listener, and how to reach it."""

    def __init__(self, folder: Path) -> None:
        self.disks = [
            PlainDisk(bytearray(1 << 20)),
            PlainDisk(bytearray(4096 * 40), read_only=True, minimum_block_bytes=4096),
        ]
        self.path = folder / "web01.sock"
        self.listener = NbdListener(self.path, self.exports, self.serve)

    def exports(self) -> list[ExportInfo]:
        return [disk.export(str(index), f"disk {index}") for index, disk in enumerate(self.disks)]

    def serve(self, negotiated: Any) -> None:
        self.disks[negotiated.export_index].serve(negotiated)

    def uri(self, name: str = "0") -> str:
        return f"nbd+unix:///{name}?socket={self.path}"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    with made.listener:
        yield made


def described(*arguments: str) -> list[dict[str, Any]]:
    exports: list[dict[str, Any]] = json.loads(run_tool("nbdinfo", "--json", *arguments).stdout)["exports"]
    return exports


def test_nbdinfo_lists_and_describes_every_export(world: World) -> None:
    first, second = described("--list", world.uri(""))
    assert (first["export-name"], second["export-name"]) == ("0", "1")
    assert (first["description"], second["description"]) == ("disk 0", "disk 1")
    assert (first["export-size"], second["export-size"]) == (1 << 20, 4096 * 40)
    assert (first["block_size_minimum"], second["block_size_minimum"]) == (512, 4096)
    assert {first["block_size_preferred"], second["block_size_preferred"]} == {4096}
    assert {first["block_size_maximum"], second["block_size_maximum"]} == {32 << 20}
    assert first["contexts"] == second["contexts"] == ["base:allocation"]
    can = {name: value for name, value in first.items() if name.startswith(("can_", "is_"))}
    assert can == {
        "is_rotational": False,
        "is_read_only": False,
        "can_cache": True,
        "can_df": True,
        "can_fast_zero": True,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": True,
        "can_zero": True,
        **({"can_block_status_payload": False} if "can_block_status_payload" in can else {}),
    }
    assert second["is_read_only"]
    assert not any(second[name] for name in ("can_trim", "can_zero", "can_fast_zero", "can_fua"))


def test_nbdinfo_takes_the_empty_name_for_the_first(world: World) -> None:
    assert described(world.uri(""))[0]["export-size"] == 1 << 20
    run_tool("nbdinfo", world.uri("7"), expected=(1,))


def test_nbdinfo_maps_data_and_holes(world: World) -> None:
    world.disks[0].data[8192:12_288] = b"x" * 4096
    rows = json.loads(run_tool("nbdinfo", "--map", "--json", world.uri()).stdout)
    assert [(row["offset"], row["length"], row["type"]) for row in rows] == [
        (0, 8192, 3),
        (8192, 4096, 0),
        (12_288, (1 << 20) - 12_288, 3),
    ]


def test_nbdcopy_brings_a_disk_in_and_out(world: World, tmp_path: Path, rng: random.Random) -> None:
    source, back = tmp_path / "source.raw", tmp_path / "back.raw"
    source.write_bytes(rng.randbytes(300_032) + bytes(500_000) + rng.randbytes((1 << 20) - 800_032))
    run_tool("nbdcopy", "--flush", source, world.uri())
    assert bytes(world.disks[0].data) == source.read_bytes()
    run_tool("nbdcopy", world.uri(), back)
    assert back.read_bytes() == source.read_bytes()


def test_qemu_reads_and_writes(world: World) -> None:
    run_tool(
        "qemu-io",
        *("-f", "raw", world.uri()),
        *("-c", "write -P 7 512 66048", "-c", "write -z -u 1024 512", "-c", "discard 65536 512"),
        *("-c", "flush", "-c", "read -P 7 512 512", "-c", "read -P 0 1024 512"),
    )
    data = world.disks[0].data
    assert data[512:1024] == b"\7" * 512
    assert not any(data[1024:1536])
    assert data[1536:65_536] == b"\7" * 64_000
    refused = run_tool("qemu-io", "-f", "raw", world.uri("1"), "-c", "write 0 4096", expected=(1,))
    assert "Permission denied" in refused.stderr


def test_nbdinfo_and_qemu_speak_tls(tmp_path: Path, rng: random.Random) -> None:
    hvreplica.tls_init(tmp_path)
    hvreplica.tls_nbd(tmp_path)
    certificates = tmp_path / "nbd"
    tls_server = server_context(certificates)
    disk = PlainDisk(bytearray(rng.randbytes(3 << 20)))
    with NbdListener(
        Address("127.0.0.1", 0), lambda: [disk.export()], disk.serve, tls_context=tls_server
    ) as listener:
        assert isinstance(listener.address, Address)
        place = f"127.0.0.1:{listener.address.port}"
        uri = f"nbds://{place}/0?tls-certificates={certificates}"
        done = run_tool("nbdinfo", "--json", uri, expected=(0, 1))
        if "TLS" in done.stderr and "compiled" in done.stderr:
            missing("nbdinfo is compiled without TLS")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["TLS"]
        run_tool("nbdcopy", uri, tmp_path / "out.raw")
        assert (tmp_path / "out.raw").read_bytes() == bytes(disk.data)
        run_tool("nbdinfo", f"nbd://{place}/0", expected=(1,))
        credentials = f"tls-creds-x509,id=tls0,endpoint=client,dir={certificates}"
        image = f"driver=nbd,host=127.0.0.1,port={listener.address.port},export=0"
        opened = ("--object", credentials, "--image-opts", f"{image},tls-creds=tls0")
        assert "3 MiB" in run_tool("qemu-img", "info", *opened).stdout
        run_tool("qemu-img", "info", "--image-opts", image, expected=(1,))
