"""What llama.cpp cannot load, told from the headers before it is tried.

llama.cpp answers a wrong number in a header with an assertion, which ends the process, where this names the number. The
rules are those of llama_model_base::load_hparams (src/llama-model.cpp) and of src/llama-hparams.h; what it refuses with
a reason of its own is left to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from ..errors import FormatError, ModelError
from .header import GGUFHeader

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\..*", re.DOTALL)
_WITHOUT_NUMBERS = {"clip"}
_ONE_EXPERT_IS_NONE = {"hunyuan-dense", "hunyuan_vl"}


def block_numbers(parts: Sequence[GGUFHeader]) -> set[int]:
    """The layers that have tensors, those of multi-token prediction included."""
    return {int(match[1]) for part in parts for name in part.tensors if (match := _BLOCK.fullmatch(name))}


def why_not_loadable(parts: Sequence[GGUFHeader]) -> str:
    """Why no llama.cpp can load a model with these headers of all its parts, "" if nothing speaks against it.

    The answer is a phrase with the field and its value, for messages that begin with the file.
    """
    head = parts[0]
    arch = head.value("general.architecture")
    if not isinstance(arch, str) or arch in _WITHOUT_NUMBERS:
        return ""
    return _layers(head, arch, parts) or _experts(head, arch) or _rope(head, arch)


def require_loadable(path: Path, parts: Sequence[GGUFHeader]) -> None:
    """Raise ModelError for what `why_not_loadable` names."""
    try:
        problem = why_not_loadable(parts)
    except FormatError as error:
        raise ModelError(str(error)) from error
    if problem:
        raise ModelError(f"{path}: {problem}, so llama.cpp cannot load it; convert the model again")


def _layers(head: GGUFHeader, arch: str, parts: Sequence[GGUFHeader]) -> str:
    key = f"{arch}.block_count"
    if key not in head.fields:
        return ""
    n_all, n_next = head.number(key), head.number(f"{arch}.nextn_predict_layers")
    if not 1 <= n_all <= MAX_LAYERS:
        return f"{key} is {n_all}, not 1 to {MAX_LAYERS}"
    if n_next >= n_all:
        return f"{arch}.nextn_predict_layers is {n_next} of {n_all} layers"
    layers = block_numbers(parts)
    if not layers:  # a vocabulary alone
        return ""
    heads = head.value(f"{arch}.attention.head_count")
    # layers of Deci models may have neither attention nor anything else
    n_empty = len(list(takewhile(lambda n: n == 0, reversed(heads)))) if isinstance(heads, tuple) else 0
    if not n_all - n_next - n_empty <= max(layers) + 1 <= n_all:
        return f"{key} says {n_all} layers, but its tensors are of layers up to {max(layers)}"
    return ""


def _experts(head: GGUFHeader, arch: str) -> str:
    n_expert = head.number(f"{arch}.expert_count")
    used = head.value(f"{arch}.expert_used_count", 0)
    numbers = used if isinstance(used, tuple) else (used,)
    most = max((number for number in numbers if type(number) is int), default=0)
    n_groups = head.number(f"{arch}.expert_group_count")
    n_used_groups = head.number(f"{arch}.expert_group_used_count")
    if arch in _ONE_EXPERT_IS_NONE and n_expert <= 1:
        n_expert = most = 0
    if n_expert > MAX_EXPERTS:
        return f"{arch}.expert_count is {n_expert}, above {MAX_EXPERTS}"
    if most > n_expert or (n_expert and most < 1):
        return f"{arch}.expert_used_count is {most} of {n_expert} experts"
    if n_groups and n_groups >= n_expert:
        return f"{arch}.expert_group_count is {n_groups} for {n_expert} experts"
    if n_groups > 1 and (n_expert % n_groups or not 0 < n_used_groups < n_groups):
        return f"{n_expert} experts are in {n_groups} groups, of which {n_used_groups} are used ({arch}.expert_group_*)"
    return ""


def _rope(head: GGUFHeader, arch: str) -> str:
    key = f"{arch}.rope.scaling.type"
    found = head.value(key, "linear")
    if isinstance(found, str) and found not in ROPE_SCALINGS:
        return f"{key} is {found[:40]!r}, not one of {', '.join(ROPE_SCALINGS)}"
    return ""
