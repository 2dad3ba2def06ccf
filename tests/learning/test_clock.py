"""The clock: what it expects, when it stops a step; with a clock of the test's own."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from steermoe_local.evaluation.tasks.neutral_text import Document
from steermoe_local.generation.engine import Engine
from steermoe_local.learning import clock, run
from steermoe_local.learning.clock import STEPS, Clock, Speed, Tokens, Work, expected_seconds
from steermoe_local.learning.learn import learn
from steermoe_local.learning.options import SIZES, Builtin, LearnOptions, LikeUnlike, Sizes
from steermoe_local.learning.speed import measure_speed
from steermoe_local.llama import capi
from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.models.embedded import embedded_model

WORK = Work(30, 32, 32, n_asked=270, n_pairs=94, n_choosing=40, n_heldout=64, asked=40, text=800, draw_text=64)
FAST = Speed(prompt=900, decode=250, scored=600, text=500)  # 1.3B parameters, 400M of them active, on eight cores


class Time:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_expected_seconds() -> None:
    normal = expected_seconds(SIZES["normal"], WORK, FAST)
    assert tuple(normal) == STEPS
    assert all(normal[step] > 0 for step in STEPS)
    slower = expected_seconds(SIZES["normal"], WORK, Speed(*(value / 2 for value in asdict(FAST).values())))
    assert sum(slower.values()) > 1.8 * sum(normal.values())
    given = expected_seconds(SIZES["normal"], replace(WORK, n_asked=0), FAST)
    assert given["answers"] == 0
    assert given["tune"] == normal["tune"]
    generated = expected_seconds(SIZES["normal"], replace(WORK, generated=True), FAST)
    assert generated["confirm"] != normal["confirm"]
    assert expected_seconds(replace(SIZES["normal"], n_candidates=0), WORK, FAST)["attribute"] == 0


def test_the_efforts() -> None:
    """About eight minutes on eight cores for a small model; about a quarter with --quick, and several times as long."""
    quick = replace(WORK, answer=19, written=19, text=300, n_asked=135, n_pairs=47, n_choosing=20, n_heldout=40)
    thorough = replace(WORK, answer=51, written=51, text=2000, n_asked=360, n_pairs=150, n_choosing=80, n_heldout=120)
    normal = sum(expected_seconds(SIZES["normal"], WORK, FAST).values())
    assert 4 * 60 < normal < 16 * 60
    assert 0.1 < sum(expected_seconds(SIZES["quick"], quick, FAST).values()) / normal < 0.5
    assert 2 < sum(expected_seconds(SIZES["thorough"], thorough, FAST).values()) / normal < 16


def test_steps_add_up() -> None:
    time = Time()
    clock = Clock({"detect": 10, "tune": 20}, {"detect": 3}, time)
    clock.begin("detect")
    time.now += 4
    clock.begin("tune")
    time.now += 5
    assert clock.spent["detect"] == 7
    assert clock.elapsed == 12
    assert clock.total == 30
    clock.begin("")
    time.now += 1000
    assert clock.elapsed == 12
    assert not clock.over()


def test_what_a_step_left_is_kept_for_the_last_ones() -> None:
    time = Time()
    clock = Clock({"answers": 10, "detect": 10, "attribute": 20, "tune": 20}, now=time)
    clock.begin("answers")
    time.now += 5
    clock.begin("detect")
    time.now += 5
    clock.begin("attribute")  # ten seconds are left over
    time.now += 9
    assert not clock.over(0.5)
    time.now += 2
    assert clock.over(0.5)
    assert not clock.over()
    time.now += 10
    assert clock.over()


def test_a_slow_step_takes_from_those_behind_it() -> None:
    time = Time()
    clock = Clock({"answers": 10, "attribute": 20, "tune": 20}, now=time)
    clock.begin("answers")
    time.now += 25
    assert clock.over()
    clock.begin("attribute")
    time.now += 9
    assert not clock.over()  # half of its own twenty seconds is its in any case
    time.now += 2
    assert clock.over()


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.7, 3.0])
def test_never_more_than_it_said(factor: float) -> None:
    """Whatever a piece of work takes, steps that can be stopped end the run within twice the time that was said."""
    time = Time()
    expected = expected_seconds(SIZES["normal"], WORK, FAST)
    clock = Clock(expected, now=time)
    stoppable = {"answers": 20, "attribute": 24, "tune": 24, "confirm": 11}  # pieces of work
    for step in STEPS:
        clock.begin(step)
        pieces = stoppable.get(step, 1)
        for _ in range(pieces):
            time.now += factor * expected[step] / pieces
            if step in stoppable and clock.over():
                break
    clock.begin("")
    assert 0.5 * clock.total <= clock.elapsed <= 2 * clock.total


def test_without_an_expectation_nothing_is_stopped() -> None:
    time = Time()
    clock = Clock(now=time)
    clock.begin("tune")
    time.now += 1e6
    assert not clock.over()


def test_what_is_foreseen_shrinks_and_never_grows_beyond_what_was_said() -> None:
    time = Time()
    clock = Clock({"answers": 10, "detect": 10, "attribute": 20, "tune": 20}, now=time)
    clock.begin("answers")
    assert clock.foreseen == 60
    time.now += 4
    clock.begin("detect")
    assert clock.foreseen == 54
    clock.foresee({"detect": 5, "attribute": 90, "tune": 8})
    assert clock.foreseen == 4 + 5 + 20 + 8
    assert clock.total == 60
    time.now += 9
    assert clock.foreseen == 4 + 9 + 20 + 8
    time.now += 1000
    assert clock.foreseen == 60
    clock.begin("")
    assert clock.total == 60


class Ticks:
    """A second passes at each look."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> float:
        self.now += 1
        return float(self.now)


