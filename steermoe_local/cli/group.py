"""The group `steermoe` and its commands."""

from __future__ import annotations

import click

from .. import __version__
from .commands.attribute import attribute
from .commands.audit import audit
from .commands.behaviours import behaviours
from .commands.bias import bias
from .commands.chat import chat
from .commands.completion import completion
from .commands.condition import condition
from .commands.config import config
from .commands.demo import demo
from .commands.detect import detect
from .commands.eval import eval_
from .commands.experiment import experiment
from .commands.fit import fit
from .commands.info import info
from .commands.learn import learn
from .commands.map import map_
from .commands.map_export import card, export, import_
from .commands.map_merge import merge
from .commands.map_recommend import recommend
from .commands.models import models
from .commands.pairs import pairs
from .commands.presets import presets
from .commands.pull import pull
from .commands.run import run
from .commands.serve import serve
from .commands.sweep import sweep
from .commands.tasks import tasks
from .commands.trace import trace
from .commands.transfer import transfer
from .commands.tune import tune
from .help_pages import add_help_all
from .program import SteerMoEGroup, debug_option, take_debug


@click.group(
    "steermoe",
    cls=SteerMoEGroup,
    invoke_without_command=True,
    params=[debug_option()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="steermoe")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Steer Mixture-of-Experts GGUF models: find the experts of a behaviour, promote or suppress them.

    \b
    To try: steermoe chat tiny --map digits-words
    Step by step, each a file:
      steermoe detect -m MODEL --pairs PAIRS.jsonl -o MAP.json
      steermoe bias build MAP.json -o BIAS.gguf --activate 10 --deactivate 50
      steermoe run MODEL "..." --bias BIAS.gguf

    \b
    Exit status: 0 done, 1 an input cannot be used, 2 wrong usage, 130 interrupted.
    """
    if ctx.invoked_subcommand is None:
        from .start_page import print_start_page

        print_start_page(main)


for command in (
    pull,
    models,
    info,
    behaviours,
    pairs,
    tasks,
    learn,
    detect,
    trace,
    attribute,
    fit,
    condition,
    map_,
    presets,
    bias,
    run,
    chat,
    serve,
    eval_,
    experiment,
    sweep,
    tune,
    transfer,
    audit,
    demo,
    config,
    completion,
):
    main.add_command(command)
for command in (merge, import_, export, card, recommend):
    map_.add_command(command)
take_debug(main)
add_help_all(main)
