"""A client that registers, replaces, deletes and uses named steerings at random, and the judge of what it was told."""

from __future__ import annotations

import base64
import functools
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from steermoe_local import BiasFile, ExpertMap, write_bias
from steermoe_local.models.shipped_maps import shipped_maps
from tests.support.alone import Alone
from tests.support.names_history import Change, Choice, Content, History

QUESTIONS = (
    "Which number comes after three?",
    "Please count starting at eleven until fifteen.",
    "What is the opposite of poor?",
    "Tell me about the sea.",
)
TEXTS = ("one, two, three,", "ten, nine,", "Document:", "zinc zinc")
# the same numbers for several maps, and other numbers for one: what a cache that compares too little takes for equal
CHOICES = tuple(
    Choice(name, activate, deactivate, reverse, scale)
    for name, activate, deactivate, reverse, scale in (
        ("digits-words", 2, 2, False, None),
        ("digits-words", 2, 2, True, None),
        ("digits-words", 20, 0, False, None),
        ("digits-words", 8, 30, True, None),
        ("digits-words", 20, 20, False, 4.0),
        ("digits-words", 40, 40, True, 4.0),
        ("document-memory", 2, 2, False, None),
        ("document-memory", 0, 20, True, None),
        ("document-memory", 20, 20, True, None),
        ("document-memory", 8, 30, True, None),
        ("document-memory", 20, 20, False, 4.0),
    )
)
MAX_TOKENS = 16
END = 0  # of tiny's vocabulary: answers under steerings that differ are longer without it, and differ, too
NEVER_ENDS = {"logit_bias": [[END, False]]}
NAMES = ("a", "b", "c", "d")

_PATHS = {"chat": "/v1/chat/completions", "text": "/v1/completions", "response": "/v1/responses"}


@dataclass(frozen=True)
class Use:
    """A request that was answered, from `start` to `end` (time.monotonic).

    It named `name` (with the numbers of `changes`), or `changes` alone, or nothing. `key` is the bias that the answer
    names, `text` the answer; of one that was given up (not `whole`) as far as it came.
    """

    start: float
    end: float
    name: str | None
    changes: Choice | None
    status: int
    code: str | None = None
    kind: str = "chat"
    prompt: Any = None
    key: str | None = None
    text: str = ""
    whole: bool = True


@dataclass
class Records:
    """What clients saw; as JSON lines between processes."""

    uses: list[Use] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """One JSON object a line."""
        for kind in ("uses", "changes", "wrong"):
            for row in getattr(self, kind):
                yield json.dumps({kind: row if isinstance(row, str) else asdict(row)})

    def take(self, line: str) -> None:
        """Add a line of `lines`."""
        ((kind, row),) = json.loads(line).items()
        if kind == "uses":
            self.uses.append(Use(**row | {"changes": row["changes"] and Choice(**row["changes"])}))
        elif kind == "changes":
            content = row["content"] and Content(Choice(**row["content"]["choice"]), row["content"]["is_map"])
            self.changes.append(Change(**row | {"content": content}))
        else:
            self.wrong.append(row)


