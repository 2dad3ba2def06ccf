"""steermoe bias."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from ...errors import UsageError
from ...maps.recommended import nothing_to_steer
from ...model_files.model_info import model_info
from ...steering.bias_file import DEFAULT_EPSILON, BiasFile, read_bias, write_bias
from ...steering.presets import PRESETS
from ...steering.rules import RULES, Rule
from ...steering.steering import Steering
from ..options.common import json_option, other_model_option, output_option, strength_option
from ..options.groups import is_given
from ..options.maps import MAP
from ..options.steering import CAP, RANK, SOFT_WEIGHTS, rule_of
from ..options.system_text import UserPath
from ..output import facts_table, print_json, print_lines, say_written, warn
from ..streams import console


@click.group()
def bias() -> None:
    """Build and look at bias files."""


rank_option = click.option(*RANK[0], **RANK[1])
preset_option = click.option(
    "--preset", type=click.Choice(PRESETS), help="Numbers of experts that the paper took for the map's model."
)
_check_option = other_model_option("GGUF file to check against: fail if made for another.")


@bias.command()
@click.argument("map_file", metavar="MAP", type=MAP)
@output_option("Bias file to write, GGUF.")
@click.option("--activate", type=click.IntRange(0), help="Experts with RD > 0 to promote.  [default: 0]")
@click.option("--deactivate", type=click.IntRange(0), help="Experts with RD < 0 to suppress.  [default: 0]")
@rank_option
@preset_option
@click.option("--reverse", is_flag=True, help="Steer to the negative side: flip the sign of RD first.")
@click.option("--layers", metavar="A-B", help="Only these layers, like 3-7,9.  [default: all]")
@click.option("--mode", type=click.Choice(RULES), default="hard", show_default=True, help="Steering rule.")
@strength_option(
    "strength",
    type=float,
    metavar="X",
    help="Soft rule: logits added to promoted, taken from suppressed experts.  [default: 1]",
)
@click.option(*CAP[0], **CAP[1])
@click.option(*SOFT_WEIGHTS[0], **SOFT_WEIGHTS[1])
@click.option(
    "--epsilon", type=float, help=f"Hard and capped rule: distance to the extreme logit.  [default: {DEFAULT_EPSILON}]"
)
@_check_option
@click.option(
    "--force",
    is_flag=True,
    help="With -m: accept a map of another or no router hash if the shape fits, and make the bias for MODEL.",
)
@json_option
def build(
    map_file: Path,
    output: Path,
    activate: int | None,
    deactivate: int | None,
    rank: str,
    preset: str | None,
    reverse: bool,
    layers: str | None,
    mode: str,
    strength: float | None,
    cap: float | None,
    weights: str | None,
    epsilon: float | None,
    model: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Choose experts from MAP, by |RD| or another score, and write them as a bias file.

    At most top-k experts of a layer are promoted; what is over is dropped. `steermoe presets` shows the numbers that
    --preset takes.

    \b
    Examples:
      steermoe bias build map.json -o bias.gguf --activate 8 --deactivate 8
      steermoe bias build map.json -o bias.gguf --preset faithful
      steermoe bias build map.json -o soft.gguf --deactivate 8 --mode soft --strength 2.5
      steermoe bias build map.json -o capped.gguf --activate 8 --rank log-odds --mode capped --cap 2
    """
    check_preset(preset, activate, deactivate, reverse)
    # another command's default in the configuration is left aside
    given = {*filter(is_given, ("mode", "strength", "cap", "weights"))}
    rule = rule_of(mode, strength, cap, weights, given | {"mode"})
    if mode == "soft" and epsilon is not None:
        raise UsageError("--epsilon belongs to --mode hard and capped; the soft rule does not use it")
    if force and not model:
        raise UsageError("--force makes the bias for a model; name it with -m MODEL")
    steering = chosen_by(
        Steering.open(map_file=map_file, epsilon=epsilon or DEFAULT_EPSILON),
        activate,
        deactivate,
        preset,
        reverse,
        layers,
        rank,
        rule if given or not recommends(activate, deactivate, preset) else None,
    )
    identity = None
    if model:
        identity = model_info(model).require_moe()
        warn(*steering.check(identity, str(model), force))
    if preset:
        steering = with_preset(steering, preset)
    made = steering.bias_file(identity)
    assert made is not None  # experts are chosen
    warn(*filter(None, [steering.shortfall]))
    write_bias(made, output)
    if as_json:
        print_json({"bias": str(output), **_facts(made)})
        return
    _print(made)
    say_written(output, before="\n")


