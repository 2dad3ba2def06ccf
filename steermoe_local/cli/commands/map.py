"""steermoe map."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..._util.visible import visible
from ...errors import UsageError
from ...maps import significance
from ...maps.difference_plot import plot_difference
from ...maps.effect_comparison import compare_effects
from ...maps.effect_plot import plot_effects
from ...maps.effects import ACTIONS
from ...maps.expert_map import ExpertMap, parse_layers
from ...maps.map_phases import phase_words
from ...maps.pair_counts import PairCounts
from ...maps.picture import require_drawable
from ...maps.plots import plot_map
from ..options.common import FILE, json_option, lock_output, output_option
from ..options.groups import is_given, together
from ..options.maps import MAP
from ..options.steering import RANK
from ..output import facts_table, print_json, say, say_written, warn
from ..streams import console
from .map_effects import compared_rows, effect_rows, effect_text, effects_json, effects_table, p_text

_OUTPUT = "Picture to write: .png, .svg, or .html, which names the expert under the pointer."


@click.group("map")
def map_() -> None:
    """Look at expert maps: scores, how sure they are, pictures, comparisons."""


_intervals = together(
    click.option(
        "--level",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        default=0.95,
        show_default=True,
        help="Level of the confidence intervals.",
    ),
    click.option(
        "--correction",
        type=click.Choice(list(significance.CORRECTIONS)),
        default="holm",
        show_default=True,
        help="Correction of p for the number of experts: holm (any error), bh (false discovery rate).",
    ),
)


@map_.command()
@click.argument("map_file", metavar="MAP", type=MAP)
@click.option("-n", "--top", type=click.IntRange(1), default=20, show_default=True, help="Experts to show.")
@click.option(
    "--per-pair",
    "per_pair",
    type=FILE,
    help="Per-pair counts of the map's run (.pairs.npz), where the map has no intervals yet.",
)
@_intervals
@json_option
def show(map_file: Path, top: int, per_pair: Path | None, level: float, correction: str, as_json: bool) -> None:
    """Show a map: where it comes from, how sure it is, its experts in the order of |RD|, and the first effects.

    Intervals, p-values and stability need the counts of each pair: `steermoe detect --per-pair` keeps them.
    RD says which experts differ; only an intervention shows which have an effect, and `steermoe attribute` tries them.

    \b
    Examples:
      steermoe map show map.json -n 5
      steermoe map show map.json --per-pair run.pairs.npz
    """
    expert_map = ExpertMap.load(map_file)
    if per_pair:
        expert_map = significance.annotate(expert_map, PairCounts.load(per_pair))
    if as_json:
        print_json(_facts(expert_map, top, level, correction))
    else:
        print_map(expert_map, top, level, correction)
    warn_unless_different(expert_map, map_file)


@map_.command()
@click.argument("map_file", metavar="MAP", type=MAP)
@click.option(
    "--per-pair",
    "per_pair",
    type=FILE,
    required=True,
    help="Per-pair counts of the map's run (.pairs.npz of steermoe detect --per-pair).",
)
@output_option("Map to write; may be MAP itself.")
@click.option(
    "--draws", type=click.IntRange(19, 99_999), default=significance.DRAWS, show_default=True, help="Shuffled maps."
)
@click.option(
    "--halves", type=click.IntRange(1, 9999), default=significance.REPEATS, show_default=True, help="Random halvings."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of both.")
@json_option
def stats(map_file: Path, per_pair: Path, output: Path, draws: int, halves: int, seed: int, as_json: bool) -> None:
    """Write a map with standard errors, split-half stability and the shuffled control.

    \b
    Example:
      steermoe map stats map.json --per-pair run.pairs.npz -o map.json
    """
    lock_output(output)
    loaded = ExpertMap.load(map_file)
    expert_map = significance.annotate(loaded, PairCounts.load(per_pair), draws=draws, repeats=halves, seed=seed)
    expert_map.save(output)
    if as_json:
        print_json({"map": str(output), **_trust(expert_map, "holm")})
    else:
        console().print(facts_table(_trust_rows(expert_map, "holm")))
        say_written(output, before="\n")
    warn_unless_different(expert_map, map_file)


@map_.command()
@click.argument("map_file", metavar="MAP", type=MAP)
@output_option(_OUTPUT)
@click.option(
    "-n",
    "--top",
    type=click.IntRange(1, 60),
    default=20,
    show_default=True,
    help="Experts in the bar chart, or to name.",
)
@click.option("--activate", type=click.IntRange(0), default=0, help="Mark the experts that this would promote.")
@click.option("--deactivate", type=click.IntRange(0), default=0, help="Mark the experts that this would suppress.")
@click.option(*RANK[0], **RANK[1])
@click.option("--reverse", is_flag=True, help="Flip the sign of RD for the choice, as in `bias build`.")
@click.option("--layers", metavar="A-B", help="Choose in these layers only, like 3-7,9.")
@click.option("--effects", is_flag=True, help="Draw RD against effect instead: what only differs, and what matters.")
def plot(
    map_file: Path,
    output: Path,
    top: int,
    activate: int,
    deactivate: int,
    rank: str,
    reverse: bool,
    layers: str | None,
    effects: bool,
) -> None:
    """Draw a map: layers x experts, RD by depth, first experts with their intervals, effects where the map has them.

    With --effects it draws one point for each action on each expert that `steermoe attribute` tried: RD against effect.

    --activate, --deactivate, --rank, --reverse and --layers mark what `steermoe bias build` would choose. Needs
    matplotlib: pip install 'steermoe-local[plot]'.

    \b
    Examples:
      steermoe map plot map.json -o map.png --activate 8 --deactivate 8
      steermoe map plot map.json -o effects.png --effects
    """
    require_drawable(output)
    lock_output(output)
    if (reverse or layers or is_given("rank")) and not activate and not deactivate:
        raise UsageError("--rank, --reverse and --layers belong to a choice; give --activate N, --deactivate N or both")
    if effects and (activate or deactivate):
        raise UsageError("--effects draws all that was tried; leave out the choice (--activate, --deactivate)")
    expert_map = ExpertMap.load(map_file)
    if effects:
        plot_effects(expert_map, output, top)
        say_written(output)
        return
    signs = None
    if activate or deactivate:
        chosen = None if layers is None else parse_layers(layers)
        signs = expert_map.choose(activate, deactivate, reverse=reverse, layers=chosen, rank=rank)
    plot_map(expert_map, output, signs, top)
    say_written(output)


@map_.command()
@click.argument("first", metavar="A", type=MAP)
@click.argument("second", metavar="B", type=MAP)
@output_option(_OUTPUT, required=False)
@click.option("-n", "--top", type=click.IntRange(1), default=20, show_default=True, help="First experts to compare.")
@json_option
def diff(first: Path, second: Path, output: Path | None, top: int, as_json: bool) -> None:
    """Compare two maps: two behaviours, two quantizations, two runs, two phases (detect --phase).

    Overlap counts experts that both maps have among their first by |RD|, with the same sign. Effects are compared where
    both maps have them.

    \b
    Example:
      steermoe map diff q8_0.json q4_0.json -o diff.png
    """
    if output:
        require_drawable(output)
        lock_output(output)
    one, two = ExpertMap.load(first), ExpertMap.load(second)
    result = significance.compare(one, two, top)
    effects = compare_effects(one, two)
    same_model = one.identity == two.identity
    if not same_model:
        say(
            visible(f"note: {first} is of {one.identity.short}, {second} of {two.identity.short}: other models, ")
            + "so expert numbers may mean other things"
        )
    if output:
        names = (first.name, second.name) if first.name != second.name else (str(first), str(second))
        plot_difference(one, two, output, names, top)
    if as_json:
        data: dict[str, Any] = {
            "first": str(first),
            "second": str(second),
            "same_model": same_model,
            "phases": [one.phase or None, two.phase or None],
            "plot": output,
            **asdict(result),
        }
        data["effects"] = None if effects is None else {name: asdict(found) for name, found in effects.items()}
        print_json(data)
        return
    worst = min(range(len(result.layers)), key=lambda i: result.by_layer[i])
    rows = [
        ("first", f"{first}: {_what(one)}"),
        ("second", f"{second}: {_what(two)}"),
        ("Pearson of RD", f"{result.pearson:+.4f}"),
        ("Spearman of RD", f"{result.spearman:+.4f}"),
        ("overlap", f"{result.overlap:.0%} of the first {result.top_n} experts (by chance {result.chance:.1%})"),
        ("lowest layer", f"layer {result.layers[worst]}, Pearson {result.by_layer[worst]:+.4f}"),
        *compared_rows(one, two, effects),
    ]
    console().print(facts_table(rows))
    if output:
        say_written(output, before="\n")


def _what(expert_map: ExpertMap) -> str:
    """The behaviour of a map, and the phase if it is of one."""
    return expert_map.behaviour + (f", {phase_words(expert_map.phase)}" if expert_map.phase else "")


def warn_unless_different(expert_map: ExpertMap, where: Path) -> None:
    """Warn that a map cannot be told from maps of shuffled pairs."""
    confidence = expert_map.confidence
    if confidence is None or confidence.differs_from_shuffled:
        return
    p = min(confidence.max_rd.p, confidence.sum_top.p)
    warn(
        f"{where}: does not differ from maps of shuffled pairs (p = {min(2 * p, 1):.2g}, {confidence.n_pairs} "
        "pairs): its experts may be chance; record more pairs"
    )


def top_experts(expert_map: ExpertMap) -> list[dict[str, Any]]:
    """The first ten experts of a new map, for --json."""
    return [{"layer": layer, "expert": expert, "rd": rd} for layer, expert, rd in expert_map.top(10)]


def print_map(expert_map: ExpertMap, top: int, level: float = 0.95, correction: str = "holm") -> None:
    """Print a map's origin, how sure it is, and its first experts."""
    rd = expert_map.rd
    out = console()
    sides = f" ({expert_map.positive} / {expert_map.negative})" if expert_map.positive else ""
    rows = [
        ("behaviour", expert_map.behaviour + sides),
        ("model", expert_map.identity.short),
        ("pairs", _counted(expert_map)),
        *([("date in prompts", ", ".join(expert_map.dates))] if expert_map.dates else []),
        *([("until stable", expert_map.stability.reason)] if expert_map.stability else []),
        *([("phase", phase_words(expert_map.phase))] if expert_map.phase else []),
        *_recommended_rows(expert_map),
        ("experts", f"RD > 0: {int((rd > 0).sum())}, RD < 0: {int((rd < 0).sum())}"),
        *_trust_rows(expert_map, correction),
        *effect_rows(expert_map),
    ]
    out.print(facts_table(rows))
    out.print()
    table = Table(box=None, pad_edge=False)
    names = {
        "ci_low": f"{level:.0%} CI" if round(level * 100, 6) % 1 == 0 else f"{level:.4g} CI",
        "p": f"p ({correction})",
    }
    names |= {"layer": "layer", "expert": "expert", "rd": "RD", "p1": "a1/N1", "p2": "a2/N2"}
    entries = _entries(expert_map, top, level, correction)
    columns: list[str] = [name for name in ("layer", "expert", "rd", "ci_low", "p", "p1", "p2") if name in entries[0]]
    if expert_map.effects is not None:  # they take the place of the rates, so that a line has 80 columns
        columns = [name for name in columns if name not in ("p1", "p2")] + list(ACTIONS)
    for name in columns:
        table.add_column(names.get(name, name), justify="right")
    for entry in entries:
        row = [str(entry["layer"]), str(entry["expert"]), f"{entry['rd']:+.4f}"]
        if "p" in entry:
            none = entry["ci_low"] is None
            row += ["no spread" if none else f"{entry['ci_low']:+.4f} to {entry['ci_high']:+.4f}", p_text(entry["p"])]
        if expert_map.effects is not None:
            row += [effect_text(entry.get(name)) for name in ACTIONS]
        elif "p1" in entry:
            row += [f"{entry['p1']:.4f}", f"{entry['p2']:.4f}"]
        table.add_row(*row)
    out.print(table)
    for part in effects_table(expert_map, top):
        out.print("", part, sep="\n")


