"""What a run writes into the folder of the steering: map, pairs, task, bias, report with pictures, card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._util.files import human_duration, timestamp
from .._util.visible import visible
from ..errors import SteerMoEError
from ..evaluation.metrics.formatting import points, signed
from ..evaluation.metrics.intervals import Interval
from ..evaluation.reports.document import Block, Code, Document, Heading, Table, Words, escape, sections
from ..evaluation.reports.figure import error_bars, missing_matplotlib, new_figure, save
from ..evaluation.reports.html_report import html_report
from ..maps.cards import render_card
from ..maps.colours import NEUTRAL, POSITIVE, RANDOM
from ..maps.effect_plot import plot_effects
from ..maps.expert_map import ExpertMap
from ..maps.plots import plot_map
from ..maps.recommended import Recommended, with_recommended
from ..models.user_maps import MAP_FILE, PAIRS_FILE, RESULT_FILE, TASK_FILE
from ..pairs.pairs import save_pairs
from ..steering.bias_file import write_bias
from .clock import STEPS, Clock
from .judging import Confirmed
from .material import task_lines
from .options import LearnOptions
from .result import ADVICE, ALREADY, FAILED, WORKS, LearnResult, failed_sentence, works_sentence
from .run import Found
from .source import Source
from .work import WorkFolder


def write_results(
    work: WorkFolder, found: Found, source: Source, options: LearnOptions, clock: Clock, facts: Mapping[str, Any]
) -> LearnResult:
    """Write the folder's files and return the result. Raises StorageError, UsageError."""
    result = _result(work, found, source, clock, facts)
    if found.material is not None:
        save_pairs(found.material.pairs, work.path(PAIRS_FILE))
        work.write(work.path(TASK_FILE), task_lines(found.material.heldout))
    pictures: list[str] = []
    if found.expert_map is not None:
        expert_map = _recommending(found, source, options, result)
        expert_map.save(work.path(MAP_FILE))
        if result.choice is not None and found.steering is not None:
            bias = found.steering.build(expert_map.identity)
            assert bias is not None  # it was measured
            write_bias(bias, work.path("bias.gguf"))
        pictures = _pictures(work, found, source)
        work.write(work.path("README.md"), _card(expert_map, facts, result))
    tables = _tables(found, source, clock)
    document = _document(result, source, tables, pictures, str(facts["command"]))
    work.write(work.path("report.md"), document.markdown())
    work.write(work.path("report.html"), html_report(document, work.folder))
    work.write(
        work.path(RESULT_FILE), json.dumps(result.to_dict(), ensure_ascii=False, indent=1) + "\n"
    )  # last: it is whole
    return result


def _result(work: WorkFolder, found: Found, source: Source, clock: Clock, facts: Mapping[str, Any]) -> LearnResult:
    choice = None if found.steering is None else _choice(found)
    common: dict[str, Any] = {
        "confirmed": found.confirmed,
        "clock": clock.to_dict(),
        "notes": found.notes,
        "facts": {**facts, "n_pairs": len(found.material.pairs) if found.material else 0},
    }
    if found.step or found.confirmed is None:
        verdict = failed_sentence(found.problem)
        already = found.step == "tune" and found.pick is not None and found.pick["unsteered"] >= 1
        advice = ALREADY if already else ADVICE[found.step]
        return LearnResult(work.name, work.folder, FAILED, verdict, found.step, advice, tried=choice, **common)
    verdict = works_sentence(found.confirmed, source.positive)
    return LearnResult(work.name, work.folder, WORKS, verdict, choice=choice, **common)


def _choice(found: Found) -> dict[str, Any]:
    """The fields of the choice that are not default."""
    steering = found.steering
    assert steering is not None
    numbers = {"activate": steering.activate, "deactivate": steering.deactivate}
    return {name: n for name, n in numbers.items() if n} | steering.further


def _recommending(found: Found, source: Source, options: LearnOptions, result: LearnResult) -> ExpertMap:
    """The map, with its recommended choice if it works."""
    assert found.expert_map is not None
    confirmed = found.confirmed
    if result.choice is None or confirmed is None or found.material is None:
        return found.expert_map
    task = found.material.heldout
    recommended = Recommended(
        choice=result.choice,
        unsteered=confirmed.unsteered.value,
        steered=confirmed.steered.value,
        random=confirmed.random,
        n_items=len(task.items),
        task=_measured_by(task.scorer, source),
        perplexity=confirmed.perplexity,
        kl=confirmed.kl,
        command=options.command,
        created=timestamp(),
        one_way=source.one_way,
    )
    return with_recommended(found.expert_map, recommended)