def recommends(activate: int | None, deactivate: int | None, preset: str | None) -> bool:
    """Whether the numbers are left to what the map recommends."""
    return activate is None and deactivate is None and preset is None


def chosen_by(
    steering: Steering,
    activate: int | None,
    deactivate: int | None,
    preset: str | None,
    reverse: bool,
    layers: str | None,
    rank: str,
    rule: Rule | None = None,
) -> Steering:
    """The map's steering with the choice of the options, but the preset; without numbers as the map recommends.

    `rule` None: the hard one, or the recommended one. Raises UsageError for a map that recommends no choice.
    """
    if recommends(activate, deactivate, preset) and steering.recommended is not None:
        choice = {"reverse": reverse or None, "layers": layers, "rank": rank if is_given("rank") else None}
        steering = steering.recommending(choice).with_choice(choice)[0]
        return steering if rule is None else steering.changed(**rule.fields)
    if not preset and not activate and not deactivate:
        raise UsageError(f"{nothing_to_steer(steering.path, activate, deactivate)}, or give a --preset")
    return steering.changed(
        activate=activate or 0,
        deactivate=deactivate or 0,
        reverse=reverse,
        layers=layers,
        rank=rank_of(rank, preset),
        **(rule or Rule()).fields,
    )


def check_preset(preset: str | None, activate: int | None, deactivate: int | None, reverse: bool) -> None:
    """Raise UsageError for a preset with numbers or a side of its own."""
    if preset and (reverse or activate is not None or deactivate is not None):
        raise UsageError(
            "--preset gives the numbers and the side; leave out --activate, --deactivate and --reverse, or --preset"
        )


def rank_of(rank: str, preset: str | None) -> str:
    """The rank to choose by: with a preset RD, whatever stands in the configuration."""
    return "rd" if preset and not is_given("rank") else rank


def with_preset(steering: Steering, preset: str) -> Steering:
    """The paper's numbers of experts; warns on stderr when the map looks like another behaviour's."""
    changed, warnings = steering.with_preset(preset)
    warn(*warnings)
    return changed


@bias.command()
@click.argument("bias_file", metavar="BIAS", type=UserPath(path_type=Path))
@_check_option
@json_option
def show(bias_file: Path, model: Path | None, as_json: bool) -> None:
    """Show which experts a bias file steers.

    \b
    Examples:
      steermoe bias show bias.gguf
      steermoe bias show bias.gguf -m tiny
    """
    loaded = read_bias(bias_file)
    if model:
        loaded.check(model_info(model).require_moe(), str(bias_file), str(model))
    if as_json:
        print_json(_facts(loaded))
        return
    _print(loaded)
    if model:
        print_lines(f"\nmade for {model}: yes")


def _facts(loaded: BiasFile) -> dict[str, Any]:
    return {
        "model": loaded.identity.to_dict(),
        "mode": loaded.mode,
        "epsilon": loaded.epsilon,
        **({} if loaded.cap is None else {"cap": loaded.cap if math.isfinite(loaded.cap) else "inf"}),
        "n_active": loaded.n_active,
        "n_inactive": loaded.n_inactive,
        "layers": {str(layer): _layer(loaded, layer) for layer in loaded.layers},
        "provenance": dict(loaded.provenance),
    }


def _layer(loaded: BiasFile, layer: int) -> dict[str, Any]:
    active, inactive = loaded.experts(layer)
    values = {"values": loaded.values[layer].tolist()} if loaded.mode == "soft" else {}
    return {"active": active, "inactive": inactive, **values}


def _rule(loaded: BiasFile) -> str:
    cap = [] if loaded.cap is None else [f"cap {loaded.cap:.6g}"]
    epsilon = [] if loaded.mode == "soft" else [f"epsilon {loaded.epsilon:.6g}"]
    return ", ".join([loaded.mode, *cap, *epsilon])


def _print(loaded: BiasFile) -> None:
    rows = [
        ("model", loaded.identity.short),
        ("rule", _rule(loaded)),
        ("promoted", str(loaded.n_active)),
        ("suppressed", str(loaded.n_inactive)),
    ]
    rows += [(key, text) for key, text in loaded.provenance.items()]
    for layer in loaded.layers:
        plus, minus = loaded.experts(layer)
        rows.append((f"layer {layer}", " ".join([*(f"+{e}" for e in plus), *(f"-{e}" for e in minus)])))
    console().print(facts_table(rows))