class NamesClient:
    """One client; `step` does something. `cut` is how many of its answers it gives up."""

    def __init__(self, client: httpx.Client, seed: int, records: Records, *, cut: float = 0.15) -> None:
        self.client, self.records = client, records
        self.rng = random.Random(seed)
        self._cut = cut

    def step(self) -> None:
        """Change a name or, more often, use one."""
        change = self.rng.random() < 0.3
        (self.change if change else self.use)()

    #
    # changing
    #

    def change(self) -> None:
        """Register, replace or delete a name."""
        name = self.rng.choice(NAMES)
        start = time.monotonic()
        if self.rng.random() < 0.3:
            response = self.client.delete(f"/v1/steering/{name}")
            self._changed(name, start, response, 204, None)
            return
        if self.rng.random() < 0.2:
            self._register_another(name, start)
            return
        content, body = self._registration(name)
        response = self.client.post("/v1/steering", json=body)
        self._changed(name, start, response, 201, content)

    def _register_another(self, name: str, start: float) -> None:
        """Register other numbers of what another name stands for; the server says which map that was."""
        other, changes = self.rng.choice(NAMES), self.rng.choice(CHOICES)
        body = changes.fields | {"name": name, "map": other, "replace": True}
        response = self.client.post("/v1/steering", json=body)
        end, data = time.monotonic(), response.json()
        if response.status_code != 201:
            self.records.uses.append(Use(start, end, other, changes, response.status_code, data["error"]["code"]))
            return
        chosen = Choice(
            _map_names()[data["map_sha256"]], data["activate"], data["deactivate"], data["reverse"], data["scale"]
        )
        self.records.uses.append(Use(start, end, other, changes, 201, key=chosen.bias.key))
        self.records.changes.append(Change(name, start, end, Content(chosen, True)))

    def _registration(self, name: str) -> tuple[Content, dict[str, Any]]:
        choice = self.rng.choice(CHOICES)
        body: dict[str, Any] = {"name": name, "replace": self.rng.random() < 0.8}
        kind = self.rng.choice(("choice", "map", "bias"))
        if kind == "bias":
            return Content(choice, False), body | {"bias": _encoded(choice)}
        source = choice.map if kind == "choice" else _map(choice.map)
        return Content(choice, True), body | choice.fields | {"map": source}

    def _changed(self, name: str, start: float, response: httpx.Response, wanted: int, content: Content | None) -> None:
        end = time.monotonic()
        code = None if response.is_success else response.json()["error"]["code"]
        if response.status_code == wanted:
            self.records.changes.append(Change(name, start, end, content))
            if content is not None and response.json()["name"] != name:
                self.records.wrong.append(f"registered {name}: {response.text}")
        elif content is None and response.status_code == 404:
            self.records.uses.append(Use(start, end, name, None, 404, code))
        elif (response.status_code, code) != (409, "name_taken"):
            self.records.wrong.append(f"{wanted} expected for {name}: {response.status_code} {response.text[:300]}")

    #
    # using
    #

    def use(self) -> None:
        """Ask for a greedy answer under a name, a name with other numbers, numbers alone, or nothing."""
        rng = self.rng
        name = rng.choice(NAMES) if rng.random() < 0.7 else None
        changes = rng.choice(CHOICES) if rng.random() < (0.3 if name else 0.7) else None
        kind = rng.choice(tuple(_PATHS))
        body = self._body(kind, name, changes)
        stream = rng.random() < 0.5
        if stream and rng.random() < 2 * self._cut:
            self._stream(kind, body, name, changes, rng.randrange(1, MAX_TOKENS))
        elif stream:
            self._stream(kind, body, name, changes, None)
        else:
            self._whole(kind, body, name, changes)

    def _body(self, kind: str, name: str | None, changes: Choice | None) -> dict[str, Any]:
        steering: Any = name if changes is None else changes.fields if name is None else changes.fields | {"map": name}
        body: dict[str, Any] = {"steering": steering, "temperature": 0} | NEVER_ENDS
        if kind == "text":
            return body | {"prompt": self.rng.choice(TEXTS), "max_tokens": MAX_TOKENS}
        question = self.rng.choice(QUESTIONS)
        if kind == "response":
            return body | {"input": question, "max_output_tokens": MAX_TOKENS, "store": self.rng.random() < 0.5}
        named = {"model": f"tiny:{name or 'none'}"} if changes is None and self.rng.random() < 0.3 else {}
        if named:
            del body["steering"]
        return body | named | {"messages": _messages(question), "max_tokens": MAX_TOKENS}

    def _whole(self, kind: str, body: dict[str, Any], name: str | None, changes: Choice | None) -> None:
        start = time.monotonic()
        response = self.client.post(_PATHS[kind], json=body)
        end = time.monotonic()
        data = response.json()
        if response.status_code != 200:
            code = data["error"]["code"]
            self.records.uses.append(Use(start, end, name, changes, response.status_code, code))
            return
        prompt = body.get("prompt") or body.get("input") or body["messages"][0]["content"]
        use = Use(start, end, name, changes, 200, None, kind, prompt, _key(data), _text(kind, data))
        self.records.uses.append(use)

    def _stream(
        self, kind: str, body: dict[str, Any], name: str | None, changes: Choice | None, n_read: int | None
    ) -> None:
        """Read a stream; give it up behind `n_read` pieces of text."""
        prompt = body.get("prompt") or body.get("input") or body["messages"][0]["content"]
        start = time.monotonic()
        pieces: list[str] = []
        keys: list[str | None] = []
        with self.client.stream("POST", _PATHS[kind], json=body | {"stream": True}) as response:
            end = time.monotonic()
            if response.status_code != 200:
                code = json.loads(response.read())["error"]["code"]
                self.records.uses.append(Use(start, end, name, changes, response.status_code, code))
                return
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                data = json.loads(line.removeprefix("data: "))
                if "error" in data:
                    self.records.wrong.append(f"in a stream: {line[:300]}")
                    return
                told = data.get("response", data)
                if "steering" in told:
                    keys.append(_key(told))
                pieces.append(_delta(kind, data))
                if n_read is not None and len(list(filter(None, pieces))) >= n_read:
                    break
            else:
                n_read = None
        if len(set(keys)) != 1:
            self.records.wrong.append(f"a stream names {keys} as its biases")
            return
        use = Use(start, end, name, changes, 200, None, kind, prompt, keys[0], "".join(pieces), n_read is None)
        self.records.uses.append(use)


