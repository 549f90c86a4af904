"""The pages of docs/cli, made from the verbs themselves so that they cannot say anything else.

Only what this package declares is used, not click's own wording, so the pages are the same with every release
of it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import click

from hvreplica.cli.main import ENVIRONMENT_PREFIX, PROGRAM, cli
from hvreplica.cli.options import SizeType, variable_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_MADE = "<!-- Made by scripts/make_docs.py from src/hvreplica/cli: edit that. -->"
_COMMON = ("json", "quiet")
_INDEX = """## Common to all verbs

- `--json` writes the answer as JSON on stdout, on one line where stdout is not a terminal. An error is then
  one line of JSON on stderr: `{"error": {"class", "message", "exit_code", "path", "offset", "field",
  "expected", "actual", "spec", "hint"}}`; what does not apply is null.
- `--quiet` shows no progress and no notes. Progress goes to stderr: a bar on a terminal, a line every few
  seconds elsewhere, nothing where a program reads JSON.
- `--help` explains a verb; `hvreplica --version` names the release.
- Every option can come from the environment, by the names in the tables; the command line goes first.
- Sizes are powers of 1024: `512`, `64K`, `2M`, `10G`, `1.5T`.
- The exit code says what happened: 0 done, 1 the disks differ, 2 wrong usage, others by the
  [kind of error](../errors.md).
- `HVREPLICA_DEBUG=1` adds the Python traceback to an error.
"""


def pages() -> dict[str, str]:
    """Return each page's text by its file name."""
    commands = cli.commands
    made = {"index.md": _index(commands)}
    for name, command in commands.items():
        made[f"{name}.md"] = "\n".join(_page(command, (PROGRAM, name))).rstrip() + "\n"
    return made


def _index(commands: Mapping[str, click.Command]) -> str:
    lines = [
        "# The command line",
        "",
        _MADE,
        "",
        *_paragraphs(cli.help or ""),
        "| command | what it does |",
        "|---|---|",
    ]
    for name, command in commands.items():
        lines.append(f"| [`{PROGRAM} {name}`]({name}.md) | {_cell(command.get_short_help_str(limit=200))} |")
        if isinstance(command, click.Group):
            lines += [
                f"| [`{PROGRAM} {name} {verb}`]({name}.md#{PROGRAM}-{name}-{verb}) "
                f"| {_cell(inner.get_short_help_str(limit=200))} |"
                for verb, inner in command.commands.items()
            ]
    return "\n".join([*lines, "", _INDEX])


def _page(command: click.Command, path: tuple[str, ...]) -> Iterator[str]:
    yield from (f"# {' '.join(path)}", "", _MADE, "")
    if not isinstance(command, click.Group):
        yield from _verb(command, path)
        return
    yield from _paragraphs(command.help or "")
    for name, inner in command.commands.items():
        yield from (f"## {' '.join((*path, name))}", "")
        yield from _verb(inner, (*path, name))


def _verb(command: click.Command, path: tuple[str, ...]) -> Iterator[str]:
    arguments = [argument_name(param) for param in command.params if isinstance(param, click.Argument)]
    yield from ("```", " ".join([*path, "[OPTIONS]", *arguments]), "```", "")
    yield from _paragraphs(command.help or "")
    options = [
        param for param in command.params if isinstance(param, click.Option) and param.name not in _COMMON
    ]
    if options:
        yield from ("| option | meaning | environment |", "|---|---|---|")
        for option in options:
            yield f"| {_spelling(option)} | {_meaning(option)} | {_variables(option, path)} |"
        yield ""


def argument_name(argument: click.Parameter) -> str:
    """Return how an argument is written in a usage line."""
    if argument.metavar:
        return argument.metavar
    if isinstance(argument.type, click.Choice):
        return "|".join(argument.type.choices)
    return str(argument.name).upper()


def _spelling(option: click.Option) -> str:
    name = ", ".join(option.opts)
    return f"`{name}`" if option.is_flag else f"`{name} {_cell(_value_name(option))}`"


def _value_name(option: click.Option) -> str:
    if option.metavar:
        return option.metavar
    if isinstance(option.type, click.Choice):
        return "|".join(option.type.choices)
    if isinstance(option.type, SizeType):
        return "SIZE"
    return "N" if isinstance(option.type, click.IntRange) else "TEXT"


def _meaning(option: click.Option) -> str:
    parts = [_cell((option.help or "").split("  [default")[0])]
    if option.required:
        parts.append("**Required.**")
    elif "[default: " in (option.help or ""):
        parts.append(f"Default: {(option.help or '').partition('[default: ')[2].rstrip(']')}.")
    elif option.show_default:
        parts.append(f"Default: `{option.default}`.")
    return " ".join(parts)


def _variables(option: click.Option, path: tuple[str, ...]) -> str:
    automatic = variable_name(option, "_".join([ENVIRONMENT_PREFIX, *path[1:]]))
    named = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
    return ", ".join(f"`{name}`" for name in [*named, automatic])


def _paragraphs(text: str) -> Iterator[str]:
    """Yield a help text as Markdown lines; what click was told to leave alone becomes a block of code."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b\n"):
            yield from ("```", *paragraph[2:].splitlines(), "```", "")
        else:
            yield from (*paragraph.splitlines(), "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
