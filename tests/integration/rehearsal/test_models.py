"""Whole models through the commands and the server: info, pairs check, detect, run, and requests over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from steermoe_local import ExpertMap, RoutingCounts
from steermoe_local.detection.pair_check import Checker
from tests.integration.rehearsal.commands import PAIRS, as_json, ok, write_pairs
from tests.integration.rehearsal.conversations import TARGETS, TOOL, tool_round
from tests.integration.rehearsal.models import MODELS, Model
from tests.integration.rehearsal.rendering import Desk
from tests.integration.rehearsal.serving import QUESTION, check_server, llama_server
from tests.support.running_server import Running, running

pytestmark = pytest.mark.rehearsal

each_model = pytest.mark.parametrize("name", list(MODELS), scope="module")


@pytest.fixture(scope="module")
def model(name: str) -> Model:
    return MODELS[name]


@pytest.fixture(scope="module")
def path(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file, as long as its tests run."""
    found = model.write(tmp_path_factory.mktemp("model"))
    yield found
    found.unlink()


@pytest.fixture(scope="module")
def desk(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """The template on the vocabulary, without weights."""
    folder = tmp_path_factory.mktemp("vocabulary")
    with Desk.open(model.template, folder, model.vocabulary, model.template_text) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Running]:
    """Our server with the model."""
    with running(model=path, parallel=2, n_ctx=8192) as found:
        yield found


@each_model
def test_info(path: Path, model: Model) -> None:
    found = as_json("info", path)
    assert found["architecture"] == model.arch
    assert (found["n_expert"], found["n_expert_used"]) == (model.n_expert, model.k)
    assert found["steerable_layers"]


@each_model
def test_pairs_check(path: Path, tmp_path: Path) -> None:
    found = as_json("pairs", "check", write_pairs(tmp_path / "pairs.jsonl"), "-m", path)
    assert found["pairs"] == found["located"] == len(PAIRS)
    assert not found["problems"]


@each_model
@pytest.mark.parametrize("case", list(TARGETS))
def test_targets(desk: Desk, case: str) -> None:
    desk.check_target(case)


@each_model
def test_detect_and_run(path: Path, desk: Desk, model: Model, tmp_path: Path) -> None:
    """Counts of every target token, k experts each; a steered answer."""
    target, counts = tmp_path / "map.json", tmp_path / "counts.npz"
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    ok("detect", "-m", path, "--pairs", pairs, "-o", target, "--counts", counts, "-t", "2")
    counted = RoutingCounts.load(counts)
    layers = as_json("info", path)["steerable_layers"]
    with Checker(path) as checker:
        sides = [checker.check(pair).sides for pair in PAIRS]
    for side, (tokens, selected) in enumerate(((counted.n1, counted.a1), (counted.n2, counted.a2))):
        n = sum(pair[side].n_target for pair in sides)
        assert n == tokens
        assert (selected[layers].sum(axis=1) == n * model.k).all()
    found = ExpertMap.load(target)
    assert found.identity.n_expert == model.n_expert
    np.testing.assert_allclose(found.rd.sum(axis=1), 0, atol=1e-9)  # each token selects k experts on either side
    assert found.rd[layers].any(axis=1).all()
    choice = ["--map", target, "--activate", 1, "--deactivate", 1]
    answer = as_json("run", "-m", path, *choice, "-n", 8, "-t", 2, "--temp", 0, "-c", 4096, "-p", QUESTION)
    rendered = desk.prompt([{"role": "user", "content": QUESTION}])
    assert answer["usage"]["prompt_tokens"] == len(rendered.tokens)
    assert answer["finish_reason"] == "stop" or answer["usage"]["completion_tokens"] == 8


@each_model
def test_server(server: Running, desk: Desk) -> None:
    check_server(server, desk.knows_no_tools())


@pytest.fixture(scope="module")
def reference(path: Path, tool: Any) -> Iterator[httpx.Client]:
    """llama.cpp's own server with the model."""
    tool("llama-server", "--version")  # fails or skips
    with llama_server(path) as client:
        yield client


@each_model
def test_tokens_are_llama_servers(desk: Desk, reference: httpx.Client) -> None:
    """Tokens of a rendered conversation with tools."""
    for messages in (tool_round()[:1], TARGETS["other scripts"][0]):
        rendered = desk.prompt(messages, [TOOL])
        body = {"content": rendered.text, "add_special": False, "parse_special": True}
        assert reference.post("/tokenize", json=body).json()["tokens"] == rendered.tokens
