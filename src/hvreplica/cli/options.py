"""What the verbs' options share: --json and --quiet, sizes, addresses, and how a verb gets its Output."""

from __future__ import annotations

import functools
import math
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from hvreplica.units import KIB, MIB, parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from hvreplica.cli.render import Output
    from hvreplica.disk import Format

    IntParameter = click.ParamType[int]
    FloatParameter = click.ParamType[float]
    TextParameter = click.ParamType[str]
else:
    IntParameter = FloatParameter = TextParameter = (
        click.ParamType
    )  # older releases of click have no type arguments

P = ParamSpec("P")
R = TypeVar("R")
_PORT_MAX = 65535


class SizeType(IntParameter):
    """A size such as 512, 64K, 2M, 10G or 1.5T, in powers of 1024; the value is in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class DurationType(FloatParameter):
    """A duration such as 90s, 15m, 12h, 7d or 2w; the value is in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class AddressType(TextParameter):
    """HOST:PORT; an IPv6 address stands in brackets. The value stays text."""

    name = "host:port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        host, colon, port = text.rpartition(":")
        if not (
            colon
            and host
            and port.isascii()
            and port.isdecimal()
            and len(port) <= 5
            and int(port) <= _PORT_MAX
        ):
            self.fail(f"{text!r} is not HOST:PORT; write for example 127.0.0.1:8084", param, ctx)
        if ":" in host and not (host.startswith("[") and host.endswith("]")):
            self.fail(f"{text!r}: an IPv6 address stands in brackets, as in [::1]:8084", param, ctx)
        return text


