"""OLMoE in PyTorch, small: the architecture of `OlmoeForCausalLM` and of llama.cpp's `olmoe`.

Every expert is computed for every token and masked by the router's choice: with experts this small
one large matrix product beats sorting tokens. Shapes: B sequences, T tokens, D hidden, E experts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes of the model; the defaults are the shipped one's."""

    vocab: int = 1280
    hidden: int = 256
    layers: int = 5
    heads: int = 4
    experts: int = 24
    top_k: int = 4
    expert_ff: int = 32
    context: int = 1024
    rope_base: float = 10000.0
    rms_eps: float = 1e-5

    def to_dict(self) -> dict:
        """Plain values, for checkpoints."""
        return asdict(self)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


def rope_tables(config: Config, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, head_dim] of NEOX rotary positions: i pairs with i + head_dim / 2."""
    dim = config.hidden // config.heads
    inverse = config.rope_base ** (-torch.arange(0, dim, 2).float() / dim)
    angles = torch.arange(length).float()[:, None] * inverse
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x [B, heads, T, head_dim]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def steer(z: Tensor, signs: Tensor, eps: float = 0.01) -> Tensor:
    """The hard rule on router logits z [B, T, E]; signs [B, E] in {-1, 0, +1}, 0 leaves as is."""
    s = signs[:, None, :]
    high = z.amax(-1, keepdim=True) + eps
    low = z.amin(-1, keepdim=True) - eps
    return torch.where(s > 0, high, torch.where(s < 0, low, z))


class Attention(nn.Module):
    """Causal attention with RMS norms over the whole query and key projections."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d = config.hidden
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(d, d, bias=False) for _ in range(4)
        )
        self.q_norm, self.k_norm = (RMSNorm(d, config.rms_eps) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, d = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(b, t, self.heads, d // self.heads).transpose(1, 2)

        q = rotate(split(self.q_norm(self.q_proj(x))), cos, sin)
        k = rotate(split(self.k_norm(self.k_proj(x))), cos, sin)
        y = self.attend(q, k, split(self.v_proj(x)))
        return self.o_proj(y.transpose(1, 2).reshape(b, t, d))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of each head [B, heads, T, head_dim]."""
        # float32 under autocast too: the bfloat16 backward is four times slower on CPUs
        with torch.autocast(q.device.type, enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)


class Experts(nn.Module):
    """Router and SwiGLU experts; weights are the softmax over all experts, not renormalised."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        e, f, d = config.experts, config.expert_ff, config.hidden
        self.top_k = config.top_k
        self.router = nn.Parameter(torch.randn(e, d) * 0.02)
        self.gate = nn.Parameter(torch.randn(e, f, d) * d**-0.5)
        self.up = nn.Parameter(torch.randn(e, f, d) * d**-0.5)
        self.down = nn.Parameter(torch.randn(e, d, f) * f**-0.5)

    def forward(self, x: Tensor, signs: Tensor | None) -> tuple[Tensor, Tensor]:
        """The block's output [B, T, D] and the unedited router logits [B, T, E]."""
        e, f, d = self.gate.shape
        with torch.autocast(x.device.type, enabled=False):
            z = F.linear(x.float(), self.router)
            edited = z if signs is None else steer(z, signs)
            weights = edited.softmax(-1)
            chosen = edited.topk(self.top_k, dim=-1).indices
            weights = torch.zeros_like(weights).scatter(-1, chosen, weights.gather(-1, chosen))
        h = F.silu(F.linear(x, self.gate.view(e * f, d))) * F.linear(x, self.up.view(e * f, d))
        h = h.view(*x.shape[:2], e, f) * weights[..., None].to(h.dtype)
        return F.linear(h.flatten(2), self.down.transpose(0, 1).reshape(d, e * f)), z


class Block(nn.Module):
    """Attention and experts, each after its norm."""

    attention: type[nn.Module] = Attention
    experts: type[nn.Module] = Experts

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attn_norm, self.ffn_norm = (RMSNorm(config.hidden, config.rms_eps) for _ in range(2))
        self.attn, self.moe = self.attention(config), self.experts(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, *steering: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The block's output, and what its experts give beside theirs."""
        x = x + self.attn(self.attn_norm(x), cos, sin)
        y, *routing = self.moe(self.ffn_norm(x), *steering)
        return x + y, *routing


class TinyMoE(nn.Module):
    """The whole model."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Parameter(torch.randn(config.vocab, config.hidden) * 0.5)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.rms_eps)
        self.head = nn.Parameter(torch.randn(config.vocab, config.hidden) * 0.02)
        cos, sin = rope_tables(config, config.context)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, signs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [B, T, vocab] and router logits before editing [layers, B, T, E].

        ids [B, T], padded at the end; signs [B, layers, E] in {-1, 0, +1} or None for no steering.
        """
        t = ids.shape[1]
        x = F.embedding(ids, self.embed)
        router = []
        for i, block in enumerate(self.blocks):
            x, z = block(x, self.cos[:t], self.sin[:t], None if signs is None else signs[:, i])
            router.append(z)
        return F.linear(self.norm(x), self.head), torch.stack(router)
