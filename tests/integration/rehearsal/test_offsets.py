"""SentencePiece vocabularies: tokens of a text, and those of a target in it, as transformers' tokenizer has them."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from steermoe_local.llama.rendering import vocabulary_renderer
from tests.integration.rehearsal.archive import vocabularies

pytestmark = pytest.mark.rehearsal

WORDS = [
    "13",
    "seven",
    "Count",
    "to",
    "twelve.",
    "one,",
    "ünï",
    "東京",
    "🙂",
    "a",
    "x=3\nnew",
    "line",
    "tab\tok",
    "don't",
]
N_TEXTS = 300


@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_targets_have_the_offsets_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    path = vocabularies()[name]
    theirs: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    blank = theirs.convert_tokens_to_ids("▁")
    rng = random.Random(3)
    with vocabulary_renderer(path) as renderer:
        for _ in range(N_TEXTS):
            words = [rng.choice(WORDS) for _ in range(rng.randrange(2, 9))]
            text, target = " ".join(words), rng.choice(words)
            found = renderer.located(text, target)
            encoded = theirs(text, return_offsets_mapping=True)
            assert found.tokens == encoded["input_ids"], text
            start, end = (len(text.encode()[:at].decode()) for at in (found.start, found.end))
            expected = [
                index
                for index, (first, last) in enumerate(encoded["offset_mapping"])
                if first < end and last > start and last > first
            ]
            # transformers gives the blank that the tokenizer adds the place of the text's first character
            if start == 0 and found.tokens[expected[0]] == blank:
                expected = expected[1:]
            assert found.target == expected, (text, target)
