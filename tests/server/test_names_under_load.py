"""Names that change hands under load: no answer is steered by anything but what its request named."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.alone import Alone
from tests.support.names_history import Change, Choice, Content, History
from tests.support.names_in_use import (
    CHOICES,
    END,
    MAX_TOKENS,
    QUESTIONS,
    NamesClient,
    Records,
    Use,
    Verdict,
    judge,
    together,
)
from tests.support.serving import Process, serving

N_CLIENTS, N_STEPS = 8, 60
N_LOADS = 10  # at most, until a broken cache is seen
F32 = ("--temp", 0, "-ctk", "f32", "-ctv", "f32")
TINY_NAME = ("-a", "tiny")


@pytest.fixture(scope="module")
def alone(tiny_f32_path: Path) -> Iterator[Alone]:
    with Alone(tiny_f32_path) as found:
        yield found


def used(server: Process, seed: int, n_steps: int = N_STEPS) -> Records:
    """What some clients saw, which change and use the same names at once."""
    records = Records()

    def run(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            one = NamesClient(client, 1000 * seed + number, records)
            for _ in range(n_steps):
                one.step()

    together([lambda n=n: run(n) for n in range(N_CLIENTS)])
    return records


@pytest.mark.parametrize("parallel", [1, 3, 8])
def test_each_answer_is_the_one_of_the_bias_that_was_named(parallel: int, tiny_f32_path: Path, alone: Alone) -> None:
    with serving(*F32, *TINY_NAME, model=tiny_f32_path, parallel=parallel) as server:
        records = used(server, parallel)
    verdict = judge(records, alone)
    assert not verdict.wrong, "\n".join(verdict.wrong[:5])
    counts = verdict.counts
    for kind in ("chat", "text", "response"):
        assert counts[kind] > N_CLIENTS
        assert counts[f"{kind}, given up"], "the clients give up nothing"
    assert counts["status 404"], "no name was missing"
    assert counts["status 400"], "no bias file was asked for other numbers"
    assert counts["near a tie"] < counts["chat"] + counts["text"]


#
# whether the test would see it
#

BROKEN = {
    "biases by name": """
from steermoe_local.steering.steering import Steering
Steering.content = property(lambda self: (self.name,))
""",
    "biases by numbers alone": """
from steermoe_local.steering.steering import Steering
content = Steering.content.fget
Steering.content = property(lambda self: content(self)[1:] or content(self))
""",
    "native biases by number of experts": """
from steermoe_local.llama import steered_llama
built = {}
def native_bias(bias):
    return built.setdefault((bias.n_active, bias.mode), steered_llama._build(bias))
from steermoe_local.generation import context
context.native_bias = native_bias
""",
    "tokens of any steering are used": """
from steermoe_local.generation import slots
slots._key = lambda bias: None
""",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_key_is_seen(what: str, tiny_f32_path: Path, alone: Alone) -> None:
    """The same load on servers whose caches have keys that say too little."""
    program = [sys.executable, "-c", f"{BROKEN[what]}\nfrom steermoe_local.cli import main\nmain()", "serve"]
    with serving(*F32, *TINY_NAME, model=tiny_f32_path, command=program) as server:
        # chance decides what meets what: as long as nothing was seen, a load of another seed
        seen = any(judge(used(server, seed, 25), alone).wrong for seed in range(N_LOADS))
    assert seen


FIRST, SECOND = Content(CHOICES[0], True), Content(CHOICES[1], False)


@pytest.mark.parametrize(
    ("start", "end", "possible"),
    [
        (0, 1, {None}),
        (1, 4, {None, FIRST}),
        (4, 5, {FIRST}),
        (5, 6, {FIRST}),
        (6, 6.5, {FIRST, SECOND}),
        (6, 9.5, {FIRST, SECOND, None}),
        (8, 8.5, {SECOND}),
        (9, 9.5, {SECOND, None}),
        (20, 21, {None}),
    ],
)
def test_what_a_name_may_have_been(start: float, end: float, possible: set[Content | None]) -> None:
    changes = [Change("a", 2, 3, FIRST), Change("a", 6, 7, SECOND), Change("a", 9, 10, None)]
    changes += [Change("b", 0, 1, SECOND)]
    assert History(changes).possible("a", start, end) == possible


def test_changes_at_the_same_time() -> None:
    """Whichever was last, of two that overlap; one that ended before another began is gone."""
    third = Content(Choice("document-memory", 1, 1), True)
    changes = [Change("a", 1, 2, third), Change("a", 3, 6, FIRST), Change("a", 4, 5, SECOND)]
    assert History(changes).possible("a", 7, 8) == {FIRST, SECOND}
    assert History(changes).possible("a", 2.5, 2.8) == {third}
    assert History([]).possible("a", 7, 8) == {None}


def test_an_answer_of_another_bias_is_seen(alone: Alone) -> None:
    text = alone.chat([{"role": "user", "content": QUESTIONS[3]}], CHOICES[3].bias, MAX_TOKENS, [END]).text

    def verdict(choice: Choice, told: Choice, text: str, whole: bool = True) -> Verdict:
        use = Use(0, 1, None, choice, 200, None, "chat", QUESTIONS[3], told.bias.key, text, whole)
        return judge(Records([use]), alone)

    assert not verdict(CHOICES[3], CHOICES[3], text).wrong
    assert not verdict(CHOICES[3], CHOICES[3], text[:5], whole=False).wrong
    assert verdict(CHOICES[3], CHOICES[3], text[:5]).wrong
    assert verdict(CHOICES[3], CHOICES[3], text[1:5], whole=False).wrong
    assert verdict(CHOICES[5], CHOICES[3], text).wrong
    assert verdict(CHOICES[5], CHOICES[5], text).wrong
