"""Names of plans that change hands while clients use them: every answer is that of one plan, as a whole."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.low_level import F32
from tests.support.names_history import Change, Content, History
from tests.support.running_server import Running, running
from tests.support.steered_server import messages

QUESTIONS = ("Please count starting at eleven until fifteen.", "Add 4 and 6.", "Tell me about the sea.")
CONTENTS = (
    ("answer: digits-words +8 -8",),
    ("prompt: digits-words +8 -8", "answer: document-memory +2 -4"),
    ("answer every 2: digits-words +2 -8", "all: document-memory +4 -4"),
    ("answer when entropy > 0.3: digits-words +8 -8",),
    ("answer when digits-words > -0.3 over prompt: digits-words +8 -8", "all: digits-words +2 -2 reverse"),
    ("answer[0:2]: digits-words +8 -8 reverse", "answer after ,: document-memory +4 -4"),
)
NAMES = ("a", "b")
N_CLIENTS, N_STEPS = 6, 40

Told = tuple[Any, ...]


def told(body: dict[str, Any]) -> Told:
    choice, steering = body["choices"][0], body["steering"]
    facts = tuple(steering["rules"]), steering["plan_sha256"], steering["bias_sha256"], steering["n_steered"]
    return *facts, choice["message"]["content"], tuple(choice["token_rules"])


def asked(question: str, steering: Any) -> dict[str, Any]:
    marks = {"return_steered": True, "return_tokens": True, "max_tokens": 16}
    return {"messages": messages(question), "steering": steering} | marks


class _Client:
    def __init__(self, server: Running, seed: int) -> None:
        self.rng = random.Random(seed)
        self.uses: list[tuple[float, float, str | None, str, int, Any]] = []
        self.changes: list[Change] = []
        self.wrong: list[str] = []
        self.url = server.url

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as client:
            for _ in range(N_STEPS):
                self.step(client)

    def step(self, client: httpx.Client) -> None:
        name, start = self.rng.choice(NAMES), time.monotonic()
        what = self.rng.random()
        if what < 0.1:
            response = client.delete(f"/v1/steering/{name}")
            if response.status_code == 204:
                self.changes.append(Change(name, start, time.monotonic(), None))
        elif what < 0.35:
            rules = self.rng.choice(CONTENTS)
            response = client.post("/v1/steering", json={"name": name, "rules": rules, "replace": True})
            self.wrong += [] if response.status_code == 201 else [response.text]
            content: Any = rules
            self.changes.append(Change(name, start, time.monotonic(), content))
        else:
            question, rules = self.rng.choice(QUESTIONS), self.rng.choice(CONTENTS)
            by_name = self.rng.random() < 0.7
            response = client.post("/v1/chat/completions", json=asked(question, name if by_name else rules))
            answer = told(response.json()) if response.status_code == 200 else rules
            wanted = name if by_name else None
            self.uses.append((start, time.monotonic(), wanted, question, response.status_code, answer))
            if not by_name and (response.status_code != 200 or answer[0] != rules):
                self.wrong.append(response.text)


@pytest.mark.parametrize("parallel", [1, 4])
def test_each_answer_is_that_of_one_plan(parallel: int, tiny_f32_path: Path) -> None:
    with running(model=tiny_f32_path, type_kv=F32, parallel=parallel) as server:
        alone = {
            (rules, question): told(server.chat(**asked(question, rules)).json())
            for rules in CONTENTS
            for question in QUESTIONS
        }
        assert all(answer[0] == rules for (rules, _), answer in alone.items()), "the rules are told in other words"
        assert len(set(alone.values())) > len(CONTENTS)
        clients = [_Client(server, 100 * parallel + number) for number in range(N_CLIENTS)]
        with ThreadPoolExecutor(N_CLIENTS) as pool:
            for future in [pool.submit(client.run) for client in clients]:
                future.result()
    assert not [line for client in clients for line in client.wrong]
    history = History([change for client in clients for change in client.changes])
    seen = set()
    for start, end, name, question, status, answer in (use for client in clients for use in client.uses):
        possible: set[Content | None] = set() if name is None else history.possible(name, start, end)
        if status != 200:
            assert (name is not None, status, None in possible) == (True, 404, True)
            continue
        assert name is None or answer[0] in possible, f"{answer[0]} is none of {possible}"
        assert answer == alone[answer[0], question]
        seen.add(answer[0])
    assert len(seen) == len(CONTENTS)