def _recommended_rows(expert_map: ExpertMap) -> list[tuple[str, str]]:
    """The choice that a map recommends, what it was measured to do, and by which command."""
    recommended = expert_map.recommended
    if recommended is None:
        return [("recommended", "no choice (give numbers of experts)")]
    rows = [("recommended", visible(recommended.choice_words)), ("measured", visible(recommended.words))]
    rows += [("on", visible(recommended.task)), ("by", visible(recommended.command))]
    return [row for row in rows if row[1]]


def _counted(expert_map: ExpertMap) -> str:
    """Pairs and tokens; an imported ranking does not tell its pairs."""
    tokens = f"{expert_map.n1:,} / {expert_map.n2:,}" if expert_map.n1 and expert_map.n2 else "unknown"
    return f"{expert_map.n_pairs or 'unknown'}, target tokens {tokens}"


def _facts(expert_map: ExpertMap, top: int, level: float, correction: str) -> dict[str, Any]:
    return {
        "model": expert_map.identity.to_dict(),
        "behaviour": expert_map.behaviour,
        "positive": expert_map.positive,
        "negative": expert_map.negative,
        "n_pairs": expert_map.n_pairs or None,  # not known of an imported ranking
        "n1": expert_map.n1,
        "n2": expert_map.n2,
        "sha256": expert_map.sha256,
        "dates": list(expert_map.dates),
        "until_stable": expert_map.stability.to_dict() if expert_map.stability else None,
        "phase": expert_map.phase or None,
        "recommended": expert_map.recommended.to_dict() if expert_map.recommended else None,
        "created": expert_map.created,
        "tool": expert_map.tool,
        "license": expert_map.license,
        "n_positive": int((expert_map.rd > 0).sum()),
        "n_negative": int((expert_map.rd < 0).sum()),
        **_trust(expert_map, correction),
        **({"level": level, "correction": correction} if expert_map.se is not None else {}),
        "top": _entries(expert_map, top, level, correction),
        "effects": effects_json(expert_map, top),
    }


