"""Facts about a GGUF model, read from its headers and its routers."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, LlamaFileType

from .._util.file_kinds import MODEL, NO_MODELS, kind_of, require_kind
from .._util.files import StrPath
from ..errors import FormatError, ModelError
from ..identity import MAX_EXPERTS, MAX_LAYERS, UNKNOWN_ROUTER, ModelIdentity
from .gating import gating
from .header import MAX_NUMBER, GGUFHeader, GGUFTensor, n_vocab, read_header
from .loadable import block_numbers, require_loadable, why_not_loadable
from .splits import SplitPaths, why_not_loaded

_ROUTER = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.ffn_gate_inp\.weight")
_SELECTION_BIAS = re.compile(r"blk\.[0-9]{1,5}\.exp_probs_b(\.bias)?")
_HASH_ROUTING = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.ffn_gate_tid2eid\.weight")

# Far above any model, so that what is built from a number is small whatever the file says.
MAX_CONTEXT = 1 << 30  # tokens
_MAX_WIDTH = 1 << 20  # of an embedding
_MAX_ROUTERS = 16 << 30  # bytes of all routers, which are hashed
_MAX_TENSORS = 1 << 16  # of all parts
_MAX_PARTS = 1 << 12
_LONGEST = {"general.architecture": 128, "general.name": 4096}  # bytes of a text; of others 1 MiB


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a GGUF model.

    `identity` is None when the model cannot be steered, and `obstacle` says why ("" otherwise). Its router is
    UNKNOWN_ROUTER if the routers were not hashed. `moe_layers` have a router, `dense_layers` have none;
    multi-token-prediction layers are in neither. In `fixed_layers` a table by token chooses the experts, which steering
    cannot change. `gating` is llama.cpp's name of the function that turns logits into weights, or "architecture
    default". `file_type` is the quantization ("Q4_K_M"). Sizes are in bytes and cover all `paths` of a split model.
    """

    paths: tuple[Path, ...]
    architecture: str
    name: str
    file_type: str
    size_bytes: int
    n_params: int
    n_layer: int
    n_expert: int
    n_expert_used: int
    n_shared_experts: int
    n_expert_groups: int
    context_length: int
    embedding_length: int
    chat_template: str | None
    gating: str
    has_selection_bias: bool
    moe_layers: tuple[int, ...]
    dense_layers: tuple[int, ...]
    fixed_layers: tuple[int, ...]
    router_types: tuple[str, ...]
    identity: ModelIdentity | None
    obstacle: str

    @property
    def is_moe(self) -> bool:
        """Whether the model has layers with a router."""
        return bool(self.moe_layers)

    @property
    def steerable_layers(self) -> tuple[int, ...]:
        """Layers whose choice of experts steering can change."""
        return tuple(layer for layer in self.moe_layers if layer not in self.fixed_layers)

    def require_moe(self) -> ModelIdentity:
        """Return the identity of a model that can be steered. Raises ModelError with the reason."""
        if self.identity is None:
            raise ModelError(
                f"{self.paths[0]}: {self.obstacle}; use a Mixture-of-Experts model "
                "such as OLMoE, Qwen3-30B-A3B or gpt-oss"
            )
        return self.identity

    def to_dict(self) -> dict[str, Any]:
        """Return all facts as plain JSON values."""
        data: dict[str, Any] = asdict(self)
        data["paths"] = [str(path) for path in self.paths]
        data["is_moe"] = self.is_moe
        data["steerable_layers"] = self.steerable_layers
        return {key: list(v) if isinstance(v, tuple) else v for key, v in data.items()}


def model_info(path: StrPath, *, routers: bool = True) -> ModelInfo:
    """Read the facts of a GGUF model; `path` may be any part of a split model.

    Reads the headers and, with `routers`, the routers (`blk.*.ffn_gate_inp.weight`), but no other tensor data.

    Raises ModelError when a file is missing, damaged or not a model.
    """
    what = "a model" if kind_of(path) in NO_MODELS else "a GGUF file"
    require_kind(path, what, MODEL, error=ModelError)
    try:
        return _collect(_read_parts(Path(path)), path, routers)
    except FormatError as error:
        raise ModelError(str(error)) from error


def check_loadable(path: StrPath) -> None:
    """Refuse a model that llama.cpp cannot load, for a reason that its headers show, before llama.cpp tries.

    llama.cpp wants the first part of a split model. Raises ModelError.
    """
    file = Path(path)
    try:
        parts = _read_parts(file)
    except FormatError as error:
        raise ModelError(str(error)) from error
    if parts[0].path != file:
        raise ModelError(why_not_loaded(file))
    require_loadable(file, parts)


