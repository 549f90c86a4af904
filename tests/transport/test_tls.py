"""Our own certificates: made private and whole, and checked with the file's name in the error before any connection."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from hvreplica.clock import SYSTEM
from hvreplica.errors import AuthenticationFailed
from hvreplica.files import OS_FILES
from hvreplica.transport import client_context, connect, server_context
from hvreplica.transport.certificates import init_tls, issue
from hvreplica.transport.tls import identify
from hvreplica.transport.trust import TrustList
from tests.support.fakeclock import FakeClock
from tests.support.tools import require_tool
from tests.transport.support import DECODER, Ask, Tell, copy_folder, serving, write_leaf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAMES = [
    "ca-key.pem",
    "ca.pem",
    "primary-key.pem",
    "primary.pem",
    "replica-key.pem",
    "replica.pem",
    "trust.toml",
]
DAY_S = 86_400


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_folder_holds_what_both_sides_need_and_nothing_else(tls_folder: Path) -> None:
    assert sorted(os.listdir(tls_folder)) == NAMES


def test_keys_are_readable_by_their_owner_alone(tls_folder: Path) -> None:
    modes = {name: stat.S_IMODE((tls_folder / name).stat().st_mode) for name in NAMES}
    assert {name for name, mode in modes.items() if mode == 0o600} == {
        name for name in NAMES if "key" in name
    }


def test_leaves_carry_names_both_usages_and_no_rights_of_a_ca(tmp_path: Path) -> None:
    clock = FakeClock()
    init_tls(
        OS_FILES, tmp_path / "new", clock=clock, names=["replica.example", "192.0.2.7", "bücher.example"]
    )
    for role in ("primary", "replica"):
        leaf = certificate(tmp_path / "new" / f"{role}.pem")
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert {"localhost", "replica.example", "xn--bcher-kva.example"} <= set(
            names.get_values_for_type(x509.DNSName)
        )
        addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
        assert addresses == {"127.0.0.1", "::1", "192.0.2.7"}
        usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
        assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert leaf.not_valid_after_utc == datetime.fromtimestamp(clock.now_s() + 825 * DAY_S, UTC)
    ca = certificate(tmp_path / "new" / "ca.pem")
    assert ca.not_valid_after_utc == datetime.fromtimestamp(clock.now_s() + 3650 * DAY_S, UTC)


def test_openssl_verifies_what_we_made(tls_folder: Path) -> None:
    openssl = require_tool("openssl")
    for role, purpose in (("primary", "sslclient"), ("replica", "sslserver")):
        command = [openssl, "verify", "-x509_strict", "-CAfile", tls_folder / "ca.pem", "-purpose", purpose]
        done = subprocess.run(
            [*command, tls_folder / f"{role}.pem"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_trust_list_lets_the_primary_write_everything(tls_folder: Path) -> None:
    trust = TrustList.load(OS_FILES, tls_folder / "trust.toml")
    for role, allowed in (("primary", True), ("replica", False)):
        der = certificate(tls_folder / f"{role}.pem").public_bytes(serialization.Encoding.DER)
        assert trust.allows(identify(der), "any VM") == allowed


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match=name):
        init_tls(OS_FILES, tmp_path, clock=SYSTEM)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"


def test_certificate_never_outlives_its_ca(tmp_path: Path) -> None:
    clock = FakeClock()
    init_tls(OS_FILES, tmp_path, clock=clock)
    clock.advance(3600 * DAY_S)
    issue(OS_FILES, tmp_path, "second", "second host", clock=clock)
    leaf, ca = certificate(tmp_path / "second.pem"), certificate(tmp_path / "ca.pem")
    assert leaf.not_valid_after_utc == ca.not_valid_after_utc


def test_issue_needs_the_key_of_the_ca_that_stands_there(
    tmp_path: Path, tls_folder: Path, other_folder: Path
) -> None:
    folder = copy_folder(tls_folder, tmp_path / "tls")
    shutil.copy(other_folder / "ca-key.pem", folder / "ca-key.pem")
    with pytest.raises(AuthenticationFailed, match="does not belong"):
        issue(OS_FILES, folder, "second", "second", clock=SYSTEM)
    (folder / "ca-key.pem").unlink()
    with pytest.raises(AuthenticationFailed, match="missing"):
        issue(OS_FILES, folder, "second", "second", clock=SYSTEM)
    assert not (folder / "second-key.pem").exists()


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb"])
def test_bad_common_name_is_refused(tls_folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        issue(OS_FILES, tls_folder, "third", name, clock=SYSTEM)


def swap_keys(folder: Path) -> None:
    shutil.copy(folder / "replica-key.pem", folder / "primary-key.pem")


def garble(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"-----BEGIN NOTHING-----\n\xff\n")


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        (remove("ca.pem"), "ca.pem", "missing"),
        (remove("primary.pem"), "primary.pem", "missing"),
        (remove("primary-key.pem"), "primary-key.pem", "missing"),
        (garble("ca.pem"), "ca.pem", "no certificate"),
        (garble("primary.pem"), "primary.pem", "no certificate"),
        (garble("primary-key.pem"), "primary-key.pem", "no private key"),
        (swap_keys, "primary-key.pem", "does not belong to the certificate"),
        (lambda folder: write_leaf(folder, "primary", valid_days=(-9, -2)), "primary.pem", "expired at 20"),
        (
            lambda folder: write_leaf(folder, "primary", valid_days=(2, 9)),
            "primary.pem",
            "not valid before 20",
        ),
        (lambda folder: (folder / "ca.pem").write_bytes(bytes((1 << 20) + 1)), "ca.pem", "too large"),
    ],
)
def test_unusable_file_is_named_before_any_connection(
    tmp_path: Path, tls_folder: Path, damage: Callable[[Path], object], file: str, words: str
) -> None:
    folder = copy_folder(tls_folder, tmp_path / "tls")
    server_context(folder)
    damage(folder)
    with pytest.raises(AuthenticationFailed, match=words) as caught:
        client_context(folder)
    assert caught.value.path == folder / file


def test_key_with_a_password_is_refused_without_asking_for_it(tmp_path: Path, tls_folder: Path) -> None:
    folder = copy_folder(tls_folder, tmp_path / "tls")
    key = folder / "primary-key.pem"
    openssl = require_tool("openssl")
    command = [
        openssl,
        "pkey",
        "-in",
        key,
        "-aes256",
        "-passout",
        "pass:secret",
        "-out",
        folder / "locked.pem",
    ]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "locked.pem").rename(key)
    with pytest.raises(AuthenticationFailed, match="no private key"):
        client_context(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_key_that_may_not_be_read_is_named(tmp_path: Path, tls_folder: Path) -> None:
    folder = copy_folder(tls_folder, tmp_path / "tls")
    (folder / "replica-key.pem").chmod(0)
    with pytest.raises(AuthenticationFailed, match="may not be read"):
        server_context(folder)


def test_folder_that_is_missing_hints_at_init(tmp_path: Path) -> None:
    with pytest.raises(AuthenticationFailed) as caught:
        server_context(tmp_path / "nowhere")
    assert "tls init" in str(caught.value.hint)


def test_certificates_of_another_tool_work_as_well(tmp_path: Path) -> None:
    openssl = require_tool("openssl")

    def run(*words: str | Path) -> None:
        subprocess.run([openssl, *words], cwd=tmp_path, check=True, capture_output=True)

    run(
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        "ca-key.pem",
        "-out",
        "ca.pem",
        "-subj",
        "/CN=CA",
        "-days",
        "9",
    )
    for role, usage in (("primary", "clientAuth"), ("replica", "serverAuth")):
        (tmp_path / "extensions").write_text(f"subjectAltName=IP:127.0.0.1\nextendedKeyUsage={usage}\n")
        run(
            "req",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            f"{role}-key.pem",
            "-out",
            "request.pem",
            "-subj",
            f"/CN={role}",
        )
        run(
            "x509",
            "-req",
            "-in",
            "request.pem",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca-key.pem",
            "-CAcreateserial",
            "-days",
            "9",
            "-extfile",
            "extensions",
            "-out",
            f"{role}.pem",
        )
    with (
        serving(
            tmp_path, lambda channel: channel.send_message(Tell(len(channel.receive_message().text)))
        ) as listener,
        connect(listener.address, client_context(tmp_path), decoder=DECODER) as channel,
    ):
        channel.send_message(Ask("four"))
        assert channel.receive_message() == Tell(4)
