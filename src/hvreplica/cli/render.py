"""The only place that prints: answers on stdout, everything else on stderr.

An answer is a value (a msgspec structure, a list or a dict). With --json it is written as it is, field by
field, on one line (indented on a terminal); without, as a short table. Names come from outside, so control
characters in them are shown as escapes and never reach the terminal.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import TYPE_CHECKING, Any, TextIO

from hvreplica.cli.exit import Failure, OutputClosed
from hvreplica.clock import iso_time
from hvreplica.units import MIB, format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.console import Console, RenderableType

_WIDTHS = {"disk_offset": 18, "log_offset": 18, "time_s": 20}
_PIPE_WIDTH = 1 << 16  # no line is broken where a program may read it
_RED, _GREEN, _YELLOW, _CYAN = "\x1b[1;31m", "\x1b[1;32m", "\x1b[33m", "\x1b[36m"
_DIM, _RESET = "\x1b[2m", "\x1b[0m"


class Output:
    """One run's answers and messages. One owner, the main thread."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet

    def answer(self, value: object, human: Callable[[], None]) -> None:
        """Write `value` as JSON, or call `human` to show it to a person."""
        if self.json:
            self.write_json(value)
        else:
            human()

    def write_json(self, value: object) -> None:
        """Write one JSON document and a newline to stdout."""
        _write_out(encode_json(value, indent=is_terminal(sys.stdout)) + "\n")

    def write_json_line(self, value: object) -> None:
        """Write one JSON document on one line to stdout, for a reader that waits for the line."""
        _write_out(encode_json(value) + "\n")

    def stream_json(self, values: Iterable[object]) -> None:
        """Write a JSON array to stdout, one element a line, while `values` come."""
        separator = "["
        for value in values:
            _write_out(f"{separator}\n{encode_json(value)}")
            separator = ","
        _write_out("[]\n" if separator == "[" else "\n]\n")

    def line(self, text: str = "") -> None:
        """Write one line to stdout; the text is ours, names in it went through plain()."""
        _write_out(text + "\n")

    def flush(self) -> None:
        """Hand to the reader what stdout still holds."""
        with _closing_output():
            sys.stdout.flush()

    def fields(self, rows: Iterable[tuple[str, object]]) -> None:
        """Write label and value pairs to stdout; a value of None is left out."""
        shown = [(label, plain(value)) for label, value in rows if value is not None]
        width = max((len(label) for label, _ in shown), default=0)
        for label, value in shown:
            self.line(f"{_colored(label.ljust(width), _CYAN)}   {value}")

    def structure(self, value: Any) -> None:
        """Write a structure's fields to stdout, labelled by name; lists of structures follow as tables."""
        self.fields(_labelled(value))
        for name, items in _lists_of_structures(value):
            self.line()
            self.line(name.replace("_", " "))
            self.structures(items)

    def structures(self, values: Sequence[Any], *, empty: str = "none") -> None:
        """Write structures of one type as a table with a column for each field."""
        if not values:
            self.line(empty)
            return
        names = values[0].__struct_fields__
        rows = [[_shown(name, getattr(value, name)) for name in names] for value in values]
        self.table([_column(name, getattr(values[0], name)) for name in names], rows)

    def stream_structures(self, values: Iterable[Any]) -> None:
        """Write structures of one type to stdout as columns, while they come."""
        widths: list[int] = []
        for value in values:
            names = value.__struct_fields__
            if not widths:
                widths = [max(len(_label(name)), _WIDTHS.get(name, 12)) for name in names]
                self.line(
                    "  ".join(_label(name).rjust(width) for name, width in zip(names, widths, strict=True))
                )
            cells = (plain(_shown(name, getattr(value, name))) for name in names)
            self.line("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))

    @contextlib.contextmanager
    def steps(self) -> Iterator[Steps]:
        """Yield what tells a person of one step after the other; a spinner turns meanwhile on a terminal."""
        shown = Steps(self, spins=is_terminal(sys.stderr) and not self.quiet)
        try:
            yield shown
        finally:
            shown.end()

    def headline(self, text: str, *, good: bool) -> None:
        """Write the one line that a person looks for to stdout."""
        self.line(_colored(text, _GREEN if good else _RED))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Write a table to stdout. A column whose name starts with ">" is right-aligned."""
        self.show(make_table(columns, rows))

    def show(self, renderable: RenderableType) -> None:
        """Write something of rich's to stdout."""
        _write_out(rendered(renderable, sys.stdout))

    def note(self, text: str) -> None:
        """Tell a person something on stderr; nothing with --quiet or --json."""
        if not (self.quiet or self.json):
            write_error(text + "\n")

    def failure(self, failure: Failure, *, trace: str | None = None) -> None:
        """Tell of an error on stderr: an object with --json, else a few lines."""
        if trace is not None:
            write_error(trace)
        if self.json:
            body = {"class": failure.kind} | {
                name: value for name, value in failure._asdict().items() if name != "kind"
            }
            write_error(encode_json({"error": body}) + "\n")
            return
        write_error(failure_text(failure, color=_wants_color(sys.stderr)))


class Steps:
    """The steps of a long story: begin() names what is being done, done() says what came of it. One owner."""

    def __init__(self, output: Output, *, spins: bool) -> None:
        self._output = output
        self._status = console_for(sys.stderr).status("") if spins else None

    def begin(self, words: str) -> None:
        """Name what is being done now."""
        if self._status is not None:
            self._status.update(words)
            self._status.start()

    def done(self, name: str, words: str, seconds: float) -> None:
        """Show a step that is done."""
        self.end()  # the spinner shares the terminal's last line with stdout
        if not (self._output.json or self._output.quiet):
            mark = _colored("\u2713", _GREEN) if _fits("\u2713", sys.stdout) else "ok"
            self._output.line(f"{mark} {name:<8} {plain(words)}  {_colored(f'{seconds:.1f} s', _DIM)}")
            self._output.flush()

    def end(self) -> None:
        """Stop the spinner."""
        if self._status is not None:
            self._status.stop()


def failure_text(failure: Failure, *, color: bool = False) -> str:
    """Return the lines that tell a person of `failure`: what and where, the details, the next step."""
    red, yellow, dim, reset = (_RED, _YELLOW, _DIM, _RESET) if color else ("", "", "", "")
    place = "" if failure.path is None else f"{plain(failure.path)}: "
    lines = [f"{red}error:{reset} {place}{plain(failure.message)}"]
    details = (
        ("field", failure.field),
        ("offset", failure.offset),
        ("expected", failure.expected),
        ("found", failure.actual),
        ("spec", failure.spec),
    )
    lines += [f"  {dim}{label:<8}{reset}  {plain(value)}" for label, value in details if value is not None]
    if failure.hint:
        lines.append(f"{yellow}hint:{reset} {plain(failure.hint)}")
    return "\n".join(lines) + "\n"


def make_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> RenderableType:
    """Return a table without a frame. A column whose name starts with ">" is right-aligned."""
    from rich import box  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0)
    )
    for name in columns:
        right = name.startswith(">")
        table.add_column(
            name.lstrip(">"), justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text("-" if value is None else plain(value)) for value in row))
    return table