def _trust(expert_map: ExpertMap, correction: str) -> dict[str, Any]:
    """How sure a map is, as JSON: nulls for a map without statistics."""
    confidence = expert_map.confidence
    if confidence is None:
        return {"differs_from_shuffled": None, "n_significant": None, "confidence": None}
    p = significance.corrected_p(expert_map, correction)
    return {
        "differs_from_shuffled": confidence.differs_from_shuffled,
        "n_significant": int((p <= 0.05).sum()),
        "confidence": confidence.to_dict(),
    }


def _trust_rows(expert_map: ExpertMap, correction: str) -> list[tuple[str, str]]:
    confidence = expert_map.confidence
    if confidence is None:
        why = "one pair has none" if expert_map.n_pairs == 1 else "needs per-pair counts: steermoe map stats"
        return [("confidence", f"unknown ({why})")]
    half, top = confidence.split_half, confidence.top_n
    significant = int((significance.corrected_p(expert_map, correction) <= 0.05).sum())
    of = len(confidence.moe_layers) * expert_map.identity.n_expert
    rows = [
        ("significant", f"{significant} of {of} experts at 5%, corrected ({correction})"),
        ("split half", f"Spearman of |RD| {half.spearman:.2f}, first {top} experts shared {half.overlap:.0%}"),
    ]
    for name, words in (("max_rd", "largest |RD|"), ("sum_top", f"sum of the first {top} |RD|")):
        control = getattr(confidence, name)
        rows.append(
            (
                "shuffled" if name == "max_rd" else "",
                f"{words} {control.value:.3f}; shuffled pairs: median {control.median:.3f}, "
                f"95% below {control.q95:.3f}, p = {p_text(control.p)}",
            )
        )
    differs = "yes, from shuffled pairs: needed, not enough", "NO: looks like shuffled pairs"
    return [*rows, ("differs", differs[not confidence.differs_from_shuffled])]


