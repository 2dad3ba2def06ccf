"""Write what the evaluation reads: `python -m small_moe.material CORPUS.jsonl FOLDER`.

FOLDER gets for each behaviour NAME.pairs.jsonl (contrast pairs, part `heldout`) and NAME.task.jsonl (prompts, part
`test`), the texts that steering should leave alone (NAME.choose.txt to choose on, NAME.report.txt to report on),
and scorers.json: how often each rule misjudges text of the corpus whose side is known, cut to the length of an answer.
The same corpus and seed give the same files. They are text of the corpus, under its licences, and not part of the
project.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from steermoe_local.evaluation.metrics.intervals import wilson
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.pairs.prompts import PromptItem

from .behaviours import BEHAVIOURS, MAX_TOKENS, Behaviour, chosen_pairs, chosen_prompts, known_answers
from .passages import CODE, PROSE, Passage, cut, passages, spread
from .sources import lines

N_PAIRS, N_PROMPTS, N_KNOWN = 200, 240, 400
N_NEUTRAL = 80  # passages of a text
PASSAGE = 150  # characters of each
NEUTRAL: dict[str, tuple[Callable[[Passage], bool], ...]] = {
    "prose": (lambda p: p.form == PROSE and p.language in ("de", "fr", "es", "it") and p.kind in ("book", "help"),),
    "code-italian": (
        lambda p: p.kind == "code" and p.form == CODE,
        lambda p: p.kind == "book" and p.form == PROSE and p.language == "it",
    ),
}
"""Which passages each neutral text has, as many of each kind: neither side of the behaviours that name it."""


def pair_lines(behaviour: Behaviour, found: Sequence[Passage], seed: int) -> list[dict[str, str]]:
    return [
        {
            "id": f"{behaviour.name}-{index}",
            "positive": row.prompt + row.positive,
            "negative": row.prompt + row.negative,
            "positive_target": row.positive,
            "negative_target": row.negative,
        }
        for index, row in enumerate(chosen_pairs(behaviour, found, N_PAIRS, seed))
    ]


def task_lines(behaviour: Behaviour, found: Sequence[Passage], seed: int) -> list[dict[str, Any]]:
    head = {
        "name": behaviour.name,
        "scorer": behaviour.scorer,
        "options": behaviour.options,
        "max_tokens": MAX_TOKENS,
        "raw": True,
        "positive": behaviour.positive,
        "negative": behaviour.negative,
        "license": "that of the document; see sources.toml",
    }
    rows = chosen_prompts(behaviour, found, N_PROMPTS, seed)
    items = [{"id": f"{row.group}-{index}", "prompt": row.text, "group": row.group} for index, row in enumerate(rows)]
    return [{"task": head}, *items]


def neutral_text(name: str, found: Sequence[Passage], seed: int) -> str:
    """Passages that belong to neither side, cut to equal lengths, of many documents, the kinds in turn."""
    rng = random.Random(f"{seed} {name}")
    kinds = []
    for wanted in NEUTRAL[name]:
        rows = [p for p in found if wanted(p) and len(p.text) >= PASSAGE // 2]
        kinds.append(spread(rows, lambda p: p.document, rng)[: N_NEUTRAL // len(NEUTRAL[name])])
    turns = [p for turn in zip_longest(*kinds) for p in turn if p is not None]
    return "\n\n".join(cut(p.text, PASSAGE) for p in turns) + "\n"


def misjudged(behaviour: Behaviour, found: Sequence[Passage], seed: int) -> dict[str, Any]:
    """For each side: how many known answers, how many the scorer takes for the other side, and for neither."""
    scorer = make_scorer(behaviour.scorer, behaviour.options)
    item = PromptItem("known", "x")
    sides = {}
    for side, texts in enumerate(known_answers(behaviour, found, N_KNOWN, seed)):
        labels = behaviour.labels()
        got = [scorer.score(item, text).label for text in texts]
        other, right = got.count(labels[1 - side]), got.count(labels[side])
        wrong = wilson(other, len(texts))
        sides[(behaviour.positive, behaviour.negative)[side]] = {
            "n": len(texts),
            "other_side": {"value": wrong.value, "low": wrong.low, "high": wrong.high},
            "neither": (len(texts) - other - right) / max(1, len(texts)),
        }
    return sides


def write(corpus: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """All files; returns what scorers.json has."""
    documents = [document for document in lines(corpus) if document["part"] != "train"]
    heldout, test = passages(documents, "heldout"), passages(documents, "test")
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"seed": seed, "max_tokens": MAX_TOKENS, "behaviours": {}}
    for name in NEUTRAL:
        for use, found in (("choose", heldout), ("report", test)):
            (folder / f"{name}.{use}.txt").write_text(neutral_text(name, found, seed), encoding="utf-8")
    for behaviour in BEHAVIOURS:
        pairs, task = pair_lines(behaviour, heldout, seed), task_lines(behaviour, test, seed)
        for kind, rows in (("pairs", pairs), ("task", task)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{behaviour.name}.{kind}.jsonl").write_text(text, encoding="utf-8")
        report["behaviours"][behaviour.name] = {
            "positive": behaviour.positive,
            "negative": behaviour.negative,
            "neutral": behaviour.neutral,
            "scorer": behaviour.scorer,
            "n_pairs": len(pairs),
            "n_prompts": len(task) - 1,
            "misjudged": misjudged(behaviour, test, seed),
        }
    (folder / "scorers.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report = write(args.corpus, args.folder, args.seed)
    for name, found in report["behaviours"].items():
        sides = "; ".join(
            f"{side}: {one['n']} known, {100 * one['other_side']['value']:.1f}% taken for the other side "
            f"({100 * one['other_side']['low']:.1f} to {100 * one['other_side']['high']:.1f}), "
            f"{100 * one['neither']:.1f}% for neither"
            for side, one in found["misjudged"].items()
        )
        print(f"{name}: {found['n_pairs']} pairs, {found['n_prompts']} prompts; {sides}", file=sys.stderr)


if __name__ == "__main__":
    main()
