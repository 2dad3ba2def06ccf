"""`SteeredLlama` under plans: phases, memory used again, caches, states, and what it refuses."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, Engine, ModelMismatchError, SteeredLlama, UsageError
from steermoe_local.generation.requests import Request
from steermoe_local.llama import capi
from steermoe_local.llama.sampling import Sampling
from steermoe_local.llama.steered_llama import native_bias
from steermoe_local.maps.routing_lean import RoutingLean
from steermoe_local.model_files.model_info import model_info
from steermoe_local.steering.bias_plan import AnyBias, BiasPlan, BiasRule
from steermoe_local.steering.plan_text import parse_rule
from tests.support.architectures import widen, write_upstream
from tests.support.low_level import identity_of, random_signs
from tests.support.paths import BUILD
from tests.support.random_models import OLMOE

PROMPT = "What is three plus four? What is one plus one?"
N = 24


@pytest.fixture(scope="module")
def biases(tiny_path: Path) -> list[BiasFile]:
    identity = identity_of(tiny_path)
    rng = np.random.default_rng(5)

    def signs() -> Any:
        k, n = identity.n_expert_used, identity.n_expert
        return np.stack([random_signs(rng, n, k, 2, n // 3) for _ in range(identity.n_layer)])

    return [
        BiasFile.from_signs(signs(), identity),
        BiasFile.from_signs(signs(), identity),
        BiasFile.from_soft(rng.normal(scale=0.5, size=identity.shape), identity),
    ]


@pytest.fixture(scope="module")
def llama(tiny_path: Path) -> Iterator[SteeredLlama]:
    model = SteeredLlama(tiny_path, n_ctx=256, n_threads=1, n_batch=8)
    yield model
    model.close()


@pytest.fixture
def fresh(llama: SteeredLlama) -> Iterator[SteeredLlama]:
    """The model, unsteered and with nothing in memory; as it was, too, behind the test."""
    llama.bias = None
    yield llama
    llama.set_cache(None)
    llama.draft_model = None
    llama.bias = None


def plan(*rules: tuple[str, BiasFile | None], lean: RoutingLean | None = None) -> BiasPlan:
    """A plan of places in their text form, and what steers there."""
    found = [(parse_rule(f"{where}: none", number).where, bias) for number, (where, bias) in enumerate(rules, 1)]
    return BiasPlan(tuple(BiasRule(where, bias, lean if where.when is not None else None) for where, bias in found))


def plans(biases: list[BiasFile]) -> dict[str, BiasPlan]:
    one, two, soft = biases
    return {
        "answer": plan(("answer", one)),
        "prompt": plan(("prompt", one)),
        "mixed": plan(("prompt[-1:]", one), ("answer[2:6]", two), ("prompt[0:3]", soft), ("answer every 2", soft)),
        "entropy": plan(("answer when entropy > 1.0", one), ("answer", two)),
        "margin": plan(("answer when margin < 1.5", two), ("prompt", soft)),
    }


def prompt_tokens(llama: SteeredLlama, text: str = PROMPT) -> list[int]:
    return list(llama.tokenize(text.encode(), add_bos=False))


def greedy(llama: SteeredLlama, tokens: list[int], n: int = N) -> list[int]:
    found = []
    for token in llama.generate(tokens, temp=0.0):
        found.append(int(token))
        if len(found) == n:
            break
    return found


def of_engine(llama: SteeredLlama, bias: AnyBias | None, tokens: list[int], **fields: Any) -> list[int]:
    """The same answer by an engine, which goes on at ends of the generation as little as the caller does."""
    ends = {t: -np.inf for t in range(llama.n_vocab()) if capi.llama_cpp().llama_vocab_is_eog(llama._model.vocab, t)}
    sampling = Sampling(temperature=0.0, logit_bias=ends)
    with Engine(llama, n_ctx=256, n_batch=8, n_threads=1, record=False) as engine:
        request = Request(tokens, bias, sampling, N, routing=False, **fields)
        return [event.token for _, event in engine.generate(request) if getattr(event, "token", -1) >= 0]


def without_ends(llama: SteeredLlama, tokens: list[int], n: int = N) -> list[int]:
    """`greedy` without the tokens that end a generation."""
    lib = capi.llama_cpp()
    ends = [token for token in range(llama.n_vocab()) if lib.llama_vocab_is_eog(llama._model.vocab, token)]

    def forbid(_: Any, scores: Any) -> Any:
        scores[ends] = -np.inf
        return scores

    from llama_cpp import LogitsProcessorList

    found = []
    for token in llama.generate(tokens, temp=0.0, logits_processor=LogitsProcessorList([forbid])):
        found.append(int(token))
        if len(found) == n:
            break
    return found


NAMES = ("answer", "prompt", "mixed", "entropy", "margin")


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_the_engine(name: str, fresh: SteeredLlama, biases: list[BiasFile]) -> None:
    tokens = prompt_tokens(fresh)
    unsteered = without_ends(fresh, tokens)
    fresh.bias = plans(biases)[name]
    steered = without_ends(fresh, tokens)
    assert steered == of_engine(fresh, plans(biases)[name], tokens)
    assert steered != unsteered, "the plan does nothing, and the test says nothing"


@pytest.mark.parametrize("name", ["answer", "mixed"])
def test_a_loop_of_the_c_interface(name: str, fresh: SteeredLlama, biases: list[BiasFile], tiny_path: Path) -> None:
    """Rows for every token by hand, in the same batches: the same bits of logits."""
    tokens = prompt_tokens(fresh)
    one, two, soft = biases
    n = len(tokens)

    def bias_at(position: int) -> BiasFile | None:
        drawn = position - (n - 1)  # the reply's token that is drawn there
        if name == "answer":
            return one if drawn >= 0 else None
        if position == n - 2:
            return one
        if 2 <= drawn < 6:
            return two
        return soft if position < 3 or (drawn >= 0 and drawn % 2 == 0) else None

    by_hand = SteeredLlama(tiny_path, n_ctx=256, n_threads=1, n_batch=8)
    planned = SteeredLlama(tiny_path, bias=plans(biases)[name], n_ctx=256, n_threads=1, n_batch=8)
    try:
        ctx = by_hand._ctx.ctx
        for row, bias in enumerate(biases):
            capi.attach_row(ctx, row, native_bias(bias))
        generated = planned.generate(tokens, temp=0.0)
        text = list(tokens)
        done = 0
        for _ in range(8):
            while done < len(text):
                part = text[done : done + 8]
                steering = [bias_at(position) for position in range(done, done + len(part))]
                capi.set_token_rows(ctx, [-1 if bias is None else biases.index(bias) for bias in steering])
                by_hand.eval(part)
                done += len(part)
            logits = np.array(capi.logits(ctx, -1, by_hand.n_vocab()))
            text.append(int(next(generated)))
            assert np.array_equal(np.array(capi.logits(planned._ctx.ctx, -1, planned.n_vocab())), logits)
            assert text[-1] == int(logits.argmax())
    finally:
        by_hand.close()
        planned.close()


def counted(llama: SteeredLlama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what is decoded from here on."""
    sizes: list[int] = []
    decode = llama._ctx.decode

    def spy(batch: Any) -> None:
        sizes.append(int(batch.batch.n_tokens))
        decode(batch)

    monkeypatch.setattr(llama._ctx, "decode", spy)
    return sizes


