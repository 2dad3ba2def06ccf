"""Bias files: a choice of experts as a small GGUF that the native library loads.

The format follows llama.cpp's control vectors: `general.architecture` is "expertbias", and the metadata are
`expertbias.version` (u32, 1; 2 in mode "capped"), `.model_hint` (the model's architecture), `.layer_count`,
`.expert_count`, `.expert_used_count` (u32), `.mode` ("hard", "soft" or "capped"), `.epsilon` (f32), `.cap` (f32, in
mode "capped" alone), `.router_sha256`, and any further string keys as provenance. The tensors are `bias.<layer>`, F32
[expert_count]: logits for soft, signs for the others. Layers without a tensor are untouched; a file without tensors is
valid and steers nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from .._util.file_kinds import BIAS, require_kind
from .._util.files import StrPath, replacing
from ..errors import FormatError, UsageError
from ..identity import MAX_LAYERS, ModelIdentity
from ..model_files.header import GGUFHeader, read_header

Mode = Literal["hard", "soft", "capped"]
DEFAULT_EPSILON = 0.01

_ARCHITECTURE = "expertbias"
_VERSION, _VERSION_CAPPED = 1, 2  # readers of version 1 alone refuse the rule that they do not know
_MAX_BYTES = 256 << 20
_MAX_FIELDS = 64
_MAX_EPSILON = 20.0  # far beyond it the softmax of the others underflows to zero, and ties decide
_MAX_SOFT = 1e6  # logits are tens; more would only bring F32 close to overflow
_MAX_CAP = _MAX_SOFT
_TENSOR = re.compile(r"bias\.(0|[1-9][0-9]{0,3})")
_PROVENANCE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_U32, _STR = GGUFValueType.UINT32, GGUFValueType.STRING
_KEYS = {
    "version": _U32,
    "model_hint": _STR,
    "layer_count": _U32,
    "expert_count": _U32,
    "expert_used_count": _U32,
    "mode": _STR,
    "epsilon": GGUFValueType.FLOAT32,
    "router_sha256": _STR,
}
_CAP = {"cap": GGUFValueType.FLOAT32}  # in mode "capped" only
# The keys that hold the fields of the model's identity.
_MODEL_KEYS = {
    "model_hint": "architecture",
    "layer_count": "n_layer",
    "expert_count": "n_expert",
    "expert_used_count": "n_expert_used",
    "router_sha256": "router_sha256",
}


@dataclass(frozen=True, eq=False)
class BiasFile:
    """What the native library adds to the routers of one model; an immutable value.

    `values` holds, for each touched layer, float32 [n_expert]: in mode "hard" the signs -1, 0 and +1 (z' = max z +
    epsilon for +1, min z - epsilon for -1), in mode "soft" logits that are added (z' = z + b), in mode "capped" signs
    again, whose z' is at most `cap` away from z (z' = min(max z + epsilon, z + cap) for +1, max(min z - epsilon,
    z - cap) for -1). `epsilon` is in logits, rounded to float32; the soft rule does not use it. `cap`, the same, is
    0 (changes nothing) to 1e6 or infinite (the hard rule), and None in other modes. `provenance` are texts such as
    `map_sha256`, `behaviour`, `choice` (JSON) and `tool`; empty ones are left out, NUL is refused. Arrays and mappings
    are copied and read-only.

    Raises FormatError when the values break a rule of the format.
    """

    identity: ModelIdentity
    mode: Mode
    values: Mapping[int, npt.NDArray[np.float32]]
    epsilon: float = DEFAULT_EPSILON
    provenance: Mapping[str, str] = field(default_factory=dict)
    cap: float | None = None

    def __post_init__(self) -> None:
        """Bring the fields into their final form and check them."""
        if self.mode not in ("hard", "soft", "capped"):
            raise FormatError(f"mode: {self.mode!r} is none of hard, soft and capped")
        if not 0 < self.epsilon <= _MAX_EPSILON:
            raise FormatError(f"epsilon: {self.epsilon} is not above 0 and at most {_MAX_EPSILON}")
        epsilon = float(np.float32(self.epsilon))
        if not epsilon:
            raise FormatError(f"epsilon: {self.epsilon} is too small for float32")
        object.__setattr__(self, "epsilon", epsilon)
        object.__setattr__(self, "cap", self._rounded_cap())
        rows = {layer: self._row(layer, self.values[layer]) for layer in sorted(self.values)}
        object.__setattr__(self, "values", MappingProxyType(rows))
        for key, text in self.provenance.items():
            if not _PROVENANCE.fullmatch(key) or key in _KEYS or key in _CAP or not isinstance(text, str):
                raise FormatError(f"provenance: {key!r} is not a free name for a text")
            if "\0" in text:
                raise FormatError(f"provenance: {key}: a NUL byte, where C programs would end the text; leave it out")
        kept = {key: text for key, text in self.provenance.items() if text}
        if len(kept) > _MAX_FIELDS - len(_keys(self.mode)) - 1:
            raise FormatError(f"provenance: {len(kept)} entries are too many")
        object.__setattr__(self, "provenance", MappingProxyType(kept))

    def _rounded_cap(self) -> float | None:
        if self.mode != "capped":
            if self.cap is not None:
                raise FormatError(f"cap: belongs to the rule capped, not to {self.mode}")
            return None
        if self.cap is None or not (0 <= self.cap <= _MAX_CAP or self.cap == math.inf):
            raise FormatError(f"cap: {self.cap} is not 0 to {_MAX_CAP:g} logits, nor infinite")
        cap = float(np.float32(self.cap)) + 0.0  # + 0: -0 and 0 are one
        if not cap and self.cap:
            raise FormatError(f"cap: {self.cap} is too small for float32")
        return cap

    def _row(self, layer: int, values: npt.ArrayLike) -> npt.NDArray[np.float32]:
        name, (n_layer, n_expert) = f"bias.{layer}", self.identity.shape
        if not 0 <= layer < n_layer:
            raise FormatError(f"{name}: the model has layers 0 to {n_layer - 1}")
        row = np.array(values, dtype=np.float32)
        row.flags.writeable = False
        if row.shape != (n_expert,):
            raise FormatError(f"{name}: shape {row.shape}, but a layer has {n_expert} experts")
        if not np.isfinite(row).all():
            raise FormatError(f"{name}: NaN or infinity in it")
        if self.mode == "soft":
            if np.abs(row).max() > _MAX_SOFT:
                raise FormatError(f"{name}: logits above {_MAX_SOFT:g}; lower the scale")
            return row
        if not np.isin(row, (-1, 0, 1)).all():
            raise FormatError(f"{name}: a {self.mode} bias has only the values -1, 0 and +1")
        uses = f"but a token uses {self.identity.n_expert_used}"
        if (active := int((row > 0).sum())) > self.identity.max_active:
            raise FormatError(f"{name}: activates {active} experts, {uses}")
        if (inactive := int((row < 0).sum())) > self.identity.max_inactive:
            raise FormatError(f"{name}: leaves {n_expert - inactive} experts, {uses}")
        return row

    @classmethod
    def from_signs(
        cls,
        signs: npt.ArrayLike,
        identity: ModelIdentity,
        epsilon: float = DEFAULT_EPSILON,
        provenance: Mapping[str, str] | None = None,
    ) -> BiasFile:
        """Make a hard bias of signs [n_layer, n_expert], as `ExpertMap.choose` returns them.

        Layers of zeros get no tensor. Raises UsageError for another shape, FormatError for impossible values.
        """
        return cls(identity, "hard", _touched(signs, identity), epsilon, provenance or {})

    @classmethod
    def from_soft(
        cls,
        bias: npt.ArrayLike,
        identity: ModelIdentity,
        scale: float = 1.0,
        provenance: Mapping[str, str] | None = None,
    ) -> BiasFile:
        """Make a soft bias of `scale` times `bias` [n_layer, n_expert], logits. Layers of zeros get no tensor.

        With the signs of `ExpertMap.choose` as `bias`, promoted experts gain `scale` and suppressed ones lose it.
        Raises UsageError for another shape, FormatError for impossible values.
        """
        if not math.isfinite(scale):
            raise FormatError(f"scale: {scale} is not a number of logits; give a finite one")
        values = np.float32(scale) * np.asarray(bias, dtype=np.float32)
        return cls(identity, "soft", _touched(values, identity), DEFAULT_EPSILON, provenance or {})

    @classmethod
    def from_capped(
        cls,
        signs: npt.ArrayLike,
        identity: ModelIdentity,
        cap: float,
        epsilon: float = DEFAULT_EPSILON,
        provenance: Mapping[str, str] | None = None,
    ) -> BiasFile:
        """Make a capped bias of signs [n_layer, n_expert], which moves no router logit by more than `cap`.

        Layers of zeros get no tensor. Raises UsageError for another shape, FormatError for impossible values.
        """
        return cls(identity, "capped", _touched(signs, identity), epsilon, provenance or {}, cap)

    @cached_property
    def key(self) -> str:
        """SHA-256 (hex, 64 digits) of what the bias does; two biases steer equally if their keys are equal.

        Over the model's identity, the mode, epsilon except in mode "soft", the cap in mode "capped", and the values
        that are not 0, as little-endian float32. Not over `provenance`, nor over layers that hold only zeros.
        """
        rows = {layer: row for layer, row in self.values.items() if row.any()}
        head = {
            "model": self.identity.to_dict(),
            "mode": self.mode,
            "epsilon": None if self.mode == "soft" else self.epsilon,
            "layers": list(rows),
        }
        if self.mode == "capped":
            head["cap"] = self.cap
        digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode("utf-8"))
        for row in rows.values():
            digest.update((row + np.float32(0)).astype("<f4").tobytes())  # + 0: -0 and 0 are one
        return digest.hexdigest()

    @cached_property
    def is_empty(self) -> bool:
        """Whether no value differs from 0, or the cap is 0, so that the bias changes nothing."""
        return self.cap == 0 or not any(row.any() for row in self.values.values())

    @property
    def layers(self) -> tuple[int, ...]:
        """The touched layers, ascending."""
        return tuple(self.values)

    @property
    def signs(self) -> npt.NDArray[np.int8]:
        """Signs of all values, int8 [n_layer, n_expert]."""
        return np.sign(self.dense()).astype(np.int8)

    @cached_property
    def n_active(self) -> int:
        """How many experts have a positive value."""
        return sum(int((row > 0).sum()) for row in self.values.values())

    @cached_property
    def n_inactive(self) -> int:
        """How many experts have a negative value."""
        return sum(int((row < 0).sum()) for row in self.values.values())

    def experts(self, layer: int) -> tuple[list[int], list[int]]:
        """The experts of a touched layer with a positive and with a negative value, ascending."""
        row = self.values[layer]
        return np.flatnonzero(row > 0).tolist(), np.flatnonzero(row < 0).tolist()

    def dense(self) -> npt.NDArray[np.float32]:
        """All values as float32 [n_layer, n_expert], 0 in untouched layers."""
        table = np.zeros(self.identity.shape, dtype=np.float32)
        for layer, row in self.values.items():
            table[layer] = row
        return table

    def check(self, identity: ModelIdentity, what: str, where: str, force: bool = False) -> list[str]:
        """Check that this bias (file `what`) belongs to the model `identity` (file `where`).

        Returns warnings, as `ModelIdentity.require_same`. Raises ModelMismatchError.
        """
        return self.identity.require_same(identity, what, where, force)


def none_if_empty(bias: BiasFile | None) -> BiasFile | None:
    """The bias, or None, which stands for "unsteered", if it changes nothing."""
    return None if bias is None or bias.is_empty else bias


def write_bias(bias: BiasFile, path: StrPath) -> None:
    """Write a bias file; the same bias gives the same bytes. Raises UsageError."""
    metadata = {key: getattr(bias.identity, name) for key, name in _MODEL_KEYS.items()}
    version = _VERSION_CAPPED if bias.mode == "capped" else _VERSION
    metadata |= {"version": version, "mode": bias.mode, "epsilon": bias.epsilon, "cap": bias.cap}
    with replacing(path) as temporary:
        writer = GGUFWriter(temporary, _ARCHITECTURE)
        try:
            for key, kind in _keys(bias.mode).items():
                writer.add_key_value(f"{_ARCHITECTURE}.{key}", metadata[key], kind)
            for key in sorted(bias.provenance):
                writer.add_string(f"{_ARCHITECTURE}.{key}", bias.provenance[key])
            for layer, row in bias.values.items():
                writer.add_tensor(f"bias.{layer}", row.astype("<f4"))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


_MAX_TABLE = 1 << 22  # experts of all layers, of which tables are made, however few the file steers


def read_bias(path: StrPath) -> BiasFile:
    """Read and validate a bias file. Raises FormatError, which names the file and the field."""
    require_kind(path, "a bias file (GGUF)", BIAS)
    header = read_header(path, max_size=_MAX_BYTES, max_tensors=MAX_LAYERS, max_fields=_MAX_FIELDS, arrays=False)
    architecture, version = (
        item.value if (item := header.fields.get(name)) else None
        for name in ("general.architecture", f"{_ARCHITECTURE}.version")
    )
    if architecture != _ARCHITECTURE:
        found = "nothing" if architecture is None else repr(architecture)
        raise FormatError(
            f"{path}: not a bias file: general.architecture is {found}, not {_ARCHITECTURE!r}; "
            "make one from an expert map"
        )
    if version not in (_VERSION, _VERSION_CAPPED):
        raise FormatError(
            f"{path}: a bias file of version {version!r}, this program reads {_VERSION} and {_VERSION_CAPPED}; "
            "upgrade steermoe-local"
        )
    try:
        metadata, provenance = _read_fields(header, _keys("capped" if version == _VERSION_CAPPED else "hard"))
        if (metadata["mode"] == "capped") != (version == _VERSION_CAPPED):
            raise FormatError(f"mode {metadata['mode']!r} in a file of version {version}")
        if header.size > header.data_end:
            raise FormatError("bytes after the last tensor")
        identity = ModelIdentity(**{name: metadata[key] for key, name in _MODEL_KEYS.items()})
        if identity.n_layer * identity.n_expert > _MAX_TABLE:
            raise FormatError(f"{identity.n_layer} layers of {identity.n_expert} experts are too many")
        values = _read_tensors(header, identity)
        cap = metadata.get("cap")
        return BiasFile(identity, metadata["mode"], values, metadata["epsilon"], provenance, cap)
    except FormatError as error:
        raise FormatError(f"{path}: {error}; make the bias file again") from None


def _keys(mode: str) -> dict[str, GGUFValueType]:
    return _KEYS | _CAP if mode == "capped" else _KEYS


def _read_fields(header: GGUFHeader, keys: Mapping[str, GGUFValueType]) -> tuple[dict[str, Any], dict[str, str]]:
    fields = {name: field for name, field in header.fields.items() if name != "general.architecture"}
    metadata: dict[str, Any] = {}
    for key, kind in keys.items():
        found = fields.pop(f"{_ARCHITECTURE}.{key}", None)
        if found is None or found.type != kind:
            state = "missing" if found is None else f"a {found.type.name}"
            raise FormatError(f"{_ARCHITECTURE}.{key}: {state}, must be {kind.name}")
        metadata[key] = found.value
    provenance: dict[str, str] = {}
    for name, item in fields.items():
        key = name.removeprefix(f"{_ARCHITECTURE}.")
        if key == name or item.type != _STR or not _PROVENANCE.fullmatch(key):
            raise FormatError(f"{name}: unknown field")
        provenance[key] = item.value
    return metadata, provenance


def _read_tensors(header: GGUFHeader, identity: ModelIdentity) -> dict[int, npt.NDArray[np.float32]]:
    values: dict[int, npt.NDArray[np.float32]] = {}
    for tensor in header.tensors.values():
        match = _TENSOR.fullmatch(tensor.name)
        if match is None:
            raise FormatError(f"unknown tensor {tensor.name!r}")
        if tensor.type != GGMLQuantizationType.F32:
            raise FormatError(f"{tensor.name}: type {tensor.type.name}, must be F32")
        if tensor.shape != (identity.n_expert,):
            raise FormatError(f"{tensor.name}: shape {list(tensor.shape)}, but a layer has {identity.n_expert} experts")
        values[int(match[1])] = header.read(tensor)
    return values


def _touched(table: npt.ArrayLike, identity: ModelIdentity) -> dict[int, npt.NDArray[np.float32]]:
    values = np.asarray(table, dtype=np.float32)
    if values.shape != identity.shape:
        raise UsageError(f"signs: shape {values.shape}, but {identity.short} needs {identity.shape}")
    return {layer: row for layer, row in enumerate(values) if row.any()}
