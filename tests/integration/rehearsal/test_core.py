"""The part of the rehearsal that `make test` runs: SentencePiece, Phi and BPE vocabularies, and one whole model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.rehearsal.archive import templates, tokenized, vocabularies
from tests.integration.rehearsal.commands import as_json, ok, write_pairs
from tests.integration.rehearsal.conversations import PLAIN, TARGETS
from tests.integration.rehearsal.families import FAMILIES, REFUSED, UNIGRAM, family
from tests.integration.rehearsal.models import MODELS, check_refused
from tests.integration.rehearsal.rendering import Desk
from tests.integration.rehearsal.serving import check_server
from tests.support.running_server import running

CORE = ("Mixtral-8x7B", "Phi-3.5-MoE", "Granite-4")


@pytest.fixture(scope="module", params=CORE)
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """Template and vocabulary of a model, without weights."""
    model = MODELS[request.param]
    folder = tmp_path_factory.mktemp("core")
    with Desk.open(model.template, folder, model.vocabulary, model.template_text, plain=True) as opened:
        yield opened


@pytest.mark.parametrize("case", list(TARGETS))
def test_targets(desk: Desk, case: str) -> None:
    desk.check_target(case)


@pytest.mark.parametrize("case", list(PLAIN))
def test_targets_in_plain_texts(desk: Desk, case: str) -> None:
    desk.check_plain(case)


def test_tokens_are_those_of_the_models_own_tokenizer(desk: Desk) -> None:
    texts = tokenized(desk.vocab.name)
    assert all(desk.renderer.tokenize(text, add_special=False) == tokens for text, tokens in texts)


def test_a_whole_model(tool: Any, tmp_path: Path) -> None:
    """Mixtral's shape: pairs check, detect, and requests with tools, schema and reasoning."""
    tool("test-llama-archs", "-h")  # skips or fails when it is not built
    path, pairs = MODELS["Mixtral-8x7B"].write(tmp_path), write_pairs(tmp_path / "pairs.jsonl")
    assert as_json("pairs", "check", pairs, "-m", path)["located"] == 3
    ok("detect", "-m", path, "--pairs", pairs, "-o", tmp_path / "map.json")
    with running(model=path, parallel=1, n_ctx=4096) as server:
        check_server(server, refuses_tools=True)


def test_wordpiece_is_refused(tool: Any, tmp_path: Path) -> None:
    tool("test-llama-archs", "-h")
    check_refused("bert-bge", tmp_path)


def test_the_archive_is_covered() -> None:
    """A template or vocabulary that a new archive brings is given a family, or refused."""
    assert {*FAMILIES.values(), *REFUSED, UNIGRAM} <= vocabularies().keys()
    used = {model.vocab for model in MODELS.values()} | {family(name) for name in templates()} | {*REFUSED, UNIGRAM}
    assert used == vocabularies().keys()
