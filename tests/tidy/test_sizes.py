"""How long things may be, where files may lie, and what names and comments must not say."""

from __future__ import annotations

import ast
import re

from tests.support.source import ROOT, Source, imported, package, sources

MODULE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70  # without its docstring, which is a contract and may be long
POSITIONAL_MAX = 5
MODULE_NAMES_BANNED = {"util", "utils", "helper", "helpers", "common", "manager", "misc"}
NAMES_BANNED = {"tmp", "data2", "pos", "off", "buf2"}  # a number says of what and in which unit
OPEN_ENDS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
HISTORY = re.compile(
    r"\b(previously|formerly|used to be|was changed|in the past|legacy code)\b", re.IGNORECASE
)
PRIVATE_PATHS = re.compile(r"(?<![\w.])/(?:work|home|root|Users)/\w")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".c", ".h", ".sh", ".yml", ".yaml", ".txt", ".cfg", ""}
TEXT_FOLDERS = ("src", "native", "docs", "scripts", "bench", "tests", "changelog.d", ".ci")


def functions(source: Source) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [
        node for node in ast.walk(source.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    docstring = 0
    if ast.get_docstring(node, clean=False) is not None:
        docstring = (first.end_lineno or first.lineno) - first.lineno + 1
    return (node.end_lineno or node.lineno) - node.lineno + 1 - docstring


def is_click_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Click passes options by name, so that their order means nothing."""
    text = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    return "option" in text or "argument" in text or "command" in text


def test_modules_are_short() -> None:
    everything = sources("src/hvreplica", "tests", "scripts", "bench", "native")
    long = [
        f"{source.path}: {source.lines} lines" for source in everything if source.lines > MODULE_LINES_MAX
    ]
    assert not long, "\n".join(long)


def test_functions_are_short() -> None:
    long = [
        f"{source.at(node)}: {node.name} has {function_lines(node)} lines"
        for source in sources("src/hvreplica", "tests/support", "scripts", "native")
        for node in functions(source)
        if function_lines(node) > FUNCTION_LINES_MAX
    ]
    assert not long, "\n".join(long)


def test_functions_have_few_positional_parameters() -> None:
    many = []
    for source in package():
        for node in functions(source):
            names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
            count = len([name for name in names if name not in {"self", "cls"}])
            if count > POSITIONAL_MAX and not is_click_command(node):
                many.append(f"{source.at(node)}: {node.name} has {count}")
    assert not many, "\n".join(many)


def test_module_names_are_nouns_of_the_field() -> None:
    vague = [source.name for source in package() if source.path.stem in MODULE_NAMES_BANNED]
    assert not vague


def test_names_say_what_they_count() -> None:
    vague = []
    for source in package():
        for node in ast.walk(source.tree):
            name = node.arg if isinstance(node, ast.arg) else node.id if isinstance(node, ast.Name) else ""
            if name in NAMES_BANNED:
                vague.append(f"{source.at(node)}: {name}")
    assert not vague, "\n".join(vague)


def test_comments_tell_neither_history_nor_plans() -> None:
    faults = [
        f"{source.path.relative_to(ROOT)}:{line}: {text.strip()[:80]}"
        for source in sources("src/hvreplica", "tests/support", "scripts", "bench", "native")
        for line, text in source.comments()
        if OPEN_ENDS.search(text) or HISTORY.search(text)
    ]
    assert not faults, "\n".join(faults)


def test_texts_name_no_private_path() -> None:
    faults = []
    for folder in TEXT_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts:
                text = path.read_text(encoding="utf-8", errors="replace")
                if path.name != "test_sizes.py" and PRIVATE_PATHS.search(text):
                    faults.append(str(path))
    assert not faults


def test_every_module_is_used() -> None:
    names: set[str] = set()
    for source in sources("src/hvreplica", "tests", "bench", "scripts", "native"):
        for _, name in imported(source.tree):
            names.update((name, name.rpartition(".")[0]))
    entry_points = {"__main__.py"}
    dead = []
    for source in package():
        module = "hvreplica." + source.name.removesuffix(".py").replace("/", ".")
        if source.path.name != "__init__.py" and source.name not in entry_points and module not in names:
            dead.append(source.name)
    assert not dead


def test_every_package_has_its_init() -> None:
    folders = {source.path.parent for source in package()}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]
