"""What may be used where. Each rule keeps one kind of access to the outside world in one place that tests can hold."""

from __future__ import annotations

import ast
import fnmatch

import pytest

from tests.support.source import Source, dotted, imported, imported_for_types, package

# module: the only files that may import it, from src/hvreplica
IMPORTS = {
    "struct": ["formats/layout.py"],
    "socket": ["transport/*", "capture/*"],
    "socketserver": [],
    "ssl": ["transport/*", "capture/*"],
    "sqlite3": ["store/database.py"],
    "cffi": ["native/*"],
    "_cffi_backend": ["native/*"],
    "hvreplica.native._hvr": ["native/*"],
    "ctypes": ["punch.py", "image_lock.py"],
    "time": ["clock.py"],
    "random": ["clock.py"],
    "secrets": ["clock.py"],
    "fcntl": ["files.py", "image_lock.py"],
    "mmap": ["files.py"],
    "shutil": ["cli/*"],
    "tempfile": ["cli/demo*"],
    "subprocess": ["cli/demo*", "cli/cut.py"],
    "click": ["cli/*"],
    "rich": ["cli/*"],
    "pickle": [],
    "marshal": [],
    "shelve": [],
    "asyncio": ["capture/qmp.py"],
}
# called name: the only files that may call it
CALLS = {
    "open": ["files.py"],
    "print": ["cli/render.py"],
    "input": [],
    "eval": [],
    "exec": [],
    "uuid.uuid1": [],
    "uuid.uuid4": ["clock.py"],
    "datetime.now": [],
    "datetime.utcnow": [],
    "datetime.datetime.now": [],
    "io.open": [],
}
OS_FILE_CALLS = frozenset(
    [
        "open",
        "read",
        "write",
        "pread",
        "pwrite",
        "preadv",
        "pwritev",
        "sendfile",
        "copy_file_range",
        "lseek",
        "fsync",
        "fdatasync",
        "truncate",
        "ftruncate",
        "rename",
        "renames",
        "replace",
        "remove",
        "unlink",
        "mkdir",
        "makedirs",
        "rmdir",
        "removedirs",
        "listdir",
        "scandir",
        "walk",
        "stat",
        "lstat",
        "fstat",
        "statvfs",
        "chmod",
        "chown",
        "utime",
        "link",
        "symlink",
        "readlink",
        "access",
        "posix_fallocate",
        "urandom",
        "getrandom",
    ]
)
PATH_FILE_CALLS = frozenset(
    [
        "read_text",
        "read_bytes",
        "write_text",
        "write_bytes",
        "touch",
        "iterdir",
        "rglob",
        "is_file",
        "is_dir",
        "rmdir",
        "hardlink_to",
        "symlink_to",
    ]
)
NOT_FILES = {  # os calls on descriptors that are not files
    ("cli/render.py", "open"),  # /dev/null in the place of a stdout that nobody reads
    ("cli/serve.py", "read"),  # the pipe that a signal handler writes to
    ("cli/serve.py", "write"),
}
FORMATS_BANNED = {"os", "time", "logging", "pathlib", "threading", "hvreplica.files", "hvreplica.clock"}
MUTATORS = frozenset(
    [
        "append",
        "extend",
        "insert",
        "remove",
        "pop",
        "popitem",
        "clear",
        "update",
        "setdefault",
        "add",
        "discard",
        "sort",
        "reverse",
        "appendleft",
    ]
)


def allowed(source: Source, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(source.name, pattern) for pattern in patterns)


def is_at(name: str, banned: str) -> bool:
    return name == banned or name.startswith(banned + ".")


