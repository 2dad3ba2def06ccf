"""The clock: what it expects, when it stops a step; with a clock of the test's own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from steermoe_local.generation.engine import Engine
from steermoe_local.learning.clock import STEPS, Clock, Speed, Work, expected_seconds, measure_speed
from steermoe_local.learning.options import SIZES
from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.models.embedded import embedded_model

WORK = Work(prompt=30, answer=32, n_asked=270, n_pairs=94, n_choosing=40, n_heldout=64)
FAST = Speed(prompt=900, decode=250)  # 1.3B parameters, 400M of them active, on eight cores


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
    slower = expected_seconds(SIZES["normal"], WORK, Speed(FAST.prompt / 2, FAST.decode / 2))
    assert sum(slower.values()) > 1.8 * sum(normal.values())
    given = expected_seconds(SIZES["normal"], replace(WORK, n_asked=0), FAST)
    assert given["answers"] == 0
    assert given["tune"] == normal["tune"]
    generated = expected_seconds(SIZES["normal"], replace(WORK, generated=True), FAST)
    assert generated["confirm"] > normal["confirm"]
    assert expected_seconds(replace(SIZES["normal"], n_candidates=0), WORK, FAST)["attribute"] == 0


def test_the_efforts() -> None:
    """About eight minutes on eight cores for a small model; about a quarter with --quick, and several times as long."""
    quick = replace(WORK, answer=19, n_asked=135, n_pairs=47, n_choosing=20, n_heldout=40)
    thorough = replace(WORK, answer=51, n_asked=360, n_pairs=150, n_choosing=80, n_heldout=120)
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


def test_a_step_may_take_what_others_left() -> None:
    time = Time()
    clock = Clock({"answers": 10, "detect": 10, "attribute": 20, "tune": 20}, now=time)
    clock.begin("answers")
    time.now += 5
    clock.begin("detect")
    time.now += 5
    clock.begin("attribute")  # ten seconds are left over
    time.now += 19
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


def test_measured_speed() -> None:
    """Tokens over the seconds of the clock that is given: each look at it is a second later."""
    ticks = iter(range(10_000))
    llama = SteeredLlama(embedded_model(), n_ctx=64)
    with Engine(llama, n_ctx=64, n_slots=2, record=False, n_threads=1) as engine:
        prompts = [engine.renderer.render(text) for text in ("one two three four", "five six seven")]
        speed = measure_speed(engine, prompts, now=lambda: float(next(ticks)))
    llama.close()
    assert speed.prompt == sum(len(prompt.tokens) for prompt in prompts)
    assert 0 < speed.decode <= 2
