"""The tables of the small model: what benchmarks/small.py measured, and the column beside the embedded model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from performance import table
from results_tables import points, rate
from rules import span

from steermoe_local.evaluation.metrics.formatting import number, percent

Summary = Mapping[str, Any]

ABSENT = (
    "No small model was there when these figures were made, so its column is empty: nothing is known of it yet. "
    "[Its recipe](../examples/small_moe/README.md) makes one, and `make results` then fills the column."
)


def render(report: Summary) -> str:
    """All tables."""
    about, found = report["about"], report["behaviours"]
    some = f"; the first {about['items']} prompts alone" if about["items"] else ""
    head = (
        f"{about['tool']}, {about['date']}, {about['machine']['cpu']}, one thread{some}. Model {about['model']} "
        f"({about['file_type']}), greedy, answers of {about['max_tokens']} tokens; at most {about['n_answers']} "
        "answers."
    )
    parts = [head, scorers(report["scorers"]), maps(found), effects(found), controls(found), layers(found)]
    return "\n\n".join([*parts, rules(found, about["budget"]), transfers(found)]) + "\n"


def scorers(known: Summary) -> str:
    rows = [
        [name, side, str(one["n"]), _share(one["other_side"]), percent(one["neither"])]
        for name, behaviour in known["behaviours"].items()
        for side, one in behaviour["misjudged"].items()
    ]
    header = ["behaviour", "text of the side", "passages", "taken for the other side", "for neither"]
    return "### Small: errors of the scorers\n\n" + table(header, rows)


def maps(found: Mapping[str, Summary]) -> str:
    rows = []
    for name, one in found.items():
        for d, of in ((one["depth"], name), (one["untrained"], f"{name}, untrained")):
            if d is None:
                continue
            rows.append(
                [
                    of,
                    str(d["n_pairs"]),
                    f"{d['n_sure']} of {d['n_experts']}",
                    f"{d['max_rd']:.3f}",
                    f"{d['shuffled']['q95']:.3f} (p = {d['shuffled']['p']:.3f})",
                    percent(d["overlap"]),
                    " / ".join(_share(share, 0) for share in d["share"]),
                    " ".join(map(str, d["sure_by_layer"])),
                ]
            )
    header = [
        "behaviour",
        "pairs",
        "experts that differ (Holm, 5%)",
        "largest absolute RD",
        "95% of shuffled maps are below",
        "first 20 that halves share",
        "share of the sum of absolute RD: first / middle / last third",
        "that differ, by layer",
    ]
    return "### Small: do experts differ, and where?\n\n" + table(header, rows)


def effects(found: Mapping[str, Summary]) -> str:
    rows = []
    for name, one in found.items():
        sides = {side["name"]: side for side in one["eval"]["sides"]}
        fluency = [sides[side]["fluency"] for side in ("towards", "away")]
        rows.append(
            [
                f"{name} / {one['about']['negative']}",
                str(sides["unsteered"]["rate"]["n"]),
                f"{one['rules']['n']} / {one['rules']['n']}",
                *(rate(sides[side]["rate"]) for side in ("away", "unsteered", "towards")),
                points(one["eval"]["effects"]["swing"]),
                " / ".join(number(f["perplexity_ratio"], 2) for f in fluency),
                " / ".join(number(f["kl"], 3) for f in fluency),
                " / ".join(percent(sides[side]["fluency"]["ill_formed"]) for side in ("unsteered", "towards", "away")),
                " / ".join(percent(sides[side]["fluency"]["looping"]) for side in ("unsteered", "towards", "away")),
            ]
        )
    header = [
        "behaviour",
        "prompts",
        "experts + / -",
        "away",
        "unsteered",
        "towards",
        "swing",
        "perplexity towards / away",
    ]
    more = ["KL towards / away", "neither side: unsteered / towards / away", "looping: unsteered / towards / away"]
    return "### Small: the hard rule\n\n" + table([*header, *more], rows)


def controls(found: Mapping[str, Summary]) -> str:
    rows = []
    for name, one in found.items():
        rows.append([name, "**the map**", "", points(one["controls"]["effects"]["swing"]), "", ""])
        for control in one["controls"]["controls"]:
            if not control["n"]:
                rows.append([name, control["kind"], "0", control["note"], "", ""])
                continue
            size = f"{100 * control['mean']:.0f} ({100 * control['low']:.0f} to {100 * control['high']:.0f})"
            rank = [percent(control["percentile"]), f"{control['p']:.3f}"]
            rows.append([name, control["kind"], str(control["n"]), size, *rank])
    header = ["behaviour", "experts", "draws", "size of the swing in points (95% range)", "draws below the map", "p"]
    return "### Small: controls\n\n" + table(header, rows)


def layers(found: Mapping[str, Summary]) -> str:
    rows = []
    for name, one in found.items():
        for part in one["layers"]["figures"]["divided"]["parts"]:
            if not part["name"].startswith("layer "):
                swing = "-" if part["swing"] is None else points(part["swing"])
                rows.append([name, part["name"], f"{part['n_active']} / {part['n_inactive']}", swing])
    verdicts = [
        [name, one["layers"]["verdict"], one["layers"]["finding"].replace("|", "\\|")] for name, one in found.items()
    ]
    return (
        "### Small: where does the hard rule work?\n\n"
        + table(["behaviour", "for or against the middle", "finding"], verdicts)
        + "\n\n"
        + table(["behaviour", "part of the choice", "experts + / -", "swing"], rows)
    )


def rules(found: Mapping[str, Summary], budget: float) -> str:
    parts = [
        "### Small: rules at one cost\n\nNumbers of experts are the most whose hard rule costs no more than "
        f"{budget:g} nats of KL on the text to choose on, or one and one; every rule is at its best within that KL."
    ]
    header = ["rule", "strength", "experts + / -", "swing of the margin, nats per token", "more than RD, hard", "KL"]
    header += ["swing of the rate, points", "answers alone steered: swing of the rate"]
    for name, one in found.items():
        rows = [
            [
                row["name"],
                row["strength"],
                f"{row['n'][0]} / {row['n'][1]}",
                span(row["swing"]),
                "" if row["more_than_rd"] is None else span(row["more_than_rd"], "+"),
                f"{row['cost']:.4f}",
                _points(row["rate"]),
                _points(row["answer_rate"]) if "answer_rate" in row else "",
            ]
            for row in one["rules"]["rules"]
        ]
        facts = one["rules"]
        fitted = "" if facts["fitted"] else "; no expert had a significant effect, so nothing was fitted"
        head = (
            f"**{name}** ({facts['n_prompts']} prompts, {facts['n_items'][1]} pairs, KL {facts['budget']:.4f}{fitted})"
        )
        parts.append(f"{head}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def transfers(found: Mapping[str, Summary]) -> str:
    rows = []
    for name, one in found.items():
        for column in (one["transfer"]["base"], *one["transfer"]["columns"]):
            same, text, agreed = column["map"], column["text"], column["routing"]
            effect = column["effect"]
            rows.append(
                [
                    name,
                    column["name"],
                    f"{column['file']['bits_per_weight']:.1f}",
                    *(("-", "-") if same is None else (f"{same['pearson']:.3f}", percent(same["overlap"]))),
                    "-" if agreed is None else percent(agreed["same_sets"]),
                    "-" if text is None else number(text["kl"], 4),
                    points(effect["effects"][effect["headline"]]),
                ]
            )
    header = [
        "behaviour",
        "model",
        "bits per weight",
        "RD Pearson",
        "top 20",
        "same experts",
        "KL",
        "swing, base's map",
    ]
    return "### Small: do quantizations keep the map?\n\n" + table(header, rows)


QUESTIONS = (
    "swing of the hard rule, points",
    "random draws with a smaller swing",
    "perplexity towards, times unsteered",
    "is the middle third of the layers ahead?",
    "RD of the smallest quantization, Pearson with the map",
)


def two_columns(tiny: Mapping[str, Summary], small: Summary | None) -> str:
    """One question a row: the embedded model, whose experts were planted, beside the small one, where there is one."""
    one = _column(tiny, "eval")
    other = [""] * len(QUESTIONS) if small is None else _column(small["behaviours"], "controls")
    rows = [list(row) for row in zip(QUESTIONS, one, other, strict=True)]
    text = table(["question", "tiny (planted)", "small (not planted)"], rows)
    return ("" if small is not None else f"{ABSENT}\n\n") + text + "\n"


def _column(of: Mapping[str, Summary], controls: str) -> list[str]:
    """The answers to QUESTIONS, a line for each behaviour; `controls` is the evaluation that has them."""
    answers: list[Callable[[Summary], str]] = [
        lambda kinds: points(kinds["eval"]["effects"]["swing"]),
        lambda kinds: _rank(kinds[controls]),
        lambda kinds: _ratio(kinds["eval"]),
        lambda kinds: kinds["layers"]["verdict"],
        lambda kinds: _kept(kinds["transfer"]),
    ]
    return ["<br>".join(f"{name}: {answer(kinds)}" for name, kinds in of.items()) for answer in answers]


def _rank(one: Summary) -> str:
    drawn = next((c for c in one["controls"] if c["kind"] == "random" and c["n"]), None)
    return "-" if drawn is None else percent(drawn["percentile"])


def _ratio(one: Summary) -> str:
    towards = next(side for side in one["sides"] if side["name"] == "towards")
    return number(towards["fluency"]["perplexity_ratio"], 2)


def _kept(one: Summary) -> str:
    last = min(one["columns"], key=lambda column: column["file"]["bits_per_weight"])
    return "-" if last["map"] is None else f"{last['map']['pearson']:.3f} ({last['name']})"


def _share(found: Summary, digits: int = 1) -> str:
    value, low, high = (format(100 * found[key], f".{digits}f") for key in ("value", "low", "high"))
    return f"{value}% ({low} to {high})"


def _points(found: Summary) -> str:
    return span({key: 100 * found[key] for key in ("value", "low", "high")}, digits=0)