def info_from(parts: list[GGUFHeader], *, routers: bool) -> ModelInfo:
    """Facts of a model from the headers of all its parts, in order, wherever these were read.

    Raises ModelError when they are not the parts of one model.
    """
    try:
        if len(parts) > 1 or _number(parts[0], "split.count") > 1:
            _check_parts(parts)
        return _collect(parts, parts[0].path, routers)
    except FormatError as error:
        raise ModelError(str(error)) from error


def router_bytes(parts: list[GGUFHeader]) -> int:
    """Bytes of the routers in all parts of a model, which hashing them reads."""
    return sum(tensor.n_bytes for part in parts for name, tensor in part.tensors.items() if _ROUTER.fullmatch(name))


def _read_parts(path: Path) -> list[GGUFHeader]:
    given = read_header(path)
    count = _number(given, "split.count", _MAX_PARTS)
    if count <= 1:
        return [given]
    paths = SplitPaths.of(path)
    if paths is None or paths.count != count:
        raise ModelError(
            f"{path}: one of {count} parts under another name; give the parts llama.cpp's names "
            f"back, NAME-00001-of-{count:05d}.gguf and so on"
        )
    if problem := paths.missing():
        raise ModelError(problem)
    parts: list[GGUFHeader] = []
    n_tensors = 0
    for part in paths:
        parts.append(given if part == path else read_header(part))
        n_tensors += len(parts[-1].tensors)
        if n_tensors > _MAX_TENSORS:
            raise ModelError(f"{part}: {n_tensors} tensors in its parts so far are too many; fetch it again")
    _check_parts(parts)
    return parts


def _check_parts(parts: list[GGUFHeader]) -> None:
    """Check that these are all the parts of a split model, in order. Raises ModelError."""
    count = len(parts)
    for number, part in enumerate(parts):
        if _number(part, "split.count") != count or _number(part, "split.no") != number:
            raise ModelError(f"{part.path}: not part {number + 1} of {count}; fetch it again")
    expected, found = _number(parts[0], "split.tensors.count"), sum(len(part.tensors) for part in parts)
    if found != expected:
        raise ModelError(
            f"{parts[0].path}: its {count} parts have {found} tensors, not {expected}; fetch all parts of one model"
        )


def _collect(parts: list[GGUFHeader], path: StrPath, hash_routers: bool) -> ModelInfo:
    head = parts[0]
    arch = _text(head, "general.architecture")
    if not arch:
        raise ModelError(f"{path}: no general.architecture in it, so it is not a model")
    n_all = _number(head, f"{arch}.block_count", MAX_LAYERS)
    n_layer = n_all - _number(head, f"{arch}.nextn_predict_layers", n_all)
    tensors: dict[str, tuple[GGUFHeader, GGUFTensor]] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise ModelError(f"{part.path}: has the tensor {name} of another part again")
            tensors[name] = (part, tensor)
    layers = block_numbers(parts)
    routers = {int(match[1]): tensors[name] for name in tensors if (match := _ROUTER.fullmatch(name))}
    fixed = (int(match[1]) for name in tensors if (match := _HASH_ROUTING.fullmatch(name)))
    moe_layers = tuple(sorted(layer for layer in routers if layer < n_layer))
    n_expert = _number(head, f"{arch}.expert_count", MAX_EXPERTS)
    n_expert_used, obstacle = _top_k(head, arch, moe_layers)
    obstacle = _obstacle(moe_layers, n_layer, n_expert, n_expert_used, routers) or obstacle or why_not_loadable(parts)
    how = gating(arch, _number(head, f"{arch}.expert_gating_func"), n_layer, n_vocab(parts))
    if how == "none" and not obstacle:
        obstacle = f"llama.cpp's {arch} graph does not use its experts"
    identity = None
    if not obstacle:
        digest = _router_sha256([routers[layer] for layer in moe_layers]) if hash_routers else UNKNOWN_ROUTER
        identity = ModelIdentity(arch, n_layer, n_expert, n_expert_used, digest)
    return ModelInfo(
        paths=tuple(part.path for part in parts),
        architecture=arch,
        name=_text(head, "general.name"),
        file_type=_file_type(head, [tensor for _, tensor in tensors.values()]),
        size_bytes=sum(part.size for part in parts),
        n_params=sum(prod(tensor.shape) for _, tensor in tensors.values()),
        n_layer=n_layer,
        n_expert=n_expert,
        n_expert_used=n_expert_used,
        n_shared_experts=_number(head, f"{arch}.expert_shared_count"),
        n_expert_groups=_number(head, f"{arch}.expert_group_count"),
        context_length=_number(head, f"{arch}.context_length", MAX_CONTEXT),
        embedding_length=_number(head, f"{arch}.embedding_length", _MAX_WIDTH),
        chat_template=_text(head, "tokenizer.chat_template") or None,
        gating=how,
        has_selection_bias=any(_SELECTION_BIAS.fullmatch(name) for name in tensors),
        moe_layers=moe_layers,
        dense_layers=tuple(sorted(layer for layer in layers if layer < n_layer and layer not in routers)),
        fixed_layers=tuple(sorted(layer for layer in fixed if layer < n_layer)),
        router_types=tuple(sorted({tensor.type.name for _, tensor in routers.values()})),
        identity=identity,
        obstacle=obstacle,
    )


