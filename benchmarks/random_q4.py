"""Random Q4_0 models with the shapes of real ones, for timing without downloaded weights.

    python benchmarks/random_q4.py granite granite.gguf

All matrices are random Q4_0 blocks, norms are ones, routers are F32 with a spread so large that the selected experts
depend on the token. The tokenizer is a byte-level BPE with a single merge, so a text of ASCII letters has one token per
letter. Tensors are written one after the other, so memory stays at the size of the largest.
"""

from __future__ import annotations

import argparse
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType

BLOCK = 32  # values of a Q4_0 block: one F16 scale d, then 16 bytes with two 4-bit q each; value = d * (q - 8)
BLOCK_BYTES = 18
Q_STD = np.sqrt((16**2 - 1) / 12)  # of q, uniform over 0..15
ROUTER_STD = 2.0  # of the logits, when the router's input has unit variance


@dataclass(frozen=True)
class Shape:
    """Shape of a model; `arch` is llama.cpp's name, "olmoe" or "granitemoe"."""

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int  # of an expert
    n_expert: int
    k: int
    n_vocab: int
    n_ctx: int = 4096
    seed: int = 1

    def __post_init__(self) -> None:
        if self.arch == "olmoe" and self.n_head_kv != self.n_head:
            raise ValueError(f"llama.cpp's olmoe has as many KV heads as heads ({self.n_head}), not {self.n_head_kv}")

    @property
    def n_experts(self) -> int:
        """Experts of all layers."""
        return self.n_layer * self.n_expert


SHAPES = {
    "olmoe": Shape("olmoe", 16, 2048, 16, 16, 1024, 64, 8, 50304),  # OLMoE-1B-7B
    "granite": Shape("granitemoe", 24, 1024, 16, 8, 512, 32, 8, 49155),  # Granite-3.1-1B-A400M
    "many": Shape("olmoe", 48, 64, 2, 2, 32, 256, 8, 512),  # 12,288 tiny experts, to measure memory per expert
    "toy": Shape("granitemoe", 3, 64, 2, 1, 32, 8, 2, 320),
    "toy-olmoe": Shape("olmoe", 3, 64, 2, 2, 32, 8, 2, 320),
}
# layers of large models; few tokens in the vocabulary, so that the time is that of the layers
SHAPES |= {
    "granite-layers": replace(SHAPES["granite"], n_layer=6, n_vocab=512),
    "olmoe-layers": replace(SHAPES["olmoe"], n_layer=1, n_vocab=512),
    "qwen3-layers": Shape("granitemoe", 1, 2048, 16, 4, 768, 128, 8, 512),  # Qwen3-30B-A3B
    "gpt-oss-layers": Shape("granitemoe", 1, 2880, 45, 9, 2880, 32, 4, 512),  # gpt-oss-20b
}


def tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors by name, slowest dimension first."""
    n_embd, n_kv = shape.n_embd, shape.n_embd // shape.n_head * shape.n_head_kv
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (shape.n_vocab, n_embd),
        "output_norm.weight": (n_embd,),
    }
    if shape.arch == "olmoe":  # the other one ties its output to the embedding
        found["output.weight"] = (shape.n_vocab, n_embd)
    for layer in range(shape.n_layer):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (n_embd,),
            "attn_q": (n_embd, n_embd),
            "attn_k": (n_kv, n_embd),
            "attn_v": (n_kv, n_embd),
            "attn_output": (n_embd, n_embd),
            "ffn_norm": (n_embd,),
            "ffn_gate_inp": (shape.n_expert, n_embd),
            "ffn_gate_exps": (shape.n_expert, shape.n_ff, n_embd),
            "ffn_up_exps": (shape.n_expert, shape.n_ff, n_embd),
            "ffn_down_exps": (shape.n_expert, n_embd, shape.n_ff),
        }
        if shape.arch == "olmoe":
            block |= {"attn_q_norm": (n_embd,), "attn_k_norm": (n_kv,)}
        found |= {f"blk.{layer}.{name}.weight": size for name, size in block.items()}
    return found


def is_router(name: str) -> bool:
    return name.endswith(".ffn_gate_inp.weight")


def is_matrix(name: str, size: tuple[int, ...]) -> bool:
    """Is the tensor written as Q4_0?"""
    return len(size) > 1 and not is_router(name)


def q4_0(rng: np.random.Generator, size: tuple[int, ...], std: float) -> npt.NDArray[np.uint8]:
    """Random Q4_0 values of about the standard deviation `std`, as bytes [..., n_in / 32 * 18]."""
    n_blocks = int(np.prod(size)) // BLOCK
    n_bytes = n_blocks * BLOCK_BYTES
    # whole 64-bit numbers: several times faster than rng.bytes
    random = rng.integers(0, 2**64 - 1, size=-(-n_bytes // 8), dtype=np.uint64, endpoint=True)
    blocks = random.astype("<u8", copy=False).view(np.uint8)[:n_bytes].reshape(n_blocks, BLOCK_BYTES)
    # 256 scales, chosen by the random byte in their place
    scales = np.linspace(0.5, 1.5, 256) * (std / Q_STD)
    blocks[:, :2] = scales.astype("<f2").view(np.uint8).reshape(256, 2)[blocks[:, 0]]
    return blocks.reshape(*size[:-1], size[-1] // BLOCK * BLOCK_BYTES)


def _values(rng: np.random.Generator, name: str, size: tuple[int, ...], f16: bool) -> npt.NDArray[Any]:
    if len(size) == 1:
        return np.ones(size, np.float32)
    if is_router(name):
        return rng.normal(scale=ROUTER_STD / np.sqrt(size[-1]), size=size).astype(np.float32)
    std = 1.0 if name == "token_embd.weight" else 1 / np.sqrt(size[-1])
    if f16:
        return (rng.standard_normal(size, np.float32) * np.float32(std)).astype(np.float16)
    return q4_0(rng, size, std)


def write_model(path: Path, shape: Shape, *, f16: bool = False) -> Path:
    """Write the model; the same shape gives the same bytes. An interrupted run leaves no file of that name.

    `f16`: its matrices as normal F16 values, from which llama.cpp quantizes to other types.
    """
    rng = np.random.default_rng(shape.seed)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    writer = GGUFWriter(partial, shape.arch)
    try:
        _metadata(writer, shape, LlamaFileType.MOSTLY_F16 if f16 else LlamaFileType.MOSTLY_Q4_0)
        sizes = tensors(shape)
        for name, size in sizes.items():
            if is_matrix(name, size) and f16:
                writer.add_tensor_info(name, size, np.dtype(np.float16), int(np.prod(size)) * 2)
            elif is_matrix(name, size):
                bytes_ = (*size[:-1], size[-1] // BLOCK * BLOCK_BYTES)
                kind = GGMLQuantizationType.Q4_0
                writer.add_tensor_info(name, bytes_, np.dtype(np.uint8), int(np.prod(bytes_)), raw_dtype=kind)
            else:
                writer.add_tensor_info(name, size, np.dtype(np.float32), int(np.prod(size)) * 4)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, size in sizes.items():
            writer.write_tensor_data(_values(rng, name, size, f16))
        writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def version_of(shape: Shape) -> str:
    """A part of a file's name: another one for another shape, or another version of the writer."""
    return f"{zlib.crc32(repr(shape).encode() + Path(__file__).read_bytes()):08x}"


def cached_model(name: str, folder: Path) -> Path:
    """The model of a name in SHAPES, made if the folder does not hold it yet."""
    path = folder / f"{name}-{version_of(SHAPES[name])}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{name}-????????.gguf"):
            old.unlink()
        write_model(path, SHAPES[name])
    return path


def _metadata(writer: GGUFWriter, shape: Shape, file_type: LlamaFileType) -> None:
    writer.add_name(f"random {shape.arch}")
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(shape.n_expert)
    writer.add_expert_used_count(shape.k)
    writer.add_vocab_size(shape.n_vocab)
    if shape.arch == "granitemoe":  # the numbers of Granite 3.1
        writer.add_logit_scale(6.0)
        writer.add_residual_scale(0.22)
        writer.add_embedding_scale(12.0)
        writer.add_attention_scale(1 / (shape.n_embd // shape.n_head))
    _tokenizer(writer, shape.n_vocab)


def _tokenizer(writer: GGUFWriter, n_vocab: int) -> None:
    """Byte-level BPE: the 256 byte letters of GPT-2, one merge, an end-of-text token, and fillers nobody can type."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokens = [letter[byte] for byte in range(256)] + [letter[0x20] * 2, "<|endoftext|>"]
    kinds = [TokenType.NORMAL] * 257 + [TokenType.CONTROL]
    eos = len(tokens) - 1
    tokens += [f"<|filler-{i}|>" for i in range(len(tokens), n_vocab)]
    kinds += [TokenType.UNUSED] * (n_vocab - len(kinds))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{letter[0x20]} {letter[0x20]}"])
    writer.add_eos_token_id(eos)
    writer.add_bos_token_id(eos)
    writer.add_add_bos_token(False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random Q4_0 model.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args()
    try:
        write_model(arguments.path, SHAPES[arguments.shape])
    except OSError as error:
        raise SystemExit(f"error: {arguments.path}: {error.strerror}; choose a folder with room for it") from None
    print(f"{arguments.path}: {arguments.path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
