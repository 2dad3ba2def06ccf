"""steermoe map recommend."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..._util.files import parse_json, read_bytes
from ...errors import FormatError, UsageError
from ...maps.expert_map import ExpertMap
from ...maps.recommended import Recommended, Values, with_recommended
from ...steering.bias_file import read_bias
from ..options.common import FILE, json_option, lock_output, output_option
from ..options.maps import MAP
from ..output import print_json, print_lines, say_written, warn

_MAX_BYTES = 64 << 20
_PARTS = ("activate", "deactivate", "reverse", "layers", "rank", "scale", "weights", "cap")


@click.command()
@click.argument("map_file", metavar="MAP", type=MAP)
@click.argument("result", metavar="[SUMMARY]", type=FILE, required=False)
@output_option("Map to write; may be MAP itself.")
@click.option("--fitted", type=FILE, metavar="FILE", help="Bias file of steermoe fit that SUMMARY measured.")
@click.option("--one-way", is_flag=True, help="Recommend this side alone: --reverse then needs numbers of its own.")
@click.option("--none", "forget", is_flag=True, help="Write the map without a recommended choice.")
@json_option
def recommend(
    map_file: Path, result: Path | None, output: Path, fitted: Path | None, one_way: bool, forget: bool, as_json: bool
) -> None:
    """Write MAP with the choice of experts that `steermoe eval` measured, and what it was measured to do.

    SUMMARY is the summary.json of that run, or its folder. Of a bias file that `steermoe fit` made of MAP its values
    are the choice. It is what steers from then on where no numbers of experts are given. The digest of the map stays
    as it is, so saved chats and plans stay good.

    \b
    Example:
      steermoe eval -m olmoe.gguf --map formal --activate 8 --deactivate 8 -o results
      steermoe map recommend formal results -o formal.json

    \b
    Of fitted values:
      steermoe fit -m olmoe.gguf --pairs pairs.jsonl --map map2.json --budget 0.02 -o bias.gguf
      steermoe eval -m olmoe.gguf --bias bias.gguf --task heldout.jsonl -o results
      steermoe map recommend map2.json results --fitted bias.gguf -o map3.json
    """
    if (result is None) == (not forget):
        raise UsageError("give the SUMMARY of a run of steermoe eval, or --none")
    lock_output(output)
    expert_map = ExpertMap.load(map_file)
    recommended = None if result is None else _measured(result, expert_map, fitted, one_way)
    try:
        changed = with_recommended(expert_map, recommended)
    except FormatError as error:
        raise FormatError(f"{result}: {error}") from None
    changed.save(output)
    if recommended is not None and (recommended.steered or 0) <= (recommended.unsteered or 0):
        warn(f"{result}: the choice does not move the answers to its side: {recommended.words}")
    if as_json:
        print_json({"map": str(output), "recommended": None if recommended is None else recommended.to_dict()})
        return
    if recommended is not None:
        print_lines(f"recommended: {recommended.choice_words}; {recommended.words}")
    say_written(output)


def _measured(path: Path, expert_map: ExpertMap, bias_file: Path | None, one_way: bool) -> Recommended:
    """The choice of a run's summary and its figures. Raises FormatError, UsageError (another map, a plan)."""
    path = path / "summary.json" if path.is_dir() else path
    try:
        data = parse_json(read_bytes(path, "a summary of steermoe eval", _MAX_BYTES).decode("utf-8"))
        return _recommended(path, data, expert_map, bias_file, one_way)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(f"{path}: not the summary.json of steermoe eval; name that file, or its folder") from None


def _recommended(
    path: Path, data: Mapping[str, Any], expert_map: ExpertMap, bias_file: Path | None, one_way: bool
) -> Recommended:
    """The same of its content, which has errors of any kind where it is damaged."""
    steering, settings = data["steering"], data["provenance"]["settings"]
    sides = {side["name"]: side for side in data["sides"]}
    unsteered = sides["unsteered"]
    fitted = "bias" in steering
    if (steering.get("provenance") or {} if fitted else steering).get("map_sha256") != expert_map.sha256:
        raise UsageError(
            f"{path}: measured another map, or a bias file that is not of it; run steermoe eval with this map"
        )
    if bias_file is not None and not fitted:
        raise UsageError(f"{path}: measured a choice of the map; leave out --fitted, or name the run that measured it")
    values = _fitted(path, steering, bias_file) if fitted else ()
    reverse = bool(json.loads(steering["provenance"]["fit"])["reverse"] if fitted else steering.get("reverse"))
    found = sides.get("steered" if fitted else "away" if reverse else "towards")
    if settings.get("placement") or found is None or steering.get("preset"):
        raise UsageError(
            f"{path}: a choice is recommended for all tokens and by numbers; run steermoe eval without "
            "--preset and rules"
        )
    if fitted:  # towards its own side, which may be the negative one
        values = tuple((layer, expert, -logits if reverse else logits) for layer, expert, logits in values)
    elif steering.get("values"):
        values = tuple((layer, expert, steering["scale"] * logits) for layer, expert, logits in steering["values"])
    choice = {name: steering[name] for name in _PARTS if steering.get(name) not in (None, False, 0)}
    if values:
        choice = {"reverse": True} if reverse else {}
    fluency = found.get("fluency") or {}
    ratio = fluency.get("perplexity_ratio")
    return Recommended(
        choice,
        unsteered=_share(unsteered, reverse),
        steered=_share(found, reverse),
        random=_random(data.get("controls") or (), -1 if fitted and reverse else 1),
        n_items=int(found["rate"]["n"]),
        task=f"{data.get('task') or 'task'}, towards {data.get('negative' if reverse else 'positive') or 'the side'}",
        perplexity=None if ratio is None else ratio - 1,
        kl=fluency.get("kl"),
        command=str(data.get("command") or ""),
        created=str(data["provenance"].get("created") or ""),
        one_way=one_way,
        values=values,
    )


def _fitted(path: Path, steering: Mapping[str, Any], bias_file: Path | None) -> Values:
    """The values of the bias file that a run measured, which steermoe fit made of the map. Raises UsageError."""
    if "fit" not in steering["provenance"]:
        raise UsageError(f"{path}: measured a bias file that steermoe fit did not make; run steermoe eval with the map")
    if bias_file is None:
        raise UsageError(f"{path}: measured the bias file {steering['bias']}; give it with --fitted FILE")
    bias = read_bias(bias_file)
    if bias.key != steering["bias_digest"]:
        raise UsageError(f"{bias_file}: not the bias file that {path} measured; give that one, or measure this one")
    table = bias.dense()
    # as short as they read back as the same float32
    return tuple((int(row), int(column), float(str(table[row, column]))) for row, column in np.argwhere(table))


def _share(side: Mapping[str, Any], reverse: bool) -> float:
    """The share of answers on the side that is steered to."""
    labels, rate = side.get("labels") or {}, float(side["rate"]["value"])
    return float(labels.get("negative", 0.0)) if reverse and "negative" in labels else 1 - rate if reverse else rate


def _random(controls: Any, sign: int) -> float | None:
    """Mean gain of random experts; of controls of both directions their mean. None: not measured."""
    for control in controls:
        if control.get("kind", "").startswith("random") and control.get("mean") is not None:
            return sign * float(control["mean"]) / (2 if control.get("away") else 1) + 0.0  # no -0
    return None
