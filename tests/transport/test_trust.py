"""Who may write what: only what an entry says, and a file that is not understood opens no door."""

from __future__ import annotations

import fnmatch
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.clock import SYSTEM
from hvreplica.errors import AuthorizationRefused, FieldOutOfRange
from hvreplica.files import OS_FILES
from hvreplica.transport import PeerIdentity, TrustList, allow
from hvreplica.transport.trust import matches

if TYPE_CHECKING:
    from pathlib import Path

PRINT = "0123456789abcdef" * 4
PEER = PeerIdentity(PRINT, "primary", 0)
STRANGER = PeerIdentity("f" * 64, "stranger", 0)


def load(folder: Path, text: str) -> TrustList:
    path = folder / "trust.toml"
    path.write_text(text, encoding="utf-8")
    return TrustList.load(OS_FILES, path)


@pytest.mark.parametrize(
    "certificate",
    [f"sha256:{PRINT}", f"SHA256:{PRINT.upper()}", "sha256:" + ":".join(re.findall("..", PRINT)), "primary"],
)
def test_certificate_is_named_by_fingerprint_or_common_name(tmp_path: Path, certificate: str) -> None:
    trust = load(tmp_path, f'[[allow]]\ncertificate = "{certificate}"\nvm = ["web*", "db01"]\n')
    assert trust.allows(PEER, "web01")
    assert trust.allows(PEER, "db01")
    assert not trust.allows(PEER, "db02")
    assert not trust.allows(PEER, "Web01")
    assert not trust.allows(STRANGER, "web01")


def test_entries_add_up(tmp_path: Path) -> None:
    entry = '[[allow]]\ncertificate = "primary"\nvm = ["{}"]\n'
    trust = load(tmp_path, entry.format("a") + entry.format("b"))
    assert trust.allows(PEER, "a")
    assert trust.allows(PEER, "b")
    assert not trust.allows(PEER, "c")


def test_empty_list_allows_nobody(tmp_path: Path) -> None:
    assert not load(tmp_path, "# nobody yet\n").allows(PEER, "web01")


def test_certificate_without_a_common_name_is_not_named_by_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(FieldOutOfRange):
        load(tmp_path, '[[allow]]\ncertificate = ""\nvm = ["*"]\n')
    trust = load(tmp_path, '[[allow]]\ncertificate = "primary"\nvm = ["*"]\n')
    assert not trust.allows(PeerIdentity("0" * 64, "", 0), "web01")


@pytest.mark.parametrize(
    "text",
    [
        "[[allow]\n",
        'allow = "all"\n',
        '[[allow]]\ncertificate = "primary"\n',
        '[[allow]]\ncertificate = "primary"\nvm = []\n',
        '[[allow]]\ncertificate = "primary"\nvm = "*"\n',
        '[[allow]]\ncertificate = "primary"\nvm = [""]\n',
        '[[allow]]\ncertificate = "primary"\nvm = ["*"]\nuntil = 2030\n',
        '[[deny]]\ncertificate = "primary"\nvm = ["*"]\n',
        '[[allow]]\ncertificate = "sha256:1234"\nvm = ["*"]\n',
        f'[[allow]]\ncertificate = "sha256:{"g" * 64}"\nvm = ["*"]\n',
        f'[[allow]]\ncertificate = "primary"\nvm = ["{"a" * 201}"]\n',
        "#" * ((1 << 20) + 1),
    ],
)
def test_list_that_is_not_understood_is_an_error_naming_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(FieldOutOfRange) as caught:
        load(tmp_path, text)
    assert caught.value.path == tmp_path / "trust.toml"


def test_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "trust.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FieldOutOfRange):
        TrustList.load(OS_FILES, tmp_path / "trust.toml")


def test_missing_list_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(AuthorizationRefused) as caught:
        TrustList.load(OS_FILES, tmp_path / "trust.toml")
    assert "tls init" in str(caught.value.hint)


def test_added_entry_keeps_what_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "trust.toml"
    path.write_text('# mine\n[[allow]]\ncertificate = "primary"\nvm = ["a"]', encoding="utf-8")
    allow(OS_FILES, path, certificate=f"sha256:{'f' * 64}", vm=['web "1"*', "naïve\\"], clock=SYSTEM)
    trust = TrustList.load(OS_FILES, path)
    assert path.read_text(encoding="utf-8").startswith("# mine\n")
    assert trust.allows(PEER, "a")
    assert trust.allows(STRANGER, 'web "1"23')
    assert trust.allows(STRANGER, "naïve\\")


def test_entry_that_is_not_valid_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trust.toml"
    allow(OS_FILES, path, certificate="primary", vm=["a"], clock=SYSTEM)
    before = path.read_bytes()
    for certificate, vm in (("sha256:12", ["a"]), ("primary", []), ("", ["a"])):
        with pytest.raises(FieldOutOfRange):
            allow(OS_FILES, path, certificate=certificate, vm=vm, clock=SYSTEM)
    assert path.read_bytes() == before


@given(st.text("ab*?", max_size=12), st.text("ab", max_size=12))
def test_patterns_match_as_fnmatch_does(pattern: str, name: str) -> None:
    assert matches(name, pattern) == fnmatch.fnmatchcase(name, pattern)


def test_brackets_are_no_wildcards() -> None:
    assert matches("web[12]", "web[12]")
    assert not matches("web1", "web[12]")


def test_hostile_pattern_takes_no_time() -> None:
    assert not matches("a" * 100, "*a" * 99 + "*b")
