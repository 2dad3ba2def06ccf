"""Many interventions in one batch against the same ones alone, by SteeredLlama and NumPy."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from steermoe_local import BiasFile
from steermoe_local.attribution import decoding
from steermoe_local.attribution.decoding import InterventionDecoder
from steermoe_local.attribution.items import Answer, Item
from steermoe_local.errors import ModelError, ModelMismatchError, UsageError
from tests.support import rounding
from tests.support.architectures import widen, write_upstream
from tests.support.interventions import DECODER, Alone
from tests.support.paths import BUILD
from tests.support.random_models import GPT_OSS, OLMOE, SELECTION_BIAS, RandomModel, write_random_model

pytestmark = pytest.mark.numeric

Array = np.ndarray[Any, Any]


# random models of the tests' own, and llama.cpp's (tests/support/architectures.py)
RANDOM: dict[str, RandomModel] = {"olmoe": OLMOE, "gpt-oss": GPT_OSS, "selection bias": SELECTION_BIAS}
SHARING = ("mimo2", "llama4", "deepseek2")  # sliding window, chunked attention, latent attention
OWN = ("qwen3next", "lfm2moe", "deepseek4")  # states, convolutions, a memory of one sequence


@pytest.fixture(scope="module")
def upstream(tool: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Path of an architecture's random model with eight experts."""
    tool("test-llama-archs", "-h")  # skips or fails when it is not built
    folder = tmp_path_factory.mktemp("architectures")

    def path_of(arch: str) -> Path:
        path = folder / f"{arch}.gguf"
        if not path.exists():
            (source,) = write_upstream(BUILD / "bin" / "test-llama-archs", folder, arch)
            widen(source, path)
            source.unlink()
        return path

    return path_of


@pytest.fixture(scope="module")
def alone(random_model: Any, upstream: Any, tiny_f32_path: Path) -> Iterator[Any]:
    """`Alone` of a model by name."""
    opened: dict[str, Alone] = {}

    def of(name: str) -> Alone:
        if name not in opened:
            path = tiny_f32_path if name == "tiny" else random_model(RANDOM[name]) if name in RANDOM else upstream(name)
            opened[name] = Alone(path)
        return opened[name]

    yield of
    for one in opened.values():
        one.close()


def check_margins(one: Alone, items: Sequence[Item], steer: Any, biases: Sequence[BiasFile | None], **more: Any) -> Any:
    """Compare margins in batches with those alone; returns them, [items, biases]."""
    found = []
    with InterventionDecoder(one.model, items, [], n_steerings=64, steer=steer, **DECODER | more) as decoder:
        for start in range(0, len(biases), decoder.n_steerings):
            group = biases[start : start + decoder.n_steerings]
            decoder.steer_by(group)
            found.append([decoder.margins(item) for item in items])
    margins = np.concatenate(found, axis=1)
    for item, values in zip(items, margins, strict=True):
        for bias, value in zip(biases, values, strict=True):
            # signs of an item add up to 2 in size
            assert value == pytest.approx(one.margin(item, bias, steer), abs=2 * one.off, rel=0), item.id
    return margins


#
# margins
#


@pytest.mark.parametrize("steer", ["answer", "all"])
@pytest.mark.parametrize("name", ["tiny", *RANDOM, *SHARING])
def test_batched_interventions_are_those_one_by_one(alone: Any, name: str, steer: str) -> None:
    one = alone(name)
    biases = one.biases(14)
    margins = check_margins(one, one.items(), steer, biases)
    np.testing.assert_allclose(margins[:, 0], margins[:, 1], rtol=0, atol=2 * one.off)  # an empty choice does nothing
    assert np.ptp(margins, axis=1).min() > 100 * one.off, "the interventions differ"


def test_a_prompt_is_unsteered_unless_it_is_asked_for(alone: Any) -> None:
    one = alone("olmoe")
    items, biases = one.items()[:1], one.biases(14)
    apart = []
    for steer in ("answer", "all"):
        apart.append(check_margins(one, items, steer, biases)[0])
    assert np.abs(apart[0] - apart[1])[2:].max() > 100 * one.off
    np.testing.assert_allclose(apart[0][:2], apart[1][:2], rtol=0, atol=2 * one.off)


