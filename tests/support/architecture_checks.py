"""What is checked of steering and recording on the models of tests/support/architectures.py.

`check` looks at the graph of one; docs/architectures.md is written from what it returns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from steermoe_local.errors import ModelError
from steermoe_local.llama import capi
from steermoe_local.model_files.model_info import ModelInfo, model_info
from tests.support import oracle, rounding
from tests.support.architectures import GROVE, N_EXPERT, N_GROUPS, N_GROUPS_USED, K
from tests.support.low_level import F32, Context, native_bias, open_model, random_signs

# a token attends to later ones, so that a prompt at once is another thing than token by token
NOT_CAUSAL = ("llada-moe", "rnd1")

N_TOKENS, N_PROMPT = 20, 16  # the rest is decoded token by token
# tensors of the routers by name: values of a token
WIDTHS = dict.fromkeys(
    ("ffn_moe_logits", "ffn_moe_logits_biased", "ffn_moe_logits_steered", "ffn_moe_probs"), N_EXPERT
) | dict.fromkeys(("ffn_moe_topk", "ffn_moe_weights", "ffn_moe_weights_softmax", "ffn_moe_weights_norm"), K)
FINAL_WEIGHTS = tuple(f"ffn_moe_weights{end}" for end in ("_scaled", "_norm", "_softmax", ""))  # the last there is


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
        none = dict.fromkeys(self.steerable, np.zeros(N_EXPERT, np.float32))
        soft = self._soft(13)
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
                self._deal(context.seen, seen, [slice(s * (end - start), (s + 1) * (end - start)) for s in range(n)])
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

    def check_token_rows(self) -> None:
        """Rows of three steerings, one of them none, mixed inside one prompt: each token under its own.

        Unsteered tokens before the first steered one have the bits of an unsteered run.
        """
        inf = float("inf")
        none = dict.fromkeys(self.steerable, np.zeros(N_EXPERT, np.float32))
        for n_first, second in ((0, (self.signs(2, 2), "capped", 0.5)), (7, (self._soft(13), "soft", inf))):
            under = [(none, "hard", inf), (self.signs(1, 3), "hard", inf), second]
            of_tokens = np.array([0] * n_first + np.random.default_rng(17).permutation(N_TOKENS - n_first).tolist()) % 3
            with Context(self.loaded, capture=True, n_seq_max=1, type_kv=F32) as context:
                plain = context.decode(self.tokens)
                context.clear()
                for row, (values, mode, cap) in enumerate(under):
                    capi.attach_row(context.ctx, row, native_bias(self.identity, values, mode, cap=cap))
                context.seen.clear()
                capi.set_token_rows(context.ctx, of_tokens)
                found = context.decode(self.tokens)
                seen: list[dict[str, list[Any]]] = [{} for _ in under]
                self._deal(context.seen, seen, [of_tokens == row for row in range(len(under))])
                # where the last token alone is an output, the last layer routes it alone
                context.clear()
                capi.set_token_rows(context.ctx, of_tokens)
                (last,) = context.decode_rows([(t, i, 0, i == N_TOKENS - 1) for i, t in enumerate(self.tokens)])
            for row, ((values, mode, cap), mine) in enumerate(zip(under, seen, strict=True)):
                n_tokens = int((of_tokens == row).sum())
                for layer in self.steerable:
                    self._check_layer(mine, layer, values[layer], mode, cap, adjugate=False, n_tokens=n_tokens)
            if self.arch not in NOT_CAUSAL:
                assert found[:n_first].tobytes() == plain[:n_first].tobytes(), "tokens before the first steered one"
                allowance = rounding.logits(found, self.info.n_layer, self.longest_sum)
                np.testing.assert_allclose(last, found[-1], rtol=0, atol=allowance)
            assert not np.array_equal(found[of_tokens > 0], plain[of_tokens > 0])

    def _soft(self, seed: int) -> dict[int, Any]:
        """Random logits for every steerable layer."""
        rng = np.random.default_rng(seed)
        return {layer: rng.normal(scale=2, size=N_EXPERT).astype(np.float32) for layer in self.steerable}

    def _deal(self, tensors: dict[str, list[Any]], seen: list[dict[str, list[Any]]], rows_of: Sequence[Any]) -> None:
        """Give each of `seen` its rows of the tensors of one batch, which `rows_of` selects for it."""
        for name, arrays in tensors.items():
            kind, _, layer = name.rpartition("-")
            if kind not in WIDTHS or not layer.isdigit() or int(layer) not in self.steerable:
                continue
            # grovemoe's adjugate experts are chosen by the same logits
            step = 2 if self.arch == "grovemoe" and kind != "ffn_moe_logits" else 1
            rows = np.concatenate([a.reshape(-1, WIDTHS[kind]) for a in arrays[::step]])
            assert len(rows) == sum(len(rows[selected]) for selected in rows_of), name
            for mine, selected in zip(seen, rows_of, strict=True):
                mine.setdefault(name, []).append(rows[selected])

    def _check_layer(
        self,
        seen: dict[str, list[Any]],
        layer: int,
        row: Any,
        mode: str,
        cap: float,
        adjugate: bool,
        n_tokens: int = N_TOKENS,
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
        assert z.shape == edited.shape == (n_tokens, N_EXPERT), where
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
        assert topk.shape == (n_tokens, K), where
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
        """Recorded counts, sums and traces are those of the captured tensors, on a prompt and on single tokens.

        Of routers alone. Steering edits the logits, but not those that are summed and traced.
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
            traces = []
            for start, end in ((0, N_PROMPT), *((i, i + 1) for i in range(N_PROMPT, N_TOKENS))):
                recorder.set_mask([0] * (end - start))
                recorder.set_trace([True] * (end - start), weights=True, logits=True)
                context.decode(self.tokens[start:end], start)
                traces.append(recorder.trace())
            found, sums = recorder.counts(), recorder.sums()
        recorder.close()
        self._check_traces(traces, chosen, weights, logits)
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

    def _check_traces(
        self, traces: list[capi.Trace], chosen: dict[int, Any], weights: dict[int, Any], logits: dict[int, Any]
    ) -> None:
        """The traces are the captured tensors, bit for bit; nothing in layers that no router decides."""
        shape = (N_TOKENS, self.info.n_layer)
        experts, mixed, z = (
            np.concatenate([getattr(trace, name) for trace in traces]) for name in ("experts", "weights", "logits")
        )
        assert experts.shape == mixed.shape == (*shape, K)
        assert z.shape == (*shape, N_EXPERT)
        for layer in range(self.info.n_layer):
            if layer not in chosen:
                assert (experts[:, layer] == -1).all(), f"layer {layer}"
                assert (mixed[:, layer] == 0).all(), f"layer {layer}"
                assert np.isnan(z[:, layer]).all(), f"layer {layer}"
                continue
            for table, captured in ((experts, chosen), (mixed, weights), (z, logits)):
                assert np.ascontiguousarray(table[:, layer]).tobytes() == captured[layer].tobytes(), f"layer {layer}"

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
        c.check_token_rows()
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
