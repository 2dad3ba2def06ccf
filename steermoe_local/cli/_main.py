"""The group `steermoe` and its commands."""

from __future__ import annotations

import click

from .. import __version__
from ._common import SteerMoEGroup
from .bias import bias
from .demo import demo
from .detect import detect
from .info import info
from .map import map_
from .map_exchange import card, export, import_
from .map_merge import merge
from .pairs import pairs
from .presets import presets
from .run import run


@click.group(cls=SteerMoEGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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


for command in (info, pairs, detect, map_, presets, bias, run, demo):
    main.add_command(command)
for command in (merge, import_, export, card):
    map_.add_command(command)
