"""The bytes that tokens cover, on SentencePiece vocabularies: blanks put before texts, white space swallowed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from steermoe_local import ExpertMap, Message, Pair, PairsError, record_counts
from steermoe_local.llama.aligning import token_bytes, tokens_in_span
from steermoe_local.llama.locating import find_in_text
from steermoe_local.llama.rendering import Renderer, vocabulary
from steermoe_local.models.embedded import behaviours
from steermoe_local.pairs.pairs import last_exact_run, load_pairs
from tests.support.sentencepiece_models import BLANK, write_sentencepiece_model

MIXTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
PHI_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>")
PAIRS = [
    Pair("digits", *((Message("user", "Count to three."), Message("assistant", reply)) for reply in replies), *replies)
    for replies in (("1, 2, 13", "one, two, three"), ("8", "eight"), ("13", "three"), ("ä 1", "ä one"))
]

PARTS = ("8", " ", "\n", "one", "ä", BLANK, "<s>", "</s>", "<|end|>", "<x>", "  ")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("spm")
    return {
        "mixtral": write_sentencepiece_model(folder / "mixtral.gguf", MIXTRAL),
        "gemma": write_sentencepiece_model(folder / "gemma.gguf", MIXTRAL, add_space_prefix=False),
        "special": write_sentencepiece_model(folder / "special.gguf", PHI, special=PHI_TOKENS),
        "phi": write_sentencepiece_model(folder / "phi.gguf", PHI, special=PHI_TOKENS, name="Phi-3.5-MoE"),
        "defined": write_sentencepiece_model(folder / "defined.gguf", PHI, special=PHI_TOKENS, defined=("  ", "<x>")),
    }


@pytest.fixture(scope="module", params=["mixtral", "gemma", "special", "phi", "defined"])
def renderer(request: pytest.FixtureRequest, models: dict[str, Path]) -> Iterator[Renderer]:
    with vocabulary(models[request.param]) as model:
        yield Renderer(model)


@pytest.fixture(scope="module")
def mixtral(models: dict[str, Path]) -> Iterator[Renderer]:
    with vocabulary(models["mixtral"]) as model:
        yield Renderer(model)


@pytest.fixture(scope="module")
def phi(models: dict[str, Path]) -> Iterator[Renderer]:
    with vocabulary(models["phi"]) as model:
        yield Renderer(model)


def piece(renderer: Renderer, token: int) -> bytes:
    return token_bytes(renderer._model, token, special=True)


def inked(data: bytes) -> bytes:
    """Without the blanks that may be added or swallowed."""
    return b"".join(data.replace(BLANK.encode(), b" ").split())


def oracle(renderer: Renderer, text: str, start: int, end: int, tokens: list[int]) -> list[int]:
    """The tokens of a span that begins and ends with no blank, counted in the text and the tokens without blanks."""
    data = text.encode()
    first, last = len(inked(data[:start])), len(inked(data[:end]))
    pieces = [inked(piece(renderer, token)) for token in tokens]
    at = -b"".join(pieces).index(inked(data))  # a BOS token before the text
    touched = []
    for index, ink in enumerate(pieces):
        if ink and at < last and at + len(ink) > first:
            touched.append(index)
        at += len(ink)
    return list(range(touched[0], touched[-1] + 1))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.positive_target)
def test_every_target_is_located(renderer: Renderer, pair: Pair) -> None:
    for side, target in pair.sides():
        found = renderer.located(side, target)
        data = found.text.encode()
        assert found.text == renderer.text(side)
        assert data[found.start : found.end].decode() == target
        assert found.target == oracle(renderer, found.text, found.start, found.end, found.tokens)
        assert not found.losses
        covered = b"".join(piece(renderer, found.tokens[index]) for index in found.target)
        assert covered.decode().strip() == target


def test_all_shipped_pairs(renderer: Renderer) -> None:
    n = 0
    for behaviour in behaviours():
        for pair in load_pairs(behaviour.pairs):
            for side, target in pair.sides():
                found = renderer.located(side, target)
                assert found.text.encode()[found.start : found.end].decode() == target
                assert found.target == oracle(renderer, found.text, found.start, found.end, found.tokens)
                assert not found.losses
                n += 1
    assert n == 720


@pytest.mark.parametrize("text", ["13", "the 13", "say\n13", "<s>13", "</s>13", "  13", "</s> 13", "ä13"])
def test_digits_are_one_token_each(renderer: Renderer, text: str) -> None:
    found = renderer.located(text, "13")
    assert [piece(renderer, found.tokens[index]) for index in found.target] == [b"1", b"3"]


@pytest.mark.parametrize(
    ("text", "as_paper"),
    [
        ("say 13", True),  # alone the target is a blank and two digits: that blank is not the target's
        ("13", True),
        ("ä13", None),  # no blank before it
        ("say three", True),
        (" three and\nthree", False),
    ],
)
def test_the_rule_of_the_paper(mixtral: Renderer, text: str, as_paper: bool | None) -> None:
    assert mixtral.located(text, "three" if "three" in text else "13").as_paper is as_paper


def test_a_blank_behind_every_special_token(mixtral: Renderer) -> None:
    found = mixtral.located((*PAIRS[1].positive, *PAIRS[2].positive), "13")
    pieces = [piece(mixtral, token) for token in found.tokens]
    assert pieces[0] == b"<s>"
    assert pieces[pieces.index(b"</s>") + 1].startswith(b" "), "the text has none there"
    assert "</s>[INST]" in found.text


def test_white_space_that_special_tokens_swallow(phi: Renderer) -> None:
    found = phi.located(PAIRS[2].positive, "13")
    pieces = [piece(phi, token) for token in found.tokens]
    assert "<|assistant|>\n13" in found.text
    assert b"\n" not in b"".join(pieces)
    assert pieces[found.target[0] - 2 : found.target[-1] + 1] == [b"<|assistant|>", b" ", b"1", b"3"]
    # a target of which they swallow a part, and one that is nothing else
    found = phi.located("<|user|>\n8", "\n8")
    assert [piece(phi, found.tokens[index]) for index in found.target] == [b"8"]
    with pytest.raises(PairsError, match="leaves nothing"):
        phi.located("<|user|> \n8", " \n")


@given(
    st.lists(st.sampled_from(["8", " ", "\n", "one", "ä", BLANK, "<s>", "</s>", "<|end|>", "<x>", "  "]), max_size=9)
)
@example(["</s>", "  ", "</s>", " "])
@example(["<|end|>", "\n", " ", "<|end|>", " "])
def test_spans_are_in_order_and_hold_the_text(renderer: Renderer, parts: list[str]) -> None:
    text = "x" + "".join(parts) + "end"
    data = text.encode()
    tokens = renderer.tokenize(text, add_special=True)
    spans = renderer._aligner.spans(data, tokens, add_special=True)
    assert len(spans) == len(tokens)
    at = 0
    for (start, end), token in zip(spans, tokens, strict=True):
        assert at <= start <= end
        assert not data[at:start].strip(), "white space alone is swallowed"
        assert inked(piece(renderer, token)) in (inked(data[start:end]), b"<s>")
        at = end
    assert at == len(data)
    start = len(data) - len("end")
    assert tokens_in_span(spans, start, len(data)) == oracle(renderer, text, start, len(data), tokens)


def test_a_text_that_the_tokenizer_changes(mixtral: Renderer) -> None:
    spans = mixtral._aligner.spans
    tokens = mixtral.tokenize("one two", add_special=False)
    with pytest.raises(PairsError, match="' three'"):
        spans(b"one three", tokens)
    with pytest.raises(PairsError, match="leaves it out"):
        spans(b"one two three", tokens)
    with pytest.raises(PairsError):
        spans(b"one", tokens)


def test_control_tokens_that_a_text_spells(mixtral: Renderer) -> None:
    for reply in ("the <s> tag", "so </s> it ends"):
        side = (Message("user", "Count."), Message("assistant", reply))
        with pytest.raises(PairsError, match=r"message 2 \(assistant\) spells '</?s>'"):
            mixtral.located(side, reply.split()[-1])
    with pytest.raises(PairsError, match="spells '<s>' at character 9"):
        mixtral.located("say the <s> tag", "tag")
    # turns that are written by hand
    assert mixtral.located("<s>[INST] a [/INST] b</s><s>[INST] c [/INST] two", "two").target
    assert mixtral.located("one </s> two", "one").target


def test_one_token_where_text_and_tokenizer_both_begin_with_it(mixtral: Renderer, caplog: Any) -> None:
    found = mixtral.located("<s>[INST] Count. [/INST]1, 2", "1, 2")
    assert found.tokens[0] == 1
    assert found.tokens.count(1) == 1
    assert len(found.notes) == 1
    assert "'<s>'" in found.notes[0]
    assert not caplog.records
    for _ in range(2):
        prompt = mixtral.render("<s>one")
        assert prompt.tokens == mixtral.render("one").tokens
    assert [record.getMessage() for record in caplog.records] == list(found.notes), "said once"
    assert mixtral.located("<s>one", "one").target == mixtral.located("one", "one").target


def test_recording_and_the_map(models: dict[str, Path]) -> None:
    for name, path in models.items():
        counts = record_counts(path, PAIRS, behaviour="digits")
        assert counts.n_pairs == len(PAIRS), name
        with vocabulary(path) as model:
            renderer = Renderer(model)
            n = [sum(len(renderer.located(*pair.sides()[side]).target) for pair in PAIRS) for side in (0, 1)]
        assert [counts.n1, counts.n2] == n
        assert ExpertMap.from_counts(counts).rd.shape == (2, 4)


def spans_of(pieces: list[bytes]) -> list[tuple[int, int]]:
    ends = [len(b"".join(pieces[: index + 1])) for index in range(len(pieces))]
    return [(end - len(part), end) for end, part in zip(ends, pieces, strict=True)]


@pytest.mark.parametrize(
    ("pieces", "target", "chosen"),
    [
        ([b"ab", b"cd", b"ef"], b"cd", [1]),
        ([b"ab", b" cd", b"ef"], b"cd", [1]),  # the blank belongs to the first target token
        ([b"ab", b" ", b"cd", b"ef"], b"cd", [2]),  # a blank of its own is outside
        ([b"ab", b"cde", b"f"], b"cd", [1]),  # merged across the end
        ([b"", b"cd", b"", b"e", b""], b"cde", [1, 3]),  # what the tokenizer added has no bytes
        ([b"x\xc3", b"\xa4y"], "ä".encode(), [0, 1]),  # halves of one character
    ],
)
def test_tokens_in_span(pieces: list[bytes], target: bytes, chosen: list[int]) -> None:
    start = b"".join(pieces).rindex(target)
    assert tokens_in_span(spans_of(pieces), start, start + len(target)) == chosen


@given(st.lists(st.binary(max_size=3), max_size=12), st.integers(0, 20), st.integers(1, 20))
def test_tokens_in_span_against_bytes(pieces: list[bytes], start: int, length: int) -> None:
    owner = [i for i, part in enumerate(pieces) for _ in part]
    assert tokens_in_span(spans_of(pieces), start, start + length) == sorted(set(owner[start : start + length]))


@given(st.lists(st.sampled_from(["a", "b", " c"]), min_size=1, max_size=10), st.data())
def test_bytes_and_exact_run_agree(pieces: list[str], data: Any) -> None:
    """With one token per piece of text, both rules find the same last span."""
    size = data.draw(st.integers(1, len(pieces)))
    at = data.draw(st.integers(0, len(pieces) - size))
    ids = [ord(part[-1]) for part in pieces]
    start, end = find_in_text("".join(pieces), "".join(pieces[at : at + size]))
    run = last_exact_run(ids, ids[at : at + size])
    assert run is not None
    assert tokens_in_span(spans_of([part.encode() for part in pieces]), start, end) == list(run)