def _measured_by(scorer: str, source: Source) -> str:
    if scorer == "choice":
        return f"held-out items on which the answer of the side {source.positive} is the likelier one, per token"
    return f"held-out answers that show {source.positive}, by the scorer {scorer}"


def _card(expert_map: ExpertMap, facts: Mapping[str, Any], result: LearnResult) -> str:
    name = str(facts["model"].get("name") or Path(str(facts["model"]["file"])).stem)
    base = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in name)
    license = expert_map.license.strip() or "other"
    try:
        card = render_card(expert_map, base.strip("-._") or "model", license=license)
    except SteerMoEError as error:  # a map that no card can be made of is a map all the same
        return f"# {result.name}\n\n{visible(str(error))}\n"
    return f"{card}\n## Verdict\n\n{escape(result.verdict)}\n"


#
# pictures
#


def _pictures(work: WorkFolder, found: Found, source: Source) -> list[str]:
    """Draw what there is; returns the names of the files, none without matplotlib."""
    expert_map = found.expert_map
    if expert_map is None or missing_matplotlib():
        return []
    names: list[str] = []
    if found.confirmed is not None:
        draw_gain(found.confirmed, source.positive, work.path("gain.png"))
        names.append("gain.png")
    signs = None
    if found.steering is not None and (bias := found.steering.build(expert_map.identity)) is not None:
        signs = bias.signs
    plot_map(expert_map, work.path("map.png"), signs)
    names.append("map.png")
    if expert_map.effects is not None:
        plot_effects(expert_map, work.path("effects.png"))
        names.append("effects.png")
    return names


def draw_gain(found: Confirmed, positive: str, path: Path) -> None:
    """Draw the rates of the held-out items: unsteered, steered, random experts, shuffled pairs. Raises UsageError."""
    figure = new_figure((6.4, 2.8), f"held-out items: {positive}", fontsize=11, weight="bold")
    axes = figure.add_subplot()
    points_of = [("unsteered", found.unsteered, NEUTRAL), ("steered", found.steered, POSITIVE)]
    values, lengths = error_bars([interval for _, interval, _ in points_of])
    axes.barh([0, 1], values, color=[colour for *_, colour in points_of], height=0.6)
    axes.errorbar(values, [0, 1], xerr=lengths, fmt="none", ecolor="black", capsize=3, linewidth=1)
    names = [name for name, *_ in points_of]
    base = found.unsteered.value
    others = [(f"random experts ({found.n_random} draws)", found.random), ("shuffled pairs", found.shuffled)]
    for name, gain in others:
        if gain is not None:
            axes.barh([len(names)], [100 * min(1.0, max(0.0, base + gain))], color=RANDOM, height=0.6)
            names.append(name)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the items")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save(figure, [path])


#
# texts
#


