"""steermoe presets."""

from __future__ import annotations

import click
from rich.table import Table

from ...steering.presets import PAPER_MODELS, PRESETS
from ..options.common import json_option
from ..output import print_json
from ..streams import console


@click.command()
@json_option
def presets(as_json: bool) -> None:
    """Show the paper's models and how many experts --preset takes for them.

    \b
    Example:
      steermoe presets
    """
    if as_json:
        print_json([model.to_dict() for model in PAPER_MODELS])
        return
    table = Table(box=None, pad_edge=False)
    for title in ("model", "architecture"):
        table.add_column(title, no_wrap=True)
    for title in ("layers", "experts", "top-k", *PRESETS):
        table.add_column(title, justify="right")
    for model in PAPER_MODELS:
        numbers = (model.n_layer, model.n_expert, model.n_expert_used)
        steered = ("+{} -{}".format(*getattr(model, name)) for name in PRESETS)
        table.add_row(model.name, model.architecture, *map(str, numbers), *steered)
    console().print(table)
