"""Exports expert maps to the formats of other tools.

- EasySteer (vLLM): its `moe_router` algorithm reads `{"layer_configs": {"<layer>": {"mode", "expert_ids"}}}` and edits
  router logits by the paper's hard rule. It needs a choice of experts, not scores. A request or a server names that
  file in a SteeringSpec (its API since August 2026, vllm/steer_vectors/api.py), whose JSON is written as well.
- SteerMoE: the table of all experts that the authors' notebook ranks, as CSV with its column names.
- Plain JSON: the ranking, for scripts.
"""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ChoiceError, UsageError
from .effects import ACTIONS, COLUMNS
from .expert_map import ExpertMap


def easysteer_config(signs: npt.NDArray[np.int8], epsilon: float | None = None) -> str:
    """EasySteer's JSON for a choice of experts, signs [n_layer, n_expert] as `ExpertMap.choose` returns them.

    A layer with both signs has mode "activate" with `expert_ids` and `deactivate_ids`. Layers without a chosen expert
    are left out. `epsilon` is written when it is given; EasySteer's default is the paper's 0.01.

    Raises ChoiceError when no expert is chosen, which EasySteer refuses.
    """
    layers: dict[str, dict[str, Any]] = {}
    for layer, row in enumerate(signs):
        active, inactive = np.flatnonzero(row > 0).tolist(), np.flatnonzero(row < 0).tolist()
        if not active and not inactive:
            continue
        config: dict[str, Any] = {"mode": "activate" if active else "deactivate", "expert_ids": active or inactive}
        if active and inactive:
            config["deactivate_ids"] = inactive
        if epsilon is not None:
            config["epsilon"] = epsilon
        layers[str(layer)] = config
    if not layers:
        raise ChoiceError("no expert is chosen, and EasySteer has no empty steering; choose at least one")
    rows = ",\n".join(f"  {json.dumps(layer)}: {json.dumps(config)}" for layer, config in layers.items())
    return f'{{\n "layer_configs": {{\n{rows}\n }}\n}}\n'


def easysteer_spec(source: str) -> str:
    """EasySteer's SteeringSpec, as JSON, that steers by the file `source` of `easysteer_config` in all its layers.

    One VectorSpec, with an ApplySpec of the whole prompt and all that is generated, as in the paper. `source` is the
    path by which the server finds the file. It is needed, as a spec without a file has one list of experts for all
    layers.

    Raises UsageError for a path with a bar, which EasySteer refuses.
    """
    if "|" in source or not source:
        raise UsageError(f"source: {source!r} is no path that EasySteer takes; it may not have a | in it")
    vector = {"source": source, "algorithm": "moe_router", "apply": {"prompt": "all", "generation": "all"}}
    return json.dumps({"vectors": [vector]}, ensure_ascii=False, indent=1) + "\n"


def steermoe_csv(expert_map: ExpertMap) -> str:
    """The ranking as CSV, a row for each expert in the order of |RD|, with the column names of SteerMoE's frames.

    `pandas.read_csv` reads it as the frame that the authors' `steer_moe` sorts (with float_precision="round_trip" as
    the same float64). It has columns of counts if the map has counts. Behind those of the frames it has what else the
    map knows: `logit`, `weight`, and of each action `promote_effect`, `promote_effect_se`, `promote_p`, `promote_cost`,
    ..., `suppress_control`, empty where it was not tried. Lines end in LF.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    a1, a2, n1, n2 = expert_map.a1, expert_map.a2, expert_map.n1, expert_map.n2
    counts = ("a1", "a2", "d1", "d2", "a1_n", "a2_n") if a1 is not None else ()
    tables = {name: table for name in ("logit", "weight") if (table := getattr(expert_map, name)) is not None}
    figures = [f"{action}_{name}" for action in ACTIONS for name in COLUMNS] if expert_map.effects else []
    writer.writerow(["layer", "expert", *counts, "risk_diff", "Layer_Expert", "risk_diff_abs", *tables, *figures])
    for layer, expert, rd in expert_map.top(expert_map.rd.size):
        row: list[Any] = [layer, expert]
        if a1 is not None and a2 is not None:
            one, two = int(a1[layer, expert]), int(a2[layer, expert])
            row += [one, two, n1 - one, n2 - two, repr(one / n1), repr(two / n2)]
        # the label in their plots, with its line break
        row += [repr(rd), f"L{layer:02d}\nE{expert:02d}", repr(abs(rd))]
        row += [repr(float(table[layer, expert])) for table in tables.values()]
        if expert_map.effects:
            tried = expert_map.effects.at(layer, expert)
            row += [repr(tried[a][name]) if name in tried.get(a, {}) else "" for a in ACTIONS for name in COLUMNS]
        writer.writerow(row)
    return text.getvalue()


def plain_ranking(expert_map: ExpertMap) -> str:
    """The ranking as JSON: its source, and a list of experts in the order of |RD|, one a line.

    Each has `layer`, `expert`, `rd`, and `p1`, `p2` (shares of the target tokens that activated it) when counted; of
    maps that have them also `logit`, `weight`, and under `promote` and `suppress` what the map's `effects` say of it.
    """
    head: dict[str, Any] = {
        "model": expert_map.identity.to_dict(),
        "behaviour": expert_map.behaviour,
        "positive": expert_map.positive,
        "negative": expert_map.negative,
        "n1": expert_map.n1,
        "n2": expert_map.n2,
        "n_pairs": expert_map.n_pairs or None,  # not known of an imported ranking
        "map_sha256": expert_map.sha256,
        **({"attribution": expert_map.effects.facts.to_dict()} if expert_map.effects else {}),
    }
    experts: list[str] = []
    for layer, expert, rd in expert_map.top(expert_map.rd.size):
        entry: dict[str, Any] = {"layer": layer, "expert": expert, "rd": rd}
        if expert_map.a1 is not None and expert_map.a2 is not None:
            entry["p1"] = int(expert_map.a1[layer, expert]) / expert_map.n1
            entry["p2"] = int(expert_map.a2[layer, expert]) / expert_map.n2
        for name in ("logit", "weight"):
            if (table := getattr(expert_map, name)) is not None:
                entry[name] = float(table[layer, expert])
        if expert_map.effects is not None:
            entry |= expert_map.effects.at(layer, expert)
        experts.append("  " + json.dumps(entry))
    text = json.dumps(head, ensure_ascii=False, indent=1).removesuffix("\n}")
    return f'{text},\n "experts": [\n' + ",\n".join(experts) + "\n ]\n}\n"
