"""steermoe map recommend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..._util.files import parse_json, read_bytes
from ...errors import FormatError, UsageError
from ...maps.expert_map import ExpertMap
from ...maps.recommended import Recommended, with_recommended
from ..options.common import FILE, json_option, lock_output, output_option
from ..options.maps import MAP
from ..output import print_json, print_lines, say_written

_MAX_BYTES = 64 << 20
_PARTS = ("activate", "deactivate", "reverse", "layers", "rank", "scale", "weights", "cap")


@click.command()
@click.argument("map_file", metavar="MAP", type=MAP)
@click.argument("result", metavar="[SUMMARY]", type=FILE, required=False)
@output_option("Map to write; may be MAP itself.")
@click.option("--one-way", is_flag=True, help="Recommend this side alone: --reverse then needs numbers of its own.")
@click.option("--none", "forget", is_flag=True, help="Write the map without a recommended choice.")
@json_option
def recommend(map_file: Path, result: Path | None, output: Path, one_way: bool, forget: bool, as_json: bool) -> None:
    """Write MAP with the choice of experts that `steermoe eval` measured, and what it was measured to do.

    SUMMARY is the summary.json of that run, or its folder. The choice is what steers from then on where no numbers of
    experts are given. The digest of the map stays as it is, so saved chats and plans stay good.

    \b
    Example:
      steermoe eval -m olmoe.gguf --map formal --activate 8 --deactivate 8 -o results
      steermoe map recommend formal results -o formal.json
    """
    if (result is None) == (not forget):
        raise UsageError("give the SUMMARY of a run of steermoe eval, or --none")
    lock_output(output)
    expert_map = ExpertMap.load(map_file)
    recommended = None if result is None else _measured(result, expert_map, one_way)
    try:
        changed = with_recommended(expert_map, recommended)
    except FormatError as error:
        raise FormatError(f"{result}: {error}") from None
    changed.save(output)
    if as_json:
        print_json({"map": str(output), "recommended": None if recommended is None else recommended.to_dict()})
        return
    if recommended is not None:
        print_lines(f"recommended: {recommended.choice_words}; {recommended.words}")
    say_written(output)


def _measured(path: Path, expert_map: ExpertMap, one_way: bool) -> Recommended:
    """The choice of a run's summary and its figures. Raises FormatError, UsageError (another map, a plan)."""
    path = path / "summary.json" if path.is_dir() else path
    try:
        data = parse_json(read_bytes(path, "a summary of steermoe eval", _MAX_BYTES).decode("utf-8"))
        steering, settings = data["steering"], data["provenance"]["settings"]
        sides = {side["name"]: side for side in data["sides"]}
        unsteered, towards = sides["unsteered"], sides["towards"]
        found = sides.get("away") if steering.get("reverse") else towards
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(f"{path}: not the summary.json of steermoe eval; name that file, or its folder") from None
    if steering.get("map_sha256") != expert_map.sha256:
        raise UsageError(f"{path}: measured another map or a bias file; run steermoe eval with this map")
    if settings.get("placement") or found is None or steering.get("preset"):
        raise UsageError(
            f"{path}: a choice is recommended for all tokens and by numbers; run steermoe eval without --where, "
            "--preset and rules"
        )
    reverse = bool(steering.get("reverse"))
    choice = {name: steering[name] for name in _PARTS if steering.get(name) not in (None, False, 0)}
    fluency = found.get("fluency") or {}
    ratio = fluency.get("perplexity_ratio")
    return Recommended(
        choice,
        unsteered=_share(unsteered, reverse),
        steered=_share(found, reverse),
        random=_random(data.get("controls") or ()),
        n_items=int(found["rate"]["n"]),
        task=f"{data.get('task') or 'task'}, towards {data.get('negative' if reverse else 'positive') or 'the side'}",
        perplexity=None if ratio is None else ratio - 1,
        kl=fluency.get("kl"),
        command=str(data.get("command") or ""),
        created=str(data["provenance"].get("created") or ""),
        one_way=one_way,
    )


def _share(side: Mapping[str, Any], reverse: bool) -> float:
    """The share of answers on the side that is steered to."""
    labels, rate = side.get("labels") or {}, float(side["rate"]["value"])
    return float(labels.get("negative", 0.0)) if reverse and "negative" in labels else 1 - rate if reverse else rate


def _random(controls: Any) -> float | None:
    """Mean gain of random experts; of controls of both directions their mean. None: not measured."""
    for control in controls:
        if control.get("kind", "").startswith("random") and control.get("mean") is not None:
            return float(control["mean"]) / (2 if control.get("away") else 1)
    return None
