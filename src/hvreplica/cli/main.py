"""The command `hvreplica`: the groups of verbs, and the one place where an exception becomes an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

import click

import hvreplica
from hvreplica.cli import exit as exits
from hvreplica.cli.capture import capture
from hvreplica.cli.completion import completion
from hvreplica.cli.cut import cut
from hvreplica.cli.demo import demo
from hvreplica.cli.disk import disk
from hvreplica.cli.disk_change import compact, resize
from hvreplica.cli.disk_check import check, repair
from hvreplica.cli.disk_merge import merge, rebase
from hvreplica.cli.extend import extend
from hvreplica.cli.failover import failover
from hvreplica.cli.log import log
from hvreplica.cli.point import point
from hvreplica.cli.point_keep import at, delete, plan, policy
from hvreplica.cli.point_open import diff, serve_point
from hvreplica.cli.render import Output, nobody_reads, silence_output, write_error
from hvreplica.cli.replicate import replicate
from hvreplica.cli.serve import serve
from hvreplica.cli.status import pause, resume, status
from hvreplica.cli.store import store
from hvreplica.cli.tls import tls

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

PROGRAM = "hvreplica"
ENVIRONMENT_PREFIX = "HVREPLICA"
_HELP_SHOWN = getattr(click.exceptions, "NoArgsIsHelpError", ())  # since click 8.2
_TERMINATING = (signal.SIGTERM, signal.SIGHUP)


class Program(click.Group):
    """A click group whose every outcome is an exit code and, at worst, a few clear lines."""

    def main(  # type: ignore[override]  # always exits, so it has no overload that returns
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,  # noqa: ARG002 - it is hvreplica, however it was started
        complete_var: str | None = None,
        **extra: Any,
    ) -> NoReturn:
        """Run and leave with the exit code. Raises: SystemExit, always."""
        arguments = list(sys.argv[1:] if args is None else args)
        self._main_shell_completion(extra, PROGRAM, complete_var)
        output = Output(json="--json" in arguments)
        # numpy starts a thread for each processor that only linear algebra would use; there is none here.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        with _signals_raised():
            code = self._run(arguments, output, extra)
        sys.exit(code)

    def _run(self, arguments: list[str], output: Output, extra: dict[str, Any]) -> int:
        """Run one verb and return its exit code; whatever went wrong is told once."""
        try:
            code = self._call(arguments, output, extra)
            output.flush()
        except exits.OutputClosed:
            silence_output()
            return exits.OUTPUT_CLOSED
        except exits.Signalled as signalled:
            return 128 + signalled.number
        except (KeyboardInterrupt, click.Abort):
            output.note("stopped")
            return exits.INTERRUPTED
        except click.ClickException as error:
            return _tell_usage(error, output)
        except BrokenPipeError as error:
            if not nobody_reads():
                return _tell(error, output)
            silence_output()
            return exits.OUTPUT_CLOSED
        except Exception as error:
            return _tell(error, output)
        return code

    def _call(self, arguments: list[str], output: Output, extra: dict[str, Any]) -> int:
        try:
            with self.make_context(PROGRAM, arguments, obj=output, **extra) as ctx:
                self.invoke(ctx)
        except click.exceptions.Exit as done:
            return done.exit_code
        return 0

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click calls it so
        """Return the verbs in the order in which one needs them."""
        return list(self.commands)


def _tell(error: Exception, output: Output) -> int:
    try:
        output.flush()
    except (OSError, exits.OutputClosed):
        silence_output()
    failure = exits.describe(error)
    trace = None
    if os.environ.get("HVREPLICA_DEBUG"):
        import traceback  # noqa: PLC0415

        trace = "".join(traceback.format_exception(error))
    output.failure(failure, trace=trace)
    return failure.exit_code


def _tell_usage(error: click.ClickException, output: Output) -> int:
    hint = None
    context = getattr(error, "ctx", None)
    if isinstance(error, _HELP_SHOWN) and not output.json:
        write_error(error.format_message() + "\n")
        return exits.USAGE
    code = exits.USAGE
    if context is not None:
        code = getattr(context.command, "usage_exit_code", exits.USAGE)
        hint = f"see `{context.command_path} --help`"
    message = " ".join(error.format_message().split())  # click lists choices on lines of their own
    output.failure(exits.Failure("UsageError", message, code, hint=hint))
    return code


@contextlib.contextmanager
def _signals_raised() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception in the main thread: a verb tidies up before it ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for number in _TERMINATING:
        if signal.getsignal(number) == signal.SIG_DFL:  # a parent that ignores SIGHUP (nohup) stays obeyed
            before[number] = signal.signal(number, _raise_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_signal(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 - the system calls it so
    raise exits.Signalled(number)


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:  # noqa: ARG001
    if not value or ctx.resilient_parsing:
        return
    ctx.obj.line(f"{PROGRAM} {hvreplica.__version__}")
    ctx.exit()


@click.group(
    PROGRAM,
    cls=Program,
    context_settings={
        "auto_envvar_prefix": ENVIRONMENT_PREFIX,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
    epilog="Every option can come from the environment: --state of `replicate` is HVREPLICA_REPLICATE_STATE.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version.",
)
def cli() -> None:
    """Keep a second, bootable copy of a virtual machine's disks at another site.

    Start with `hvreplica demo`: it replicates a real disk on this machine and proves both sides equal.
    """


for _verb in (check, repair, resize, compact, merge, rebase):
    disk.add_command(_verb)
for _verb in (serve_point, diff):
    point.add_command(_verb)
for _verb in (at, plan, delete):
    point.add_command(_verb)
store.add_command(policy)
for _command in (
    demo,
    tls,
    serve,
    capture,
    replicate,
    cut,
    status,
    pause,
    resume,
    store,
    point,
    failover,
    extend,
    disk,
    log,
    completion,
):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    cli.main()
