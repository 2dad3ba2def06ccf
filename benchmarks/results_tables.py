"""The tables of docs/results.md, made from the summaries that the commands wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from performance import table
from tuning import HEADER, line

from steermoe_local.evaluation.metrics import formatting
from steermoe_local.evaluation.metrics.formatting import number, percent
from steermoe_local.evaluation.metrics.intervals import Interval

__all__ = ["render"]

Summary = Mapping[str, Any]


def render(report: Summary) -> str:
    """All sections, in the order of docs/results.md."""
    about, found = report["about"], report["behaviours"]
    some = f"; the first {about['items']} items of each task alone" if about["items"] else ""
    first = next(iter(found.values()))["eval"]["provenance"]
    head = (
        f"{about['tool']}, {about['date']}, {about['machine']}, one thread{some}. Model {first['model']['file']} "
        f"({first['model']['quantization']}), greedy decoding, seed {first['seed']} for bootstraps and draws."
    )
    sections = [
        head,
        effects(found),
        controls(found),
        fluency(found),
        signatures(found),
        experiments(found),
        sweeps(found),
        tuning(report["tuning"]),
        layers(found),
        transfers(found),
        commands(report["commands"]),
    ]
    return "\n\n".join(sections) + "\n"


def effects(found: Mapping[str, Summary]) -> str:
    rows = []
    for name, kinds in found.items():
        one = kinds["eval"]
        sides = {side["name"]: side for side in one["sides"]}
        rows.append(
            [
                f"{name} ({one['positive']} / {one['negative']})",
                str(sides["unsteered"]["rate"]["n"]),
                f"{sides['towards']['n_active']} / {sides['towards']['n_inactive']}",
                *(rate(sides[side]["rate"]) for side in ("away", "unsteered", "towards")),
                points(one["effects"]["away"]),
                points(one["effects"]["towards"]),
                points(one["effects"]["swing"]),
            ]
        )
    header = ["behaviour", "items", "experts + / -", "away", "unsteered", "towards"]
    return "### Effect\n\n" + table([*header, "away - unsteered", "towards - unsteered", "swing"], rows)


def controls(found: Mapping[str, Summary]) -> str:
    rows = []
    for name, kinds in found.items():
        one = kinds["eval"]
        rows.append([name, "**the map**", "", points(one["effects"]["swing"]), "", ""])
        for control in one["controls"]:
            if not control["n"]:
                rows.append([name, control["kind"], "0", control["note"], "", ""])
                continue
            rows.append(
                [
                    name,
                    control["kind"],
                    str(control["n"]),
                    f"{100 * control['mean']:.0f} ({100 * control['low']:.0f} to {100 * control['high']:.0f})",
                    percent(control["percentile"]),
                    f"{control['p']:.3f}",
                ]
            )
    header = ["behaviour", "experts", "draws", "size of the swing in points (95% range)", "draws below the map", "p"]
    return "### Controls\n\n" + table(header, rows)


def fluency(found: Mapping[str, Summary]) -> str:
    rows = []
    for name, kinds in found.items():
        for side in kinds["eval"]["sides"]:
            f = side["fluency"]
            rows.append(
                [
                    name,
                    side["name"],
                    number(f["perplexity"], 3),
                    number(f["perplexity_ratio"], 3),
                    number(f["kl"], 4),
                    f"{f['distinct_2']:.2f}",
                    percent(f["looping"]),
                    percent(f["empty"]),
                    percent(f["cut"]),
                    percent(f["ill_formed"]),
                    "-" if f["refused"] is None else rate(f["refused"]),
                ]
            )
    header = ["behaviour", "side", "perplexity", "ratio", "KL", "distinct-2", "looping", "empty", "cut"]
    return "### Side effects\n\n" + table([*header, "ill-formed", "benign refused"], rows)


def signatures(found: Mapping[str, Summary]) -> str:
    rows = [
        [name, f"{s['name']} ({s['side']})", s["found"], s["rule"]]
        for name, kinds in found.items()
        for s in kinds["eval"]["signatures"]
    ]
    if not rows:
        return "### Failure signatures\n\nNo rule fired on the recommended numbers of experts."
    return "### Failure signatures\n\n" + table(["behaviour", "signature", "found", "rule"], rows)


def experiments(found: Mapping[str, Summary]) -> str:
    rows = []
    for name, kinds in found.items():
        for one in kinds.values():
            if "experiment" in one:
                rows.append([one["experiment"], name, one["verdict"], one["finding"].replace("|", "\\|")])
    order = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: order.index(row[0]))
    n = next(one for one in kinds.values() if "experiment" in one)["about"]["n_items"]
    head = f"### Named experiments\n\nOn the first {n} items of each task.\n\n"
    return head + table(["experiment", "behaviour", "for or against", "finding"], rows)


def sweeps(found: Mapping[str, Summary]) -> str:
    parts = ["### Sweep\n"]
    for name, kinds in found.items():
        one = kinds["sweep"]
        ours = [point for point in one["points"] if not point["reverse"]]
        active, inactive = (sorted({point[side] for point in ours}) for side in ("activate", "deactivate"))
        cells = {(point["activate"], point["deactivate"]): cell(point) for point in ours}
        rows = [[f"+{a}", *(cells.get((a, d), "impossible") for d in inactive)] for a in active]
        parts.append(
            f"{name}: swing in points, and how many times the perplexity towards; experts promoted down, suppressed "
            f"across.\n\n{table(['', *(f'-{d}' for d in inactive)], rows)}\n"
        )
    return "\n".join(parts).rstrip()


def cell(point: Summary) -> str:
    swing = point["swing"]
    ratio = point["fluency"]["perplexity_ratio"]
    return f"{'-' if swing is None else format(100 * swing['value'], '+.0f')}, {number(ratio, 2)}"


def tuning(found: Summary) -> str:
    """The search against a grid."""
    rows = "\n".join(line(row) for row in found["rows"])
    tried, answers = (
        [sum(row[method][what] for row in found["rows"]) for method in ("search", "grid")]
        for what in ("n_tried", "n_answers")
    )
    n = len(found["grid"])
    return (
        f"### Tune\n\nAgainst a grid of {n} x {n} numbers of experts, of which equal choices count once. Half of the "
        f"items are held out.\n\n{HEADER}\n{rows}\n\n{tried[0]} choices tried against {tried[1]} "
        f"({1 - tried[0] / tried[1]:.0%} saved), {answers[0]} answers against {answers[1]} "
        f"({1 - answers[0] / answers[1]:.0%} saved)."
    )


def layers(found: Mapping[str, Summary]) -> str:
    rows = []
    for name, kinds in found.items():
        for part in kinds["layers"]["figures"]["divided"]["parts"]:
            rows.append(
                [
                    name,
                    part["name"],
                    f"{part['n_active']} / {part['n_inactive']}",
                    *("-" if part[side] is None else points(part[side]) for side in ("away", "towards", "swing")),
                ]
            )
    header = ["behaviour", "layers", "experts + / -", "away", "towards", "swing"]
    return "### Layers\n\n" + table(header, rows)


def transfers(found: Mapping[str, Summary]) -> str:
    rows = []
    for name, kinds in found.items():
        one = kinds["transfer"]
        for column in (one["base"], *one["columns"]):
            same, text = column["map"], column["text"]
            agreed = column["routing"]
            effect, own = column["effect"], column["own_effect"]
            rows.append(
                [
                    name,
                    f"base ({column['file']['file_type']})" if column["name"] == "base" else column["name"],
                    f"{column['file']['bits_per_weight']:.1f}",
                    *(("-", "-") if same is None else (f"{same['pearson']:.3f}", percent(same["overlap"]))),
                    "-" if agreed is None else percent(agreed["same_sets"]),
                    "-" if text is None else number(text["kl"], 4),
                    number(column["perplexity"], 3),
                    points(effect["effects"][effect["headline"]]),
                    "-" if own is None else points(own["effects"][own["headline"]]),
                ]
            )
    header = ["behaviour", "model", "bits per weight", "RD Pearson", "top 20", "same experts", "KL", "perplexity"]
    return "### Quantizations\n\n" + table([*header, "swing, base's map", "swing, own map"], rows)


def commands(words: Mapping[str, str]) -> str:
    lines = "\n".join([*words.values(), "python benchmarks/tuning.py OUT.json"])
    return (
        "### Commands\n\nOf one behaviour; the others have their map's name instead.\n\n"
        f"<!-- not run: benchmarks/results.py runs them -->\n```sh\n{lines}\n```"
    )


def rate(interval: Summary) -> str:
    return str(Interval(**interval))


def points(interval: Summary) -> str:
    return formatting.points(Interval(**interval))
