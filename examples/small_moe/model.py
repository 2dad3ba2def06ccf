"""OLMoE with a router loss as usual; each expert computes its own tokens only.

Norms and attention are those of the tiny model (`tiny_moe.model`), attention computed otherwise. Shapes: N tokens, D
hidden, E experts, K chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_moe import model as tiny
from tiny_moe.model import Config, RMSNorm, rope_tables

ATTENTION_BLOCK = 128  # queries whose products with all earlier keys are computed at once


def parameter_counts(config: Config) -> tuple[int, int]:
    """Parameters of the whole model, and those that work on a token (embedding and head are counted in full)."""
    with torch.device("meta"):
        n = sum(p.numel() for p in SmallMoE(config).parameters())
    return n, n - 3 * config.hidden * config.expert_ff * (config.experts - config.top_k) * config.layers


class Attention(tiny.Attention):
    """The same; on a CPU under autocast in bfloat16 with the softmax in float32, in half the fused function's time."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().attend(q, k, v)
        q, k = q * q.shape[-1] ** -0.5, k.transpose(-1, -2)
        pieces, begin = [], 0
        for part in q.split(ATTENTION_BLOCK, dim=2):
            end = begin + part.shape[2]
            scores = (part @ k[..., :end]).float()
            later = torch.ones_like(scores[0, 0, :, begin:], dtype=torch.bool).triu(1)
            scores[..., begin:].masked_fill_(later, float("-inf"))
            pieces.append(scores.softmax(-1) @ v[:, :, :end])
            begin = end
        return torch.cat(pieces, dim=2)


class Experts(nn.Module):
    """Router and SwiGLU experts; weights are the softmax over all experts, not renormalised (as OLMoE)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        e, f, d = config.experts, config.expert_ff, config.hidden
        self.top_k = config.top_k
        self.router = nn.Parameter(torch.randn(e, d) * 0.02)
        self.gate = nn.Parameter(torch.randn(e, f, d) * 0.02)
        self.up = nn.Parameter(torch.randn(e, f, d) * 0.02)
        self.down = nn.Parameter(torch.randn(e, d, f) * 0.02 / (2 * config.layers) ** 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block's output, router logits [N, E] in float32, and how many of the N tokens chose each expert [E]."""
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            z = F.linear(x.float(), self.router)
            weights, chosen = z.softmax(-1).topk(self.top_k, dim=-1)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(self.router))
        rows = order // self.top_k
        pieces = []
        # unbind, for the gradient of `self.gate[e]` is a tensor of all experts, zero but for one
        weights_of = (self.gate.unbind(), self.up.unbind(), self.down.unbind())
        for part, gate, up, down in zip(x[rows].split(counts.tolist()), *weights_of, strict=True):
            h = F.silu(F.linear(part, gate)) * F.linear(part, up)
            pieces.append(F.linear(h, down))
        y = torch.cat(pieces).float() * weights.flatten()[order, None]
        return torch.zeros_like(x, dtype=y.dtype).index_add(0, rows, y).view(shape), z, counts


class Block(tiny.Block):
    """Attention and experts as above."""

    attention, experts = Attention, Experts


class SmallMoE(nn.Module):
    """The whole model."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Parameter(torch.randn(config.vocab, config.hidden) * 0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.rms_eps)
        self.head = nn.Parameter(torch.randn(config.vocab, config.hidden) * 0.02)
        for block in self.blocks:
            for name in ("q_proj", "k_proj", "v_proj"):
                nn.init.normal_(getattr(block.attn, name).weight, std=0.02)
            nn.init.normal_(block.attn.o_proj.weight, std=0.02 / (2 * config.layers) ** 0.5)
        cos, sin = rope_tables(config, config.context)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [B, T, D] before the head, router logits [layers, N, E], counts [layers, E]; ids [B, T]."""
        t = ids.shape[1]
        x = F.embedding(ids, self.embed)
        router, counts = [], []
        for block in self.blocks:
            x, z, n = block(x, self.cos[:t], self.sin[:t])
            router.append(z)
            counts.append(n)
        return self.norm(x), torch.stack(router), torch.stack(counts)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the vocabulary."""
        return F.linear(hidden, self.head)