@pytest.mark.parametrize("steer", ["answer", "all"])
def test_a_prompt_longer_than_the_sliding_window(alone: Any, steer: str) -> None:
    """128 tokens in gpt-oss: what lies behind the window is out of every sequence's sight."""
    one = alone("gpt-oss")
    check_margins(one, one.items(150)[:1], steer, one.biases(5))


@pytest.mark.parametrize("name", OWN)
def test_models_whose_sequences_share_nothing(alone: Any, name: str) -> None:
    one = alone(name)
    items = one.items()
    with pytest.raises(ModelError, match="--steer all"):
        InterventionDecoder(one.model, items, [], n_steerings=4, steer="answer", **DECODER)
    check_margins(one, items, "all", one.biases(5))


@pytest.mark.parametrize("steer", ["answer", "all"])
@pytest.mark.parametrize("n_batch", [1, 7, 61, 512])
def test_batches_smaller_than_the_rows(alone: Any, n_batch: int, steer: str) -> None:
    """A batch holds one row of each sequence at least; larger items are decoded in several."""
    one = alone("olmoe")
    with InterventionDecoder(one.model, one.items(), [], n_steerings=6, n_batch=n_batch, **DECODER) as decoder:
        assert decoder._n_batch >= max(n_batch, 6 * 4 + 1)
    check_margins(one, one.items(40), steer, one.biases(14), n_batch=n_batch)


@pytest.mark.parametrize("n_batch", [9, 512])
def test_sequences_that_share_nothing_give_the_same(alone: Any, monkeypatch: pytest.MonkeyPatch, n_batch: int) -> None:
    """The way of recurrent models on one that could share."""
    monkeypatch.setattr(decoding, "can_share", lambda _: False)
    one = alone("olmoe")
    check_margins(one, one.items(), "all", one.biases(6), n_batch=n_batch)


