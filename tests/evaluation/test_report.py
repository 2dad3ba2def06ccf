"""Reports in Markdown and pictures of an evaluation; texts from models and files must not break either."""

from __future__ import annotations

import builtins
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import UsageError
from steermoe_local.evaluation.measuring.measurements import Measurement
from steermoe_local.evaluation.measuring.side_effects import fluency
from steermoe_local.evaluation.metrics.intervals import difference, rate
from steermoe_local.evaluation.reports.document import Table, escape, markdown_table
from steermoe_local.evaluation.reports.evaluation import document, draw_effect, examples, statistics, tables
from steermoe_local.evaluation.reports.figure import missing_matplotlib, plain
from steermoe_local.evaluation.studies.controls.controls import ControlResult
from steermoe_local.evaluation.studies.evaluate import Evaluation, Side
from steermoe_local.evaluation.studies.signatures import Signature
from tests.evaluation.test_side_effects import answer, measurement

HOSTILE = "a | b\n# c <script>alert(1)</script> [x](y) ![z](w) `code` *s* _u_ $e^2$ \x1b[31m \u202e end"


def made(*values: list[float], **fields: Any) -> Evaluation:
    """An evaluation of three sides by their values."""
    names = ("unsteered", "towards", "away")[: len(values)]
    measured = [
        measurement(
            *(
                answer(f"item-{i}", value, text=f"{name} {i}", label="positive" if value else "negative")
                for i, value in enumerate(row)
            )
        )
        for name, row in zip(names, values, strict=True)
    ]
    sides = tuple(_side(name, found, measured[0]) for name, found in zip(names, measured, strict=True))
    effects = {name: difference(found.values, measured[0].values) for name, found in zip(names, measured, strict=True)}
    del effects["unsteered"]
    if "away" in effects:
        effects["swing"] = difference(measured[1].values, measured[2].values)
    facts: dict[str, Any] = {
        "task": "numbers",
        "positive": "digits",
        "negative": "words",
        "sides": sides,
        "effects": effects,
        "controls": (),
        "signatures": (),
        "steering": {"name": "digits-words", "map": "map.json", "map_sha256": "ab" * 32, "side": "digits"},
        "provenance": {
            "model": {"file": "model.gguf", "quantization": "Q4_K_M"},
            "settings": {"sampling": {"temperature": 0}, "seeds": [0], "task_sha256": "cd" * 32},
            "seed": 0,
            "created": "2026-01-01T00:00:00Z",
            "tool": "steermoe-local 1",
        },
        "measurements": tuple(measured),
    }
    return Evaluation(**facts | fields)


def _side(name: str, found: Measurement, base: Measurement) -> Side:
    labels = {"positive": found.rate, "negative": 1 - found.rate}
    return Side(name, name, 2, 3, rate(found.values), labels, fluency(found, base))


BASE = [[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]]


def test_a_report() -> None:
    controls = (
        ControlResult.of("random", [0.1, -0.2], ["1", "2"], 0.75),
        ControlResult.of("shuffled", [], [], 0.75, note="no pairs"),
    )
    text = document(made(*BASE, controls=controls), "steermoe eval -m model.gguf -o OUT", ["effect.png"]).markdown()
    assert text.startswith("# digits-words on model.gguf\n")
    assert "4 items of the task numbers, answered greedily." in text
    assert "Does map.json steer the model (Q4\\_K\\_M) to its side digits?" in text
    assert "| towards | 2 / 3 | 100% (51 to 100) |" in text
    assert "| towards - away | +75 (+9 to +95) |" in text
    assert "| random | 2 | 15 (10 to 20) | 100% | 0.333 |  |" in text
    assert "| shuffled | 0 | - | - | - | no pairs |" in text
    assert "(fluency collapse, over-refusal" in text
    assert "![effect.png](effect.png)" in text
    assert "```sh\nsteermoe eval -m model.gguf -o OUT\n```" in text
    assert "SHA-256: task cdcdcdcdcdcd, map abababababab." in text
    assert len(text.splitlines()) < 70


