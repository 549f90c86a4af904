"""VM names become folder names: safe, one to one, apart on every usual file system, and readable."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hvreplica.errors import FieldOutOfRange
from hvreplica.store.layout import VmPaths, collision_key, folder_name, validate_vm_name, vm_name
from tests.store.world import guid

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=100)
DEVICES = ["CON", "con", "Nul.txt", "COM1", "lpt9.vhdx", "com²", "CONIN$", "aux .x", "prn"]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("web01", "web01"),
        ("SQL-PROD 01", "SQL-PROD 01"),
        ("Büro", "Büro"),
        ("仮想マシン", "仮想マシン"),
        ("a/b\\c", "a%2Fb%5Cc"),
        ("..", "%2E%2E"),
        (".hidden", "%2Ehidden"),
        ("dots.", "dots%2E"),
        (" blank ", "%20blank%20"),
        ("50%", "50%25"),
        ("con", "%63on"),
        ("NUL.txt", "%4EUL.txt"),
        ("catalog.db", "%63atalog.db"),
        ("Store.Lock", "%53tore.Lock"),
        ("web~1", "web%7E1"),
        ('a:b*c?d"e<f>g|h', "a%3Ab%2Ac%3Fd%22e%3Cf%3Eg%7Ch"),
        ("u\u202eexe", "u%E2%80%AEexe"),
    ],
)
def test_folder_of_a_name_is_readable_and_safe(name: str, folder: str) -> None:
    assert folder_name(name) == folder
    assert vm_name(folder) == name


@given(name=NAMES, strict=st.booleans())
@example(name="..", strict=False)
@example(name="../../etc/passwd", strict=False)
@example(name="\\\\server\\share", strict=True)
@example(name="x" * 99 + "/", strict=True)
@example(name="\U0001f600" * 100, strict=False)
def test_folder_is_one_safe_component(*, name: str, strict: bool) -> None:
    folder = folder_name(name, strict=strict)
    assert not set('/\\:*?"<>|\0') & set(folder)
    assert folder.isprintable()
    assert folder[0] not in ". "
    assert folder[-1] not in ". "
    assert len(os.fsencode(folder)) <= 255
    assert Path("/store", folder).parent == Path("/store")
    assert os.path.normpath(f"/store/{folder}") == f"/store/{folder}"


@given(name=NAMES, strict=st.booleans())
def test_folder_leads_back_to_its_name(*, name: str, strict: bool) -> None:
    folder = folder_name(name, strict=strict)
    assert vm_name(folder) == name or "%~" in folder


@pytest.mark.parametrize("name", DEVICES)
def test_windows_device_names_are_escaped(name: str) -> None:
    stem = folder_name(name).split(".")[0].rstrip().casefold()
    assert stem not in {"con", "nul", "com1", "lpt9", "com²", "conin$", "aux", "prn"}
    assert "%" in stem


ALIKE = st.sampled_from(
    ["Web01", "wEb01", "web01", "WEB01", "é", "e\u0301", "É", "\u017fs", "ss", "ß", "☃a", "☃A", "CON", "con"]
)


@given(st.lists(ALIKE | NAMES, min_size=2, max_size=12, unique=True))
@example(["Web01", "web01", "WEB01"])
@example(["☃A", "☃a", "A☃", "a☃"])
@example(["\u00e9", "e\u0301"])
@example(["CON", "Con", "con", "cOn"])
@example(["x" * 100, "X" * 100, "\U0001f600" * 100, "\U0001f600" * 99])
def test_names_never_share_a_folder_in_any_order(names: list[str]) -> None:
    keys: set[str] = set()
    for name in names:
        folder = folder_name(name)
        if collision_key(folder) in keys:
            folder = folder_name(name, strict=True)
        assert collision_key(folder) not in keys, (name, names)
        keys.add(collision_key(folder))


@given(
    NAMES,
    st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]),
    st.sampled_from([str.upper, str.lower, str.casefold]),
)
@example("\u0131", "NFC", str.upper)
@example("ß", "NFC", str.upper)
def test_collision_key_knows_what_a_file_system_may_make_of_a_folder(
    name: str, form: Literal["NFC", "NFD", "NFKC", "NFKD"], change: Callable[[str], str]
) -> None:
    folder = folder_name(name)
    seen = change(unicodedata.normalize(form, folder))
    assert collision_key(seen) == collision_key(folder)


@pytest.mark.parametrize(
    "name", ["", "x" * 101, "a\nb", "a\0b", "\x7f", "a\x85", "\udcff", "a\u2028b", "\x1b[2J"]
)
def test_impossible_names_are_refused(name: str) -> None:
    for check in (validate_vm_name, folder_name):
        with pytest.raises(FieldOutOfRange) as caught:
            check(name)
        assert caught.value.field == "vm"
        str(caught.value).encode()


@pytest.mark.parametrize(
    "folder", ["%zz", "%", "%2", "a%2fb", "..", "%77eb01", "%=web", "x%~00", "%FF", "lost+found"]
)
def test_foreign_folders_have_no_name_of_ours(folder: str) -> None:
    name = vm_name(folder)
    assert name is None or folder in {folder_name(name), folder_name(name, strict=True)}


def test_paths_stay_in_the_folder() -> None:
    paths = VmPaths.of(Path("/store"), folder_name("../web"))
    for path in (
        paths.disk(0),
        paths.partial_disk(63),
        paths.log(guid(1)),
        paths.partial_log(guid(1)),
        paths.lock,
    ):
        assert Path("/store/%2E.%2Fweb") in path.parents
