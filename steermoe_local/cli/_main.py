"""The group `steermoe` and its commands."""

from __future__ import annotations

import click

from .. import __version__
from ._program import SteerMoEGroup
from .bias import bias
from .chat import chat
from .completion import completion
from .config import config
from .demo import demo
from .detect import detect
from .eval import eval_
from .experiment import experiment
from .info import info
from .map import map_
from .map_exchange import card, export, import_
from .map_merge import merge
from .models import models
from .pairs import pairs
from .presets import presets
from .pull import pull
from .run import run
from .serve import serve
from .sweep import sweep
from .tasks import tasks
from .transfer import transfer
from .tune import tune


@click.group(
    "steermoe",
    cls=SteerMoEGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="steermoe")
def main() -> None:
    """Steer Mixture-of-Experts GGUF models: find the experts of a behaviour, promote or suppress them.

    \b
    The way, each step a file:
      steermoe detect -m MODEL --pairs PAIRS.jsonl -o MAP.json
      steermoe bias build MAP.json -o BIAS.gguf --activate 10 --deactivate 50
      steermoe run -m MODEL --bias BIAS.gguf -p "..."

    \b
    Exit status: 0 done, 1 an input cannot be used, 2 wrong usage, 130 interrupted.
    """


for command in (
    pull,
    models,
    info,
    pairs,
    tasks,
    detect,
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
    demo,
    config,
    completion,
):
    main.add_command(command)
for command in (merge, import_, export, card):
    map_.add_command(command)