def test_signatures_are_reported_with_their_rules() -> None:
    signature = Signature("no effect", "swing", "the interval of the effect reaches 0", "+1 (-3 to +5)")
    evaluation = made(*BASE, signatures=(signature,))
    text = document(evaluation).markdown()
    assert "- no effect (swing): +1 (-3 to +5). Rule: the interval of the effect reaches 0." in text
    assert statistics(evaluation).endswith("; found: no effect")
    assert "How to repeat" in text
    assert "```" not in text


def test_the_statistics() -> None:
    assert statistics(made(*BASE)) == "swing +75 (+9 to +95) on 4 items; no failure signature"
    control = ControlResult.of("random", [0.1, 0.9], ["1", "2"], 0.75)
    assert "; larger than 50% of 2 draws of random experts; " in statistics(made(*BASE, controls=(control,)))
    assert statistics(made(*BASE[:2])).startswith("towards +50 (")


def test_tables_of_what_was_not_measured() -> None:
    found = tables(made(*BASE[:2]))
    assert [table.title for table in found] == ["Rates", "Effects", "Fluency"]
    assert [row[0] for row in found[1].rows] == ["towards - unsteered"]
    assert found[2].rows[0][1:5] == ("-", "-", "-", "-")
    assert all(len(row) == len(table.header) for table in found for row in table.rows)


def test_examples_are_those_that_differ() -> None:
    values = [[0.0] * 9, [0.0] * 7 + [1.0, 1.0], [0.0] * 9]
    table = examples(made(*values))
    assert [row[0] for row in table.rows] == ["item-0", "item-1", "item-7", "item-8"]
    assert table.rows[2][1:] == ("unsteered 7 [negative]", "towards 7 [positive]", "away 7 [negative]")


def test_hostile_texts() -> None:
    evaluation = made(*BASE)
    first = evaluation.measurements[0]
    long = replace(first.answers[0], text=HOSTILE * 20, label="<b>", item="x|y")
    blank = replace(first.answers[1], text=" \n ")
    measured = replace(first, answers=(long, blank, *first.answers[2:]))
    evaluation = replace(
        evaluation,
        measurements=(measured, *evaluation.measurements[1:]),
        positive=HOSTILE,
        task=HOSTILE,
        steering={"name": HOSTILE, "map": HOSTILE, "side": HOSTILE},
    )
    text = document(evaluation).markdown()
    assert "<script>" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "(empty)" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    columns = {line.replace("\\|", "").count("|") for line in table if "…" in line or "item-2" in line}
    assert columns == {5}, "no text adds a column"
    assert max(map(len, table)) < 800


@given(st.text(max_size=60))
def test_escaped_text_is_one_inert_line(text: str) -> None:
    found = escape(text)
    assert "\n" not in found
    assert "<" not in found
    row = markdown_table(Table("", ("a",), ((text,),))).splitlines()[-1]
    assert row.replace("\\\\", "").replace("\\|", "").count("|") == 2


def test_an_escape_by_hand() -> None:
    assert escape("a|b *c* <i> 5_5 #1\n&") == r"a\|b \*c\* &lt;i&gt; 5\_5 \#1 &amp;"
    assert escape("> 31% -> 84%") == "&gt; 31% -> 84%"


#
# pictures
#


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    control = ControlResult.of("random", [0.1, -0.2, 0.0], ["1", "2", "3"], 0.75)
    empty = ControlResult.of("bottom", [], [], 0.75)
    evaluation = made(*BASE, controls=(control, empty), positive=HOSTILE)
    paths = [tmp_path / "a.png", tmp_path / "a.svg"]
    draw_effect(evaluation, paths)
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(paths[1]).getroot().tag.endswith("svg")
    before = [path.read_bytes() for path in paths]
    draw_effect(evaluation, paths)
    assert [path.read_bytes() for path in paths] == before, "the same every time"
    draw_effect(made(*BASE[:2]), [tmp_path / "b.svg"])
    assert (tmp_path / "b.svg").stat().st_size > 1000
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / "no"))):
        draw_effect(evaluation, [tmp_path / "no" / "a.png"])


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'steermoe-local[plot]'" in missing_matplotlib()
    with pytest.raises(UsageError, match="no pictures"):
        draw_effect(made(*BASE), [tmp_path / "a.png"])


def test_names_in_pictures() -> None:
    assert plain("a\nb $x$") == r"a b \$x\$"
    assert len(plain("x" * 500)) == 80