def test_measured_speed() -> None:
    """Tokens over the seconds of the clock that is given."""
    llama = SteeredLlama(embedded_model(), n_ctx=64)
    with Engine(llama, n_ctx=64, n_slots=2, record=False, n_threads=1) as engine:
        prompts = [engine.renderer.render(text) for text in ("one two three four", "five six seven")]
        document = Document(tuple(prompts[0].tokens), 0)
        found = measure_speed(engine, prompts, [document], max_tokens=4, now=Ticks())
        without = measure_speed(engine, prompts, max_tokens=4, now=Ticks())
    llama.close()
    n = sum(len(prompt.tokens) for prompt in prompts)
    assert found.speed.prompt == found.speed.scored == n
    assert found.speed.text == 2 * (len(document.tokens) - 1)  # read twice at once
    assert 0 < found.speed.decode <= 2
    assert len(found.lengths) == 2
    assert all(0 < length <= 4 for length in found.lengths)
    assert without.speed.text == without.speed.scored


CONTRASTS = {"instructions": LikeUnlike("Use digits.", "Use words."), "behaviour": Builtin("digits-words")}


@pytest.mark.parametrize("contrast", CONTRASTS.values(), ids=list(CONTRASTS))
def test_expected_work_is_what_is_computed(
    contrast: LikeUnlike | Builtin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that the model computes in each step, against those that its time was expected of: within twice."""
    counted = dict.fromkeys((*STEPS, ""), 0)
    now = [""]
    expected: list[dict[str, Tokens]] = []
    library, begin, tokens_of = capi.llama_cpp(), Clock.begin, clock.expected_tokens

    def decode(context: Any, batch: Any) -> int:
        counted[now[0]] += batch.n_tokens
        return int(library.llama_decode(context, batch))

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return decode if name == "llama_decode" else getattr(library, name)

    def noted(clock: Clock, step: str) -> None:
        now[0] = step
        begin(clock, step)

    def kept(sizes: Sizes, work: Work) -> dict[str, Tokens]:
        expected.append(tokens_of(sizes, work))
        return expected[-1]

    measure = run.measure_speed

    def unseen(*args: Any, **arguments: Any) -> Any:
        now[0] = ""  # what is measured is no work of the step
        try:
            return measure(*args, **arguments)
        finally:
            now[0] = "answers"

    monkeypatch.setattr(capi, "llama_cpp", Counting)
    monkeypatch.setattr(Clock, "begin", noted)
    monkeypatch.setattr(clock, "expected_tokens", kept)
    monkeypatch.setattr(run, "measure_speed", unseen)
    options = LearnOptions(effort="quick", context={"n_threads": 1})
    result = learn(embedded_model(), "digits", contrast, tmp_path, options=options, now=Time())
    assert result.outcome == "works", result.verdict
    first, last = expected[0], expected[-1]
    assert counted[""]
    asked = isinstance(contrast, LikeUnlike)
    for step in ("detect", "attribute", "tune", "confirm"):  # as foreseen with the pairs at hand
        assert 0.5 < last[step].total / counted[step] < 2, step
    if asked:
        assert 0.5 < first["answers"].total / counted["answers"] < 2
    said = sum(tokens.total for tokens in first.values())
    assert 0.7 < said / sum(counted[step] for step in first) < 2