def test_memory_is_used_token_by_token(
    fresh: SteeredLlama, biases: list[BiasFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a turn's answer becomes part of the prompt is read again where its steering differs, and nothing else."""
    tokens = prompt_tokens(fresh)
    by_name = plans(biases)
    fresh.bias = by_name["answer"]
    answer = greedy(fresh, tokens, 6)
    sizes = counted(fresh, monkeypatch)
    longer = [*tokens, *answer, *tokens[:4]]
    again = greedy(fresh, longer, 3)
    # the prompt's last token and the answer's were steered, as a part of the prompt they are not
    assert sum(sizes) == len(longer) - (len(tokens) - 1) + 2
    fresh.reset()
    fresh.bias = None
    fresh.bias = by_name["answer"]
    assert greedy(fresh, longer, 3) == again
    # a plan that steers the answer otherwise shares the prompt
    sizes.clear()
    fresh.bias = plan(("answer", biases[1]))
    other = greedy(fresh, longer, 3)
    assert sum(sizes) == 1 + 2
    fresh.bias = None
    fresh.bias = plan(("answer", biases[1]))
    assert greedy(fresh, longer, 3) == other
    # and one that steers the prompt shares nothing
    sizes.clear()
    fresh.bias = by_name["prompt"]
    greedy(fresh, longer, 3)
    assert sum(sizes) == len(longer) + 2


def test_memory_is_always_what_the_plan_wants(
    fresh: SteeredLlama, biases: list[BiasFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random plans, prompts that begin alike, and states: each token that is attended to has its bias of now."""
    rng = np.random.default_rng(11)
    places = ("answer", "prompt", "all", "prompt[-2:]", "answer[1:3]", "prompt every 2", "answer when margin < 2")
    memory: dict[int, tuple[int, str]] = {}  # what was computed at each position, under which bias
    rows: list[int] = []
    wanted_rows = capi.set_token_rows
    decode = fresh._ctx.decode

    def take(ctx: Any, given: Any) -> None:
        rows[:] = given
        wanted_rows(ctx, given)

    def spy(batch: Any) -> None:
        assert fresh._rows is not None
        keys = ["" if row < 0 else fresh._rows.plan.biases[row].key for row in rows]
        for index, key in enumerate(keys):
            memory[int(batch.batch.pos[index])] = (int(batch.batch.token[index]), key)
        assert len(keys) == batch.batch.n_tokens
        decode(batch)

    monkeypatch.setattr(capi, "set_token_rows", take)
    monkeypatch.setattr(fresh._ctx, "decode", spy)
    base = prompt_tokens(fresh)
    state: Any = None
    kept: dict[int, tuple[int, str]] = {}
    for _ in range(60):
        chosen = [(str(place), [None, *biases][rng.integers(4)]) for place in rng.choice(places, 2, replace=False)]
        fresh.bias = plan(*chosen)
        if state is not None and rng.random() < 0.2:
            fresh.load_state(state)
            memory.clear()
            memory.update(kept)
        tokens = [*base[: rng.integers(2, len(base))], *rng.integers(20, 60, rng.integers(0, 3)).tolist()]
        generated = fresh.generate(tokens, temp=0.0)
        answer = [int(next(generated)) for _ in range(rng.integers(1, 6))]
        run = generated.gi_frame.f_locals["run"]
        text = [*tokens, *answer[:-1]]
        assert fresh.n_tokens == len(text)
        assert [memory[position] for position in range(len(text))] == list(zip(text, run.keys, strict=True))
        assert fresh._known_keys() == run.keys
        if rng.random() < 0.2:
            state, kept = fresh.save_state(), dict(memory)


@pytest.mark.parametrize("arch", ["lfm2moe", "qwen3next", "llama4"])
def test_recurrent_states_and_windows(arch: str, tmp_path: Path) -> None:
    """Memory that cannot be cut anywhere: answers are those of an empty memory, and of the engine."""
    (source,) = write_upstream(BUILD / "bin" / "test-llama-archs", tmp_path, arch)
    path = tmp_path / "wide.gguf"
    widen(source, path)
    identity, rng = identity_of(path), np.random.default_rng(1)
    n, k = identity.n_expert, identity.n_expert_used
    layers = model_info(path).moe_layers
    bias = BiasFile(identity, "hard", {layer: random_signs(rng, n, k, 1, n // 3) for layer in layers})
    steering = plan(("prompt[0:3]", bias), ("answer[1:4]", bias))
    models = [SteeredLlama(path, bias=steering, n_ctx=256, n_threads=1) for _ in range(2)]
    try:
        tokens = [int(token) for token in rng.integers(0, models[0].n_vocab(), 12)]
        first = greedy(models[0], tokens, 6)
        longer = [*tokens, *first, *tokens[:3]]
        second = greedy(models[0], longer, 6)
        assert greedy(models[0], tokens, 6) == first
        assert greedy(models[1], longer, 6) == second
        with Engine(models[1], n_ctx=256, n_threads=1, record=False) as engine:
            request = Request(tokens, steering, Sampling(temperature=0.0), 6, routing=False)
            found = [event.token for _, event in engine.generate(request) if getattr(event, "token", -1) >= 0]
        assert found == first
    finally:
        for model in models:
            model.close()


def test_a_prompt_that_is_in_memory_is_not_computed(
    fresh: SteeredLlama, biases: list[BiasFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = prompt_tokens(fresh)
    fresh.bias = plans(biases)["mixed"]
    first = greedy(fresh, tokens, 1)
    sizes = counted(fresh, monkeypatch)
    assert greedy(fresh, tokens, 1) == first
    assert sizes == []


def test_a_plain_bias_is_as_before(fresh: SteeredLlama, tiny_path: Path, biases: list[BiasFile]) -> None:
    """Behind a plan, and as the only rule of one for all tokens, bits are those of the bias."""
    tokens = prompt_tokens(fresh)
    fresh.bias = plans(biases)["mixed"]
    greedy(fresh, tokens, 3)
    fresh.bias = biases[0]
    assert fresh.n_tokens == 0
    answer = greedy(fresh, tokens, 6)
    logits = np.array(capi.logits(fresh._ctx.ctx, -1, fresh.n_vocab()))
    plain = SteeredLlama(tiny_path, bias=biases[0], n_ctx=256, n_threads=1, n_batch=8)
    everywhere = SteeredLlama(tiny_path, bias=plan(("all", biases[0])), n_ctx=256, n_threads=1, n_batch=8)
    for other in (plain, everywhere):
        assert greedy(other, tokens, 6) == answer
        assert np.array_equal(np.array(capi.logits(other._ctx.ctx, -1, other.n_vocab())), logits)
        other.close()
    fresh.bias = None
    assert fresh.layer_info()[0].steered is False


def test_chats_have_phases(fresh: SteeredLlama, biases: list[BiasFile]) -> None:
    """A chat's answer is that of the engine on the rendered prompt; also as a stream, which is computed later."""
    from steermoe_local.llama.rendering import Renderer
    from steermoe_local.pairs.pairs import Message

    messages = [{"role": "user", "content": "What is three plus four?"}]
    rendered = Renderer(fresh._model).render([Message(**message) for message in messages])
    fresh.bias = plans(biases)["mixed"]
    options: dict[str, Any] = {"messages": messages, "temperature": 0.0, "max_tokens": 8}
    text = fresh.create_chat_completion(**options)["choices"][0]["message"]["content"]
    with Engine(fresh, n_ctx=256, n_batch=8, n_threads=1, record=False) as engine:
        request = Request(rendered.tokens, fresh.bias, Sampling(temperature=0.0), 8, style=rendered.style)
        found = "".join(event.text for _, event in engine.generate(request) if hasattr(event, "text"))
    assert text == found
    stream = fresh.create_chat_completion(**options, stream=True)
    assert not fresh._chats
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in stream) == text


def test_the_style_of_a_chat(fresh: SteeredLlama, biases: list[BiasFile], monkeypatch: pytest.MonkeyPatch) -> None:
    """The markers of the chat template, for chats alone; a prompt may end inside the reasoning."""
    from steermoe_local.llama import steered_llama

    styles: list[Any] = []
    made = steered_llama.PlanRun

    def run(rows: Any, start: int, prompt: Any, style: Any, token_bytes: Any) -> Any:
        styles.append(style)
        return made(rows, start, prompt, style, token_bytes)

    monkeypatch.setattr(steered_llama, "PlanRun", run)
    monkeypatch.setitem(fresh.metadata, "tokenizer.chat_template", "{{ '<think>' }} {{ '</think>' }}")
    fresh.bias = plans(biases)["answer"]
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 2}
    fresh.create_chat_completion(messages=[{"role": "user", "content": "one"}], **options)
    for part in fresh.create_chat_completion(messages=[{"role": "user", "content": "two"}], **options, stream=True):
        assert part
    fresh.create_completion("one", **options)
    assert [style is not None for style in styles] == [True, True, False]
    assert styles[0].tags is not None


def test_the_prompt_cache(fresh: SteeredLlama, biases: list[BiasFile]) -> None:
    from llama_cpp import LlamaRAMCache

    inner = LlamaRAMCache()
    fresh.set_cache(inner)
    tokens = prompt_tokens(fresh)
    all_plans: list[AnyBias | None] = [None, *biases[:2], *(plans(biases)[name] for name in NAMES)]
    texts = []
    for bias in all_plans:
        fresh.bias = bias
        assert tokens not in fresh.cache
        texts.append(fresh.create_completion(tokens, max_tokens=8, temperature=0)["choices"][0]["text"])
        assert tokens in fresh.cache
    assert len(inner.cache_state) == len(all_plans)
    for bias, text in zip(all_plans, texts, strict=True):
        fresh.bias = None
        fresh.bias = bias
        assert fresh.create_completion(tokens, max_tokens=8, temperature=0)["choices"][0]["text"] == text


def test_states(fresh: SteeredLlama, biases: list[BiasFile], monkeypatch: pytest.MonkeyPatch) -> None:
    """A state keeps what each token was computed under; what is not known is computed again."""
    tokens = prompt_tokens(fresh)
    by_name = plans(biases)
    answer = greedy(fresh, tokens, 4)
    unknown = fresh.save_state()
    fresh.bias = by_name["answer"]
    steered = greedy(fresh, tokens, 4)
    state = pickle.loads(pickle.dumps(fresh.save_state()))
    sizes = counted(fresh, monkeypatch)
    fresh.bias = None
    fresh.bias = by_name["answer"]
    fresh.load_state(state)
    assert greedy(fresh, tokens, 4) == steered
    assert sizes[0] == 1, "the prompt's last token alone, for its logits"
    sizes.clear()
    fresh.load_state(unknown)
    assert greedy(fresh, tokens, 4) == steered
    assert sum(sizes) == len(tokens) + 3
    # without a plan, of a plan's state the unsteered beginning is what was computed alike
    fresh.bias = None
    fresh.load_state(state)
    assert fresh.n_tokens == len(tokens) - 1
    assert greedy(fresh, tokens, 4) == answer
    fresh.bias = biases[0]
    fresh.load_state(state)
    assert fresh.n_tokens == 0


def test_what_cannot_hold_is_refused(
    fresh: SteeredLlama, tiny_path: Path, biases: list[BiasFile], random_model: Any
) -> None:
    tokens = prompt_tokens(fresh)
    old = fresh.bias = plans(biases)["answer"]
    answer = greedy(fresh, tokens, 4)
    lean = RoutingLean(np.ones(biases[0].identity.shape))
    with pytest.raises(UsageError, match="use Engine"):
        fresh.bias = plan(("answer when m < 0.1 over prompt", biases[0]), lean=lean)
    foreign = BiasFile.from_signs(np.eye(4, 16, dtype=np.float32), identity_of(random_model(OLMOE)))
    with pytest.raises(ModelMismatchError):
        fresh.bias = plan(("prompt", biases[1]), ("answer", foreign))
    assert fresh.bias is old, "the old steering stays after an error"
    assert greedy(fresh, tokens, 4) == answer
    with pytest.raises(UsageError, match="eval"):
        fresh.eval(tokens)
    with pytest.raises(UsageError, match="embeddings"):
        fresh.embed("one")
    generated = fresh.generate(tokens, temp=0.0)
    next(generated)
    with pytest.raises(UsageError, match="sent"):
        generated.send([1])
    generated = fresh.generate(tokens, temp=0.0)
    next(generated)
    fresh.bias = plans(biases)["mixed"]
    with pytest.raises(UsageError, match="changed"):
        next(generated)

    def draft(_: Any) -> Any:
        return np.array([1], np.intc)

    fresh.draft_model = draft
    with pytest.raises(UsageError, match="draft"):
        fresh.generate(tokens)
    with pytest.raises(UsageError, match="draft"):
        fresh.bias = plans(biases)["answer"]
    with pytest.raises(UsageError, match="draft"):
        SteeredLlama(tiny_path, bias=plans(biases)["answer"], draft_model=draft, n_ctx=64)


def test_logits_of_all_tokens(tiny_path: Path, biases: list[BiasFile], fresh: SteeredLlama) -> None:
    """`logits_all` and log probabilities work as without a plan."""
    tokens = prompt_tokens(fresh)
    whole = SteeredLlama(tiny_path, bias=plans(biases)["entropy"], n_ctx=256, n_threads=1, n_batch=8, logits_all=True)
    fresh.bias = plans(biases)["entropy"]
    try:
        assert greedy(whole, tokens) == greedy(fresh, tokens)
        answer = whole.create_completion(tokens, max_tokens=4, temperature=0, logprobs=2)["choices"][0]
        assert len(answer["logprobs"]["tokens"]) <= 4
    finally:
        whole.close()


def test_a_prompt_behind_another(fresh: SteeredLlama, biases: list[BiasFile]) -> None:
    """`reset=False`: what was there stays, and the new tokens are a prompt of their own."""
    tokens = prompt_tokens(fresh)
    fresh.bias = plan(("prompt[0:1]", biases[0]))
    next(fresh.generate(tokens, temp=0.0))
    held = fresh.n_tokens
    next(fresh.generate(tokens[:3], temp=0.0, reset=False))
    assert fresh.n_tokens == held + 3
    keys = fresh._known_keys()
    assert [index for index, key in enumerate(keys) if key == biases[0].key] == [0, held]


def test_rows_of_an_interrupted_decode_steer_no_other(
    fresh: SteeredLlama, biases: list[BiasFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the naming of the rows and the decode: what is decoded next is under its own steering."""
    tokens = prompt_tokens(fresh)[:8]
    fresh.bias = biases[0]
    fresh.eval(tokens)
    wanted = np.array(capi.logits(fresh._ctx.ctx, -1, fresh._n_vocab))
    fresh.bias = plan(("answer[5:]", biases[1]))

    def interrupted(batch: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fresh._ctx, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            greedy(fresh, tokens, 1)
    fresh.bias = biases[0]
    fresh.eval(tokens)
    np.testing.assert_array_equal(np.array(capi.logits(fresh._ctx.ctx, -1, fresh._n_vocab)), wanted)


def test_an_interrupted_change_steers_nothing(
    fresh: SteeredLlama, biases: list[BiasFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is attached then nobody knows: the model says that it is unsteered, and it is, with an empty memory."""
    tokens = prompt_tokens(fresh)
    unsteered = greedy(fresh, tokens)
    fresh.bias = biases[0]
    fresh.eval(tokens[:5])
    attach = capi.attach_row

    def interrupted(*arguments: Any) -> None:
        attach(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(capi, "attach_row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fresh.bias = plan(("all", biases[1]), ("answer", biases[2]))
    assert (fresh.bias, fresh.n_tokens) == (None, 0)
    assert greedy(fresh, tokens) == unsteered
