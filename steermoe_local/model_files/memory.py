"""Estimates from the header whether a model and its KV cache fit into free memory, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._util.control_groups import group_folders
from .._util.files import human_size
from ..errors import FormatError, ModelError
from .cache_shape import cache_shape, read_headers
from .header import GGUFHeader
from .model_info import ModelInfo

F16, Q8_0 = 1, 8  # enum ggml_type
_CELLS = 256  # llama_context pads the number of cells to this
_FILES = {  # of the memory controller, by version: limit, usage, statistics of what the kernel can drop
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"),
    2: ("memory.max", "memory.current", "inactive_file", "active_file"),
}
_NO_LIMIT = 1 << 60  # version 1 of control groups writes a number near 2^63 for no limit


@dataclass(frozen=True)
class MemoryEstimate:
    """The bytes that a run takes, and `free`, the bytes that there are for it (None: not known).

    `weights` is the size of the files. `copies` are the second copies of quantized weights that llama.cpp makes for
    its faster kernels (repacking), `replaced` the part of the files that is not read any more when they are made.
    How much of it goes to a GPU or another machine is not known before loading, so `elsewhere` permits a warning
    only; so does `bound`, where `cache` is an upper bound. `mapped` weights are read from the file as they are
    needed and need not fit. `smaller` has the tokens of context that would fit with the same cache, and with the
    cache in q8_0.
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
    copies: int = 0
    replaced: int = 0

    @property
    def buffers(self) -> int:
        """Bytes that must be in memory wherever the weights are."""
        return self.cache + self.compute

    @property
    def total(self) -> int:
        """Bytes that a loaded model is at work on."""
        return self.weights - self.replaced + self.copies + self.buffers

    @property
    def has_room_for_copies(self) -> bool:
        """Is there room for repacked copies of the weights?

        Unlike mapped weights they cannot be dropped and read again. A quarter of their size must be left besides:
        with less, the kernel drops those mapped weights that are in use before those that were copied (measured with
        memory limits of control groups: docs/performance.md).
        """
        return self.free is None or self.elsewhere or self.total + self.copies // 4 <= self.free

    def problem(self) -> str | None:
        """One line with the cure if the run cannot work, else None."""
        if self.free is None or self.elsewhere or self.bound:
            return None
        if self.buffers > self.free:
            times = f", {self.n_sequences} of them" if self.n_sequences > 1 else ""
            return (
                f"{self.name}: the KV cache for {self.n_ctx} tokens of context{times} takes {human_size(self.cache)} "
                f"and the compute buffers about {human_size(self.compute)}, but {human_size(self.free)} of memory are "
                f"free; {self._cure()}, or free some memory"
            )
        if self.copies and self.copies + self.buffers > self.free:
            return (
                f"{self.name}: repacked copies of its weights take {human_size(self.copies)} and KV cache and buffers "
                f"{human_size(self.buffers)}, but {human_size(self.free)} of memory are free; leave the copies out "
                "(--no-repack)"
            )
        if not self.mapped and self.total > self.free:
            return (
                f"{self._total(self.free)}; leave the file mapped (no --no-mmap, no --mlock), or take a smaller "
                "quantization"
            )
        return None

    def warning(self) -> str | None:
        """One line if the run may work, but not well, else None."""
        if self.free is None or self.problem() or (self.total <= self.free and self.has_room_for_copies):
            return None
        total = self._total(self.free)
        if self.total <= self.free:
            return f"{total}; if it is slow, leave the repacked copies out (--no-repack)"
        if self.elsewhere:
            return f"{total}; this works only as far as the rest goes to a GPU or to other machines"
        if self.bound and self.buffers > self.free:
            return f"{total}; its cache may be smaller than this upper bound; if loading fails, take a smaller -c"
        return (
            f"{total}; weights will be read from the disk again and again, which is slow, or loading fails; take a "
            "smaller quantization, a smaller context (-c), or a GPU (-ngl, with -cmoe if it is small)"
        )

    def _total(self, free: int) -> str:
        copies = f", repacked copies of them {human_size(self.copies)}" if self.copies else ""
        return (
            f"{self.name}: its weights take {human_size(self.weights)}{copies} and KV cache and buffers "
            f"{human_size(self.buffers)}, but {human_size(free)} of memory are free"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        return {
            "weights_bytes": self.weights,
            "repacked_bytes": self.copies,
            "kv_cache_bytes": self.cache,
            "compute_bytes": self.compute,
            "free_bytes": self.free,
            "n_ctx": self.n_ctx,
            "n_sequences": self.n_sequences,
        }

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
    locked: bool = False,
    elsewhere: bool = False,
    repacks: Callable[[str, tuple[int, ...]], bool] | None = None,
    free: int | None = None,
) -> MemoryEstimate:
    """Compare what a model and a context on it take with what is free.

    Args:
        facts: of the model, by `model_info`.
        n_ctx: tokens of context of each sequence; 0 takes what the model was trained for.
        n_sequences: how many of them.
        type_k, type_v: numbers of the cache's types (enum ggml_type).
        flash_attn, n_ubatch: as in `llama_cpp.Llama`.
        mapped: the weights are mapped from the file (use_mmap).
        locked: they are locked in RAM (use_mlock).
        elsewhere: part of it goes to a GPU or to other machines.
        repacks: says of a weight's type ("Q4_0") and shape if llama.cpp repacks it; None: it repacks none.
        free: bytes to take for free; None asks the system.

    Raises ModelError when the header cannot be read any more, and for numbers that no model has.
    """
    headers = read_headers(facts)
    try:
        shape = cache_shape(facts, headers)
    except FormatError as error:
        raise ModelError(str(error)) from error
    n_ctx = n_ctx or facts.context_length
    free = free_memory() if free is None else free

    def needs(tokens: int, k: int, v: int, fa: bool) -> tuple[int, int]:
        cells = -(-tokens // _CELLS) * _CELLS  # of each sequence; a sequence attends to its own alone
        cache = shape.cache_bytes(cells * n_sequences, n_sequences, k, v, fa)
        return cache, shape.compute_bytes(cells, n_ubatch, fa)

    cache, compute = needs(n_ctx, type_k, type_v, flash_attn)
    copies, replaced = repacked_bytes(headers, repacks) if repacks else (0, 0)
    estimate = MemoryEstimate(
        name=str(facts.paths[0]),
        weights=facts.size_bytes,
        cache=cache,
        compute=compute,
        free=free,
        n_ctx=n_ctx,
        n_sequences=n_sequences,
        mapped=mapped and not locked,
        elsewhere=elsewhere,
        bound=shape.bound,
        copies=copies,
        replaced=0 if mapped and locked else replaced,
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


def repacked_bytes(headers: Sequence[GGUFHeader], repacks: Callable[[str, tuple[int, ...]], bool]) -> tuple[int, int]:
    """Bytes of the weights that are repacked, and those of them that are not read from the file any more.

    `headers` are those of all parts of a model, `repacks` is as in `check_memory`.
    """
    copies = replaced = 0
    tied = not any("output.weight" in header.tensors for header in headers)
    for header in headers:
        for name, tensor in header.tensors.items():
            # embeddings are looked up, not multiplied; llama.cpp loads a tied one a second time, as the output
            embedding = name.endswith("token_embd.weight")
            if repacks(tensor.type.name, tensor.shape) and (not embedding or (tied and name == "token_embd.weight")):
                copies += tensor.n_bytes
                replaced += 0 if embedding else tensor.n_bytes
    return copies, replaced


def free_memory() -> int | None:
    """Bytes that this process can take without swapping; None when the system does not say."""
    known = [n for n in (system_memory(), control_group_memory()) if n is not None]
    return min(known, default=None)


def system_memory() -> int | None:
    """Free bytes of the system, with the caches that it can drop."""
    try:
        import psutil

        return int(psutil.virtual_memory().available)
    except Exception:  # no psutil for this machine, or no /proc: then nothing is checked
        return None


def control_group_memory(proc: Path | None = None, root: Path | None = None) -> int | None:
    """Bytes that the process's Linux control groups (containers, systemd units) leave it; None without a limit.

    The kernel counts pages of mapped files, but drops them when memory is needed, so they count as free here. `proc`
    and `root` are those of `group_folders`.
    """
    left = [_left(folder, *_FILES[version]) for version, folder in group_folders("memory", proc, root)]
    return max(0, min(known)) if (known := [free for free in left if free is not None]) else None


def _left(group: Path, limit: str, usage: str, *caches: str) -> int | None:
    try:
        allowed = (group / limit).read_text("ascii").strip()
        if allowed == "max" or int(allowed) >= _NO_LIMIT:
            return None
        used = int((group / usage).read_text("ascii"))
    except (OSError, ValueError):
        return None
    try:
        lines = (group / "memory.stat").read_text("ascii").splitlines()
        stats = dict(line.split(" ", 1) for line in lines if " " in line)
        used -= sum(int(stats.get(name, 0)) for name in caches)
    except (OSError, ValueError):
        pass  # without it, what is cached counts as used
    return int(allowed) - max(0, used)