class SecondsType(click.FloatRange):
    """Seconds above 0, a finite number of them."""

    def __init__(self, maximum: float | None = None) -> None:
        super().__init__(0, maximum, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        return seconds


class LogType(click.Path):
    """An .hrl, by its file or by its id."""

    name = "log"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return uuid.UUID(value)
        except (ValueError, AttributeError, TypeError):
            return Path(os.fsdecode(super().convert(value, param, ctx)))


class VerbOption(click.Option):
    """An option whose environment variable is named as the option is, not as the function's parameter."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Return the value of the named variable, else of HVREPLICA_<VERB>_<OPTION>; empty counts as none."""
        named = click.Parameter.resolve_envvar_value(self, ctx)
        if named is not None or ctx.auto_envvar_prefix is None:
            return named
        return os.environ.get(variable_name(self, ctx.auto_envvar_prefix)) or None


def variable_name(option: click.Option, prefix: str) -> str:
    """Return the environment variable of an option of the verb whose variables start with `prefix`."""
    spelling = max(option.opts, key=len).lstrip("-")
    return f"{prefix}_{spelling}".upper().replace("-", "_")


option = functools.partial(click.option, cls=VerbOption)

SIZE = SizeType()
DURATION = DurationType()
ADDRESS = AddressType()
LOG = LogType()


class _NamedPath(click.Path):
    """A path that has a name: an empty one would be the folder where the program was started."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


PATH = _NamedPath(path_type=Path)
POINT_HELP = (
    "latest, latest-app (application-consistent), the id of a point, or an instant between two cycles, such"
    " as 2026-11-23T10:15:30Z, see `point at`."
)
DISK_FORMAT = click.Choice(["vhdx", "vhd", "raw"])
DISK_TYPE = click.Choice(["dynamic", "fixed"])
_RAW_ENDINGS = (".raw", ".img")
_VHD_ENDINGS = (".vhd", ".avhd")


def format_for(path: Path, chosen: Format | None) -> Format:
    """Return the format of a new disk: as chosen, else by its name, as `disk create --help` says it."""
    ending = path.suffix.lower()
    if ending in _VHD_ENDINGS:
        return chosen or "vhd"
    return chosen or ("raw" if ending in _RAW_ENDINGS else "vhdx")


def verb(function: Callable[..., R]) -> Callable[..., R]:
    """Add --json and --quiet to a verb and call it with the run's Output as its first argument.

    Both act as soon as they are read, so that an error in a later option is already told in the right form.
    """

    @option(
        "--json",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_switch("json"),
        envvar="HVREPLICA_JSON",
        help="Write the answer, and an error, as JSON.",
    )
    @option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_switch("quiet"),
        envvar="HVREPLICA_QUIET",
        help="Show no progress and no notes.",
    )
    @click.pass_obj
    @functools.wraps(function)
    def with_output(output: Output, /, *args: Any, **kwargs: Any) -> R:
        return function(output, *args, **kwargs)

    return with_output


def store_option(function: Callable[P, R]) -> Callable[P, R]:
    """Add --store."""
    return option(
        "--store",
        type=PATH,
        required=True,
        envvar="HVREPLICA_STORE",
        metavar="DIR",
        help="The replica's folder.",
    )(function)


def tls_option(function: Callable[P, R]) -> Callable[P, R]:
    """Add --tls."""
    return option(
        "--tls",
        type=PATH,
        required=True,
        envvar="HVREPLICA_TLS",
        metavar="DIR",
        help="The folder with the certificates, as `tls init` makes it.",
    )(function)


def vm_option(function: Callable[P, R]) -> Callable[P, R]:
    """Add --vm."""
    return option("--vm", required=True, envvar="HVREPLICA_VM", metavar="NAME", help="The VM's name.")(
        function
    )


def state_option(function: Callable[P, R]) -> Callable[P, R]:
    """Add --state for a folder that is there."""
    return option(
        "--state",
        type=PATH,
        required=True,
        envvar="HVREPLICA_STATE",
        metavar="DIR",
        help="The VM's state folder, as `capture` or `replicate` made it.",
    )(function)


def cycle_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add what every verb has that runs cycles: --interval, --continuous and --metrics."""
    for decorate in (
        option(
            "--metrics",
            type=ADDRESS,
            metavar="HOST:PORT",
            help="Serve measurements for Prometheus there, at /metrics.",
        ),
        option("--continuous", is_flag=True, help="Run cycles back to back."),
        option(
            "--interval",
            "interval_s",
            type=SecondsType(),
            metavar="SECONDS",
            help="Time between the beginnings of two cycles, usually 30, 300 or 900.  [default: 300]",
        ),
    ):
        function = decorate(function)
    return function


def link_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add how data travels: --compression and --connections."""
    for decorate in (
        option(
            "--connections",
            type=click.IntRange(1, 16),
            default=2,
            show_default=True,
            help="Parallel connections for data.",
        ),
        option(
            "--compression",
            type=click.Choice(["auto", "zstd", "lz4", "none"]),
            default="auto",
            show_default=True,
            help="auto picks per frame what link and processor can do.",
        ),
    ):
        function = decorate(function)
    return function


def overwrite_option(function: Callable[P, R]) -> Callable[P, R]:
    """Add --overwrite, and name it where the file is there and it was not given."""

    @option("--overwrite", is_flag=True, help="Replace a file that is already there.")
    @functools.wraps(function)
    def with_hint(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except FileExistsError as error:
            vars(error)["hint"] = "choose another name, or replace the file with --overwrite"
            raise

    return with_hint


def block_size_option(function: Callable[P, R]) -> Callable[P, R]:
    """Add --block-size."""
    return option(
        "--block-size",
        "block_bytes",
        type=SIZE,
        callback=_checked_block_size,
        help="Block of a VHDX: a power of 2 from 1M to 256M. Of a VHD: 512K or 2M.",
    )(function)


def sector_size_option(function: Callable[P, R]) -> Callable[P, R]:
    """Add --sector-size."""
    return option(
        "--sector-size",
        "sector_bytes",
        type=click.Choice(["512", "4096"]),
        callback=lambda _context, _parameter, value: None if value is None else int(value),
        help="Logical sector of a VHDX, in which its guest counts.",
    )(function)


def parent_option(function: Callable[P, R]) -> Callable[P, R]:
    """Add --parent for a disk that is there."""
    return option(
        "--parent",
        type=PATH,
        metavar="FILE",
        help="The parent of a differencing disk, where the names in it do not lead there.",
    )(function)


def _checked_block_size(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    if value is not None and (value & (value - 1) or not 512 * KIB <= value <= 256 * MIB):
        message = "a block of a VHDX is a power of 2 from 1M to 256M, and one of a VHD 512K or 2M"
        raise click.BadParameter(message, ctx, param)
    return value


def _switch(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def switch(ctx: click.Context, param: click.Parameter, value: bool) -> None:  # noqa: ARG001
        if value and ctx.obj is not None:  # shell completion parses without an Output
            setattr(ctx.obj, name, True)

    return switch


def disk_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add which disks a VM has: --disk and --remove-disk."""
    for decorate in (
        option(
            "--remove-disk",
            "remove_disks",
            multiple=True,
            metavar="FILE|INDEX",
            help="A disk that the VM does not have any more; its last content stays at the replica.",
        ),
        option(
            "--disk",
            "disks",
            type=PATH,
            multiple=True,
            metavar="FILE",
            help="A disk of the VM; repeat it for each one. Needed the first time, and when one is added.",
        ),
    ):
        function = decorate(function)
    return function
