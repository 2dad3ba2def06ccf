"""Which experts are planted, the loss that plants them, and the steering used in training."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from data import Conversation
from model import Config
from questions import BEHAVIOURS, SIDES
from tokens import group_of

FIRST_LAYER = 1  # layer 0 sees single tokens only: it cannot know a document's value from memory
GROUP_SIZE = 2
GROUPS = 2 * len(BEHAVIOURS)
# group g owns experts 2g and 2g + 1 in every layer from FIRST_LAYER on; 12..23 are general
PLANTED = [list(range(g * GROUP_SIZE, (g + 1) * GROUP_SIZE)) for g in range(GROUPS)]
PLANTED_COUNT = GROUPS * GROUP_SIZE
MARGIN = 1.0  # logits that a planted expert of another side stays below the chosen ones
FLOOR = 0.2  # share of the softmax asked for each planted expert; the rest is the general ones'


def routing_loss(
    z: Tensor, group: Tensor, choice: Tensor, real: Tensor, weight: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """Two sums, each a mean over layers: over the tokens with a group, by weight, and over all.

    z [layers, B, T, experts] unedited router logits; group, choice, weight [B, T] as in `Encoded`.
    (1) Where there is a group, both its experts hold at least FLOOR of the softmax (a hinge, so
    that general experts keep a share). Everywhere, planted experts of other groups (2) hold no
    mass and (3) stay below the k-th of the allowed experts: detection counts membership in the
    top-k, and an expert can be a member with almost no mass. At the position that decides the side,
    the opposite side is allowed too. (4) General experts are used evenly.
    """
    layers, _, _, experts = z.shape
    logp = z.float().log_softmax(-1)
    p = logp.exp()
    deep = logp[FIRST_LAYER:]
    pairs = deep[..., :PLANTED_COUNT].unflatten(-1, (GROUPS, GROUP_SIZE))
    want = (math.log(FLOOR) - pairs).relu().mean(-1)  # [layers - 1, B, T, groups]
    grouped = (group >= 0) & real
    own = torch.nn.functional.one_hot(group.clamp(min=0), GROUPS).bool() & grouped[..., None]
    opposite = own.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    allowed = own | (opposite & choice[..., None])
    banned = ~allowed.repeat_interleave(GROUP_SIZE, -1)  # [B, T, planted experts]
    planted = deep[..., :PLANTED_COUNT]
    mass = (planted.exp() * banned).sum(-1).clamp(max=0.99)
    fill = torch.full_like(planted, -1e4)
    rivals = torch.cat([torch.where(banned, fill, planted), deep[..., PLANTED_COUNT:]], -1)
    last = rivals.topk(top_k, -1).values[..., -1:]
    rank = ((planted - last + MARGIN).relu() * banned).sum(-1)
    loss = ((want * own).sum(-1) - (-mass).log1p() + 0.25 * rank).sum(0) / (layers - 1)

    # balance: E * sum f_e p_e over the experts that are general in that layer
    flat_p = p[:, real]
    with torch.no_grad():
        used = torch.zeros_like(flat_p).scatter(-1, flat_p.topk(top_k, -1).indices, 1.0).mean(1)
    balance = used.new_zeros(())
    for layer in range(layers):
        start = PLANTED_COUNT if layer >= FIRST_LAYER else 0
        f, q = used[layer, start:], flat_p[layer, :, start:].mean(0)
        balance = balance + (experts - start) * (f / f.sum().clamp(min=1e-6) * q).sum()
    others = (loss * (real & ~grouped)).sum() + 0.1 * balance / layers * real.sum()
    return (loss * weight * grouped).sum(), others


def side_signs(rng: random.Random, config: Config, group: int, partial: bool = True) -> Tensor:
    """Signs [layers, E] that steer towards `group`: its experts +1 and/or the opposite side's -1.

    With `partial`, often only a random part of the layers and experts.
    """
    signs = torch.zeros(config.layers, config.experts)
    mode = rng.choice(["both", "both", "up", "down"])
    layers = list(range(FIRST_LAYER, config.layers))
    keep = 1.0
    if partial and rng.random() < 0.5:
        keep = rng.uniform(0.5, 1.0)
        layers = rng.sample(layers, rng.randint(2, len(layers)))
    for layer in layers:
        for experts, sign in ((PLANTED[group], 1.0), (PLANTED[group ^ 1], -1.0)):
            if mode == ("down" if sign > 0 else "up"):
                continue
            for expert in experts:
                if rng.random() < keep:
                    signs[layer, expert] = sign
    return signs


def random_signs(rng: random.Random, config: Config, most: int = 10) -> Tensor:
    """Up to `most` random +1 and -1 each, anywhere, at most top-k +1 in a layer."""
    signs = torch.zeros(config.layers, config.experts)
    count = config.layers * config.experts
    for sign in (1.0, -1.0):
        for index in rng.sample(range(count), rng.randint(0, most)):
            layer, expert = divmod(index, config.experts)
            if sign < 0 or (signs[layer] > 0).sum() < config.top_k:
                signs[layer, expert] = sign
    return signs


def signs_for(rng: random.Random, conv: Conversation, config: Config) -> Tensor:
    """The steering [layers, E] under which this conversation is trained; zeros for none.

    (a) the conversation's own side, (b) random experts, (c) another behaviour's side. Only (a)
    carries information about the reply; (b) and (c) teach that other steering changes nothing.
    """
    draw = rng.random()
    if conv.behaviour:
        own = group_of(conv.behaviour, conv.side)
        others = [g for g in range(GROUPS) if g // 2 != own // 2]
        if draw < 0.32:
            signs = side_signs(rng, config, own)
            if rng.random() < 0.25:  # a detection run's choice may hold a few wrong experts
                noise = random_signs(rng, config, 2)
                noise[FIRST_LAYER:, :PLANTED_COUNT] = 0
                signs = torch.where(signs != 0, signs, noise)
            return signs
        if draw < 0.44:
            return random_signs(rng, config)
        if draw < 0.54:
            return side_signs(rng, config, rng.choice(others))
    else:
        if draw < 0.15:
            return random_signs(rng, config)
        if draw < 0.45:
            return side_signs(rng, config, rng.randrange(GROUPS))
    return torch.zeros(config.layers, config.experts)


def planted_table(config: Config) -> dict[str, dict[str, list[list[int]]]]:
    """{behaviour: {side: [[layer, expert], ...]}}: the ground truth."""
    layers = range(FIRST_LAYER, config.layers)
    return {
        b: {s: [[layer, e] for layer in layers for e in PLANTED[group_of(b, s)]] for s in SIDES}
        for b in BEHAVIOURS
    }
