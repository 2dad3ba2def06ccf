"""Where tokens of a completion's prompt begin, on a vocabulary that puts blanks behind special tokens."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from steermoe_local.llama.rendering import Renderer, vocabulary
from steermoe_local.llama.tokenizing import token_bytes
from steermoe_local.server.prompting import Prompter
from tests.support.sentencepiece_models import write_sentencepiece_model


@pytest.mark.parametrize("add_space_prefix", [None, False])
@pytest.mark.parametrize("text", ["", "one", "one</s>13</s> ä two", "<s>one", "ä", " 1  3"])
def test_every_token_begins_where_its_text_is(tmp_path: Path, text: str, add_space_prefix: bool | None) -> None:
    path = write_sentencepiece_model(tmp_path / "m.gguf", "", add_space_prefix=add_space_prefix)
    with vocabulary(path) as model:

        def piece(token: int, *, special: bool = False) -> bytes:
            return token_bytes(model.vocab, token, special)

        engine: Any = SimpleNamespace(renderer=Renderer(model), n_ctx=512, model=model, token_bytes=piece)
        with closing(Prompter(engine, thinking=False, template_arguments={})) as prompter:
            (prompt,) = prompter.texts(text)
        assert prompt.tokens[0] == model.token_bos()
        data = text.encode()
        starts = [len(text[:offset].encode()) for offset in prompt.offsets]
        for token, start in list(zip(prompt.tokens, starts, strict=True))[0 if text.startswith("<s>") else 1 :]:
            ink = piece(token, special=True).strip()
            assert data[start:].lstrip().startswith(ink) or not ink.isascii(), "or a byte of a letter"
        assert prompt.offsets == sorted(prompt.offsets)
        if text == "one</s>13</s> ä two":
            tail = [text[offset:] for offset in prompt.offsets]
            assert "13</s> ä two" in tail
            assert "3</s> ä two" in tail
