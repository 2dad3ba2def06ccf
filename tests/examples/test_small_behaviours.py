"""The pairs, prompts and known answers of the small model, made of a made-up corpus."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from steermoe_local import load_pairs
from steermoe_local.evaluation.tasks.builtin import open_task
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.pairs.prompts import PromptItem
from tests.support.paths import ROOT

LANGUAGES = {
    "en": "The window {n} shows the files that you have opened with this command.",
    "de": "Das Fenster {n} zeigt die Dateien, die Sie mit diesem Befehl geöffnet haben.",
    "fr": "La fenêtre {n} affiche les fichiers que vous avez ouverts avec cette commande.",
    "es": "La ventana {n} muestra los archivos que usted ha abierto con esta orden y no otros.",
    "it": "La finestra {n} mostra i file che avete aperto con questo comando e non gli altri.",
}
PARTS = ("train", "heldout", "test")


def documents() -> Iterator[dict[str, str]]:
    """A page of each kind and language in each part, whose paragraphs have numbers of their own."""
    for index, part in enumerate(PARTS):
        for page in range(3):
            n = 100 * index + 10 * page
            for language, text in LANGUAGES.items():
                prose = [text.format(n=n + i) for i in range(4)]
                counted = "There are always four windows at a time, and three of them are visible."
                blocks = ["# Calc", prose[0], f"    open({n}); close();", prose[1], f"  * item {n} alone", prose[2]]
                blocks += [f"    return {n} + 1;", f"  * another item {n}", "* * *", prose[3]]
                blocks += [f"Page {n}. {counted}"] if language == "en" else [text.format(n=n + 4)]
                yield _document(f"help/p{part}{page}.html/{language}", part, "help", language, blocks)
            manual = [f"NAME\n       tool{n} - shows a window"]
            manual += [
                f"       The option {n + i} opens a window of\n       the files that it is given." for i in range(4)
            ]
            yield _document(f"man/man1/{part}{page}.1/en", part, "man", "en", manual)
            yield _document(
                f"source/{part}{page}.c/c",
                part,
                "code",
                "c",
                [
                    f"int a{n}(void)\n{{\n\tif (opened({n}) && closed({n}))\n\t\tlog_it({n});\n\treturn {n};\n}}",
                    f"int b{n} = {n};",
                ],
            )


def _document(name: str, part: str, kind: str, language: str, blocks: list[str]) -> dict[str, str]:
    return {"id": f"package-{name}", "part": part, "kind": kind, "language": language, "text": "\n\n".join(blocks)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """The modules behaviours and passages of examples/small_moe."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from small_moe import behaviours, passages

    return behaviours, passages


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "corpus.jsonl"
    path.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(corpus: Path) -> Path:
    return make(corpus, corpus.with_name("material"))


def numbers(text: str) -> set[int]:
    """The large numbers of a text, which say which part of the made-up corpus it is of."""
    return {int(found) for found in re.findall("[0-9]+", text) if int(found) > 12}


