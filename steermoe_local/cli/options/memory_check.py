"""The check before a model is loaded: does it fit into free memory?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ...errors import ResourceError
from .common import CACHE_TYPES, LlamaFlags

if TYPE_CHECKING:
    from ...model_files.memory import MemoryEstimate
    from ...model_files.model_info import ModelInfo


def check_memory(facts: ModelInfo, flags: LlamaFlags, n_ctx: int, n_sequences: int = 1) -> MemoryEstimate | None:
    """Say what will not fit, before anything is loaded: a warning on stderr, or ResourceError.

    `facts` are of `model_info`, `flags` the command's `llama_options`; `n_ctx` are the tokens of context of each of
    `n_sequences` sequences, 0 for the model's own. With --no-memory-check nothing is looked at and None returned.

    Raises ResourceError, with what to change, when KV cache and buffers (or weights that are not mapped) do not fit.
    """
    if not flags.memory_check:
        return None
    from ...model_files import memory

    estimate = memory.check_memory(
        facts,
        n_ctx,
        n_sequences,
        CACHE_TYPES[flags.cache_type_k],
        CACHE_TYPES[flags.cache_type_v],
        flash_attn=flags.flash_attn != "off",  # auto: the CPU has it, and an error should be sure
        n_ubatch=min(flags.ubatch_size, flags.batch_size),
        mapped=flags.mmap and not flags.mlock,
        elsewhere=flags.n_gpu_layers != 0 or bool(flags.rpc),
    )
    if problem := estimate.problem():
        raise ResourceError(f"{problem}; --no-memory-check tries it all the same")
    if warning := estimate.warning():
        click.echo(f"warning: {warning}", err=True)
    return estimate
