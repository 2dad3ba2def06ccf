"""steermoe bias."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..bias_file import DEFAULT_EPSILON, BiasFile, read_bias, write_bias
from ..errors import UsageError
from ..expert_map import ExpertMap, parse_layers
from ._common import console, facts_table, json_option, print_json


@click.group()
def bias() -> None:
    """Build and look at bias files."""


@bias.command()
@click.argument("map_file", metavar="MAP", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Bias file to write, GGUF.")
@click.option(
    "--activate", type=click.IntRange(0), default=0, show_default=True, help="Experts with RD > 0 to promote."
)
@click.option(
    "--deactivate", type=click.IntRange(0), default=0, show_default=True, help="Experts with RD < 0 to suppress."
)
@click.option("--reverse", is_flag=True, help="Steer to the negative side: flip the sign of RD first.")
@click.option("--layers", metavar="A-B", help="Only these layers, like 3-7,9.  [default: all]")
@click.option("--mode", type=click.Choice(["hard", "soft"]), default="hard", show_default=True, help="Steering rule.")
@click.option(
    "--scale", type=float, help="Soft rule: logits added to promoted, taken from suppressed experts.  [default: 1]"
)
@click.option("--epsilon", type=float, help=f"Hard rule: distance to the extreme logit.  [default: {DEFAULT_EPSILON}]")
@json_option
def build(
    map_file: Path,
    output: Path,
    activate: int,
    deactivate: int,
    reverse: bool,
    layers: str | None,
    mode: str,
    scale: float | None,
    epsilon: float | None,
    as_json: bool,
) -> None:
    """Choose experts from MAP in the order of |RD| and write them as a bias file.

    At most top-k experts of a layer are promoted; what is over is dropped.

    \b
    Examples:
      steermoe bias build map.json -o bias.gguf --activate 8 --deactivate 8
      steermoe bias build map.json -o soft.gguf --deactivate 8 --mode soft --scale 2.5
    """
    if activate == 0 and deactivate == 0:
        raise UsageError("nothing to steer; give --activate N, --deactivate N or both")
    if mode == "hard" and scale is not None:
        raise UsageError("--scale belongs to --mode soft; the hard rule has no strength")
    if mode == "soft" and epsilon is not None:
        raise UsageError("--epsilon belongs to --mode hard; the soft rule does not use it")
    expert_map = ExpertMap.load(map_file)
    signs = expert_map.choose(
        activate, deactivate, reverse=reverse, layers=None if layers is None else parse_layers(layers)
    )
    choice: dict[str, Any] = {"activate": activate, "deactivate": deactivate, "reverse": reverse, "layers": layers}
    if mode == "soft":
        choice["scale"] = 1.0 if scale is None else scale
    provenance = {
        "behaviour": expert_map.behaviour,
        "map_sha256": expert_map.sha256,
        "choice": json.dumps(choice),
        "tool": expert_map.tool,
    }
    if mode == "soft":
        made = BiasFile.from_soft(signs, expert_map.identity, choice["scale"], provenance)
    else:
        made = BiasFile.from_signs(signs, expert_map.identity, epsilon or DEFAULT_EPSILON, provenance)
    write_bias(made, output)
    if as_json:
        print_json({"bias": str(output), **_facts(made)})
        return
    _print(made)
    click.echo(f"\nwritten: {output}")


@bias.command()
@click.argument("bias_file", metavar="BIAS", type=click.Path(path_type=Path))
@json_option
def show(bias_file: Path, as_json: bool) -> None:
    """Show which experts a bias file steers.

    \b
    Example:
      steermoe bias show bias.gguf
    """
    loaded = read_bias(bias_file)
    if as_json:
        print_json(_facts(loaded))
        return
    _print(loaded)


def _facts(loaded: BiasFile) -> dict[str, Any]:
    return {
        "model": loaded.identity.to_dict(),
        "mode": loaded.mode,
        "epsilon": loaded.epsilon,
        "n_active": loaded.n_active,
        "n_inactive": loaded.n_inactive,
        "layers": {str(layer): _layer(loaded, layer) for layer in loaded.layers},
        "provenance": dict(loaded.provenance),
    }


def _layer(loaded: BiasFile, layer: int) -> dict[str, Any]:
    active, inactive = loaded.experts(layer)
    values = {"values": loaded.values[layer].tolist()} if loaded.mode == "soft" else {}
    return {"active": active, "inactive": inactive, **values}


def _print(loaded: BiasFile) -> None:
    rows = [
        ("model", loaded.identity.short),
        ("rule", f"{loaded.mode}, epsilon {loaded.epsilon:.6g}" if loaded.mode == "hard" else loaded.mode),
        ("promoted", str(loaded.n_active)),
        ("suppressed", str(loaded.n_inactive)),
    ]
    rows += [(key, text) for key, text in loaded.provenance.items()]
    for layer in loaded.layers:
        plus, minus = loaded.experts(layer)
        rows.append((f"layer {layer}", " ".join([*(f"+{e}" for e in plus), *(f"-{e}" for e in minus)])))
    console().print(facts_table(rows))
