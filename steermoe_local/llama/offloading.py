"""How much of a model goes to the GPUs when nobody says it, as llama.cpp's -ngl auto does (common/fit.cpp).

llama.cpp loads the model without its weights to measure what fits; here it is computed from the header, with the same
margin. First as many experts as must stay on the CPU, with all other weights on the GPUs; if not even those fit, the
last layers.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import backends

MARGIN = 1 << 30
"""Bytes that stay free on each device (common/common.h: fit_params_target)."""

ALL = -1
_BLOCK = re.compile(r"blk\.(\d+)\.")
_EXPERTS = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps")


@dataclass(frozen=True)
class Offloading:
    """Arguments of `SteeredLlama`: layers on the GPUs, -1 for all, and how many layers' experts stay on the CPU."""

    n_gpu_layers: int
    n_cpu_moe: int = 0


NONE = Offloading(0)


def gpu_memory(devices: Sequence[str] | None, rpc_servers: Sequence[str] = ()) -> list[int]:
    """Free bytes of the devices that layers would go to: those named, all of them for None. Empty without any.

    Raises UsageError (an unknown device), NativeError (an RPC server that cannot be used).
    """
    if devices is not None and not devices:
        return []
    if rpc_servers:
        backends.add_rpc_servers(rpc_servers)
    ask = backends.function(
        "ggml_backend_dev_memory",
        None,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.POINTER(ctypes.c_size_t),
    )
    found = []
    for device in backends.offload_devices(devices, rpc_servers):
        free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
        ask(device, ctypes.byref(free), ctypes.byref(total))
        found.append(free.value)
    return found


def fitting(
    free: Sequence[int],
    tensors: Mapping[str, int],
    n_layer: int,
    cache: int,
    compute: int,
    *,
    keep_experts: bool = True,
) -> Offloading:
    """What fits into devices with so many free bytes.

    `tensors` are the bytes of the weights by name, `cache` and `compute` those of the KV cache and the compute buffers,
    which every device has for itself. `keep_experts`: experts may stay on the CPU while the rest of their layer goes.
    """
    room = sum(max(0, bytes_ - MARGIN - compute) for bytes_ in free)
    if not room:
        return NONE
    layers, experts, rest = [0] * n_layer, [0] * n_layer, 0
    tied = "output.weight" not in tensors
    for name, size in tensors.items():
        match = _BLOCK.match(name)
        if match is None or int(match[1]) >= n_layer:
            # token embeddings stay on the CPU; tied ones are loaded a second time, as the output
            rest += size if tied or not name.startswith("token_embd") else 0
        elif _EXPERTS.search(name):
            experts[int(match[1])] += size
        else:
            layers[int(match[1])] += size
    of_cache = cache / max(1, n_layer)
    needed = rest + sum(layers) + sum(experts) + cache
    if needed <= room:
        return Offloading(ALL)
    if keep_experts:
        for n in range(n_layer):
            needed -= experts[n]
            if needed <= room:
                return Offloading(ALL, n + 1)
    n_gpu, used = 0, float(rest)  # the output goes first, then layers from the last one on
    for layer in reversed(range(n_layer)):
        used += layers[layer] + of_cache + (0 if keep_experts else experts[layer])
        if used > room:
            break
        n_gpu += 1
    return Offloading(n_gpu + 1, n_layer if keep_experts else 0) if n_gpu else NONE