def import_faults(source: Source) -> list[str]:
    faults = []
    for_types = imported_for_types(source.tree)
    for node, name in imported(source.tree):
        if name.endswith(".*"):
            faults.append(f"{source.at(node)}: import * hides where names come from")
        for banned, patterns in IMPORTS.items():
            if is_at(name, banned) and node not in for_types and not allowed(source, patterns):
                faults.append(f"{source.at(node)}: {banned} belongs to {patterns or 'nobody'}")
        if source.name.startswith("formats/"):
            faults += [
                f"{source.at(node)}: formats are pure, no {banned}"
                for banned in FORMATS_BANNED
                if is_at(name, banned)
            ]
    return faults


def call_faults(source: Source) -> list[str]:
    faults = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in CALLS and not allowed(source, CALLS[name]):
            faults.append(f"{source.at(node)}: {name}() belongs to {CALLS[name] or 'nobody'}")
        last = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        is_file_call = (name == f"os.{last}" and last in OS_FILE_CALLS) or last in PATH_FILE_CALLS
        is_allowed = (
            source.name in {"files.py", "image_lock.py", "clock.py"} or (source.name, last) in NOT_FILES
        )
        if is_file_call and not is_allowed:
            faults.append(f"{source.at(node)}: {last}() touches files; only files.py does")
    return faults


def local_names(function: ast.FunctionDef) -> set[str]:
    arguments = function.args
    names = {arg.arg for arg in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    names |= {arg.arg for arg in (arguments.vararg, arguments.kwarg) if arg is not None}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def changed_name(node: ast.AST) -> str:
    """Return the plain name whose value a node changes in place, or ""."""
    if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, (ast.Store, ast.Del)):
        return node.value.id if isinstance(node.value, ast.Name) else ""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
        return node.func.value.id if isinstance(node.func.value, ast.Name) else ""
    return ""


def state_faults(source: Source) -> list[str]:
    module_names = set()
    for statement in source.tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        module_names |= {target.id for target in targets if isinstance(target, ast.Name)}
    faults = []
    for function in ast.walk(source.tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        shared = module_names - local_names(function)
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                faults.append(f"{source.at(node)}: global state")
            elif changed_name(node) in shared:
                faults.append(f"{source.at(node)}: changes {changed_name(node)}, which the module shares")
    return faults


@pytest.mark.parametrize("check", [import_faults, call_faults, state_faults])
def test_package_keeps_every_ban(check: object) -> None:
    assert callable(check)
    faults = [fault for source in package() for fault in check(source)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("disk/x.py", "import struct"),
        ("disk/x.py", "from socket import create_connection"),
        ("store/x.py", "import sqlite3 as db"),
        ("disk/x.py", "from hvreplica.native._hvr import lib"),
        ("formats/x.py", "from hvreplica.files import OS_FILES"),
        ("formats/x.py", "import os.path"),
        ("disk/x.py", "from os import *"),
        ("disk/x.py", "print(1)"),
        ("disk/x.py", "open('x')"),
        ("disk/x.py", "import os\nos.replace('a', 'b')"),
        ("disk/x.py", "def f(path):\n    return path.read_bytes()"),
        ("disk/x.py", "import uuid\nuuid.uuid4()"),
        ("disk/x.py", "SEEN = {}\ndef f(key):\n    SEEN[key] = 1"),
        ("disk/x.py", "SEEN: list[int] = []\ndef f(key):\n    SEEN.append(key)"),
        ("disk/x.py", "COUNT = 0\ndef f():\n    global COUNT\n    COUNT = 1"),
    ],
)
def test_bans_catch_what_they_name(name: str, text: str) -> None:
    tree = ast.parse(text)
    source = Source(package()[0].path, name, text, tree)
    assert import_faults(source) + call_faults(source) + state_faults(source)


def test_bans_let_ordinary_code_pass() -> None:
    text = (
        "import os\nimport uuid\nNAMES = {}\n"
        "def f(NAMES, files):\n    NAMES['x'] = os.environ\n    files.unlink('x')\n    return uuid.UUID(int=0)\n"
    )
    source = Source(package()[0].path, "disk/x.py", text, ast.parse(text))
    assert not import_faults(source) + call_faults(source) + state_faults(source)
