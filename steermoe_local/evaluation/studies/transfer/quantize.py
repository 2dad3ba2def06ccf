"""Makes quantizations of a model with llama.cpp's own quantizer, by the names that llama-quantize has for them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from ...._util.disk import cannot_write
from ...._util.files import StrPath, human_size, parse_json, read_bytes, replacing, sha256_file, tool_name
from ...._util.locks import OutputLock
from ...._util.writing import require_no_link
from ....errors import FormatError, ModelError, ModelMismatchError, NativeError, ResourceError, UsageError
from ....llama.quantizer import quantize_file
from ....model_files.header import GGUFTensor, read_header
from ....model_files.model_info import ModelInfo, model_info

_FORMAT = "steermoe-quantization"
_MIXTURE = 1.2  # a mixture gives some tensors more bits than its name says
_ROUTER = "ffn_gate_inp.weight"
_FULL = {"F32", "F16", "BF16"}
_MIB = 1 << 20

QUANTS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "IQ4_XS")


@dataclass(frozen=True)
class FileType:
    """A quantization as llama-quantize names it.

    `number` is that of llama.h's `enum llama_ftype`; most weights take `bits` each, in rows that are a multiple of
    `block`. `needs_matrix`: not without an importance matrix.
    """

    name: str
    number: int
    block: int
    bits: float
    needs_matrix: bool = False


def _types(*rows: tuple[str, int, int, float], needs_matrix: bool = False) -> dict[str, FileType]:
    return {row[0]: FileType(*row, needs_matrix) for row in rows}


# llama.h: enum llama_ftype; blocks and bits of the type that most tensors get (llama-quant.cpp, ggml-common.h)
FILE_TYPES: Mapping[str, FileType] = {
    **_types(
        ("F32", 0, 1, 32),
        ("F16", 1, 1, 16),
        ("BF16", 32, 1, 16),
        ("Q8_0", 7, 32, 8.5),
        ("Q6_K", 18, 256, 6.5625),
        ("Q5_K_M", 17, 256, 5.5),
        ("Q5_K_S", 16, 256, 5.5),
        ("Q5_1", 9, 32, 6.0),
        ("Q5_0", 8, 32, 5.5),
        ("Q4_K_M", 15, 256, 4.5),
        ("Q4_K_S", 14, 256, 4.5),
        ("Q4_1", 3, 32, 5.0),
        ("Q4_0", 2, 32, 4.5),
        ("IQ4_NL", 25, 32, 4.5),
        ("IQ4_XS", 30, 256, 4.25),
        ("MXFP4_MOE", 38, 32, 4.25),
        ("Q3_K_L", 13, 256, 3.4375),
        ("Q3_K_M", 12, 256, 3.4375),
        ("Q3_K_S", 11, 256, 3.4375),
        ("IQ3_M", 27, 256, 3.4375),
        ("IQ3_S", 26, 256, 3.4375),
        ("Q2_K", 10, 256, 2.625),
        ("TQ2_0", 37, 256, 2.0625),
        ("TQ1_0", 36, 256, 1.6875),
    ),
    **_types(
        ("IQ3_XS", 22, 256, 3.4375),
        ("IQ3_XXS", 23, 256, 3.0625),
        ("Q2_K_S", 21, 256, 2.625),
        ("IQ2_M", 29, 256, 2.5625),
        ("IQ2_S", 28, 256, 2.3125),
        ("IQ2_XS", 20, 256, 2.3125),
        ("IQ2_XXS", 19, 256, 2.0625),
        ("IQ1_M", 31, 256, 1.75),
        ("IQ1_S", 24, 256, 1.5625),
        needs_matrix=True,
    ),
}
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}


def file_type(name: str) -> FileType:
    """A quantization by its name, in any case. Raises UsageError for an unknown one, or one that needs a matrix."""
    wanted = name.strip().upper()
    found = FILE_TYPES.get(_ALIASES.get(wanted, wanted))
    if found is None:
        known = ", ".join(name for name, kind in FILE_TYPES.items() if not kind.needs_matrix)
        raise UsageError(f"{name!r} is no quantization that can be made here; take some of {known}")
    if found.needs_matrix:
        raise UsageError(
            f"{found.name} needs an importance matrix, which is not made here; leave it out, or make the file with "
            "llama-imatrix and llama-quantize --imatrix"
        )
    return found


@dataclass(frozen=True)
class TypeShare:
    """Tensors of one type in a file: how many, and their share of all weights."""

    tensors: int
    share: float


@dataclass(frozen=True)
class ModelFile:
    """A model's file, and the types that its tensors really have.

    `file_type` is that of the header, `types` are those of the tensors, by falling share of the weights. `n_fallback`
    tensors, `fallback_share` of all weights, have rows that do not fit the blocks of the type that was asked for and
    got another type. `seconds` is how long quantizing took, None where nothing was quantized.
    """

    path: Path
    file_type: str
    size_bytes: int
    bits_per_weight: float
    types: Mapping[str, TypeShare]
    n_fallback: int = 0
    fallback_share: float = 0.0
    seconds: float | None = None

    @classmethod
    def of(cls, info: ModelInfo, kind: FileType | None = None, seconds: float | None = None) -> ModelFile:
        """Read the header of a file that was quantized to `kind`. Raises FormatError."""
        tensors = _tensors(info)
        total = sum(prod(tensor.shape) for tensor in tensors)
        weights: Counter[str] = Counter()
        for tensor in tensors:
            weights[tensor.type.name] += prod(tensor.shape)
        numbers = Counter(tensor.type.name for tensor in tensors)
        fell = [t for t in tensors if kind and t.type.name not in _FULL and t.shape[0] % kind.block]
        return cls(
            path=info.paths[0],
            file_type=info.file_type,
            size_bytes=info.size_bytes,
            bits_per_weight=8 * info.size_bytes / total,
            types={name: TypeShare(numbers[name], n / total) for name, n in weights.most_common()},
            n_fallback=len(fell),
            fallback_share=sum(prod(t.shape) for t in fell) / total,
            seconds=seconds,
        )


def _tensors(info: ModelInfo) -> list[GGUFTensor]:
    return [tensor for path in info.paths for tensor in read_header(path).tensors.values()]


def estimate(info: ModelInfo, kind: FileType) -> int:
    """About how many bytes the model takes as `kind`, rather more than fewer. Raises FormatError."""
    tensors = _tensors(info)
    bits = float(8 * (info.size_bytes - sum(tensor.n_bytes for tensor in tensors)))  # vocabulary and the like
    for tensor in tensors:
        n, per_weight = prod(tensor.shape), 8 * tensor.n_bytes / prod(tensor.shape)
        if _is_quantized(tensor):
            per_weight = kind.bits if kind.block < 256 else min(8.5, _MIXTURE * kind.bits)
            if tensor.shape[0] % kind.block or "token_embd" in tensor.name or tensor.name == "output.weight":
                per_weight = max(kind.bits, 8.5 if tensor.shape[0] % 32 == 0 else 16)
            if kind.name == "MXFP4_MOE" and len(tensor.shape) < 3:  # for experts alone
                per_weight = 8.5
        bits += n * per_weight
    return int(bits / 8)


def _is_quantized(tensor: GGUFTensor) -> bool:
    """Whether the quantizer changes the tensor (llama-quant.cpp: tensor_allows_quantization, its main rules)."""
    name = tensor.name
    return len(tensor.shape) > 1 and name.endswith("weight") and "_norm" not in name and not name.endswith(_ROUTER)


class Quantizer:
    """Makes quantizations of one model in a folder, which is made with the first of them.

    With each file `X.gguf` it writes `X.gguf.json` with its origin, so that the file is used again, and not made again,
    if the model is still the same.
    """

    def __init__(
        self,
        base: ModelInfo,
        folder: StrPath,
        *,
        n_threads: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """`progress` is called with ("quantize Q4_K_M", MiB written, MiB expected). Raises ModelError (no experts)."""
        self.identity = base.require_moe()
        self.base = base
        self.folder = Path(folder)
        self._n_threads = n_threads
        self._progress = progress or (lambda *_: None)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of the model's file; of a split one, of its parts' digests. It takes reading all of it."""
        digests = [sha256_file(path) for path in self.base.paths]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def warning(self) -> str | None:
        """A warning in one line if the model is quantized already, else None."""
        quantized = {tensor.type.name for tensor in _tensors(self.base)} - _FULL
        if not quantized:
            return None
        return (
            f"{self.base.paths[0]}: quantized already ({self.base.file_type}); what is made from it has lost twice and "
            "says little about files made from the original; take an F16 or BF16 file"
        )

    def path(self, kind: FileType) -> Path:
        """The file of a quantization."""
        first = self.base.paths[0].name.removesuffix(".gguf")
        stem = first.partition("-00001-of-")[0] if len(self.base.paths) > 1 else first
        return self.folder / f"{stem}-{kind.name}.gguf"

    def check_room(self, kinds: Sequence[FileType], keep: bool) -> None:
        """Raise ResourceError without room on the disk for all of them with `keep`, else for the largest."""
        sizes = {kind.name: estimate(self.base, kind) for kind in kinds if self.find(kind) is None}
        if not sizes:
            return
        place = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(place).free
        largest = max(sizes, key=lambda name: sizes[name])
        needed = sum(sizes.values()) if keep else sizes[largest]
        if needed > free:
            what = f"{len(sizes)} quantizations take" if keep and len(sizes) > 1 else f"{largest} takes"
            cure = " (without --keep one at a time is there)" if keep and len(sizes) > 1 else ""
            raise ResourceError(
                f"{self.folder}: {what} about {human_size(needed)}, but {human_size(free)} of the disk are free; "
                f"free some, leave some out{cure}, or take a folder on another disk"
            )

    def find(self, kind: FileType) -> ModelFile | None:
        """The quantization that exists already, if made from this very model by this very tool; else None."""
        path = self.path(kind)
        try:
            made = parse_json(read_bytes(_note(path), "a note", _MIB).decode("utf-8"))
            if made != self._made(kind, path.stat().st_size):
                return None
            return ModelFile.of(self._checked(path), kind)
        except (FormatError, ModelError, ModelMismatchError, ValueError, OSError):
            return None

    def make(self, kind: FileType) -> ModelFile:
        """Quantize, or use the file that exists.

        Raises NativeError (llama.cpp refuses), ResourceError (the disk is full), UsageError (the folder cannot be
        written), BusyError (another process makes it), ModelMismatchError (routers that changed).
        """
        if found := self.find(kind):
            return found
        path = self.path(kind)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        with OutputLock(require_no_link(path)):
            return self._make(kind, path)

    def _make(self, kind: FileType, path: Path) -> ModelFile:
        expected = estimate(self.base, kind)
        what, total = f"quantize {kind.name}", max(1, expected // _MIB)
        self._progress(what, 0, total)
        start = time.monotonic()
        with replacing(path) as temporary:
            try:
                quantize_file(
                    self.base.paths[0],
                    temporary,
                    kind.number,
                    n_threads=self._n_threads,
                    requantize=self.warning is not None,
                    on_bytes=lambda n: self._progress(what, min(n // _MIB, total), total),
                )
            except NativeError as error:
                raise self._failure(kind, error, expected) from None
            seconds = time.monotonic() - start
            self._checked(temporary)
            made = self._made(kind, temporary.stat().st_size)
            _note(path).unlink(missing_ok=True)
        with replacing(require_no_link(_note(path))) as temporary:
            temporary.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8", newline="\n")
        self._progress(what, total, total)
        return ModelFile.of(model_info(path, routers=False), kind, round(seconds, 3))

    def remove(self, kind: FileType) -> None:
        """Delete a quantization and its note, and the folder if nothing else is in it."""
        self.path(kind).unlink(missing_ok=True)
        _note(self.path(kind)).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _made(self, kind: FileType, size: int) -> dict[str, Any]:
        """The contents of the note."""
        base = {"file": self.base.paths[0].name, "size": self.base.size_bytes, "sha256": self.sha256}
        return {"format": _FORMAT, "version": 1, "base": base, "type": kind.name, "size": size, "tool": tool_name()}

    def _checked(self, path: Path) -> ModelInfo:
        """The facts of a complete file with the base's routers. Raises ModelError, ModelMismatchError."""
        info = model_info(path)
        if info.identity != self.identity:
            raise ModelMismatchError(
                f"{path}: its routers are not those of {self.base.paths[0]}, which quantizing must not change; report "
                "this"
            )
        return info

    def _failure(self, kind: FileType, error: NativeError, expected: int) -> Exception:
        """The error that the quantizer's reason means."""
        free = shutil.disk_usage(self.folder).free
        if "importance matrix" in str(error):
            return UsageError(
                f"{kind.name} of this model needs an importance matrix ({error}), which is not made here; leave it out"
            )
        if "iostream" in str(error) or free < min(expected, _MIB):
            return ResourceError(
                f"{self.folder}: {kind.name} (about {human_size(expected)}) could not be written, {human_size(free)} "
                f"of the disk are free ({error}); free some, or take a folder on another disk"
            )
        return NativeError(
            f"{self.base.paths[0]}: llama.cpp cannot quantize it to {kind.name}: {error}; leave it out, or see "
            "llama-quantize",
            error.code,
        )


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".json")
