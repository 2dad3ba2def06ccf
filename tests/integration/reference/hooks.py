"""The reference: transformers with the routers' forward replaced by the definition, steered or not.

Written from the definition of steering and of each way to route; nothing of steermoe_local is used. What a router does
around the choice of experts (its projection, the scaling of the block's output, shared experts) stays transformers'.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.integration.reference.architectures import Case, Routing
from tests.integration.reference.hf_olmoe import Steering, hard_rule, soft_rule

FORCED = 1e30  # far above any score
MASKED = -1e18  # an expert of a group that is not chosen: below all others, above the suppressed ones


@dataclass
class Layer:
    """What one layer's router saw and chose for T tokens."""

    z: Tensor  # [T, experts], unsteered
    selected: Tensor  # [T, k], ascending
    margin: float  # smallest distance of the scores (or group scores) of the last one chosen and the first one left


@dataclass
class Trace:
    """Logits [T, vocabulary], and the routers' layers by number."""

    logits: np.ndarray
    layers: dict[int, Layer] = field(default_factory=dict)


def route(z: Tensor, how: Routing, bias: Tensor | None, signs: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Experts [T, k] and weights [T, k] of (already steered) logits z [T, experts], and the margin of the choice.

    `signs` [experts] of the hard rule: they also bind the choice where it is not monotone in z.
    """
    gated = {"softmax": z.softmax(-1), "softmax-selected": z, "sigmoid": z.sigmoid()}[how.gating]
    scores = z if how.by_logits else gated if bias is None else gated + bias
    monotone = how.gating != "sigmoid" and bias is None and how.n_group == 1
    if monotone or how.by_logits:
        scores = z  # the same order, and margins in the unit of the logits
    margins = []
    if how.n_group > 1:
        scores, margin = _mask_groups(scores, how)
        margins.append(margin)
    if signs is not None and not (monotone or how.by_logits):
        scores = scores.clamp(min=MASKED) + FORCED * signs
    order = scores.sort(dim=-1, descending=True)
    selected = order.indices[:, : how.k]
    margins.append((order.values[:, how.k - 1] - order.values[:, how.k]).min().item())
    if signs is not None and (signs >= 0).sum() == how.k:
        margins = margins[-1:]  # the signs alone decide: no matter which groups are chosen
    weights = gated.gather(-1, selected)
    if how.gating == "softmax-selected":
        weights = weights.softmax(-1)
    if how.norm:
        weights = weights / weights.sum(-1, keepdim=True)
    return selected, weights * how.scale, min(margins)


def _mask_groups(scores: Tensor, how: Routing) -> tuple[Tensor, float]:
    """-inf outside of the groups whose best experts have the largest sums."""
    groups = scores.view(len(scores), how.n_group, -1)
    order = groups.topk(how.group_best, dim=-1).values.sum(-1).sort(dim=-1, descending=True)
    chosen = order.indices[:, : how.topk_group]
    mask = torch.ones(groups.shape[:2], dtype=torch.bool).scatter(1, chosen, False)
    margin = (order.values[:, how.topk_group - 1] - order.values[:, how.topk_group]).min().item()
    return groups.masked_fill(mask[..., None], -torch.inf).view_as(scores), margin


@contextmanager
def hooked(case: Case, model: Any, steering: Steering | None, layers: dict[int, Layer]) -> Iterator[None]:
    """Every router of `model` routes by `route`; `layers` gets what they did."""
    name = "route_tokens_to_experts" if case.arch == "dbrx" else "forward"
    routers = _routers(case, model)
    others: list[tuple[Any, Any]] = []
    for module in model.modules():
        if case.rms_norm and isinstance(module, torch.nn.LayerNorm):
            others.append((module, partial(_rms_norm, module)))
        if case.half_gelu and "GELU" in type(module).__name__:
            others.append((module, partial(_half_gelu, module.forward)))
    for layer, module in routers:
        setattr(module, name, _replacement(case, layer, module, getattr(module, name), steering, layers))
    for module, forward in others:
        module.forward = forward
    try:
        yield
    finally:
        for _, module in routers:
            delattr(module, name)
        for module, _ in others:
            del module.forward


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    """LayerNorm without taking the mean away."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias


def _half_gelu(gelu: Any, x: Tensor) -> Tensor:
    """What a table of half precision holds for x, rounded to half precision."""
    return torch.where(x <= -10, 0, torch.where(x >= 10, x, gelu(x.half().float()).half().float()))


def _routers(case: Case, model: Any) -> list[tuple[int, Any]]:
    """(layer, router) in order; the layer is the number in the module's name."""
    found = []
    for name, module in model.named_modules():
        if type(module).__name__ == case.router:
            found.append((int(next(part for part in name.split(".") if part.isdigit())), module))
    assert found, f"{case.hf} has no {case.router}"
    return found


def _replacement(
    case: Case, layer: int, module: Any, original: Any, steering: Steering | None, layers: dict[int, Layer]
) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        z = _router_logits(case, module, result, args)
        bias = _selection_bias(module, args)
        signs = None
        steered = z
        if steering is not None:
            values = torch.from_numpy(steering.values[layer].astype(np.float32))
            if steering.mode == "hard":
                signs, steered = values, hard_rule(z, values, steering.epsilon)
            else:
                steered = soft_rule(z, values)
        selected, weights, margin = route(steered, case.routing, bias, signs)
        layers[layer] = Layer(z, selected.sort(-1).values, margin)
        return _as_returned(case, module, result, z, selected, weights)

    return forward


def _router_logits(case: Case, module: Any, result: Any, args: Any) -> Tensor:
    """The logits [T, experts], from what transformers' router returns."""
    if case.arch == "llama4":
        return result[1].float()
    if case.arch == "dbrx":
        return args[0].reshape(-1, args[0].shape[-1]).float()
    if case.arch == "gemma4":
        x = module.norm(args[0]) * module.scale * module.scalar_root_size  # it returns probabilities instead
        return module.proj(x)
    return result[0].float()


def _selection_bias(module: Any, args: Any) -> Tensor | None:
    """The selection bias: the router's own, or handed in by its block."""
    if hasattr(module, "moe_statics"):
        return module.moe_statics.e_score_correction_bias.reshape(-1)
    if getattr(module, "e_score_correction_bias", None) is not None:
        return module.e_score_correction_bias
    return args[1] if len(args) > 1 else None


def _as_returned(case: Case, module: Any, result: Any, z: Tensor, selected: Tensor, weights: Tensor) -> Any:
    """In the form that transformers' block expects."""
    if case.arch == "llama4":
        return torch.zeros_like(z).scatter(1, selected, weights), result[1]
    if case.arch == "dbrx":
        return weights, selected
    if case.arch == "gemma4":
        weights = weights * module.per_expert_scale[selected]
    if case.name == "laguna":
        weights = weights / case.routing.scale  # its block scales the sum
    return result[0], weights, selected


@torch.no_grad()
def run(case: Case, model: Any, tokens: list[int], steering: Steering | None = None) -> Trace:
    """One prompt from an empty cache, routed by the definition."""
    layers: dict[int, Layer] = {}
    with hooked(case, model, steering, layers):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return Trace(logits.float().numpy(), layers)


@torch.no_grad()
def run_original(model: Any, tokens: list[int]) -> np.ndarray:
    """Logits [T, vocabulary] of transformers as it is."""
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return np.asarray(logits.float().numpy())
