"""steermoe chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..options.common import context_option, maps_option, reasoning_option, system_option, template_options
from ..options.groups import PROMPT, in_help
from ..options.llama import llama_options
from ..options.positionals import model_argument
from ..options.sampling import sampling_options
from ..options.steering import SteeringFlags, steering_options


@click.command()
@in_help({"prompt": PROMPT}, rare=("history", "show_speed"))
@model_argument
@steering_options
@maps_option("maps", "Folder of maps and bias files that /steer finds by name. Can be given again.")
@click.option("-p", "--prompt", metavar="TEXT", help="First message.")
@system_option("System message.")
@sampling_options
@context_option("Context in tokens, 0: the model's.  [default: at most 4096]")
@template_options
@reasoning_option("What the model thinks before it answers: dim, or not at all; auto shows it on a terminal.")
@click.option("--show-speed", is_flag=True, help="Tokens per second after every answer, as /speed on.")
@click.option(
    "--history/--no-history", default=True, help="Keep what is typed, for the arrow keys.  [default: history]"
)
@llama_options
def chat(
    model: Path,
    steering_flags: SteeringFlags,
    prompt: str | None,
    system_prompt: str | None,
    reasoning: str,
    show_speed: bool,
    history: bool,
    **options: Any,
) -> None:
    """Chat with a model, steered or not, and change the steering as you go.

    /help lists what can be changed in the chat: the map, the numbers of experts, the side, the strength, or the rules
    of a plan; /compare answers unsteered and steered side by side, /experts and /why tell what the last answer's
    routing was. A change holds from the next message on, and what it changes about the chat so far is recomputed.
    Ctrl-C stops an answer, Ctrl-D leaves.

    Without a terminal every line of stdin is a message, or a command, and stdout gets the answers alone.

    \b
    Examples:
      steermoe chat tiny --map digits-words
      steermoe chat olmoe.gguf --map map.json --activate 10 --deactivate 50 -c 8192
      steermoe chat olmoe.gguf --bias bias.gguf -sys "Be brief." --temp 0.3
      printf 'Hello.\\nWho are you?\\n' | steermoe chat olmoe.gguf
    """
    from ...model_files.model_info import model_info
    from ..chat.loop import TerminalKind, run_chat
    from ..chat.maps import MapFinder
    from ..chat.session import ChatFlags

    # A map that does not fit is refused before the model is loaded; only then are the routers hashed here.
    facts = model_info(model, routers=steering_flags.wanted)
    flags = ChatFlags(**options, force=steering_flags.force)
    steering = None
    if steering_flags.wanted:
        identity = facts.require_moe()
        finder = MapFinder(flags.maps, identity, model, flags.force)
        steering = steering_flags.open(identity, model, finder.find)
    run_chat(
        flags,
        model,
        TerminalKind.here(),
        system=system_prompt,
        steering=steering,
        prompt=prompt,
        show_reasoning=None if reasoning == "auto" else reasoning == "show",
        show_speed=show_speed,
        keep_history=history,
    )
