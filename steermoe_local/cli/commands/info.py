"""steermoe info."""

from __future__ import annotations

from pathlib import Path

import click

from ..._util.visible import visible
from ...maps.expert_map import format_layers
from ...model_files.gating import UNKNOWN
from ...model_files.model_info import ModelInfo, model_info
from ..options.common import json_option
from ..options.positionals import looked_at_argument
from ..output import facts_table, print_json
from ..streams import console


@click.command()
@looked_at_argument
@json_option
def info(model: Path, as_json: bool) -> None:
    """Show what a model is and whether it can be steered. Reads the header and the routers only.

    \b
    Example:
      steermoe info tiny
    """
    facts = model_info(model)
    if as_json:
        print_json(facts.to_dict())
        return
    console().print(facts_table(_rows(facts)))


def _rows(facts: ModelInfo) -> list[tuple[str, str]]:
    parts = f" in {len(facts.paths)} parts" if len(facts.paths) > 1 else ""
    size = f"{facts.size_bytes / 1e6:,.1f} MB{parts}, {facts.n_params / 1e6:,.1f} M parameters"
    rows = [
        ("model", facts.name or facts.paths[0].name),
        ("architecture", facts.architecture),
        ("file type", f"{facts.file_type}, {size}"),
        ("context", f"{facts.context_length:,} tokens trained"),
        ("chat template", _template(facts)),
    ]
    if not facts.is_moe:
        return [*rows, ("steerable", f"no: {facts.obstacle}")]
    shared = f", {facts.n_shared_experts} shared" if facts.n_shared_experts else ""
    groups = f", in {facts.n_expert_groups} groups" if facts.n_expert_groups > 1 else ""
    rows += [
        ("experts", f"top-{facts.n_expert_used} of {facts.n_expert} a layer{shared}{groups}"),
        ("layers", f"{facts.n_layer}, with experts: {_ranges(facts.moe_layers)}"),
        ("gating", facts.gating + (" with a selection bias" if facts.has_selection_bias else "")),
        ("router", f"{facts.identity.router_sha256 if facts.identity else '-'} ({', '.join(facts.router_types)})"),
    ]
    if facts.fixed_layers:
        rows.append(("fixed layers", f"{_ranges(facts.fixed_layers)}: chosen by token, steering cannot reach them"))
    if facts.obstacle:
        answer = f"no: {facts.obstacle}"
    elif not facts.steerable_layers:
        answer = "no: all experts are chosen by token"
    else:
        answer = f"yes, layers {_ranges(facts.steerable_layers)}"
        if facts.gating == UNKNOWN:
            answer += ", if its graph routes as the file looks; loading it tells"
    return [*rows, ("steerable", answer)]


def _template(facts: ModelInfo) -> str:
    if not facts.chat_template:
        return "no"
    from ...llama.template_client import template_problem

    problem = template_problem(facts.chat_template)
    return f"yes, but: {visible(problem)}" if problem else "yes"


def _ranges(layers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) as "0-2, 5"."""
    return format_layers(layers).replace(",", ", ")