def test_outputs_in_several_parts(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary so large that few rows of logits fit the memory that is allowed for them."""
    one = alone("olmoe")
    monkeypatch.setattr(decoding, "_LOGITS_BYTES", 4 * one.n_vocab * 16)
    check_margins(one, one.items(), "answer", one.biases(14))


def test_many_answers(alone: Any) -> None:
    """Each steering takes a sequence for each answer, so fewer fit; more answers than sequences are refused."""
    one = alone("olmoe")
    prompt = one.items()[0].prompt
    answers = [Answer((i % 64, i // 64), (0, 1), 1 / 60 if i < 60 else -1 / 60) for i in range(120)]
    item = Item("many", prompt, tuple(answers))
    with InterventionDecoder(one.model, [item], [], n_steerings=64, **DECODER) as decoder:
        assert decoder.n_steerings == 2
    check_margins(one, [item], "answer", one.biases(5))
    too_many = Item("more", prompt, tuple(itertools.chain(answers, answers, answers)))
    with pytest.raises(UsageError, match="360"):
        InterventionDecoder(one.model, [too_many], [], n_steerings=64, **DECODER)


def test_steerings_can_be_exchanged(alone: Any) -> None:
    """What an earlier block left, of more steerings and longer prompts, changes nothing."""
    one = alone("olmoe")
    items, biases = one.items(), one.biases(20)
    with InterventionDecoder(one.model, items, [one.document(20, 0)], n_steerings=12, **DECODER) as decoder:
        decoder.steer_by(biases[:4])
        alone_first = [decoder.margins(item) for item in items]
        decoder.steer_by(biases[8:20])
        for item in items:
            decoder.margins(item)
        decoder.divergences(one.document(20, 0))
        decoder.steer_by(biases[:4])
        for item, before in zip(items, alone_first, strict=True):
            assert np.array_equal(decoder.margins(item), before)


#
# divergences
#


@pytest.mark.parametrize("steer", ["answer", "all"])
@pytest.mark.parametrize(("n", "first"), [(30, 0), (30, 12), (2, 0)])
@pytest.mark.parametrize("name", ["olmoe", "selection bias", "mimo2"])
def test_divergences_are_those_of_numpy(alone: Any, name: str, n: int, first: int, steer: Any) -> None:
    one = alone(name)
    document, biases = one.document(n, first), one.biases(10)
    with InterventionDecoder(one.model, one.items(), [document], n_steerings=16, steer=steer, **DECODER) as decoder:
        decoder.steer_by(biases)
        found = decoder.divergences(document)
    for bias, value in zip(biases, found, strict=True):
        expected = one.divergence(document, bias, steer)
        assert value == pytest.approx(expected, abs=document.n * rounding.kl(expected / document.n, one.off), rel=0)
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert (found >= 0).all()
    assert found[2:].max() > 10 * document.n * rounding.kl(0, one.off), "the interventions differ"


@pytest.mark.parametrize("n_batch", [1, 40, 100])
def test_divergences_in_small_batches(alone: Any, n_batch: int) -> None:
    one = alone("qwen3next")
    document, biases = one.document(30, 0), one.biases(7)
    with InterventionDecoder(
        one.model, one.items()[1:], [document], n_steerings=7, steer="all", n_batch=n_batch, **DECODER
    ) as decoder:
        decoder.steer_by(biases)
        found = decoder.divergences(document)
    for bias, value in zip(biases, found, strict=True):
        expected = one.divergence(document, bias, "all")
        assert value == pytest.approx(expected, abs=document.n * rounding.kl(expected / document.n, one.off), rel=0)


#
# what is refused
#


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model.gguf", OLMOE)
    shutil.copy(path, tmp_path / "good.gguf")
    for tensor in GGUFReader(path, "r+").tensors:
        if tensor.name == "blk.2.ffn_down_exps.weight":
            tensor.data[3] = np.nan  # an expert of a layer: only the tokens that it is chosen for
    one = Alone(path)
    try:
        item, document = one.items()[0], one.document(20, 0)
        identity = decoding.loaded_identity(one.model)
        signs = np.zeros(identity.shape, np.int8)
        signs[2, 3] = -1
        without = BiasFile.from_signs(signs, identity)
        with InterventionDecoder(one.model, [item], [document], n_steerings=2, **DECODER) as decoder:
            decoder.steer_by([without, BiasFile.from_signs(-signs, identity)])
            for compute in (lambda: decoder.margins(item), lambda: decoder.divergences(document)):
                with pytest.raises(ModelError):
                    compute()
    finally:
        one.close()


def test_attention_to_later_tokens_is_refused(upstream: Any) -> None:
    one = Alone(upstream("llada-moe"))
    try:
        with pytest.raises(ModelError, match="bidirectional"):
            InterventionDecoder(one.model, one.items(), [], n_steerings=2, steer="all")
    finally:
        one.close()


def test_what_is_longer_than_the_trained_context_is_refused(alone: Any) -> None:
    one = alone("olmoe")
    longer = one.items(520)[:1]
    with pytest.raises(UsageError, match="512"):
        InterventionDecoder(one.model, longer, [], n_steerings=2, **DECODER)
    with pytest.raises(UsageError, match="600"):
        InterventionDecoder(one.model, one.items(), [one.document(600, 0)], n_steerings=2, **DECODER)


def test_steerings_of_another_model_and_too_many_of_them_are_refused(alone: Any) -> None:
    one, other = alone("olmoe"), alone("gpt-oss")
    item = one.items()[1]
    with InterventionDecoder(one.model, [item], [], n_steerings=3, **DECODER) as decoder:
        with pytest.raises(UsageError, match="steer_by"):
            decoder.margins(item)
        with pytest.raises(UsageError, match="4"):
            decoder.steer_by(one.biases(4))
        with pytest.raises(ModelMismatchError):
            decoder.steer_by(other.biases(3))
        with pytest.raises(UsageError, match="steer_by"):
            decoder.margins(item)  # half of another model's steerings may be attached
        decoder.steer_by(one.biases(3))
        assert np.isfinite(decoder.margins(item)).all()