def _entries(expert_map: ExpertMap, top: int, level: float, correction: str) -> list[dict[str, Any]]:
    """The first experts, each with all that the map knows about it."""
    entries: list[dict[str, Any]] = []
    a1, a2, se, confidence = expert_map.a1, expert_map.a2, expert_map.se, expert_map.confidence
    p = half = None
    low: float | None
    high: float | None
    if se is not None and confidence is not None:
        p = significance.corrected_p(expert_map, correction)
        half = significance.half_widths(se, confidence.n_pairs, level)
    for layer, expert, rd in expert_map.top(top):
        at = (layer, expert)
        entry: dict[str, Any] = {"layer": layer, "expert": expert, "rd": rd}
        if se is not None and p is not None and half is not None:
            low, high = max(rd - float(half[at]), -1.0), min(rd + float(half[at]), 1.0)
            if not se[at]:  # the same in all pairs: not an exact RD, but one whose spread the pairs do not show
                low = high = None
            entry |= {"se": float(se[at]), "ci_low": low, "ci_high": high, "p": float(p[at])}
        if a1 is not None and a2 is not None:
            entry |= {"a1": int(a1[at]), "a2": int(a2[at])}
            entry |= {"p1": entry["a1"] / expert_map.n1, "p2": entry["a2"] / expert_map.n2}
        if expert_map.effects is not None:
            entry |= expert_map.effects.at(layer, expert)
        entries.append(entry)
    return entries