def _tables(found: Found, source: Source, clock: Clock) -> list[Table]:
    tables: list[Table] = []
    if (confirmed := found.confirmed) is not None and found.material is not None:
        rows = [
            ("unsteered", str(confirmed.unsteered), ""),
            ("steered", str(confirmed.steered), points(confirmed.gain)),
            (f"random experts, {confirmed.n_random} draws", "", f"{signed(confirmed.random)} (mean)"),
        ]
        if confirmed.shuffled is not None:
            rows.append(("map of shuffled pairs, both ways round", "", f"{signed(confirmed.shuffled)} (mean)"))
        task = found.material.heldout
        note = f"95% intervals over {len(task.items)} items that no step before had seen; points of the rate"
        tables.append(
            Table(f"Held-out items: {_measured_by(task.scorer, source)}", ("", "rate", "gain"), tuple(rows), note)
        )
        if confirmed.by_margin is not None:
            both = zip(("unsteered", "steered"), confirmed.by_margin, strict=True)
            note = "pairs that no step learnt from; the verdict does not depend on them"
            shares = tuple((name, str(share)) for name, share in both)
            what = f"Held-out pairs: the answer of the side {source.positive} is the likelier one, per token"
            tables.append(Table(what, ("", "rate"), shares, note))
        tests = [("gain above 0", confirmed.gain, confirmed.gain.low > 0)]
        tests.append(("gain above random experts'", confirmed.above_random, confirmed.above_random.low > 0))
        if confirmed.above_shuffled is not None:
            above = confirmed.above_shuffled
            tests.append(("gain above that of shuffled pairs", above, above.low > 0))
        verdicts = [(name, _interval(interval), "yes" if holds else "no") for name, interval, holds in tests]
        below = confirmed.n_below == confirmed.n_random
        verdicts.append(
            ("every draw of random experts below", f"{confirmed.n_below} of {confirmed.n_random}", _yes(below))
        )
        verdicts.append(("perplexity within the budget", f"{confirmed.perplexity:+.1%}, KL {confirmed.kl:.4f}", ""))
        tables.append(Table("What a verdict of works takes", ("", "points (95% interval)", "holds"), tuple(verdicts)))
    if found.pick is not None:
        tables.append(_trials(found.pick))
    if (expert_map := found.expert_map) is not None:
        tables.append(_statistics(expert_map))
    expected, spent = clock.expected, clock.spent
    times = tuple((step, human_duration(expected[step]), human_duration(spent[step])) for step in STEPS)
    whole = ("in all", human_duration(clock.total), human_duration(clock.elapsed))
    tables.append(Table("Time", ("step", "expected", "taken"), (*times, whole)))
    return tables


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _interval(found: Interval) -> str:
    return f"{100 * found.value:+.0f} ({100 * found.low:+.0f} to {100 * found.high:+.0f})"


def _trials(pick: Mapping[str, Any]) -> Table:
    rows = []
    for trial in pick["trials"]:
        gain = "" if trial["gain"] is None else f"{100 * trial['gain']:+.0f} ± {100 * (trial['error'] or 0):.0f}"
        rows.append((f"+{trial['activate']} -{trial['deactivate']}", gain, f"{trial['costs'][0]:+.1%}", trial["over"]))
    note = "points on the items for choosing, with the standard error; of equal ones the fewest experts are taken"
    return Table("The choice", ("experts", "gain", "perplexity", "over the budget by"), tuple(rows), note)


def _statistics(expert_map: ExpertMap) -> Table:
    rows = [("pairs", str(expert_map.n_pairs)), ("target tokens", f"{expert_map.n1:,} / {expert_map.n2:,}")]
    if expert_map.confidence is not None:
        found = expert_map.confidence
        rows.append(("differs from shuffled pairs", f"{_yes(found.differs_from_shuffled)}, p = {found.max_rd.p:.3g}"))
        rows.append(("split-half agreement", f"Spearman {found.split_half.spearman:.2f}"))
    if expert_map.stability is not None:
        rows.append(("until stable", expert_map.stability.reason))
    if expert_map.effects is not None:
        for action, n in expert_map.effects.facts.n_draws.items():
            rows.append((action, f"{n} draws, R2 {expert_map.effects.facts.r2[action]:.2f} on held-out draws"))
    first = ", ".join(f"{layer}/{expert} ({rd:+.2f})" for layer, expert, rd in expert_map.top(8))
    rows.append(("first experts (layer/expert, RD)", first))
    return Table("Statistics", ("", ""), tuple(rows))


def _document(
    result: LearnResult, source: Source, tables: Sequence[Table], pictures: Sequence[str], command: str
) -> Document:
    """The report: what was asked, what to do next, figures, statistics."""
    blocks: list[Block] = [
        Words(f"Steering towards {source.positive}, away from {source.negative}; learnt from {source.words}.")
    ]
    if result.choice is not None:
        blocks += [Words("Use it:"), Code(f"steermoe chat MODEL --map {result.name}")]
    elif result.advice:
        blocks.append(Words(f"{result.advice}.", "What to try"))
    blocks += map(Words, result.notes)
    blocks += sections((table.cut(RESULT_FILE) for table in tables), pictures)
    if command:
        blocks += [Heading("How to repeat it"), Code(command)]
    return Document(result.name, result.verdict, tuple(blocks))