def _labelled(value: Any) -> Iterator[tuple[str, object]]:
    for name in value.__struct_fields__:
        field = getattr(value, name)
        if hasattr(field, "__struct_fields__"):
            yield from ((f"{name.replace('_', ' ')}: {label}", inner) for label, inner in _labelled(field))
        elif not isinstance(field, (list, tuple)):
            yield _label(name), _shown(name, field)
        elif not (field and hasattr(field[0], "__struct_fields__")):
            yield _label(name), ", ".join(str(item) for item in field) or None


def _lists_of_structures(value: Any) -> Iterator[tuple[str, Sequence[Any]]]:
    for name in value.__struct_fields__:
        field = getattr(value, name)
        if isinstance(field, (list, tuple)) and field and hasattr(field[0], "__struct_fields__"):
            yield name, field


def _label(name: str) -> str:
    if name in {"virtual_bytes", "file_bytes", "block_bytes"}:
        return f"{name.removesuffix('_bytes')} size"
    return name.removesuffix("_bytes").removesuffix("_s").replace("_", " ")


def _column(name: str, value: object) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and not name.endswith("_s")
    return f">{_label(name)}" if is_number else _label(name)


def _shown(name: str, value: object) -> object:
    """Return a field as a person reads it: sizes with a unit, yes or no, times as ISO 8601."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes") and isinstance(value, int):
        return format_size(value)
    if name.endswith("_s") and isinstance(value, (int, float)):
        return moment(value)
    if name.endswith("checksum") and isinstance(value, int):
        return f"{value:#010x}"
    if name.endswith("seconds") and isinstance(value, (int, float)):
        return f"{value:.1f} s"
    return value


def kind_shown(kind: str, consistency: str) -> str:
    """Return a point's kind, and that it is application-consistent, where it is."""
    return f"{kind}, app" if consistency == "app" else kind


