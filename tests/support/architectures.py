"""One small random model for every Mixture-of-Experts architecture of llama.cpp, and what is checked on each.

llama.cpp's own `test-llama-archs -o DIR` writes them, with two experts of which both are used: nothing can be chosen
there. `widen` gives them eight experts of which three are used, and other ways to route where the architecture reads
them from its file. `check` then looks at the graph; docs/architectures.md is written from what it returns.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from steermoe_local.errors import ModelError
from steermoe_local.llama import capi
from steermoe_local.model_files.model_info import ModelInfo, model_info
from tests.support import oracle, rounding
from tests.support.low_level import F32, Context, native_bias, open_model, random_signs

# every architecture that test-llama-archs of the pinned tree writes as a Mixture-of-Experts model
ARCHITECTURES = [
    "afmoe",
    "arctic",
    "bailingmoe",
    "bailingmoe2",
    "bailingmoe3",
    "cohere2moe",
    "dbrx",
    "deepseek",
    "deepseek2",
    "deepseek32",
    "deepseek4",
    "dots1",
    "dots3note",
    "ernie4_5",
    "ernie4_5-moe",
    "exaone-moe",
    "glm-dsa",
    "glm4moe",
    "glm5-next",
    "gpt-oss",
    "granite",
    "granitemoe",
    "grok",
    "grovemoe",
    "hunyuan-moe",
    "hy_v3",
    "hy_v4",
    "kimi-k3",
    "kimi-linear",
    "laguna",
    "lfm2moe",
    "llada-moe",
    "llama",
    "llama4",
    "maple",
    "mellum",
    "mimo2",
    "minicpm",
    "minimax-01",
    "minimax-m2",
    "minimax-m3",
    "mistral3",
    "mistral4",
    "olmoe",
    "paddleocr",
    "phimoe",
    "qwen2moe",
    "qwen35moe",
    "qwen3moe",
    "qwen3next",
    "qwen3vlmoe",
    "qwen4exp",
    "refact",
    "rnd1",
    "smallthinker",
]
# their files say that there are experts, but hold no layer with experts, or the graph does not use it
WITHOUT_ROUTERS = ("ernie4_5", "paddleocr", "refact")
# build_moe_ffn serves these too, but test-llama-archs does not write them
NOT_WRITTEN = [
    "deepseek2-ocr",
    "dflash",
    "gemma4",
    "granite_swa",
    "granitehybrid",
    "jamba",
    "nemotron_h",
    "nemotron_h_moe",
    "nomic-bert-moe",
    "step35",
]
# architectures whose files may name groups of experts; the key is read for all, so these stand for the ways of gating
GROUPED = ("bailingmoe2", "deepseek2", "deepseek32", "dots1", "glm4moe", "olmoe")

# a token attends to later ones, so that a prompt at once is another thing than token by token
NOT_CAUSAL = ("llada-moe", "rnd1")

# routers of large logits, whose sigmoid or softplus rounds many of them to one value
SATURATED = ("afmoe", "deepseek4", "dots1", "grovemoe", "llama4", "smallthinker")

N_EXPERT, K, N_GROUPS, N_GROUPS_USED = 8, 3, 4, 2
GROVE = 2  # experts that share one adjugate expert in grovemoe
N_TOKENS, N_PROMPT = 20, 16  # the rest is decoded token by token
# tensors of the routers by name: values of a token
WIDTHS = dict.fromkeys(
    ("ffn_moe_logits", "ffn_moe_logits_biased", "ffn_moe_logits_steered", "ffn_moe_probs"), N_EXPERT
) | dict.fromkeys(("ffn_moe_topk", "ffn_moe_weights", "ffn_moe_weights_softmax", "ffn_moe_weights_norm"), K)
FINAL_WEIGHTS = tuple(f"ffn_moe_weights{end}" for end in ("_scaled", "_norm", "_softmax", ""))  # the last there is
EXPERT_TENSOR = re.compile(r"blk\.\d+\.(ffn_(gate|up|down|gate_up)_(ch)?exps\.|ffn_gate_inp\.|exp_probs_b)")


def write_upstream(program: Path, folder: Path, arch: str = "") -> list[Path]:
    """Let test-llama-archs write its models; the Mixture-of-Experts ones. `arch`: one architecture, else all."""
    command = [str(program), "-s", "1", "-o", str(folder)]
    done = subprocess.run(
        [*command, *(["-a", f"^{arch}$"] if arch else [])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for dense in folder.glob("*-dense.gguf"):
        dense.unlink()
    return sorted(folder.glob("*-moe.gguf"))


def variants(arch: str) -> tuple[str, ...]:
    """The ways to widen an architecture that are checked."""
    others = {"groups": GROUPED, "saturated": SATURATED, "hash": ("deepseek4",)}
    return ("", *(name for name, archs in others.items() if arch in archs))


def widen(source: Path, path: Path, variant: str = "") -> Path:
    """Write `source` with N_EXPERT experts, top-K.

    `variant`: "groups", "saturated" (large logits) or "hash" (a table by token routes the first layer).
    """
    reader = GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    rng = np.random.default_rng(5)
    changed: dict[str, Any] = {"expert_count": N_EXPERT, "expert_used_count": K}
    if variant == "groups":
        changed |= {"expert_group_count": N_GROUPS, "expert_group_used_count": N_GROUPS_USED}
    if variant == "hash":
        changed |= {"hash_layer_count": 1}
    if arch == "grovemoe":
        changed |= {"experts_per_group": GROVE}
    writer = GGUFWriter(path, arch)
    for key, entry in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = changed.get(key.removeprefix(f"{arch}."), entry.contents())
        if value != []:
            writer.add_key_value(key, value, entry.types[0], entry.types[-1] if len(entry.types) > 1 else None)
    for tensor in reader.tensors:
        values = np.array(tensor.data)
        if EXPERT_TENSOR.match(tensor.name) and values.shape[0] == 2:
            n = N_EXPERT // GROVE if "_chexps" in tensor.name else N_EXPERT
            # routers wide enough that the choice depends on the token
            router = "ffn_gate_inp.weight" in tensor.name
            scale = 0.1 if not router else 100.0 if variant == "saturated" else 1.0
            values = rng.normal(scale=scale, size=(n, *values.shape[1:])).astype(values.dtype)
        if variant == "hash" and tensor.name.startswith("blk.0.exp_probs_b"):
            continue
        writer.add_tensor(tensor.name, values)
    if variant == "hash":
        n_vocab = next(t for t in reader.tensors if t.name == "token_embd.weight").shape[1]
        table = np.argsort(rng.random((int(n_vocab), N_EXPERT)), axis=1)[:, :K].astype(np.int32)
        writer.add_tensor("blk.0.ffn_gate_tid2eid.weight", table, raw_dtype=GGMLQuantizationType.I32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@dataclass
class Found:
    """What the checks of one model saw, for docs/architectures.md."""

    architecture: str
    variant: str = ""
    gating: str = ""
    selection_bias: bool = False
    n_groups: int = 0
    n_shared: int = 0
    n_layer: int = 0
    steerable: tuple[int, ...] = ()
    obstacles: dict[int, str] = field(default_factory=dict)  # by MoE layer that cannot be steered
    not_a_moe: str = ""


class Checker:
    """The checks of one widened model. Each raises AssertionError with what differs."""

    def __init__(self, path: Path, arch: str) -> None:
        self.path, self.arch = path, arch
        self.info: ModelInfo = model_info(path)
        self.identity = self.info.require_moe()
        self.loaded = open_model(path)
        self.tokens = np.random.default_rng(3).integers(0, self.loaded.n_vocab(), N_TOKENS).tolist()

    def close(self) -> None:
        """Free the model."""
        self.loaded.close()

    @cached_property
    def layers(self) -> list[capi.LayerInfo]:
        """How every layer routes, as the graph was built."""
        with Context(self.loaded, n_seq_max=1) as context:
            return [capi.layer_info(context.ctx, layer) for layer in range(self.info.n_layer)]

    @cached_property
    def steerable(self) -> tuple[int, ...]:
        """Layers that can be steered."""
        return tuple(layer for layer, info in enumerate(self.layers) if info.steerable)

    @cached_property
    def selection_biases(self) -> dict[int, Any]:
        """exp_probs_b by layer."""
        named = re.compile(r"blk\.(\d+)\.exp_probs_b(\.bias)?")
        found = ((named.fullmatch(t.name), t) for t in GGUFReader(self.path).tensors)
        return {int(match[1]): np.array(t.data) for match, t in found if match}

    @cached_property
    def longest_sum(self) -> int:
        """The most products that one element of a matrix product adds."""
        return max(int(t.shape[0]) for t in GGUFReader(self.path).tensors if len(t.shape) > 1)

    def logits(
        self, rows: dict[int, Any] | None = None, mode: str = "hard", detach: bool = False, cap: float | None = None
    ) -> list[bytes]:
        """Logits of a prompt and of single tokens after it, with a bias of `rows`; None: never attached."""
        with Context(self.loaded, n_seq_max=1) as context:
            if rows is not None:
                capi.attach(context.ctx, native_bias(self.identity, rows, mode, cap=cap))
            if detach:
                context.decode(self.tokens[:N_PROMPT])
                capi.detach(context.ctx)
                context.clear()
            return self._decode(context)

    def _decode(self, context: Context) -> list[bytes]:
        found = [context.decode(self.tokens[:N_PROMPT])]
        found += [context.decode([token], N_PROMPT + i) for i, token in enumerate(self.tokens[N_PROMPT:])]
        assert all(np.isfinite(part).all() for part in found)
        return [part.tobytes() for part in found]

    def check_info(self) -> None:
        """`steermoe info`, which reads the file alone, says what the graph does."""
        for layer, info in enumerate(self.layers):
            where = f"layer {layer}"
            assert (info.gating != "none") == (layer in self.info.moe_layers), where
            if info.gating == "none":
                continue
            assert info.gating == self.info.gating, where
            assert (info.n_expert, info.n_expert_used) == (self.info.n_expert, self.info.n_expert_used), where
            assert info.selection_bias == (layer in self.selection_biases), where
            assert info.expert_groups == (self.info.n_expert_groups > 1), where
        assert self.steerable == self.info.steerable_layers
        assert self.info.has_selection_bias == bool(self.selection_biases)

    def check_zeros(self) -> None:
        """A bias of zeros, hard or soft, a cap of 0 and a bias that was taken off again leave every bit.

        An infinite cap leaves those of the hard rule.
        """
        plain = self.logits()
        zeros = {layer: np.zeros(N_EXPERT) for layer in self.steerable}
        assert self.logits(zeros) == plain, "a hard bias of zeros"
        assert self.logits(zeros, "soft") == plain, "a soft bias of zeros"
        signs = self.signs(1, 3)
        hard = self.logits(signs)
        assert hard != plain, "a hard bias changes nothing"
        assert self.logits(signs, "capped", cap=0.0) == plain, "a cap of 0"
        assert self.logits(signs, "capped", cap=float("inf")) == hard, "an infinite cap"
        assert self.logits(signs, detach=True) == plain, "attached and detached"

    def signs(self, n_plus: int, n_minus: int) -> dict[int, Any]:
        """Random signs for every steerable layer."""
        rng = np.random.default_rng(7)
        return {layer: random_signs(rng, N_EXPERT, K, n_plus, n_minus) for layer in self.steerable}

    def check_promise(self, rows: dict[int, Any], mode: str = "hard", cap: float = float("inf")) -> None:
        """Edited logits bit for bit, choice and weights against the oracle, and the promise in so many words."""
        with Context(self.loaded, capture=True, n_seq_max=1) as context:
            capi.attach(context.ctx, native_bias(self.identity, rows, mode, cap=cap))
            self._decode(context)
            seen = context.seen
        for layer in self.steerable:
            n_calls = 2 if self.arch == "grovemoe" else 1  # its adjugate experts are chosen by the same logits
            for call in range(n_calls):
                part = {name: arrays[call::n_calls] for name, arrays in seen.items()}
                if n_calls == 2:  # computed once, used twice
                    part[f"ffn_moe_logits-{layer}"] = seen[f"ffn_moe_logits-{layer}"]
                self._check_layer(part, layer, rows[layer], mode, cap, adjugate=call == 1)

    def check_sequences(self) -> None:
        """Sequences in one batch, under all rules, in different layers, and under none: each as it is alone."""
        rng = np.random.default_rng(13)
        none = dict.fromkeys(self.steerable, np.zeros(N_EXPERT, np.float32))
        soft = {layer: rng.normal(scale=2, size=N_EXPERT).astype(np.float32) for layer in self.steerable}
        some = {layer: row for layer, row in self.signs(K, N_EXPERT - K).items() if layer % 2 == 0}
        inf = float("inf")
        under = [(self.signs(1, 3), "hard", inf), (soft, "soft", inf), (none, "hard", inf), (some, "hard", inf)]
        under += [(self.signs(1, 3), "capped", 0.5), (some, "capped", 2.0), (some, "capped", inf)]
        n = len(under)
        seen: list[dict[str, list[Any]]] = [{} for _ in under]
        # a cache in F16 would round what differs in its last bit to neighbours, ten thousand times as far apart
        with Context(self.loaded, capture=True, n_seq_max=n, type_kv=F32) as context:
            for sequence, (rows, mode, cap) in enumerate(under):
                capi.attach_sequence(context.ctx, sequence, native_bias(self.identity, rows, mode, cap=cap))
            for start, end in ((0, N_PROMPT), *((i, i + 1) for i in range(N_PROMPT, N_TOKENS))):
                context.seen.clear()
                # sequence by sequence, all of one length: llama.cpp does not reorder these when it splits the batch
                batch = [(self.tokens[i], i, s, True) for s in range(n) for i in range(start, end)]
                logits = context.decode_rows(batch)
                self._deal(context.seen, seen, end - start)
            # where the last token alone is an output, the last layer routes it alone
            context.clear()
            whole = [(self.tokens[i], i, s, i == N_TOKENS - 1) for s in range(n) for i in range(N_TOKENS)]
            last = context.decode_rows(whole)
            if self.arch not in NOT_CAUSAL:
                allowance = rounding.logits(logits, self.info.n_layer, self.longest_sum)
                np.testing.assert_allclose(last, logits, rtol=0, atol=allowance)
        for (rows, mode, cap), mine in zip(under, seen, strict=True):
            for layer in self.steerable:
                self._check_layer(mine, layer, rows.get(layer, none[layer]), mode, cap, adjugate=False)

    def _deal(self, tensors: dict[str, list[Any]], seen: list[dict[str, list[Any]]], n_tokens: int) -> None:
        """Give each sequence its rows of the tensors of one batch."""
        for name, arrays in tensors.items():
            kind, _, layer = name.rpartition("-")
            if kind not in WIDTHS or not layer.isdigit() or int(layer) not in self.steerable:
                continue
            # grovemoe's adjugate experts are chosen by the same logits
            step = 2 if self.arch == "grovemoe" and kind != "ffn_moe_logits" else 1
            rows = np.concatenate([a.reshape(-1, WIDTHS[kind]) for a in arrays[::step]])
            assert len(rows) == n_tokens * len(seen), name
            for sequence, mine in enumerate(seen):
                mine.setdefault(name, []).append(rows[sequence * n_tokens : (sequence + 1) * n_tokens])

    def _check_layer(
        self, seen: dict[str, list[Any]], layer: int, row: Any, mode: str, cap: float, adjugate: bool
    ) -> None:
        info, where = self.layers[layer], f"layer {layer}"

        def rows_of(name: str, width: int) -> Any:
            parts = [part.reshape(-1, width) for part in seen.get(f"{name}-{layer}", [])]
            return np.concatenate(parts) if parts else None

        # logits: gpt-oss has a bias of the router's own and renames its edited logits, which are its probabilities
        z = rows_of("ffn_moe_logits_biased", N_EXPERT)
        z = rows_of("ffn_moe_logits", N_EXPERT) if z is None else z
        edited = rows_of("ffn_moe_logits_steered", N_EXPERT)
        edited = rows_of("ffn_moe_probs", N_EXPERT) if info.gating == "softmax_weight" else edited
        assert z.shape == edited.shape == (N_TOKENS, N_EXPERT), where
        steered = oracle.steer(z, mode, row, cap=cap)
        assert (edited + np.float32(0)).tobytes() == (steered + np.float32(0)).tobytes(), f"{where}: edited logits"

        # choice
        own = {"llama4": "logits", "grovemoe": "sigmoid"}.get(self.arch, info.gating)
        groups = (N_GROUPS, N_GROUPS_USED) if info.expert_groups else None
        selection_bias = self.selection_biases.get(layer)
        scores = oracle.selection_scores(steered, own, selection_bias, groups)
        # the sum with a bias rounds once more, and of two scores both are off
        off = oracle.score_allowance(steered, own)
        off += 0 if selection_bias is None else rounding.F32 * np.abs(np.nan_to_num(scores, neginf=0))
        near = 2 * off.max(axis=1, keepdims=True)
        topk = rows_of("ffn_moe_topk", K)
        assert topk.shape == (N_TOKENS, K), where
        # only a cap leaves the choice to the architecture's own scores of the edited logits
        hard = mode == "hard" or (mode == "capped" and cap == float("inf"))
        signs = np.asarray(row) if hard else np.zeros(N_EXPERT)
        wanted = oracle.chosen_by(scores, signs, K)
        for name, table, allowed in (
            ("sign", np.broadcast_to(signs, scores.shape), np.zeros_like(near)),
            ("score", scores, near),
        ):
            finite = np.maximum(table, -1e30)  # -inf: of a group that is left out
            ours, theirs = (np.sort(np.take_along_axis(finite, chosen, axis=1), axis=1) for chosen in (topk, wanted))
            # scores that F32 cannot tell apart may stand in any order
            assert (np.abs(ours - theirs) <= allowed).all(), f"{where}: {name}s"
        for expert in np.flatnonzero(signs > 0):
            assert (topk == expert).any(axis=1).all(), f"{where}: expert {expert} is +1, but not always chosen"
        assert not np.isin(topk, np.flatnonzero(signs < 0)).any(), f"{where}: an expert with -1 was chosen"

        # weights
        mixed = topk // GROVE if adjugate else topk  # llama.cpp takes them by the adjugate expert's number
        weights = oracle.selected_weights(steered, mixed, info.gating)
        name = "ffn_moe_weights_softmax" if info.gating == "softmax_weight" else "ffn_moe_weights"
        off = oracle.weight_allowance(steered, mixed, info.gating)
        assert (np.abs(rows_of(name, K) - weights) <= off).all(), f"{where}: weights"
        normed = rows_of("ffn_moe_weights_norm", K)
        if normed is not None:
            total = weights.sum(axis=1, keepdims=True)
            weights = weights / np.maximum(total, 2.0**-14)
            off = oracle.weight_allowance(steered, mixed, info.gating, norm=True)
            assert (np.abs(normed - weights) <= off).all(), f"{where}: normalised weights"

    def check_recorder(self) -> None:
        """Recorded counts and sums are those of the captured tensors, on a prompt and on single tokens.

        Of routers alone. Steering edits the logits, but not those that are summed.
        """
        for rows in (None, self.signs(1, 3)):
            self._check_recorder(rows)

    def _check_recorder(self, rows: dict[int, Any] | None) -> None:
        bias = None if rows is None else native_bias(self.identity, rows)
        with Context(self.loaded, capture=True, n_seq_max=1) as context:
            if bias is not None:
                capi.attach(context.ctx, bias)
            self._decode(context)
            step = 2 if self.arch == "grovemoe" else 1

            def captured(layer: int, names: tuple[str, ...], width: int, step: int = step) -> Any:
                name = next(name for name in names if f"{name}-{layer}" in context.seen)
                return np.concatenate([a.reshape(-1, width) for a in context.seen[f"{name}-{layer}"][::step]])

            chosen = {layer: captured(layer, ("ffn_moe_topk",), K) for layer in self.steerable}
            weights = {layer: captured(layer, FINAL_WEIGHTS, K) for layer in self.steerable}
            # gpt-oss renames what it selects by, unless it is edited first
            renamed = ("ffn_moe_probs",) if rows is None and self.info.gating == "softmax_weight" else ()
            names = (*renamed, "ffn_moe_logits_biased", "ffn_moe_logits")
            logits = {layer: captured(layer, names, N_EXPERT, 1) for layer in self.steerable}
        recorder = capi.NativeRecorder(self.loaded.model, 1, self.identity.shape, sums=True)
        with Context(self.loaded, recorder=recorder, n_seq_max=1) as context:
            recorder.bind(context.ctx)
            if bias is not None:
                capi.attach(context.ctx, bias)
            recorder.set_mask([0] * N_PROMPT)
            context.decode(self.tokens[:N_PROMPT])
            for i, token in enumerate(self.tokens[N_PROMPT:]):
                recorder.set_mask([0])
                context.decode([token], N_PROMPT + i)
            found, sums = recorder.counts(), recorder.sums()
        recorder.close()
        counts = np.array(found[0]).reshape(self.identity.shape)
        tokens = np.array(found[1])
        for layer in range(self.info.n_layer):
            used = chosen.get(layer, np.zeros((0, K), np.int32))
            assert tokens[layer] == len(used), f"layer {layer}: tokens"
            assert np.array_equal(counts[layer], np.bincount(used.ravel(), minlength=N_EXPERT)), f"layer {layer}"
            expected = (np.zeros(N_EXPERT), np.zeros(1), np.zeros(N_EXPERT))
            if layer in chosen:
                expected = oracle.sums(logits[layer], used, weights[layer])
            for name, table, values in zip(("logits", "spread", "weights"), sums, expected, strict=True):
                mine = np.array(table).reshape(self.info.n_layer, -1)[layer]
                allowed = oracle.sums_allowance(logits.get(layer), weights.get(layer), name)
                assert (np.abs(mine - values) <= allowed).all(), f"layer {layer}: {name}"

    def check_refused(self) -> None:
        """A bias for a layer whose choice comes from outside is refused with the reason."""
        for layer in self.info.fixed_layers:
            refused = pytest.raises(ModelError, match="not chosen")
            with Context(self.loaded, n_seq_max=1) as context, refused:
                capi.attach(context.ctx, native_bias(self.identity, {layer: np.eye(N_EXPERT)[0]}))

    def found(self, variant: str) -> Found:
        """The facts for the table."""
        return Found(
            architecture=self.arch,
            variant=variant,
            gating=self.info.gating,
            selection_bias=self.info.has_selection_bias,
            n_groups=self.info.n_expert_groups if self.info.n_expert_groups > 1 else 0,
            n_shared=self.info.n_shared_experts,
            n_layer=self.info.n_layer,
            steerable=self.steerable,
            obstacles={layer: self.layers[layer].reason for layer in self.info.fixed_layers},
        )


@contextmanager
def checker(path: Path, arch: str) -> Iterator[Checker]:
    """A Checker that is closed at the end."""
    opened = Checker(path, arch)
    try:
        yield opened
    finally:
        opened.close()


def check(path: Path, arch: str, variant: str = "") -> Found:
    """Everything about one widened model."""
    with checker(path, arch) as c:
        c.check_info()
        c.check_zeros()
        c.check_promise(c.signs(1, 3))
        c.check_promise(c.signs(K, 0))
        c.check_promise(c.signs(0, N_EXPERT - K))
        c.check_promise(c.signs(2, N_EXPERT - K))
        rng = np.random.default_rng(9)
        c.check_promise({layer: rng.normal(scale=2, size=N_EXPERT).astype(np.float32) for layer in c.steerable}, "soft")
        for cap in (0.25, 3.0, float("inf")):
            c.check_promise(c.signs(2, N_EXPERT - K), "capped", cap)
        c.check_sequences()
        c.check_recorder()
        c.check_refused()
        return c.found(variant)


def check_upstream(path: Path, arch: str) -> Found:
    """What can be seen on a file as test-llama-archs wrote it: facts, and bits under a bias of zeros."""
    info = model_info(path)
    if info.identity is None:
        return replace(Found(arch), not_a_moe=info.obstacle)
    with checker(path, arch) as c:
        c.check_info()
        zeros = {layer: np.zeros(info.n_expert) for layer in c.steerable}
        assert c.logits(zeros) == c.logits(), "a bias of zeros"
        return c.found("")
