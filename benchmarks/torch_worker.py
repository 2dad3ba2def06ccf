"""A process that runs Hugging Face transformers on the CPU on request: same shapes, random weights, hooks on routers.

    python torch_worker.py SHAPE --threads N --dtype bfloat16|float32

Requests and answers as in worker.py. `experts` in a request names one of transformers' ways to compute experts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from random_q4 import SHAPES, Shape
from transformers import initialization  # since version 5
from worker import memory_use, serve, steering_rows

EXPERTS = ("eager", "grouped_mm", "batched_mm")


def make_model(shape: Shape, dtype: torch.dtype) -> Any:
    """A model of the shape with small random weights, on the CPU, in evaluation mode."""
    size: dict[str, Any] = {
        "vocab_size": shape.n_vocab,
        "hidden_size": shape.n_embd,
        "intermediate_size": shape.n_ff,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_head_kv,
        "num_experts_per_tok": shape.k,
        "max_position_embeddings": shape.n_ctx,
    }
    if shape.arch == "olmoe":
        config: Any = transformers.OlmoeConfig(**size, num_experts=shape.n_expert)
        kind: Any = transformers.OlmoeForCausalLM
    else:
        config = transformers.GraniteMoeConfig(
            **size,
            num_local_experts=shape.n_expert,
            tie_word_embeddings=True,
            logits_scaling=6.0,
            residual_multiplier=0.22,
            embedding_multiplier=12.0,
            attention_multiplier=shape.n_head / shape.n_embd,
        )
        kind = transformers.GraniteMoeForCausalLM
    torch.manual_seed(shape.seed)
    # the class's own initialisation would take a minute; uniform values in place take seconds
    with initialization.no_init_weights():
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = kind(config)
        finally:
            torch.set_default_dtype(previous)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                bound = (2.0 if is_router(name) else 1.0) * (3 / weight.shape[-1]) ** 0.5
                weight.uniform_(-bound, bound)
    return model.eval()


def is_router(name: str) -> bool:
    return name.endswith(("router.weight", "mlp.gate.weight"))


class Runner:
    """A model, its routers in layer order, and the KV cache of the last prompt."""

    def __init__(self, shape: Shape, dtype: str) -> None:
        self.shape = shape
        self.model = make_model(shape, getattr(torch, dtype))
        self.routers = [m for n, m in self.model.named_modules() if is_router(f"{n}.weight")]
        if len(self.routers) != shape.n_layer:
            raise SystemExit(f"found {len(self.routers)} routers in {shape.n_layer} layers")
        rows = steering_rows(shape.n_layer, shape.n_expert, "hard")
        self.signs = [torch.tensor(rows[layer]) for layer in range(shape.n_layer)]
        self.counts = torch.zeros(shape.n_layer, shape.n_expert, dtype=torch.int64)
        self.cache: Any = None

    def tokens(self, n: int, start: int = 0) -> torch.Tensor:
        return torch.tensor([[(7919 + i * i * 31 + i * 101) % self.shape.n_vocab for i in range(start, start + n)]])

    def _count(self, layer: int, output: tuple[torch.Tensor, ...]) -> None:
        """Hook that counts the selected experts."""
        self.counts[layer] += torch.bincount(output[2].flatten(), minlength=self.shape.n_expert)

    def _steer(self, layer: int, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Hook that applies the hard rule and routes again, as the model's router does."""
        logits, weights, _ = output
        z, sign = logits.float(), self.signs[layer]
        z = torch.where(sign > 0, z.amax(-1, keepdim=True) + 0.01, z)
        z = torch.where(sign < 0, logits.float().amin(-1, keepdim=True) - 0.01, z)
        if self.shape.arch == "olmoe":
            top, index = z.softmax(-1).topk(self.shape.k)
        else:
            top, index = z.topk(self.shape.k)
            top = top.softmax(-1)
        return z.to(logits.dtype), top.to(weights.dtype), index

    @contextmanager
    def _hooks(self, which: str) -> Iterator[None]:
        hooks = {"none": None, "count": self._count, "steer": self._steer}
        hook = hooks[which]
        handles = [
            router.register_forward_hook(lambda _m, _i, output, layer=layer: hook(layer, output))
            for layer, router in enumerate(self.routers)
            if hook is not None
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def prompt(self, n: int, hooks: str, experts: str) -> dict[str, float]:
        """Time a prompt of n tokens; the head computes only the last token."""
        self.model.set_experts_implementation(experts)
        self.counts.zero_()
        tokens = self.tokens(n)
        with self._hooks(hooks), torch.inference_mode():
            start, cpu = time.perf_counter(), time.process_time()
            output = self.model(tokens, use_cache=True, logits_to_keep=1)
            answer = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        self._check(output.logits)
        self.cache = output.past_key_values
        if hooks == "count" and int(self.counts.sum()) != n * self.shape.k * self.shape.n_layer:
            raise SystemExit("the hooks did not see every token in every layer")
        return answer

    def decode(self, start: int, n: int, hooks: str, experts: str) -> dict[str, float]:
        """Time n tokens, one after the other, after a prompt of `start` tokens."""
        self.model.set_experts_implementation(experts)
        extra = self.cache.get_seq_length() - start
        if extra:
            self.cache.crop(-extra)
        seconds = 0.0
        with self._hooks(hooks), torch.inference_mode():
            for token in self.tokens(n, start).T:
                begin = time.perf_counter()
                output = self.model(token[None], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
                seconds += time.perf_counter() - begin
        self._check(output.logits)
        return {"seconds": seconds}

    def _check(self, logits: torch.Tensor) -> None:
        if not torch.isfinite(logits).all() or logits.min() == logits.max():
            raise SystemExit("the logits are not finite or all the same")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a random model under transformers on request.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    runner = Runner(SHAPES[arguments.shape], arguments.dtype)
    serve({"prompt": runner.prompt, "decode": runner.decode, "memory": memory_use})


if __name__ == "__main__":
    main()