def _obstacle(
    moe_layers: tuple[int, ...],
    n_layer: int,
    n_expert: int,
    n_expert_used: int,
    routers: dict[int, tuple[GGUFHeader, GGUFTensor]],
) -> str:
    if not moe_layers:
        return "no layer has experts (no blk.*.ffn_gate_inp.weight), so there is nothing to steer"
    if not 1 <= n_expert_used <= n_expert:
        return f"it says top-{n_expert_used} of {n_expert} experts, which cannot be"
    for layer in moe_layers:
        shape = routers[layer][1].shape
        if len(shape) != 2 or shape[1] != n_expert or shape[0] > _MAX_WIDTH:
            return f"the router of layer {layer} has shape {list(shape)}, not {n_expert} experts"
    return ""


def _top_k(head: GGUFHeader, arch: str, moe_layers: tuple[int, ...]) -> tuple[int, str]:
    """(top-k, obstacle): llama.cpp also takes one number per layer, of which only equal ones are supported."""
    key = f"{arch}.expert_used_count"
    value = head.value(key)
    if not isinstance(value, tuple):
        return _number(head, key), ""
    if not all(type(number) is int for number in value):
        raise ModelError(f"{head.path}: {key} is not of whole numbers; convert the model again")
    per_layer = {value[i] for i in moe_layers if i < len(value)}
    if len(per_layer) > 1:
        return max(per_layer), "its layers use different numbers of experts per token"
    return max(per_layer, default=0), ""


def _router_sha256(routers: list[tuple[GGUFHeader, GGUFTensor]]) -> str:
    digest = hashlib.sha256()
    total = sum(tensor.n_bytes for _, tensor in routers)
    if total > _MAX_ROUTERS:
        raise FormatError(f"{routers[0][0].path}: routers of {total} bytes, which no model has; fetch it again")
    for part, tensor in routers:
        for values in part.read_parts(tensor):
            digest.update(values.astype("<f4").tobytes())
    return digest.hexdigest()


def _file_type(head: GGUFHeader, tensors: list[GGUFTensor]) -> str:
    if "general.file_type" in head.fields:
        number = _number(head, "general.file_type")
        try:
            return str(LlamaFileType(number & ~LlamaFileType.GUESSED).name).split("_", 1)[1]
        except ValueError:
            return f"type {number}"
    types = Counter[str]()
    for tensor in tensors:
        types[tensor.type.name] += prod(tensor.shape)
    return f"mostly {types.most_common(1)[0][0]}" if types else "unknown"


def _number(head: GGUFHeader, key: str, most: int = MAX_NUMBER) -> int:
    """A whole number up to `most`; 0 without the field, as for llama.cpp's optional keys."""
    value = head.value(key, 0)
    if type(value) is not int or value < 0:
        raise ModelError(f"{head.path}: {key} is not a whole number; convert the model again")
    return head.bounded(key, value, most)


def _text(head: GGUFHeader, key: str) -> str:
    entry = head.fields.get(key)
    if entry is None:
        return ""
    if entry.type == GGUFValueType.STRING and (entry.value is None or len(entry.value) > _LONGEST.get(key, 1 << 20)):
        raise ModelError(f"{head.path}: {key} is longer than {_LONGEST.get(key, 1 << 20)} bytes; fetch it again")
    if not isinstance(entry.value, str):
        raise ModelError(f"{head.path}: {key} is not a text; convert the model again")
    return entry.value
