"""Evaluation harnesses against the server: on tasks of our own their scores are what SteeredLlama gives, to the last.

The harnesses run as programs, in an environment of their own (make test-clients), and reach nothing but this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, ExpertMap, SteeredLlama
from steermoe_local.models.shipped_maps import shipped_maps
from tests.support import rounding
from tests.support.paths import ROOT
from tests.support.running_server import TINY
from tests.support.serving import Process, serving

pytestmark = pytest.mark.clients

PROGRAMS = ROOT / "build" / "clients-venv" / ("Scripts" if sys.platform == "win32" else "bin")
STEERINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "digits": {"map": "digits-words", "activate": 2, "deactivate": 2},
    "words": {"map": "digits-words", "activate": 2, "deactivate": 2, "reverse": True},
}
NUMBERS = {"one": (2, "two"), "two": (3, "three"), "three": (4, "four"), "four": (5, "five"), "five": (6, "six")}
NUMBERS |= {"seven": (8, "eight"), "nine": (10, "ten"), "ten": (11, "eleven"), "eleven": (12, "twelve")}
QUESTIONS = {f"Which number comes after {word}?": (str(digit), name) for word, (digit, name) in NUMBERS.items()}


def prompt_of(question: str) -> str:
    """As the chat template writes it."""
    return f"<|user|>{question}<|end|><|assistant|>"


def bias_of(choice: dict[str, Any] | None) -> BiasFile | None:
    if choice is None:
        return None
    expert_map = ExpertMap.load(shipped_maps()[choice["map"]])
    signs = expert_map.choose(choice["activate"], choice["deactivate"], reverse=choice.get("reverse", False))
    return BiasFile.from_signs(signs, expert_map.identity)


#
# the judge
#


class Judge:
    """What the model says and how likely it finds what it is given, one at a time and without a server."""

    def __init__(self, steering: str) -> None:
        self._llama = SteeredLlama(TINY, n_ctx=256, n_threads=1, logits_all=True)
        self._llama.set_bias(bias_of(STEERINGS[steering]))
        self.allowance = 0.0
        self.answers = {question: self._answer(question) for question in QUESTIONS}
        self.likelihoods = {question: self._likelihoods(question) for question in QUESTIONS}
        self._llama.close()

    def _answer(self, question: str) -> str:
        body: Any = self._llama.create_chat_completion(
            [{"role": "user", "content": question}], temperature=0, max_tokens=16
        )
        return str(body["choices"][0]["message"]["content"])

    def _likelihoods(self, question: str) -> list[tuple[float, bool]]:
        """(log likelihood, is it the greedy answer) of each choice."""
        llama = self._llama
        start = llama.tokenize(prompt_of(question).encode(), add_bos=False, special=True)
        found = []
        for choice in QUESTIONS[question]:
            tokens = llama.tokenize((prompt_of(question) + choice).encode(), add_bos=False, special=True)
            assert tokens[: len(start)] == start
            llama.reset()
            llama.eval(tokens)
            rows = np.array(llama.scores[len(start) - 1 : len(tokens) - 1], np.float64)
            rows -= rows.max(axis=1, keepdims=True)
            rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
            rest = tokens[len(start) :]
            allowance = len(rest) * rounding.logprobs(rows, **rounding.TINY, stored=rounding.F16)
            self.allowance = max(self.allowance, allowance)
            found.append((float(sum(rows[i, t] for i, t in enumerate(rest))), rows.argmax(axis=1).tolist() == rest))
        return found

    @property
    def accuracy(self) -> float:
        """Of the task: the digits are more likely than the words."""
        pairs = self.likelihoods.values()
        return sum(digit[0] > word[0] for digit, word in pairs) / len(QUESTIONS)

    @property
    def exact(self) -> float:
        """Of the task: the answer is the digits."""
        return sum(self.answers[question] == choices[0] for question, choices in QUESTIONS.items()) / len(QUESTIONS)


@pytest.fixture(scope="module")
def judges() -> dict[str, Judge]:
    return {steering: Judge(steering) for steering in STEERINGS}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Names for what a harness can only choose by the model's name."""
    folder = tmp_path_factory.mktemp("maps")
    for name, choice in STEERINGS.items():
        if choice is not None:
            (folder / f"{name}.choice.json").write_text(json.dumps(choice))
    with serving("--temp", 0, "--maps", folder, n_ctx=256) as found:
        yield found


