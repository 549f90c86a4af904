"""`completion`: print the script that lets a shell complete hvreplica's verbs and options."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hvreplica.cli.options import verb

if TYPE_CHECKING:
    from hvreplica.cli.render import Output

_COMPLETE_VARIABLE = "_HVREPLICA_COMPLETE"
_HELP = """Print the completion script for a shell; put it where that shell looks:

\b
hvreplica completion bash > ~/.local/share/bash-completion/completions/hvreplica
hvreplica completion zsh > ~/.zfunc/_hvreplica
hvreplica completion fish > ~/.config/fish/completions/hvreplica.fish
"""


@click.command(short_help="Print the completion script for a shell.", help=_HELP)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@verb
def completion(output: Output, shell: str) -> None:
    """Print what the named shell reads."""
    from click.shell_completion import get_completion_class  # noqa: PLC0415

    complete = get_completion_class(shell)
    assert complete is not None, shell
    root = click.get_current_context().find_root()
    script = complete(root.command, {}, "hvreplica", _COMPLETE_VARIABLE).source().rstrip()
    output.answer({"shell": shell, "script": script}, lambda: output.line(script))
