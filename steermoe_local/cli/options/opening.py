"""Opening a model with the flags of the command line, for every command that runs one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._util.files import human_size
from ...errors import ResourceError
from ...model_files.model_info import check_loadable
from ..output import say, warn
from .llama import AUTO_LAYERS, CACHE_TYPES, LlamaFlags

if TYPE_CHECKING:
    from ...generation.engine import Engine
    from ...llama.steered_llama import SteeredLlama
    from ...model_files.memory import MemoryEstimate
    from ...model_files.model_info import ModelInfo

DEFAULT_CONTEXT = 4096


def context_size(facts: ModelInfo, ctx_size: int | None) -> int:
    """Tokens of context for -c: 0 is the model's own, None (not given) as well, but at most DEFAULT_CONTEXT."""
    trained = facts.context_length or DEFAULT_CONTEXT
    return min(DEFAULT_CONTEXT, trained) if ctx_size is None else ctx_size or trained


def check_memory(facts: ModelInfo, flags: LlamaFlags, n_ctx: int, n_sequences: int = 1) -> LlamaFlags:
    """Warn on stderr, or raise ResourceError, when a model does not fit into free memory; nothing is loaded.

    What its headers show to be impossible is refused first (ModelError), as its size means nothing.

    `n_ctx` are the tokens of context of each of `n_sequences` sequences, 0 for the model's own. An error is raised when
    KV cache and buffers (or weights that are not mapped) do not fit. With --no-memory-check nothing is looked at.

    Returns the flags to load the model with: checked, and with `repack` decided. Without --repack or --no-repack the
    weights are repacked if there is room for the copies; else a line on stderr says that they are not.
    """
    _warn_without_gpu(flags)
    if not flags.memory_check:
        return offloaded(facts, flags, n_ctx, n_sequences)
    check_loadable(facts.paths[0])
    from ...llama.cpu import repacks
    from ...model_files import memory

    flags = offloaded(facts, flags, n_ctx, n_sequences)

    def estimated(repack: bool) -> MemoryEstimate:
        return memory.check_memory(
            facts,
            n_ctx,
            n_sequences,
            CACHE_TYPES[flags.cache_type_k],
            CACHE_TYPES[flags.cache_type_v],
            flash_attn=flags.flash_attn != "off",  # auto: the CPU has it, and an error should be sure
            n_ubatch=min(flags.ubatch_size, flags.batch_size),
            mapped=flags.mmap,
            locked=flags.mlock,
            elsewhere=flags.n_gpu_layers != 0 or bool(flags.rpc),
            repacks=repacks() if repack else None,
        )

    repack = flags.repack is not False
    estimate, left_out = estimated(repack), ""
    if flags.repack is None and estimate.copies and not estimate.has_room_for_copies:
        left_out = (
            f"{estimate.name}: {human_size(estimate.copies)} of repacked copies of its weights do not fit into "
            f"{human_size(estimate.free or 0)} of free memory besides the rest, so it runs without them: prompts take "
            "longer (--repack makes them all the same)"
        )
        repack = False
        estimate = estimated(repack)
    if problem := estimate.problem():
        raise ResourceError(f"{problem}; --no-memory-check tries it all the same")
    if left_out:
        say(left_out)
    elif flags.verbose:
        say(_of_weights(estimate, repack))
    if warning := estimate.warning():
        warn(warning)
    return replace(flags, memory_check=False, repack=repack)


