"""Every vocabulary of the archive: tokens as the model's own tokenizer has them, targets in plain texts, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from steermoe_local.errors import PairsError
from steermoe_local.pairs.pairs import Message
from tests.integration.rehearsal import page
from tests.integration.rehearsal.archive import tokenized, vocabularies
from tests.integration.rehearsal.conversations import PLAIN, TARGETS
from tests.integration.rehearsal.families import REFUSED
from tests.integration.rehearsal.models import check_refused
from tests.integration.rehearsal.rendering import Desk

pytestmark = pytest.mark.rehearsal

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CAUSAL = [name for name in vocabularies() if name not in REFUSED]
each_vocabulary = pytest.mark.parametrize("name", CAUSAL, scope="module")


@pytest.fixture(scope="module")
def chatml(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """The vocabulary with a simple template."""
    with Desk.open("chatml", tmp_path_factory.mktemp("vocabulary"), name, CHATML) as opened:
        yield opened


@pytest.mark.parametrize("name", [name for name in CAUSAL if tokenized(name)], scope="module")
def test_tokens_are_those_of_the_models_own_tokenizer(chatml: Desk, name: str) -> None:
    """The archive keeps texts and the tokens that the original tokenizers made of them."""
    texts = tokenized(name)
    assert len(texts) > 30
    wrong = [text for text, tokens in texts if chatml.renderer.tokenize(text, add_special=False) != tokens]
    assert not wrong


@each_vocabulary
@pytest.mark.parametrize("case", list(TARGETS))
def test_targets(chatml: Desk, case: str) -> None:
    chatml.check_target(case)


@each_vocabulary
@pytest.mark.parametrize("case", list(PLAIN))
def test_targets_in_plain_texts(chatml: Desk, case: str) -> None:
    chatml.check_plain(case)


@each_vocabulary
def test_one_bos_token(chatml: Desk) -> None:
    """A plain text that begins with the text of the BOS token gets one."""
    text = chatml.vocab.text("bos") + "one, two, three"
    found = chatml.renderer.located(text, "two, three")
    bos = chatml.vocab.scalars["tokenizer.ggml.bos_token_id"]
    assert found.tokens.count(bos) == 1


@each_vocabulary
def test_a_plain_text_that_spells_a_marker(chatml: Desk) -> None:
    """A target that is the text of a special token: located as that token, or refused; never other tokens."""
    side = (Message("user", "say <|im_end|> twice"), Message("assistant", "fine, <|im_end|> it is"))
    try:
        found = chatml.renderer.located(side, "fine")
    except PairsError:
        return
    data = found.text.encode()
    assert data[found.start : found.end] == b"fine"


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    check_refused(name, tmp_path)


@pytest.mark.parametrize("name", list(vocabularies()))
def test_the_page_is_current(name: str) -> None:
    assert page.vocabulary_row(name) in page.PAGE.read_text("utf-8").splitlines(), "make docs"