def moment(unix_s: float) -> str:
    """Return a point in time to the second, in UTC."""
    try:
        return f"{iso_time(unix_s)[:19]}Z"
    except (OverflowError, ValueError, OSError):  # a damaged clock's year is no reason to fail
        return str(unix_s)


def ratio(raw_bytes: int, wire_bytes: int) -> str | None:
    """Return how far data shrank on the wire; None below 1 MiB, where greetings and tables weigh more."""
    return f"{raw_bytes / wire_bytes:.1f}:1" if wire_bytes and raw_bytes >= MIB else None


def plain(value: object) -> str:
    """Return `value` as text that cannot steer a terminal: what is not printable becomes an escape."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


def encode_json(value: object, *, indent: bool = False) -> str:
    """Return `value` as JSON; a file name that is not UTF-8 keeps its bytes as lone surrogate escapes."""
    import msgspec  # noqa: PLC0415

    try:
        encoded = msgspec.json.encode(value, enc_hook=_encode_other)
    except UnicodeEncodeError:
        import json  # noqa: PLC0415

        return json.dumps(msgspec.to_builtins(value, enc_hook=_encode_other), indent=2 if indent else None)
    return (msgspec.json.format(encoded, indent=2) if indent else encoded).decode()


def rendered(renderable: RenderableType, stream: TextIO) -> str:
    """Return what rich makes of `renderable` for `stream`: plain and unbroken where it is not a terminal."""
    buffer = _Buffer(getattr(stream, "encoding", None) or "utf-8")
    console_for(stream, buffer).print(renderable, soft_wrap=False)
    lines = buffer.getvalue().split("\n")
    return "\n".join(line.rstrip() for line in lines)


def console_for(stream: TextIO, file: TextIO | None = None) -> Console:
    """Return a rich console as wide as `stream` is; it writes to `file` or to `stream` itself."""
    from rich.console import Console  # noqa: PLC0415

    terminal = is_terminal(stream)
    return Console(
        file=file or stream,
        force_terminal=terminal,
        width=None if terminal else _PIPE_WIDTH,
        no_color=None if _wants_color(stream) else True,
        highlight=False,
        markup=False,
        emoji=False,
    )


def is_terminal(stream: TextIO) -> bool:
    """Return whether a person looks at `stream`."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def nobody_reads() -> bool:
    """Return whether stdout is a pipe whose reader went away, for what click itself wrote to it."""
    try:
        poller = select.poll()
        poller.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0))
    except (OSError, ValueError):
        return False


def silence_output() -> None:
    """Point stdout at nothing, so that the interpreter's last flush of what nobody reads cannot complain."""
    with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)


class _Buffer(io.StringIO):
    """Text in memory that claims the encoding of the stream it is made for, so rich draws what fits."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


def _encode_other(value: object) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):  # a numpy scalar
        return value.item()
    message = f"no JSON form for {type(value).__name__}"
    raise NotImplementedError(message)


def _wants_color(stream: TextIO) -> bool:
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def _closing_output() -> Any:
    try:
        yield
    except BrokenPipeError:
        raise OutputClosed from None


def _write_out(text: str) -> None:
    with _closing_output():
        sys.stdout.write(_encodable(text, sys.stdout))


def write_error(text: str) -> None:
    """Write to stderr; there is nobody left to tell when that fails."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(_encodable(text, sys.stderr))
        sys.stderr.flush()


def _colored(text: str, color: str) -> str:
    return f"{color}{text}{_RESET}" if _wants_color(sys.stdout) else text


def _fits(text: str, stream: TextIO) -> bool:
    return _encodable(text, stream) == text


def _encodable(text: str, stream: TextIO) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text
