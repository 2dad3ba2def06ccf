"""steermoe map import, export and card."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ..._util.files import replacing
from ...errors import UsageError
from ...identity import UNKNOWN_ROUTER, ModelIdentity
from ...maps.cards import render_card
from ...maps.expert_map import ExpertMap, parse_layers
from ...maps.export import easysteer_config, easysteer_spec, plain_ranking, steermoe_csv
from ...maps.rankings import LEADING_DENSE, Rankings, ranking_name, read_rankings
from ...model_files.model_info import model_info
from ...models.user_maps import map_label
from ...steering.presets import PAPER_MODELS
from ...steering.steering import Steering
from ..options.common import (
    FILE,
    json_option,
    lock_output,
    meaning_options,
    other_model_option,
    output_option,
    require_distinct,
)
from ..options.groups import is_given
from ..options.maps import MAP
from ..options.system_text import is_text
from ..output import print_json, say_written, warn
from .bias import check_preset, chosen_by, preset_option, rank_option, with_preset
from .map import print_map, top_experts

FORMATS = ("easysteer", "steermoe-csv", "json")


@click.command("import")
@click.argument("ranking", metavar="FILE.pkl", type=FILE)
@output_option("Expert map to write, JSON.")
@click.option("--model-id", metavar="ORG/NAME", help="The ranked model.  [default: by the file's name]")
@other_model_option("GGUF file of that model: takes its router hash.")
@click.option("--arch", help="Its architecture as GGUF names it.  [default: MODEL's, or by --model-id]")
@click.option(
    "--moe-layers",
    metavar="A-B",
    help="The model's numbers of the ranked layers, like 1-26, if the ranking leaves out layers without experts.",
)
@click.option("--behaviour", help="Name of the behaviour.  [default: by the file's name]")
@meaning_options("What RD > 0 means, in words.", "What RD < 0 means, in words.", "Licence of the ranking.")
@json_option
def import_(
    ranking: Path,
    output: Path,
    model_id: str | None,
    model: Path | None,
    arch: str | None,
    moe_layers: str | None,
    behaviour: str | None,
    meaning: dict[str, str],
    as_json: bool,
) -> None:
    """Make an expert map of a SteerMoE ranking, a pickled pandas frame.

    The pickle is read without being run; whatever is not a table of numbers is refused. A ranking does not tell its
    model's router hash: give -m MODEL, or use the map with --force. Where a model has layers without experts, as
    DeepSeek's and GLM's first ones, a ranking may number only the others: say which they are with --moe-layers.

    \b
    Examples:
      steermoe map import 'activations_[allenai--OLMoE-1B-7B-0125-Instruct]_[safety].pkl' -o map.json
      steermoe map import rank.pkl --model-id my/model --behaviour brevity -m model.gguf -o map.json
    """
    lock_output(output)
    if model and arch:
        raise UsageError("-m MODEL tells the architecture; leave out --arch")
    rankings = read_rankings(ranking)
    given = None if moe_layers is None else parse_layers(moe_layers)
    named_model, named_behaviour = ranking_name(ranking)
    model_id, behaviour = model_id or named_model, behaviour or named_behaviour
    if not model_id:
        raise UsageError(f"{ranking}: its name does not tell the model; give --model-id ORG/NAME")
    if not behaviour:
        raise UsageError(f"{ranking}: its name does not tell the behaviour; give --behaviour NAME")
    if named_model and model_id != named_model:
        warn(f"{ranking}: by its name a ranking of {named_model}, not of {model_id}")
    facts = model_info(model) if model else None
    identity = facts.require_moe() if facts else _declared(rankings, model_id, arch, given, str(ranking))
    expert_map = rankings.to_map(
        identity,
        behaviour,
        where=str(ranking),
        moe_layers=given,
        model_layers=facts.moe_layers if facts else None,
        **meaning,
        notes=f"imported from {ranking.name}, a ranking of {model_id}; the licence of that file holds",
    )
    expert_map.save(output)
    if not model:
        warn(
            "the router hash is not known, so this map fits any model of its shape and needs --force; "
            "to bind it, import with -m MODEL"
        )
    if as_json:
        print_json(
            {
                "map": str(output),
                "model_id": model_id,
                "model": identity.to_dict(),
                "behaviour": behaviour,
                "n1": expert_map.n1,
                "n2": expert_map.n2,
                "n_positive": int((expert_map.rd > 0).sum()),
                "n_negative": int((expert_map.rd < 0).sum()),
                "top": top_experts(expert_map),
            }
        )
        return
    print_map(expert_map, 10)
    say_written(output, before="\n")


def _declared(
    rankings: Rankings, model_id: str, arch: str | None, moe_layers: tuple[int, ...] | None, where: str
) -> ModelIdentity:
    """The identity of a model that is not at hand: the shape is the ranking's own, up to its last layer."""
    known = {paper.name.lower(): paper.architecture for paper in PAPER_MODELS}
    arch = arch or known.get(model_id.lower())
    if not arch:
        raise UsageError(f"{model_id}: its architecture is not known; give -m MODEL.gguf, or --arch as GGUF names it")
    layers = rankings.layers_by(moe_layers, where)
    if arch in LEADING_DENSE and moe_layers is None and not rankings.layers:
        n = rankings.shape[0]
        raise UsageError(
            f"{where}: numbers its layers from 0, and models of the architecture {arch} may begin with layers without "
            f"experts; give -m MODEL, or --moe-layers: 0-{n - 1} if they have none, 1-{n} if the first is one, ..."
        )
    return ModelIdentity(arch, layers[-1] + 1, rankings.shape[1], rankings.n_expert_used, UNKNOWN_ROUTER)