def test_the_canary_can_tell(judges: dict[str, Judge]) -> None:
    """The scores of the three steerings differ, so that a server which does not steer is found out."""
    assert judges["digits"].accuracy == 1
    assert judges["words"].accuracy == 0
    assert 0 < judges["none"].accuracy < 1
    assert len({judge.exact for judge in judges.values()}) == 3


def run(*command: Any, folder: Path, **env: str) -> str:
    """Run a program of the clients' environment; it reaches this machine alone."""
    closed = "http://127.0.0.1:9"  # where nobody listens
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"http_proxy": closed, "https_proxy": closed, "all_proxy": closed, "no_proxy": "127.0.0.1"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment |= {"HF_HOME": str(folder / "hub"), "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    program = PROGRAMS / str(command[0])
    assert program.exists(), f"{program}: not installed; make test-clients does it"
    done = subprocess.run(
        [str(program), *map(str, command[1:])],
        cwd=folder,
        env=environment | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


#
# lm-evaluation-harness
#

CHOICES_TASK = """
task: digits_choices
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ANSWERS_TASK = """
task: digits_answers
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{choices[0]}}"
target_delimiter: ""
generation_kwargs: {until: ["<|end|>"], do_sample: false, max_gen_toks: 16}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""

LM_EVAL_TASKS = ("digits_choices", "digits_answers")


def lm_eval(
    server: Process, folder: Path, model: str, *options: Any, tasks: tuple[str, ...] = LM_EVAL_TASKS, concurrency: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(results by task, samples by task)."""
    items = [{"question": q, "prompt": prompt_of(q), "choices": choices} for q, choices in QUESTIONS.items()]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "choices.yaml").write_text(CHOICES_TASK)
    (folder / "answers.yaml").write_text(ANSWERS_TASK)
    arguments = [f"model={model}", f"base_url={server.url}/v1/completions", f"num_concurrent={concurrency}"]
    arguments += ["max_length=256", "max_retries=1"]
    log = run(
        *("lm_eval", "run", "--model", "local-completions", "--model_args", ",".join(arguments)),
        *("--tasks", ",".join(tasks), "--include_path", folder, "--output_path", folder / "out", "--log_samples"),
        *options,
        folder=folder,
        no_proxy="127.0.0.1",
    )
    assert "Auto-detected remote tokenizer support" in log, "it needs no tokenizer of its own"
    results = json.loads(next((folder / "out").rglob("results_*.json")).read_text())["results"]
    samples = {}
    for task in tasks:
        path = next((folder / "out").rglob(f"samples_{task}_*.jsonl"))
        samples[task] = [json.loads(line) for line in path.read_text().splitlines()]
    return results, samples


@pytest.mark.parametrize(("steering", "concurrency"), [("none", 1), ("digits", 4), ("words", 4)])
def test_lm_evaluation_harness(
    server: Process, judges: dict[str, Judge], tmp_path: Path, steering: str, concurrency: int
) -> None:
    judge = judges[steering]
    results, samples = lm_eval(server, tmp_path, f"tiny:{steering}", concurrency=concurrency)
    assert results["digits_choices"]["acc,none"] == pytest.approx(judge.accuracy)
    assert results["digits_answers"]["exact_match,none"] == pytest.approx(judge.exact)
    assert len(samples["digits_choices"]) == len(samples["digits_answers"]) == len(QUESTIONS)
    for sample in samples["digits_choices"]:
        expected = judge.likelihoods[sample["doc"]["question"]]
        found = [(float(loglikelihood), greedy in (True, "True")) for ((loglikelihood, greedy),) in sample["resps"]]
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        wanted = [value for value, _ in expected]
        np.testing.assert_allclose([value for value, _ in found], wanted, rtol=0, atol=judge.allowance)
    for sample in samples["digits_answers"]:
        assert sample["resps"] == [[judge.answers[sample["doc"]["question"]]]]


@pytest.mark.parametrize("steering", ["digits", "words"])
def test_lm_evaluation_harness_by_the_field(
    server: Process, judges: dict[str, Judge], tmp_path: Path, steering: str
) -> None:
    """Its generation arguments are sent in the request unchanged, so they can contain a steering."""
    judge = judges[steering]
    options = ("--gen_kwargs", json.dumps({"steering": STEERINGS[steering]}))
    results, samples = lm_eval(server, tmp_path, "tiny", *options, tasks=("digits_answers",), concurrency=4)
    assert results["digits_answers"]["exact_match,none"] == pytest.approx(judge.exact)
    for sample in samples["digits_answers"]:
        assert sample["resps"] == [[judge.answers[sample["doc"]["question"]]]]


#
# inspect-ai
#

INSPECT_TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import json_dataset
from inspect_ai.scorer import exact
from inspect_ai.solver import generate


@task
def digits():
    return Task(dataset=json_dataset("items.jsonl"), solver=generate(), scorer=exact())
"""


@pytest.mark.parametrize(
    ("steering", "by"),
    [("none", "name"), ("digits", "name"), ("digits", "field"), ("words", "name"), ("words", "field")],
)
def test_inspect(server: Process, judges: dict[str, Judge], tmp_path: Path, steering: str, by: str) -> None:
    """`openai-api`, steered by the model's name, or by a field of the request's body."""
    judge = judges[steering]
    items = [{"input": question, "target": choices[0], "id": question} for question, choices in QUESTIONS.items()]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "digits.py").write_text(INSPECT_TASK)
    model, more = f"tiny:{steering}", []
    if by == "field":
        model, more = "tiny", ["--extra-body", json.dumps({"steering": STEERINGS[steering]})]
    run(
        *("inspect", "eval", "digits.py", "--model", f"openai-api/local/{model}", "--temperature", 0),
        *("--max-tokens", 16, "--logprobs", "--top-logprobs", 2, "--max-retries", 0, "--max-connections", 4, *more),
        *("--log-dir", tmp_path / "logs", "--log-format", "json", "--display", "plain"),
        folder=tmp_path,
        LOCAL_BASE_URL=f"{server.url}/v1",
        LOCAL_API_KEY="none",
    )
    (path,) = (tmp_path / "logs").glob("*.json")
    log = json.loads(path.read_text())
    assert log["status"] == "success"
    (score,) = log["results"]["scores"]
    assert score["metrics"]["mean"]["value"] == pytest.approx(judge.exact)
    assert len(log["samples"]) == len(QUESTIONS)
    n_scored = 0
    for sample in log["samples"]:
        choice = sample["output"]["choices"][0]
        answer = choice["message"]["content"]
        assert (answer if isinstance(answer, str) else answer[0]["text"]) == judge.answers[sample["id"]]
        tokens = choice["logprobs"]["content"]
        assert all(len(token["top_logprobs"]) == 2 for token in tokens)
        for text, (likelihood, greedy) in zip(QUESTIONS[sample["id"]], judge.likelihoods[sample["id"]], strict=True):
            if greedy and text == judge.answers[sample["id"]]:
                said = [token["logprob"] for token in tokens if token["token"] and token["token"] in text]
                assert sum(said) == pytest.approx(likelihood, rel=0, abs=judge.allowance)
                n_scored += 1
    assert n_scored > len(QUESTIONS) / 2
