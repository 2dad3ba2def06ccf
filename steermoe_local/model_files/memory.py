"""Whether a model and its KV cache fit into free memory, told from the header before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .cache_shape import cache_shape
from .free_memory import free_memory
from .model_info import ModelInfo

__all__ = ["MemoryEstimate", "check_memory"]

F16, Q8_0 = 1, 8  # enum ggml_type
_CELLS = 256  # llama_context pads the number of cells to this


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run takes, in bytes, against `free`, the memory that is there for it (None: not known).

    `weights` is the size of the files: what of it goes to a GPU or another machine is not known before loading, so
    with `elsewhere` nothing but a warning comes of it; nor with `bound`, where `cache` is an upper bound. `mapped`
    weights are read from the file as they are needed and need not fit.
    """

    name: str
    weights: int
    cache: int
    compute: int
    free: int | None
    n_ctx: int
    n_sequences: int
    mapped: bool = True
    elsewhere: bool = False
    bound: bool = False
    smaller: tuple[int, ...] = ()
    """What would fit instead: tokens of context with the same cache, then with the cache in q8_0."""

    @property
    def buffers(self) -> int:
        """What must be in memory whatever becomes of the weights."""
        return self.cache + self.compute

    def problem(self) -> str | None:
        """One line with the cure if the run cannot work, else None."""
        if self.free is None or self.elsewhere or self.bound:
            return None
        if self.buffers > self.free:
            return f"{self._needs()}, but {_size(self.free)} of memory are free; {self._cure()}, or free some memory"
        if not self.mapped and self.weights + self.buffers > self.free:
            return (
                f"{self.name}: its weights take {_size(self.weights)} and KV cache and buffers {_size(self.buffers)}, "
                f"but {_size(self.free)} of memory are free; leave the file mapped (no --no-mmap, no --mlock), or take "
                "a smaller quantization"
            )
        return None

    def warning(self) -> str | None:
        """One line if the run may work, but not well, else None."""
        if self.free is None or self.problem() or self.weights + self.buffers <= self.free:
            return None
        needs = (
            f"{self.name}: its weights take {_size(self.weights)} and KV cache and buffers {_size(self.buffers)}, but "
            f"{_size(self.free)} of memory are free"
        )
        if self.elsewhere:
            return f"{needs}; this works only as far as the rest goes to a GPU or to other machines"
        if self.bound and self.buffers > self.free:
            return f"{needs}; its cache may be smaller than this upper bound; if loading fails, take a smaller -c"
        return (
            f"{needs}; weights will be read from the disk again and again, which is slow, or loading fails; take a "
            "smaller quantization, a smaller context (-c), or a GPU (-ngl, with -cmoe if it is small)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        return {
            "weights_bytes": self.weights,
            "kv_cache_bytes": self.cache,
            "compute_bytes": self.compute,
            "free_bytes": self.free,
            "n_ctx": self.n_ctx,
            "n_sequences": self.n_sequences,
        }

    def _needs(self) -> str:
        times = f", {self.n_sequences} of them" if self.n_sequences > 1 else ""
        return (
            f"{self.name}: the KV cache for {self.n_ctx} tokens of context{times} takes {_size(self.cache)} and the "
            f"compute buffers about {_size(self.compute)}"
        )

    def _cure(self) -> str:
        same, quantized = self.smaller if self.smaller else (0, 0)
        cures = []
        if same:
            cures.append(f"take a smaller context (-c {same} fits)")
        if quantized >= self.n_ctx > same:
            cures.append("halve the cache (-fa on -ctk q8_0 -ctv q8_0 fits)")
        elif quantized > same:
            cures.append(f"halve the cache (-fa on -ctk q8_0 -ctv q8_0, then -c {quantized} fits)")
        return ", or ".join(cures) or "take a smaller model, or a smaller -c and -ub"


def check_memory(
    facts: ModelInfo,
    n_ctx: int,
    n_sequences: int = 1,
    type_k: int = F16,
    type_v: int = F16,
    *,
    flash_attn: bool = False,
    n_ubatch: int = 512,
    mapped: bool = True,
    elsewhere: bool = False,
    free: int | None = None,
) -> MemoryEstimate:
    """Compare what a model and a context on it take with what is free.

    Args:
        facts: of the model, by `model_info`.
        n_ctx: tokens of context of each sequence; 0 takes what the model was trained for.
        n_sequences: how many of them.
        type_k, type_v: numbers of the cache's types (enum ggml_type).
        flash_attn, n_ubatch: as in `llama_cpp.Llama`.
        mapped: the weights are mapped from the file (use_mmap) and not locked in RAM.
        elsewhere: part of it goes to a GPU or to other machines.
        free: bytes to take for free; None asks the system.

    Raises ModelError when the header cannot be read any more.
    """
    shape = cache_shape(facts)
    n_ctx = n_ctx or facts.context_length
    free = free_memory() if free is None else free

    def needs(tokens: int, k: int, v: int, fa: bool) -> tuple[int, int]:
        cells = -(-tokens // _CELLS) * _CELLS  # of each sequence; a sequence attends to its own alone
        cache = shape.cache_bytes(cells * n_sequences, n_sequences, k, v, fa)
        return cache, shape.compute_bytes(cells, n_ubatch, fa)

    cache, compute = needs(n_ctx, type_k, type_v, flash_attn)
    estimate = MemoryEstimate(
        str(facts.paths[0]), facts.size_bytes, cache, compute, free, n_ctx, n_sequences, mapped, elsewhere, shape.bound
    )
    if estimate.problem() is None:
        return estimate

    def fits(k: int, v: int, fa: bool) -> int:
        """Most tokens of context, in steps of 256."""
        low, high = 0, n_ctx // _CELLS + 1  # cells grow with the tokens, and so do both
        while low < high:
            middle = (low + high + 1) // 2
            if sum(needs(middle * _CELLS, k, v, fa)) <= (free or 0):
                low = middle
            else:
                high = middle - 1
        return min(low * _CELLS, n_ctx)

    return replace(estimate, smaller=(fits(type_k, type_v, flash_attn), fits(Q8_0, Q8_0, True)))


def _size(n: int) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"