def make(corpus: Path, folder: Path, *words: str) -> Path:
    command = [sys.executable, "-m", "small_moe.material", str(corpus), str(folder), *words]
    done = subprocess.run(command, cwd=ROOT / "examples", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_forms(small: Any) -> None:
    _, passages = small
    prose = LANGUAGES["en"].format(n=1)
    for text, kind, form in (
        (prose, "help", "prose"),
        ("  * " + prose, "help", "list"),
        ("  12. " + prose, "documentation", "list"),
        ("* * *", "help", "other"),
        ("    if a:\n        b()", "documentation", "code"),
        ("     Part of the Stable ABI.", "documentation", "other"),
        ("## " + prose, "help", "other"),
        ("Name | Meaning of the letters and of all the other signs here\n---|---", "help", "other"),
        ("A short line.", "help", "other"),
        ("       " + prose, "man", "prose"),
        ("       " + prose + "\n           " + prose, "man", "other"),
        ("DESCRIPTION\n       " + prose, "man", "other"),
        ("int main(void)", "code", "code"),
    ):
        assert passages.form_of(text, kind) == form, text


def test_no_word_is_cut(small: Any) -> None:
    _, passages = small
    assert passages.cut("one two three", 9) == "one two"
    assert passages.cut("one two three", 7) == "one two"
    assert passages.cut("one two", 7) == "one two"
    assert passages.cut("onetwothree", 5) == "onetw"


def test_pairs_have_one_prompt_and_come_from_other_pages_than_the_prompts(made: Path, small: Any) -> None:
    behaviours, _ = small
    for behaviour in behaviours.BEHAVIOURS:
        pairs = load_pairs(made / f"{behaviour.name}.pairs.jsonl")
        assert pairs, behaviour.name
        for pair in pairs:
            assert pair.margin_problem() is None
            assert pair.positive.removesuffix(pair.positive_target) == pair.negative.removesuffix(pair.negative_target)
            assert numbers(pair.positive + pair.negative) <= set(range(100, 200)), "of the held-out part alone"
        task = open_task(made / f"{behaviour.name}.task.jsonl")
        assert task.raw
        assert len({item.messages()[-1].content for item in task.items}) == len(task.items)
        assert numbers(" ".join(item.messages()[-1].content for item in task.items)) <= set(range(200, 300)), (
            "of the test part alone"
        )


def test_known_answers_are_scored_as_what_they_are(made: Path) -> None:
    found = json.loads((made / "scorers.json").read_text("utf-8"))["behaviours"]
    assert set(found) == {"german", "french", "spanish", "code", "list", "manual", "digits"}
    for name, behaviour in found.items():
        for side, one in behaviour["misjudged"].items():
            assert one["n"] > 0, (name, side)
            assert one["other_side"]["value"] == 0, (name, side)
            assert one["other_side"]["high"] > 0, "an interval, not a certainty"


def test_errors_are_counted(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer that is wrong is found out."""
    _, passages = small
    from small_moe import material

    found = passages.passages(documents(), "test")
    (code,) = [one for one in material.BEHAVIOURS if one.name == "code"]
    blind = type(code)(**{**vars(code), "options": {"pattern": "no such text"}})
    sides = material.misjudged(blind, found, 0)
    assert sides["code"]["other_side"]["value"] == 1
    assert sides["prose"]["other_side"]["value"] == 0


def test_the_same_seed_gives_the_same_files(made: Path, corpus: Path, tmp_path: Path) -> None:
    again, other = make(corpus, tmp_path / "again"), make(corpus, tmp_path / "other", "--seed", "1")
    names = sorted(path.name for path in made.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in names:
        assert (made / name).read_bytes() == (again / name).read_bytes()
    assert any((made / name).read_bytes() != (other / name).read_bytes() for name in names)


def test_neutral_texts_are_of_neither_side(made: Path) -> None:
    for use, n in (("choose", 100), ("report", 200)):
        code, prose = ((made / f"{name}.{use}.txt").read_text("utf-8") for name in ("code-italian", "prose"))
        assert f"int a{n}(void)" in code
        assert "window" not in code + prose, "no English running text"
        assert "Fenster" in prose
        assert numbers(code + prose) <= set(range(n, n + 100)), "of their own part of the corpus"


def test_first_prompts_are_of_all_groups(made: Path) -> None:
    for name, n in (("german", 3), ("code", 2), ("manual", 2)):
        items = open_task(made / f"{name}.task.jsonl").items[:n]
        assert len({item.extra["group"] for item in items}) == n


@pytest.mark.parametrize("language", ["german", "french", "spanish", "italian"])
def test_languages_are_told_from_english_and_from_each_other(language: str) -> None:
    names = dict(zip(("english", "german", "french", "spanish", "italian"), LANGUAGES.values(), strict=True))
    scorer = make_scorer("language", {"positive": language, "negative": "english"})
    for name, text in names.items():
        expected = name if name in (language, "english") else "ill-formed"
        assert scorer.score(PromptItem("q", "x"), text.format(n=7)).label == expected
