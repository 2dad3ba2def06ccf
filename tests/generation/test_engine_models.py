"""`Engine` on other kinds of models: dense, sliding windows, recurrent states, and those that cannot write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, ModelError, ModelMismatchError, SteeredLlama
from steermoe_local.generation.engine import Engine
from steermoe_local.llama import capi
from tests.support.architectures import widen, write_upstream
from tests.support.generation import answer, greedy
from tests.support.low_level import identity_of
from tests.support.paths import BUILD
from tests.support.random_models import GPT_OSS, OLMOE, RandomModel

pytestmark = pytest.mark.numeric

DENSE = RandomModel("qwen3", n_layer=2, n_dense=2, n_expert=0, k=0)


def compare_with_alone(
    path: Path, n_prompts: tuple[int, ...] = (30, 7, 70), kept: float = 0.5, **options: Any
) -> list[list[int]]:
    """Three slots at once, then the texts continued, then cut back to `kept` of them and continued: as alone.

    Returns `n_cached` of the last two.
    """
    model = SteeredLlama(path, n_ctx=32, n_threads=1, n_threads_batch=1, **options)
    rng = np.random.default_rng(8)
    n_vocab = model.n_vocab()
    settings: dict[str, Any] = {"n_ctx": 700, "n_batch": 64, "n_ubatch": 16, "n_threads": 1}

    def fresh(prompt: list[int]) -> list[int]:
        with Engine(model, **settings) as engine:
            return answer(engine, greedy(prompt, 6))[0][1]

    found: list[list[int]] = []
    texts = [rng.integers(0, n_vocab, n).tolist() for n in n_prompts]
    said: list[list[int]] = []
    with Engine(model, n_slots=3, **settings) as engine:
        slots = [engine.slot() for _ in n_prompts]
        for change in ("", "continued", "cut"):
            for i, text in enumerate(texts):
                more = rng.integers(0, n_vocab, 5).tolist()
                place = int(len(text) * kept)
                if change == "continued":
                    texts[i] = text + said[i] + more
                if change == "cut":
                    texts[i] = [*text[:place], (text[place] + 1) % n_vocab, *more]
            answers = answer(engine, *(greedy(t, 6, slot=s) for s, t in zip(slots, texts, strict=True)))
            said = [tokens for _, tokens, _ in answers]
            assert said == [fresh(text) for text in texts], change
            found.append([end.n_cached for _, _, end in answers])
    model.close()
    return found[1:]


def test_a_dense_model(random_model: Any) -> None:
    path = random_model(DENSE)
    continued, cut = compare_with_alone(path)
    assert continued == [35, 12, 75]
    assert cut == [20, 9, 40]
    model = SteeredLlama(path, n_ctx=32, n_threads=1)
    with Engine(model, n_ctx=64, n_threads=1) as engine:
        assert engine.identity is None
        text, tokens, end = answer(engine, greedy([1, 2, 3], 4))[0]
        assert (text, len(tokens), end.routing) == ("", 4, None)
        assert engine.route([1, 2, 3], None, 1) is None
        foreign = BiasFile.from_signs(np.eye(4, 16), identity_of(random_model(OLMOE)))
        with pytest.raises((ModelMismatchError, ModelError)):
            engine.add(greedy([1, 2, 3], bias=foreign))
        with pytest.raises(ModelError, match="no tokenizer"):
            _ = engine.renderer
    model.close()


@pytest.mark.parametrize(
    ("swa_full", "kept", "n_kept"), [(True, 0.5, 305), (False, 0.5, 0), (False, 0.7, 0), (False, 0.95, 580)]
)
def test_a_sliding_window(random_model: Any, swa_full: bool, kept: float, n_kept: int) -> None:
    """gpt-oss looks back on 128 tokens: where some of them are gone, the text is computed again."""
    continued, cut = compare_with_alone(random_model(GPT_OSS), (30, 7, 600), kept, swa_full=swa_full)
    assert continued == [35, 12, 605]
    assert cut[2] == n_kept


@pytest.mark.parametrize("arch", ["lfm2moe", "qwen3next", "kimi-linear", "minimax-01", "deepseek4", "llama4"])
def test_other_kinds_of_memory(tool: Any, tmp_path: Path, arch: str) -> None:
    """Recurrent states cannot be cut: such a slot begins again, and says so."""
    tool("test-llama-archs", "-h")  # skips or fails when it is not built
    upstream = write_upstream(BUILD / "bin" / "test-llama-archs", tmp_path, arch)
    continued, cut = compare_with_alone(widen(upstream[0], tmp_path / "wide.gguf"), (20, 7, 30))
    assert continued == [25, 12, 35]
    assert cut == ([15, 9, 20] if arch == "llama4" else [0, 0, 0])


def test_a_state_and_a_window(tool: Any, tmp_path: Path) -> None:
    """Where the state says that nothing is cut, nothing has left the window."""
    tool("test-llama-archs", "-s", 1, "-a", "^lfm2$", "-o", tmp_path)
    continued, cut = compare_with_alone(tmp_path / "lfm2-dense.gguf")
    assert continued == [35, 12, 75]
    assert cut == [0, 0, 0]


def test_models_that_do_not_write(tool: Any, tmp_path: Path, llama: SteeredLlama, monkeypatch: Any) -> None:
    lib = capi.llama_cpp()
    for name, value, words in (
        ("llama_model_has_encoder", True, "encoder"),
        ("llama_model_has_decoder", False, "left to right"),
        ("llama_get_memory", None, "no memory"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(lib, name, lambda *_, value=value: value)
            with pytest.raises(ModelError, match=words):
                Engine(llama, n_ctx=64)
    tool("test-llama-archs", "-h")
    upstream = write_upstream(BUILD / "bin" / "test-llama-archs", tmp_path, "llada-moe")
    diffusion = SteeredLlama(upstream[0], n_ctx=32, n_threads=1)
    with pytest.raises(ModelError, match=r"llada-moe model .* left"):
        Engine(diffusion, n_ctx=64)
    diffusion.close()
