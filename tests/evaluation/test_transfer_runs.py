"""Runs of `transfer` that are interrupted or refused, what they use again, and the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import UsageError
from steermoe_local.errors import ChoiceError, ResourceError
from steermoe_local.evaluation.measuring.evaluator import Evaluator, EvaluatorSettings
from steermoe_local.evaluation.measuring.json_values import from_plain, plain
from steermoe_local.evaluation.measuring.opening import open_evaluator
from steermoe_local.evaluation.reports.transfer import conclusions, document, draw_transfer, table
from steermoe_local.evaluation.studies.transfer import quantize
from steermoe_local.evaluation.studies.transfer import transfer as module
from steermoe_local.evaluation.studies.transfer.results import Column, MapEffect, Transfer
from steermoe_local.evaluation.studies.transfer.transfer import OpenEvaluator, transfer
from steermoe_local.evaluation.tasks.builtin import builtin_task
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.pairs.pairs import Pair
from steermoe_local.steering.steering import Steering
from tests.support.scored_maps import scored_map
from tests.support.transfer_run import QUANTS, TransferRun, interval


@pytest.fixture
def done(transferred: TransferRun) -> TransferRun:
    return transferred


@pytest.fixture
def pairs(transferred: TransferRun) -> list[Pair]:
    return transferred.pairs


@pytest.fixture
def steering(transferred: TransferRun) -> Steering:
    return transferred.steering


@pytest.fixture
def evaluators(transferred: TransferRun) -> OpenEvaluator:
    return transferred.evaluators


#
# interrupted, and what else can go wrong
#


def stable(column: Column) -> dict[str, Any]:
    """A column without what differs from run to run."""
    data = column.to_dict(items=True)
    data["file"]["seconds"] = None
    del data["own_map_sha256"]  # the map says when it was made
    return data


def test_columns_survive_a_file(done: TransferRun) -> None:
    for column in (done.found.base, *done.found.columns):
        data = json.loads(json.dumps(column.to_dict(items=True)))
        assert Column.from_dict(data, column.file.path.parent) == column
    text = json.dumps(done.found.to_dict())
    assert str(done.folder) not in text, "no folders of this machine"
    assert '"items"' not in text


def test_an_interrupted_run_goes_on(
    done: TransferRun, tiny_path: Path, steering: Steering, evaluators: OpenEvaluator, pairs: list[Pair], tmp_path: Path
) -> None:
    kept: dict[str, Column] = {}
    opened: list[str] = []

    @contextmanager
    def counting(path: Path, name: str) -> Iterator[Evaluator]:
        opened.append(name)
        with evaluators(path, name) as evaluator:
            yield evaluator

    def keep(column: Column) -> None:
        kept[column.name] = column
        if column.name == "Q8_0":
            raise KeyboardInterrupt

    def go(on_column: Callable[[Column], None]) -> Transfer:
        return transfer(
            tiny_path,
            steering,
            counting,
            folder=tmp_path / "models",
            quants=QUANTS,
            pairs=pairs,
            keep=False,
            n_threads=1,
            done=kept,
            on_column=on_column,
        )

    with pytest.raises(KeyboardInterrupt):
        go(keep)
    assert opened == ["base", "Q8_0"]
    assert not (tmp_path / "models").exists(), "a quantization that nobody wanted to keep"
    kept = {name: Column.from_dict(json.loads(json.dumps(c.to_dict(items=True))), tmp_path) for name, c in kept.items()}
    opened.clear()
    again: list[str] = []
    found = go(lambda column: again.append(column.name))
    assert (opened, again) == (["base", "Q2_K"], ["Q2_K"])
    for name in ("base", *QUANTS):
        assert stable(found.column(name)) == stable(done.found.column(name))
    assert not (tmp_path / "models").exists()


def test_what_is_there_is_used(done: TransferRun, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("quantized again")

    monkeypatch.setattr(quantize, "quantize_file", refuse)
    columns = {"base": done.found.base}
    measured: list[str] = []

    def column(_: Any, _evaluator: Any, name: str, file: Any, *__: Any) -> Column:
        measured.append(name)
        assert file.seconds is None
        return replace(done.found.column(name), file=file)

    monkeypatch.setattr(module._Study, "column", column)
    steering = Steering.open(map_file=map_path("digits-words"), activate=2, deactivate=2)
    task = builtin_task("digits-words").first(1)
    arguments: dict[str, Any] = {
        "neutral": None,
        "benign": None,
        "settings": EvaluatorSettings(context={"n_threads": 1}),
    }
    found = transfer(
        tiny_path,
        steering,
        lambda path, _: open_evaluator(path, task, **arguments),
        folder=done.folder,
        quants=["q8_0", "Q8_0"],
        done=columns,
        keep=True,
    )
    assert measured == ["Q8_0"], "named twice, measured once"
    assert done.path("Q8_0").exists()
    assert "not made" in found.warnings[0]


def test_pairs_that_are_not_the_maps(
    done: TransferRun, tiny_path: Path, evaluators: OpenEvaluator, steering: Steering, pairs: list[Pair]
) -> None:
    columns = {column.name: column for column in (done.found.base, *done.found.columns)}

    def warnings(pairs: list[Pair]) -> tuple[str, ...]:
        options: dict[str, Any] = {"folder": done.folder, "quants": QUANTS, "done": columns}
        return transfer(tiny_path, steering, evaluators, pairs=pairs, **options).warnings

    assert warnings(pairs) == ()
    (warning,) = warnings(pairs[:-1])
    assert warning.startswith("the pairs are not")


def test_an_own_map_that_cannot_steer(
    done: TransferRun,
    tiny_path: Path,
    steering: Steering,
    evaluators: OpenEvaluator,
    pairs: list[Pair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is reported, and does not end the run."""
    real = module.both_ways

    def both_ways(choice: Steering, identity: Any) -> Any:
        if choice.expert_map is not steering.expert_map:
            raise ChoiceError("layer 3: deactivating 9 would leave too few")
        return real(choice, identity)

    monkeypatch.setattr(module, "both_ways", both_ways)
    columns = {"base": done.found.base}
    options: dict[str, Any] = {"folder": done.folder, "quants": ["Q8_0"], "done": columns, "n_agreement": 5}
    found = transfer(tiny_path, steering, evaluators, pairs=pairs, **options)
    (column,) = found.columns
    assert column.notes == ("its own map cannot be steered by: layer 3: deactivating 9 would leave too few",)
    assert column.own_effect is column.own_gain is None
    assert column.map is not None
    assert column.effect.effects == done.found.column("Q8_0").effect.effects
    assert column.routing is not None
    assert column.routing.n_tokens == 5
    assert "deactivating 9" in document(found).markdown()