def offloaded(facts: ModelInfo, flags: LlamaFlags, n_ctx: int, n_sequences: int) -> LlamaFlags:
    """The flags with -ngl auto decided; without a GPU it means none, and nothing is said.

    Where the flags say themselves what stays on the CPU (-cmoe, -ncmoe, -ot), only the number of layers is chosen.
    Raises UsageError (an unknown device), NativeError (an RPC server that cannot be used).
    """
    if flags.n_gpu_layers != AUTO_LAYERS:
        return flags
    from ...llama.backends import cpu_moe_patterns
    from ...llama.offloading import fitting, gpu_memory
    from ...model_files import memory
    from ...model_files.cache_shape import read_headers

    free = gpu_memory(() if flags.device == ("none",) else flags.device, flags.rpc or ())
    if not free:
        return replace(flags, n_gpu_layers=0)
    types = CACHE_TYPES[flags.cache_type_k], CACHE_TYPES[flags.cache_type_v]
    estimate = memory.check_memory(
        facts,
        n_ctx,
        n_sequences,
        *types,
        flash_attn=flags.flash_attn != "off",
        n_ubatch=min(flags.ubatch_size, flags.batch_size),
        elsewhere=True,
    )
    stays = [pattern for pattern, _ in cpu_moe_patterns(None if flags.cpu_moe else flags.n_cpu_moe)]
    tensors = {
        name: tensor.n_bytes
        for header in read_headers(facts)
        for name, tensor in header.tensors.items()
        if not any(re.search(pattern, name) for pattern in stays)
    }
    keep_experts = not stays and not flags.override_tensor
    found = fitting(free, tensors, facts.n_layer, estimate.cache, estimate.compute, keep_experts=keep_experts)
    if flags.verbose:
        layers = "all layers" if found.n_gpu_layers < 0 else f"{found.n_gpu_layers} layers"
        but = f", experts of the first {found.n_cpu_moe} on the CPU" if found.n_cpu_moe else ""
        say(f"{estimate.name}: -ngl auto: {layers} on the GPU{but}, by {human_size(sum(free))} free there")
    return replace(flags, n_gpu_layers=found.n_gpu_layers, n_cpu_moe=flags.n_cpu_moe or found.n_cpu_moe)


_warned: set[str] = set()


def _warn_without_gpu(flags: LlamaFlags) -> None:
    """Warn once when a GPU is asked for and the library has none."""
    asked = []
    if flags.n_gpu_layers not in (0, AUTO_LAYERS):
        asked.append("-ngl")
    if flags.tensor_split:
        asked.append("-ts")
    if not asked or flags.device == ("none",):
        return
    from ...llama.backends import device_names

    line = ", ".join(asked)
    if device_names() or flags.rpc or line in _warned:
        return
    _warned.add(line)
    warn(
        f"{line}: ignored, as this library knows no GPU; build it for yours, like CMAKE_ARGS=-DGGML_CUDA=on "
        "pip install . (docs/backends.md)"
    )


def _of_weights(estimate: MemoryEstimate, repack: bool) -> str:
    """Whether the weights are repacked, and why.

    By benchmarks/prompts.py, prompts are faster with copies; with those of Q4_K weights they are as fast.
    """
    if estimate.copies:
        copies = human_size(estimate.copies)
        return f"{estimate.name}: {copies} of its weights are repacked, with which prompts are fastest"
    if repack:
        return f"{estimate.name}: none of its weights are of a type and shape that are repacked on this CPU"
    return f"{estimate.name}: its weights are not repacked (--no-repack); prompts may take longer"


def warn_of_unknown_reasoning(facts: ModelInfo) -> None:
    """Warn when a model may reason in a way that cannot be told from its answers."""
    from ...llama.reasoning_styles import unknown_reasoning

    if warning := unknown_reasoning(facts.chat_template or ""):
        warn(f"{facts.paths[0]}: {warning}")


@contextmanager
def open_model(
    facts: ModelInfo, flags: LlamaFlags, n_ctx: int, n_sequences: int = 1, *, path: Path | None = None
) -> Iterator[SteeredLlama]:
    """Load a model, after `check_memory`. Its own context is small; engines and recorders make theirs.

    `path` is the file as the user named it; a later part of a split model is refused. None takes the first part. Raises
    ResourceError (no memory for `n_sequences` sequences of `n_ctx` tokens), ModelError, NativeError.
    """
    from ...llama.steered_llama import SteeredLlama

    flags = check_memory(facts, flags, n_ctx, n_sequences)
    with closing(SteeredLlama(path or facts.paths[0], n_ctx=64, n_batch=64, **flags.model_arguments())) as llama:
        yield llama


@contextmanager
def open_engine(
    facts: ModelInfo, flags: LlamaFlags, n_ctx: int, n_slots: int, *, path: Path | None = None, **engine_arguments: Any
) -> Iterator[Engine]:
    """Load a model and make an engine of `n_slots` slots of `n_ctx` tokens each.

    `path` as in `open_model`. `engine_arguments` are further ones of `Engine`. Raises as `open_model`.
    """
    from ...generation.engine import Engine

    context = flags.context_arguments()
    context["n_batch"] = max(context["n_batch"], n_slots)
    with (
        open_model(facts, flags, n_ctx, n_slots, path=path) as llama,
        Engine(llama, n_ctx=n_ctx, n_slots=n_slots, **context, **engine_arguments) as engine,
    ):
        yield engine
