"""The date of a conversation whose template prints it: one for all of it, kept in its file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from steermoe_local import FormatError, ModelError, SteeredLlama
from steermoe_local.generation.chat import Chat
from steermoe_local.generation.engine import Engine
from tests.support.chats import say
from tests.support.generation import GREEDY
from tests.support.templated import BROKEN, DATED, models

ONE, TWO = "2024-02-29", "2025-12-01"


@pytest.fixture(scope="module")
def dated(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = models(tmp_path_factory.mktemp("models"), tiny_path)
    llama = SteeredLlama(model(DATED), n_ctx=64, n_threads=1)
    with closing(llama), Engine(llama, n_ctx=256, n_threads=1) as engine:
        yield engine


def chat(engine: Engine, date: str | None = None) -> Chat:
    return Chat(engine, sampling=GREEDY, max_tokens=2, date=date)


def prompt_of(made: Chat) -> str:
    return made._renderer.chat_text([{"role": "user", "content": "Hi."}])


def test_the_file_keeps_the_date(dated: Engine, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    first = chat(dated, ONE)
    say(first, "Hi.")
    first.save(path)
    first.close()
    assert json.loads(path.read_text("utf-8"))["date"] == ONE
    later = chat(dated)
    assert later.date not in (None, ONE), "today"
    assert later.load(path) == []
    assert later.date == ONE
    assert f"Today is {ONE}." in prompt_of(later)
    later.close()
    other = chat(dated, TWO)  # who gives a date, wants it
    (warning,) = other.load(path)
    assert ONE in warning
    assert TWO in warning
    assert f"Today is {TWO}." in prompt_of(other)
    other.close()


def test_files_without_a_date_and_damaged_ones(dated: Engine, tmp_path: Path) -> None:
    made = chat(dated, ONE)
    content = made.to_dict()
    for bad in ("yesterday", "2023-02-29", 20240229, [ONE]):
        with pytest.raises(FormatError, match="date"):
            made.load(content | {"date": bad})
    del content["date"]  # of an earlier version
    assert made.load(content) == []
    assert made.date == ONE
    made.close()


def test_a_template_without_a_date(new: object, engine: Engine) -> None:
    made = Chat(engine, date=ONE)
    assert made.date is None
    assert "date" not in made.to_dict()
    assert made.load(made.to_dict() | {"date": TWO}) == []
    made.close()


def test_llama_cpps_chat_completions(tiny_path: Path, tmp_path: Path) -> None:
    """`create_chat_completion` renders by the same template; one that cannot be read leaves texts."""
    model = models(tmp_path, tiny_path)
    with closing(SteeredLlama(model(DATED), n_ctx=128, n_threads=1, date=ONE)) as llama:
        llama.create_chat_completion([{"role": "user", "content": "Hi."}], max_tokens=1)
        text = llama.detokenize(llama.input_ids[: llama.n_tokens].tolist(), special=True)
        assert f"Today is {ONE}.".encode() in text
    with closing(SteeredLlama(model(BROKEN), n_ctx=128, n_threads=1)) as llama:
        assert llama.create_completion("one, two,", max_tokens=1)["usage"]["prompt_tokens"] > 1
        with pytest.raises(ModelError, match="cannot be read"):
            llama.create_chat_completion([{"role": "user", "content": "Hi."}], max_tokens=1)
