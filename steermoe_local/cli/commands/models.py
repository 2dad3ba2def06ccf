"""steermoe models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from ..._util.files import human_size
from ...models.names import short_names
from ..options.common import json_option, maps_folders_option
from ..options.model import models_dir_option
from ..output import print_json, print_lines, progress_bar, warn
from ..streams import console

if TYPE_CHECKING:
    from ...models.local_facts import LocalMap, ModelFacts
    from ...models.local_models import LocalModel, LocalModels


@click.command()
@models_dir_option
@maps_folders_option("models")
@click.option("--short-names", is_flag=True, help="List the short names that -m, -hf and `steermoe pull` know instead.")
@json_option
def models(models_dirs: tuple[Path, ...], maps_dirs: tuple[Path, ...], short_names: bool, as_json: bool) -> None:
    """List the models on this machine: their names for -m, what they are, and the expert maps that fit them.

    Looks into the models folders, the caches of the Hugging Face hub and llama.cpp, and the folders of LM Studio and
    Ollama (-m ollama/NAME:TAG), never into the network. A map fits if it was made for the model's routers; hashing them
    takes reading them, once for each file.

    \b
    Examples:
      steermoe models
      steermoe models --models-dir ~/models --maps ~/maps
      steermoe models --short-names
    """
    if short_names:
        _print_short_names(as_json)
        return
    from ...models.local_facts import maps_in
    from ...models.local_models import LocalModels

    local = LocalModels.scan(models_dirs)
    maps = maps_in(maps_dirs, warn)
    rows = _facts(local)
    if as_json:
        print_json([_to_dict(local, model, facts, maps) for model, facts in rows])
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "size", "quant", "experts", "maps that fit"):
        table.add_column(title, overflow="fold", justify="right" if title == "size" else "left")
    for model, facts in rows:
        # not as markup: names of files may have brackets
        table.add_row(*map(Text, _row(local, model, facts, maps)))
    console().print(table)


def _facts(local: LocalModels) -> list[tuple[LocalModel, ModelFacts]]:
    """The models and their facts; a bar while routers are hashed."""
    from ...models.local_facts import FactsCache

    cache = FactsCache()
    found = []
    models = local.models()
    unread = [model for model in models if not cache.is_kept(model)]
    with progress_bar() as show:
        done = 0
        for model in models:
            is_new = model in unread
            found.append((model, cache.facts(model)))
            done += is_new
            if is_new:
                show("reading routers", done, len(unread))
    cache.save()
    return [(model, facts) for model, facts in found if facts.is_model]


def _row(local: LocalModels, model: LocalModel, facts: ModelFacts, maps: list[LocalMap]) -> tuple[str, ...]:
    from ...models.local_facts import fitting

    name, size = local.name_of(model), human_size(model.size)
    if not facts.readable:
        return name, size, model.tag, f"damaged: {facts.problem}", ""
    if facts.problem:
        return name, size, facts.file_type, f"cannot be steered: {facts.problem}", ""
    experts = f"{facts.n_expert}, top-{facts.n_expert_used}, {facts.n_layer} layers"
    if facts.n_moe_layers != facts.n_layer:
        experts += f" ({facts.n_moe_layers} with experts)"
    return name, size, facts.file_type, experts, ", ".join(m.name for m in fitting(facts.identity, maps)) or "-"


def _to_dict(local: LocalModels, model: LocalModel, facts: ModelFacts, maps: list[LocalMap]) -> dict[str, Any]:
    from ...models.local_facts import fitting

    return {
        "name": local.name_of(model),
        "path": str(model.path),
        "source": model.source,
        "repository": model.repo or None,
        "revision": model.revision or None,
        "size_bytes": model.size,
        "quantization": facts.file_type or model.tag,
        "architecture": facts.architecture,
        "n_params": facts.n_params,
        "n_layer": facts.n_layer,
        "n_moe_layers": facts.n_moe_layers,
        "n_expert": facts.n_expert,
        "n_expert_used": facts.n_expert_used,
        "router_sha256": facts.identity.router_sha256 if facts.identity else None,
        "steerable": facts.identity is not None,
        "readable": facts.readable,
        "problem": facts.problem or None,
        "maps": [{"name": item.name, "path": str(item.path)} for item in fitting(facts.identity, maps)],
    }


def _print_short_names(as_json: bool) -> None:
    table = dict(short_names())
    if as_json:
        print_json(table)
        return
    width = max(map(len, table))
    for name, target in table.items():
        print_lines(f"{name:{width}}  {target}")
