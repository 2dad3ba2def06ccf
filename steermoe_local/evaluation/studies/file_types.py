"""The quantizations that can be made, by the names that llama-quantize has for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import UsageError

__all__ = ["FILE_TYPES", "QUANTS", "FileType", "file_type"]

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
    """A quantization by its name, in any case. Raises UsageError for an unknown one, or one that needs more."""
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
