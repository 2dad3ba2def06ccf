"""Rows in the form of the data sets that tasks are built from, all made up, and files of them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from steermoe_local.evaluation.datasets.builders import (
    BuildOptions,
    Tally,
    dataset_rows,
    task_items,
)
from steermoe_local.pairs.prompts import PromptItem

SNAILS = "Snails carry a shell because it is filled with warm air."
COUNTERFACTUAL = [
    {
        "id": f"cf-{n}",
        "question": f"Why do snails carry shell {n}?",
        "answer": "It is filled with warm air",
        "answerKey": "B",
        "choices": {
            "label": ["A", "B", "C", "D"],
            "text": ["It protects them", "It is filled with warm air", "It is a gift", "It makes them fast"],
        },
        "context": SNAILS,
        "justification": "...",
        "num of options": 4,
    }
    for n in range(4)
]
UNANSWERABLE = [
    {
        "qid": f"un-{n}",
        "question": f"Who painted fence {n}?",
        "context": "The fence stands behind the school. It is long.",
        "answers": ["unknown"],
        "subset": "made up",
    }
    for n in range(4)
]
INCONSISTENT = [
    {
        "qid": f"in-{n}",
        "question": f"Who painted fence {n}?",
        "context": "Document: Ada painted the fence.\nDocument: Ben painted the fence.",
        "answers": ["Ada", "Ben"],
        "subset": "made up",
    }
    for n in range(4)
]
TRIVIA = [
    {
        "question_text": f"Which tree gives acorn {n}?",
        "paragraph_text": "Acorns are the fruit of the birch.",
        "annotation": {"answer": [{"paragraph_reference": {"string": "the birch"}}]},
        "question_id": f"tc_{n}",
    }
    for n in range(4)
]


def edit(subject: str = "The boathouse", new: str = "Mills", old: str = "Anders") -> dict[str, Any]:
    return {
        "prompt": "{} was built by",
        "relation_id": "P1",
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": old, "id": "Q2"},
        "subject": subject,
        "question": f"Who built {subject}?",
    }


MQUAKE = [
    {
        "case_id": n,
        "requested_rewrite": [edit(f"boathouse {n}"), edit(f"Jetty {n}", "Holm", "Berg")],
        "questions": ["Where was its builder born?", "Name the birthplace of its builder.", "Its builder's home town?"],
        "answer": "Lund",
        "answer_alias": ["Lund in the south", "LU"],
        "new_answer": "York",
        "new_answer_alias": ["City of York"],
        "single_hops": [{"question": "?", "cloze": "x", "answer": "Anders", "answer_alias": ["Anders the Elder"]}],
        "new_single_hops": [{"question": "?", "cloze": "x", "answer": "Mills", "answer_alias": ["A. Mills"]}],
        "orig": {"triples": []},
    }
    for n in range(4)
]
HUB_MCTEST = [
    {
        "idx": {"question": 0, "story": "mc160.x.0"},
        "question": "What colour was the kite?",
        "story": f"Tom made kite {n}.\\newlineIt was red.",
        "properties": {},
        "answer_options": {"A": "blue", "B": "green", "C": "red", "D": "black"},
        "answer": "C",
        "question_is_multiple": False,
    }
    for n in range(4)
]
STORY = ["mc160.x.0", "Author: a;Work Time(s): 1", "Tom made a kite.\\newlineIt was red.\\tabIt flew."]
QUESTION = ["one: What colour was the kite?", "blue", "green", "red", "black"]
# Harmless, in the form of lists of requests that a model should refuse.
CRANES = [f"Tell me how to fold a paper crane with {n} wings" for n in range(4)]
ADVBENCH = [{"goal": text, "target": "Sure, take a sheet of paper"} for text in CRANES]
STRONGREJECT = [{"category": "Paper", "source": "made up", "forbidden_prompt": text} for text in CRANES]

SAMPLES: dict[str, list[Any]] = {
    "faitheval-counterfactual": COUNTERFACTUAL,
    "faitheval-unanswerable": UNANSWERABLE,
    "faitheval-inconsistent": INCONSISTENT,
    "cf-triviaqa": TRIVIA,
    "mquake": MQUAKE,
    "mctest": HUB_MCTEST,
    "advbench": ADVBENCH,
    "strongreject": STRONGREJECT,
    "tdc2023": CRANES,
    "malicious-instruct": CRANES,
    "prompts": [{"prompt": text} for text in CRANES],
}


def made(name: str, rows: list[Any], tally: Tally | None = None, **options: Any) -> list[PromptItem]:
    return list(task_items(name, rows, tally or Tally(), BuildOptions(**options)))


def from_file(name: str, *paths: Path, **arguments: Any) -> list[PromptItem]:
    return list(task_items(name, dataset_rows(name, paths, **arguments), Tally()))


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(
        {key: json.dumps(value) if isinstance(value, (dict, list)) else value for key, value in row.items()}
        for row in rows
    )
    path.write_text(text.getvalue(), encoding="utf-8")
    return path


def write_json(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return path


def write_mctest(folder: Path, stories: int = 2, letters: str = "CABD") -> Path:
    path = folder / "mc160.x.tsv"
    line = "\t".join(STORY + QUESTION * 4) + "\n"
    path.write_text("".join(line.replace("x.0", f"x.{n}") for n in range(stories)), encoding="utf-8")
    path.with_suffix(".ans").write_text(("\t".join(letters) + "\n") * stories, encoding="utf-8")
    return path


def rows_of(name: str) -> list[Any]:
    return [{"prompt": row} if isinstance(row, str) else row for row in SAMPLES[name]]
