"""Write the behaviours that ship (steermoe_local/behaviours/) from the hand-written texts in material/.

    python examples/behaviours/make.py [--check]

Everything is deterministic: the same material gives the same bytes. The labelled answers are copied as they are, and
the error rate of each scorer on them is measured and written. All text is this project's own, licence MIT.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from builders import BUILDERS  # noqa: E402
from common import lines  # noqa: E402
from steermoe_local.evaluation.tasks.builtin import side_of  # noqa: E402
from steermoe_local.evaluation.tasks.scorers import make_scorer  # noqa: E402
from steermoe_local.pairs.prompts import PromptItem  # noqa: E402

FOLDER = HERE.parent.parent / "steermoe_local" / "behaviours"
FACTS: dict[str, dict[str, Any]] = tomllib.loads((HERE / "facts.toml").read_text("utf-8"))


def files() -> dict[str, str]:
    """Every file, by its path below steermoe_local/behaviours, and its text."""
    found = {"neutral-questions.txt": "".join(f"{question}\n" for question in neutral_questions())}
    for name, facts in FACTS.items():
        built = BUILDERS[name]()
        labelled = labelled_answers(name)
        wrong = errors(facts["scorer"], facts["options"], labelled)
        facts = {
            **{key: facts[key] for key in ("title", "positive", "negative", "about", "like", "unlike")},
            "one_way": facts.get("one_way", False),
            **{key: facts[key] for key in ("scorer", "options", "max_tokens")},
            "error_rate": round(len(wrong) / len(labelled), 4),
            "n_labelled": len(labelled),
            "n_test": sum(row["split"] == "test" for row in labelled),
            "n_test_errors": sum(row["split"] == "test" for _, row in wrong),
        }
        found[f"{name}/behaviour.json"] = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
        found[f"{name}/pairs.jsonl"] = rows(pair(name, number, *one) for number, one in enumerate(built.pairs, 1))
        found[f"{name}/heldout.jsonl"] = rows(
            {"id": f"{name}-heldout-{number:03}", **item} for number, item in enumerate(built.heldout, 1)
        )
        found[f"{name}/labelled.jsonl"] = rows(labelled)
    return found


def neutral_questions() -> list[str]:
    """Questions of the bank and more, none of them a held-out prompt."""
    return [*(row.split(" | ")[0] for row in lines("bank.txt")), *lines("neutral-more.txt")]


def pair(name: str, number: int, prompt: str, positive: str, negative: str) -> dict[str, Any]:
    """The line of a pair: one prompt, two answers."""

    def side(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    return {
        "id": f"{name}-{number:03}",
        "positive": side(positive),
        "negative": side(negative),
        "positive_target": positive,
        "negative_target": negative,
    }


def labelled_answers(name: str) -> list[dict[str, Any]]:
    """The labelled answers of a behaviour: of lines "label | question | reply", with further fields as JSON.

    "\\n" in a reply is a line break. The rules of the scorers were written with the part "dev" in view; no rule was
    changed for what is in "test".
    """
    names = {"+": "positive", "-": "negative", "?": "ill-formed"}
    found: list[dict[str, Any]] = []
    for part, file in (("dev", f"labelled/{name}.txt"), ("test", f"labelled/{name}.test.txt")):
        for number, line in enumerate(lines(file), 1):
            label, prompt, reply, *more = line.split(" | ", 3)
            row = {"id": f"{name}-{part}-{number:03}", "split": part, "prompt": prompt}
            row |= json.loads(more[0]) if more else {}
            found.append({**row, "reply": reply.replace("\\n", "\n"), "label": names[label]})
    return found


def errors(scorer: str, options: dict[str, Any], labelled: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(side that the scorer finds, row) of each answer for which it is not the labelled one."""
    made = make_scorer(scorer, options)
    found = []
    for row in labelled:
        extra = {key: value for key, value in row.items() if key not in ("id", "prompt")}
        side = side_of(made.score(PromptItem(row["id"], row["prompt"], extra=extra), row["reply"]))
        if side != row["label"]:
            found.append((side, row))
    return found


def rows(values: Any) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def main(arguments: list[str]) -> int:
    """Write the files; with --check, say which are not as they would be written."""
    different = []
    for name, text in files().items():
        path = FOLDER / name
        if path.is_file() and path.read_text("utf-8") == text:
            continue
        different.append(name)
        if arguments != ["--check"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8", newline="\n")
    print("\n".join(different) or "all as they are written")
    return int(arguments == ["--check"] and bool(different))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