#
# the judge
#


@dataclass
class Verdict:
    """What is wrong, and how many uses of each kind were judged."""

    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def judge(records: Records, alone: Alone) -> Verdict:
    """Compare every answer with its answer alone under the bias that it names, and that bias with what the name was.

    Where rounding may decide an answer otherwise in a batch, only its bias is compared.
    """
    history = History(records.changes)
    verdict = Verdict(list(records.wrong))
    for use in records.uses:
        if use.name is None:
            possible: set[str | int | None] = {None if use.changes is None else use.changes.bias.key}
        else:
            contents = history.possible(use.name, use.start, use.end)
            possible = {404 if content is None else _key_of(content, use.changes) for content in contents}
        told: str | int | None = use.key if use.status in (200, 201) else use.status
        if told not in possible:
            verdict.wrong.append(f"{told} is none of {possible}, which {use} may have named")
        elif use.status == 200:
            _judge_text(use, alone, verdict)
        else:
            if use.status >= 400 and use.code not in _CODES[use.status]:
                verdict.wrong.append(f"{use.code}: {use}")
            verdict.counts[f"status {use.status}"] += 1
    return verdict


_CODES = {404: ("steering_not_found",), 400: ("invalid_value",)}


def _key_of(content: Content, changes: Choice | None) -> str | int:
    chosen = content.chosen(changes)
    return 400 if chosen is None else chosen.bias.key


@functools.cache
def _biases() -> dict[str | None, BiasFile | None]:
    """All biases that names can stand for, by key."""
    contents = [Content(choice, True) for choice in CHOICES]
    chosen = [content.chosen(changes) for content in contents for changes in (None, *CHOICES)]
    return {None: None} | {choice.bias.key: choice.bias for choice in chosen if choice is not None}


def _judge_text(use: Use, alone: Alone, verdict: Verdict) -> None:
    bias = _biases()[use.key]
    if use.kind == "text":
        answer = alone.complete(use.prompt, bias, MAX_TOKENS, [END])
    else:
        answer = alone.chat(_messages(use.prompt), bias, MAX_TOKENS, [END])
    if not answer.certain:
        verdict.counts["near a tie"] += 1
        return
    verdict.counts[f"{use.kind}{'' if use.whole else ', given up'}"] += 1
    if answer.text != use.text if use.whole else not answer.text.startswith(use.text):
        verdict.wrong.append(f"{use.text!r} is not what it is alone, {answer.text!r}: {use}")


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _key(data: dict[str, Any]) -> str | None:
    return (data["steering"] or {}).get("bias_sha256")


def _text(kind: str, data: dict[str, Any]) -> str:
    if kind == "response":
        return "".join(part["text"] for item in data["output"] for part in item["content"])
    choice = data["choices"][0]
    return str(choice["text"] if kind == "text" else choice["message"]["content"])


def _delta(kind: str, data: dict[str, Any]) -> str:
    if kind == "response":
        return str(data["delta"]) if data["type"] == "response.output_text.delta" else ""
    return "".join((c["text"] if kind == "text" else c["delta"].get("content")) or "" for c in data["choices"])


@functools.cache
def _map(name: str) -> dict[str, Any]:
    return dict(json.loads(Path(shipped_maps()[name]).read_bytes()))


@functools.cache
def _map_names() -> dict[str, str]:
    return {ExpertMap.load(path).sha256: name for name, path in shipped_maps().items()}


@functools.cache
def _encoded(choice: Choice) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "b.gguf"
        write_bias(choice.bias, path)
        return base64.b64encode(path.read_bytes()).decode()


def together(clients: Iterable[Callable[[], None]]) -> None:
    """Run clients at once; the first exception is raised."""
    calls = list(clients)
    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()
