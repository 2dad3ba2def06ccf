"""The clients of the soak test, in a process of their own.

    python -m tests.integration.soak.load URL BOMB_URL GROUP SECONDS SEED N_SILENT FILE

GROUP is "answers" (their answers are judged) or "attack". What they saw is written to FILE, one JSON object a line: the
records of `names_in_use`, and {"count": NAME} with numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.integration.soak import sockets
from tests.integration.soak.bound import BOUND, said
from tests.integration.soak.hostile import requests
from tests.integration.soak.template import BOMBS
from tests.support.names_in_use import MAX_TOKENS, NEVER_ENDS, QUESTIONS, NamesClient, Records, Use

NICE = 10  # the server's delays are measured, not those that its clients cause by taking its CPU
N_NAMES = 5
SCRAPED = ("/metrics", "/v1/models", "/v1/steering", "/health", "/", "/openapi.json", "/v1/steering/digits-words/map")
# What an overloaded server may say; who asks must be able to come again.
BUSY = frozenset({429})


class Load:
    """Clients, each in a thread, until the time is over; then all that they saw."""

    def __init__(self, url: str, bomb_url: str, seconds: float, seed: int, n_silent: int) -> None:
        self.url, self.bomb_url, self.seed, self.n_silent = url, bomb_url, seed, n_silent
        self.address = address_of(url)
        self.end = time.monotonic() + seconds
        self.records = Records()
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, what: str, n: int = 1) -> None:
        with self._lock:
            self.counts[what] += n

    def wrong(self, what: str) -> None:
        self.records.wrong.append(what[:600])
        time.sleep(0.2)  # a server that refuses everything is told of often enough

    def client(self, url: str | None = None) -> httpx.Client:
        return httpx.Client(base_url=url or self.url, timeout=120, trust_env=False)

    def run(self, actors: list[Callable[[random.Random], None]]) -> None:
        """Run all until the end."""
        threads = [
            threading.Thread(target=self._repeat, args=(actor, random.Random(1000 * self.seed + number)))
            for number, actor in enumerate(actors)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _repeat(self, actor: Callable[[random.Random], None], rng: random.Random) -> None:
        try:
            while time.monotonic() < self.end:
                actor(rng)
        except Exception:
            self.wrong(f"{actor.__name__}: {traceback.format_exc()[-500:]}")

    #
    # whose answers are judged
    #

    def names(self, rng: random.Random) -> None:
        with self.client() as client:
            one = NamesClient(client, rng.randrange(1 << 30), self.records)
            for _ in range(50):
                if time.monotonic() >= self.end:
                    return
                one.step()
                self.count("names")

    def half_closed(self, rng: random.Random) -> None:
        question = rng.choice(QUESTIONS)
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": MAX_TOKENS, "temperature": 0}
        start = time.monotonic()
        status, data = sockets.ask_half_closed(self.address, body | NEVER_ENDS)
        self.count("half-closed")
        if status != 200:
            self.wrong(f"half-closed: status {status}: {str(data)[:200]}")
        else:
            text = data["choices"][0]["message"]["content"]
            self.records.uses.append(Use(start, time.monotonic(), None, None, 200, prompt=question, text=text))
        time.sleep(0.2)

    def bound(self, rng: random.Random) -> None:
        name = rng.choice(list(BOUND))
        with self.client() as client:
            response = client.post("/v1/chat/completions", json=BOUND[name])
        self.count("bound by a grammar, or tools")
        if response.status_code != 200:
            self.wrong(f"{name}: {response.status_code} {response.text}")
        else:
            line = json.dumps({"bound": [name, said(response.json())]})
            with self._lock:
                self.counts[line] += 1
        time.sleep(0.1)

    def conversation(self, rng: random.Random) -> None:
        """Two responses, the second of which goes on with the first by its id."""
        first: dict[str, Any] = {"input": rng.choice(QUESTIONS), "max_output_tokens": MAX_TOKENS, "temperature": 0}
        with self.client() as client:
            response = client.post("/v1/responses", json=first | NEVER_ENDS)
            if response.status_code != 200:
                return self.wrong(f"responses: {response.status_code} {response.text}")
            previous = response.json()["id"]
            then = {"input": "And then?", "previous_response_id": previous, "max_output_tokens": 4}
            response = client.post("/v1/responses", json=then)
            self.count("responses that go on")
            if response.status_code not in (200, 404):  # 404: others have taken its place in the store
                self.wrong(f"previous_response_id: {response.status_code} {response.text}")
        time.sleep(0.1)
        return None

    def scrape(self, rng: random.Random) -> None:
        with self.client() as client:
            for path in SCRAPED:
                response = client.get(path)
                self.count("scraped")
                if response.status_code != 200:
                    self.wrong(f"{path}: {response.status_code} {response.text[:200]}")
                time.sleep(0.05)

    #
    # who means harm
    #

    def hostile(self, rng: random.Random) -> None:
        name, (data, allowed) = rng.choice(list(requests().items()))
        status, body = sockets.status_of(self.address, data, half_close=name == "cut body")
        self.count("hostile")
        # A connection may be closed without an answer where the client was still sending.
        if status not in allowed | BUSY and (status or len(data) < 100_000):
            self.wrong(f"{name}: status {status} {body[:200]!r}")
        time.sleep(0.02)

    def slow_reader(self, rng: random.Random) -> None:
        sockets.read_slowly(self.address, rng, min(8.0, max(0.0, self.end - time.monotonic())))
        self.count("slow readers")

    def given_up(self, rng: random.Random) -> None:
        sockets.begin_and_reset(self.address, rng)
        self.count("given up")
        time.sleep(0.05)

    def silent(self, _: random.Random) -> None:
        with sockets.silent(self.address, self.n_silent) as held:
            self.count("silent connections", len(held))
            while time.monotonic() < self.end:
                time.sleep(0.2)

    def bomb(self, rng: random.Random) -> None:
        word = rng.choice(BOMBS)
        with self.client(self.bomb_url) as client:
            response = client.post("/v1/chat/completions", json=self._about(word))
        self.count("template bombs")
        if not 400 <= response.status_code < 500:
            self.wrong(f"{word}: {response.status_code} {response.text}")

    def beside_bombs(self, _: random.Random) -> None:
        with self.client(self.bomb_url) as client:
            response = client.post("/v1/chat/completions", json=self._about("four"))
        self.count("beside bombs")
        if response.status_code != 200:
            self.wrong(f"beside template bombs: {response.status_code} {response.text}")
        time.sleep(0.1)

    @staticmethod
    def _about(word: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": word}], "max_tokens": 4, "temperature": 0}


def address_of(url: str) -> tuple[str, int]:
    """(host, port)."""
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def main() -> None:
    """Run a group."""
    url, bomb_url, group, seconds, seed, n_silent, path = sys.argv[1:]
    with contextlib.suppress(AttributeError):  # Windows has none
        os.nice(NICE)
    load = Load(url, bomb_url, float(seconds), int(seed), int(n_silent))
    beside = (load.bomb, load.beside_bombs)
    groups: dict[str, list[Callable[[random.Random], None]]] = {
        "answers": [load.names] * N_NAMES + [load.half_closed, load.bound, load.conversation, load.scrape],
        "attack": [load.hostile] * 2 + [load.slow_reader] * 2 + [load.given_up, load.silent, *beside],
    }
    load.run(groups[group])
    with Path(path).open("w", encoding="utf-8") as file:
        for line in load.records.lines():
            print(line, file=file)
        print(json.dumps({"counts": load.counts}), file=file)


if __name__ == "__main__":
    main()