@click.command()
@click.argument("map_file", metavar="MAP", type=MAP)
@click.option("--format", "format_", type=click.Choice(FORMATS), required=True, help="What to write.")
@output_option("File to write.")
@click.option("--activate", type=click.IntRange(0), help="easysteer: experts with RD > 0 to promote.  [default: 0]")
@click.option("--deactivate", type=click.IntRange(0), help="easysteer: experts with RD < 0 to suppress.  [default: 0]")
@rank_option
@preset_option
@click.option("--reverse", is_flag=True, help="easysteer: steer to the negative side: flip the sign of RD first.")
@click.option("--layers", metavar="A-B", help="easysteer: only these layers, like 3-7,9.  [default: all]")
@click.option("--epsilon", type=click.FloatRange(0, min_open=True), help="easysteer: distance to the extreme logit.")
@click.option(
    "--spec",
    type=FILE,
    help="easysteer: also write a SteeringSpec that names OUTPUT, as requests and servers of August 2026 take it.",
)
@click.option("--source", metavar="PATH", help="Path of OUTPUT for the server, in --spec.  [default: its path here]")
def export(
    map_file: Path,
    format_: str,
    output: Path,
    activate: int | None,
    deactivate: int | None,
    rank: str,
    preset: str | None,
    reverse: bool,
    layers: str | None,
    epsilon: float | None,
    spec: Path | None,
    source: str | None,
) -> None:
    """Write MAP for another tool.

    easysteer: a choice of experts for EasySteer's moe_router under vLLM, chosen as `steermoe bias build` does; with
    --spec also the SteeringSpec (VectorSpec, ApplySpec) to send with a request or to start the server with.
    steermoe-csv: all experts, with the columns of SteerMoE's rankings. json: all experts in order, for scripts.

    \b
    Examples:
      steermoe map export map.json --format easysteer -o experts.json --spec spec.json --activate 8 --deactivate 8
      steermoe map export map.json --format steermoe-csv -o ranking.csv
    """
    chosen = preset or activate or deactivate
    if format_ != "easysteer" and (chosen or reverse or layers or epsilon or spec or is_given("rank")):
        raise UsageError(f"--format {format_} writes all experts; choosing some belongs to --format easysteer")
    if source is not None and spec is None:
        raise UsageError("--source is written into the file of --spec; give --spec FILE")
    check_preset(preset, activate, deactivate, reverse)
    spec_text = easysteer_spec(_server_path(output) if source is None else source) if spec else ""
    require_distinct(output, spec)
    for path in filter(None, (output, spec)):
        lock_output(path)
    expert_map = ExpertMap.load(map_file)
    if format_ == "steermoe-csv":
        text = steermoe_csv(expert_map)
    elif format_ == "json":
        text = plain_ranking(expert_map)
    else:
        steering = chosen_by(
            Steering(map_label(map_file), expert_map, path=map_file),
            activate,
            deactivate,
            preset,
            reverse,
            layers,
            rank,
        )
        if steering.mode != "hard":
            raise UsageError(
                f"{map_file}: recommends the {steering.mode} rule, which the format has not; give --activate N, "
                "--deactivate N or both"
            )
        warn(*filter(None, [steering.shortfall]))
        made = (with_preset(steering, preset) if preset else steering).bias_file()
        assert made is not None  # experts are chosen
        text = easysteer_config(made.signs, epsilon)
    _write(output, text)
    if spec:
        _write(spec, spec_text)


def _server_path(output: Path) -> str:
    """The absolute path of a file, for the spec. Raises UsageError for a folder whose name is not text."""
    path = os.path.abspath(output)
    if not is_text(path):
        raise UsageError(f"{path}: not UTF-8, so --spec cannot name it; give --source, or an output elsewhere")
    return path


@click.command()
@click.argument("map_file", metavar="MAP", type=MAP)
@click.option("--base-model", metavar="ORG/NAME", required=True, help="The model's name on the hub.")
@output_option("Card to write, like README.md.")
@click.option("--license", "license_", default="", help="Licence of the map.  [default: what stands in the map]")
def card(map_file: Path, base_model: str, output: Path, license_: str) -> None:
    """Write the card (README.md) with which to publish MAP on the Hugging Face hub.

    \b
    Example:
      steermoe map card map.json --base-model allenai/OLMoE-1B-7B-0125-Instruct --license CC0-1.0 -o README.md
    """
    lock_output(output)
    _write(output, render_card(ExpertMap.load(map_file), base_model, license=license_, file=map_file.name))


def _write(output: Path, text: str) -> None:
    with replacing(output) as temporary:
        temporary.write_bytes(text.encode("utf-8"))
    say_written(output)
