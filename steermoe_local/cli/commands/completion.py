"""steermoe completion: scripts that let a shell complete commands, options, models and files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ..options import settings
from ..streams import put

VARIABLE = "_STEERMOE_COMPLETE"  # click's name for the program called steermoe


class _CompletionCommand(settings.WithoutConfig, click.Command):
    pass


@click.command(cls=_CompletionCommand)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that lets SHELL complete steermoe's commands, options, models and files.

    \b
    Examples:
      steermoe completion bash > ~/.local/share/bash-completion/completions/steermoe
      steermoe completion zsh > ~/.zfunc/_steermoe
      steermoe completion fish > ~/.config/fish/completions/steermoe.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    put(kind(ctx.find_root().command, {}, "steermoe", VARIABLE).source(), end="")