def test_own_maps_have_no_effects_to_choose_by(
    done: TransferRun, tiny_path: Path, steering: Steering, evaluators: OpenEvaluator, pairs: list[Pair]
) -> None:
    """The map's choice by effect is measured on every model; a model's own map of the pairs is only compared."""
    assert steering.expert_map is not None
    scored = replace(steering.expert_map, effects=scored_map().effects)
    by_effect = steering.changed(expert_map=scored, rank="effect", cap=3.0)
    columns = {"base": done.found.base}
    options: dict[str, Any] = {"folder": done.folder, "quants": ["Q8_0"], "done": columns, "n_agreement": 5}
    found = transfer(tiny_path, by_effect, evaluators, pairs=pairs, **options)
    (column,) = found.columns
    (note,) = column.notes
    assert note.startswith("its own map cannot be steered by: rank effect: ")
    assert column.map is not None
    assert (found.provenance["steering"]["rank"], found.provenance["steering"]["cap"]) == ("effect", 3.0)
    assert "by effect" in document(found).markdown()


def test_refused_before_anything_is_made(
    tiny_path: Path, steering: Steering, evaluators: OpenEvaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(choice: Steering = steering, **options: Any) -> None:
        transfer(tiny_path, choice, evaluators, **{"folder": tmp_path / "models", "quants": ["Q8_0"]} | options)

    monkeypatch.setattr(module.Quantizer, "make", lambda *_: pytest.fail("quantized"))
    with pytest.raises(UsageError, match="'Q9'"):
        attempt(quants=["Q8_0", "Q9"])
    with pytest.raises(UsageError, match="IQ1_S"):
        attempt(quants=["IQ1_S"])
    with pytest.raises(UsageError, match="quantizations"):
        attempt(quants=[])
    with pytest.raises(UsageError, match="n_agreement"):
        attempt(n_agreement=0)
    with pytest.raises(UsageError, match=r"ready: .*--map"):
        attempt(Steering("ready", bias=steering.build()))
    assert steering.expert_map is not None
    for sign in (-1, 1):  # one cannot be carried out as it is, the other not in reverse
        flat = replace(steering.expert_map, rd=np.full((5, 24), sign / 10), a1=None, a2=None)
        with pytest.raises(ChoiceError, match=r"deactivating .* the 4 experts"):
            attempt(steering.changed(expert_map=flat, deactivate=120))
    monkeypatch.setattr(quantize.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(ResourceError, match="Q8_0"):
        attempt()
    assert not (tmp_path / "models").exists()


#
# words and pictures
#


def column(
    done: TransferRun, name: str, effect: float, change: float | None = None, gain: float | None = None
) -> Column:
    """A column with a swing of the test's choice."""
    real = done.found.column("Q8_0")
    made = replace(
        real.effect,
        effects={**real.effect.effects, "swing": interval(effect)},
        change=None if change is None else interval(change),
    )
    file = replace(real.file, file_type=name, n_fallback=0, fallback_share=0.0)
    return replace(real, name=name, file=file, effect=made, own_gain=None if gain is None else interval(gain))


def told(done: TransferRun, base: float, *columns: Column) -> str:
    return " ".join(conclusions(replace(done.found, base=column(done, "base", base), columns=columns)))


def test_conclusions_say_what_the_intervals_say(done: TransferRun) -> None:
    make = column
    words = told(done, 0.8, make(done, "A", 0.7, -0.1), make(done, "B", 0.3, -0.5, 0.4), make(done, "C", 0.05, -0.75))
    assert "keeps its swing (same sign, 95% interval without 0) on 2 of 3 quantizations (A, B)." in words
    assert "It is smaller than on the base (interval of the difference without 0) on B, C." in words
    assert "larger" not in words
    assert "A map made on the quantization itself does more than the base's on B." in words
    assert "milder" not in words
    assert "as large as it can be" not in words
    assert "as large as it can be" in told(done, -1.0, make(done, "A", -1.0, 0.0))
    # a map whose positive side the task counts as its negative one
    words = told(
        done, -0.8, make(done, "A", -0.2, 0.6, -0.3), make(done, "B", -1.0, -0.2, 0.2), make(done, "C", 0.5, 1.3)
    )
    assert "on 2 of 3 quantizations (A, B)." in words
    assert "It is smaller than on the base (interval of the difference without 0) on A, C." in words
    assert "It is larger than on the base (interval of the difference without 0) on B." in words
    assert "itself does more than the base's on A and does less on B." in words
    assert "no effect that could carry over" in told(done, 0.05, make(done, "A", 0.9))
    assert "is not told from the base's on any of them" in told(done, 0.8, make(done, "A", 0.8, 0.0, 0.0))
    fallen = make(done, "A", 0.8, 0.0)
    fallen = replace(fallen, file=replace(fallen.file, n_fallback=5, fallback_share=0.2))
    assert "on A rows that do not fit its blocks got another type (up to 20% of the weights, A)" in told(
        done, 0.8, fallen
    )


def test_the_table(done: TransferRun) -> None:
    found = table(done.found)
    assert [row[0] for row in found.rows] == ["base (F16)", *QUANTS]
    cells = dict(zip(found.header, found.rows[2], strict=True))
    real = done.found.column("Q2_K")
    assert real.routing is not None
    assert real.map is not None
    assert cells["same sets"] == f"{real.routing.same_sets:.1%}"
    assert cells["RD Pearson"] == f"{real.map.pearson:.3f}"
    assert cells["bits/weight"] == f"{real.file.bits_per_weight:.2f}"
    bare = [replace(c, map=None, own_effect=None, perplexity=None) for c in (done.found.base, *done.found.columns)]
    header = table(replace(done.found, base=bare[0], columns=tuple(bare[1:]))).header
    assert not {"RD Pearson", "by own map", "perplexity"} & set(header), "columns of nothing"


def test_the_report(done: TransferRun) -> None:
    text = document(done.found, "steermoe transfer -m tiny", ["transfer.png"]).markdown()
    assert text.startswith("# digits-words over quantizations of tiny-moe.gguf\n")
    assert "```sh\nsteermoe transfer -m tiny\n```" in text
    assert "![transfer.png](transfer.png)" in text
    assert str(done.folder) not in text
    hostile = {**done.found.provenance["steering"], "name": "a | b\n# <script>"}
    found = replace(done.found, provenance={**done.found.provenance, "steering": hostile})
    assert "<script>" not in document(found).markdown()
    assert "\n# <" not in document(found).markdown()


def test_the_picture(done: TransferRun, tmp_path: Path) -> None:
    one, again, bare_one = (tmp_path / name for name in ("a.svg", "b.svg", "c.png"))
    draw_transfer(done.found, [one])
    draw_transfer(done.found, [again])
    assert one.read_bytes() == again.read_bytes()
    bare = [
        replace(c, map=None, own_effect=None, own_gain=None, perplexity=None, routing=None, text=None)
        for c in (done.found.base, *done.found.columns)
    ]
    draw_transfer(replace(done.found, base=bare[0], columns=tuple(bare[1:])), [bare_one])
    assert bare_one.read_bytes().startswith(b"\x89PNG")


def test_a_preset_has_no_reverse(done: TransferRun) -> None:
    """Then the effect to compare is the one towards."""
    effect = done.found.base.effect
    one = replace(effect, effects={"towards": effect.effects["towards"]}, headline="towards")
    assert one.effect == effect.effects["towards"]
    found = replace(done.found, base=replace(done.found.base, effect=one), columns=())
    assert "towards" in table(found).header
    assert from_plain(MapEffect, json.loads(json.dumps(plain(one)))) == one
