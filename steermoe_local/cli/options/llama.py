"""The options of llama.cpp under its names: threads, batches, devices, the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from ...errors import UsageError
from .common import WORDS, Parsed
from .groups import COMPUTING, MODEL, option, option_group

# enum ggml_type of the types that llama.cpp takes for the KV cache (common/arg.cpp)
CACHE_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q4_0": 2,
    "q4_1": 3,
    "iq4_nl": 20,
    "q5_0": 6,
    "q5_1": 7,
}
QUANTIZED_CACHE_TYPES = set(CACHE_TYPES) - {"f32", "f16", "bf16"}
SPLIT_MODES = {"none": 0, "layer": 1, "row": 2, "tensor": 3}  # llama.h: enum llama_split_mode
FLASH_ATTN: dict[str, bool | str] = {"on": True, "off": False, "auto": "auto"}


AUTO_LAYERS = -2
"""-ngl auto: as many layers as fit; `check_memory` makes a number of it."""


def _layers(text: str) -> int:
    if text == "auto":
        return AUTO_LAYERS
    if text == "all":
        return -1  # as in llama_cpp.Llama
    try:
        return max(int(text), -1)
    except ValueError:
        raise ValueError(f"{text!r} is neither a number of layers nor 'auto' or 'all'.") from None


def _proportions(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.replace("/", ",").split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0 or not 0 < sum(numbers) < float("inf"):
        raise ValueError(f"{text!r} is no list of proportions, like 3,1.")
    return numbers


def _overrides(text: str) -> tuple[tuple[str, str], ...]:
    """(pattern, buffer type) pairs."""
    pairs = tuple(part.partition("=") for part in text.split(","))
    if not all(pattern and buffer for pattern, _, buffer in pairs):
        raise ValueError(f"{text!r} is not PATTERN=BUFFER, like exps=CPU.")
    return tuple((pattern, buffer) for pattern, _, buffer in pairs)


def _flash_attn(default: str) -> Any:
    return option(
        "-fa",
        "--flash-attn",
        type=click.Choice(list(FLASH_ATTN)),
        default=default,
        show_default=True,
        help="Flash attention; auto: where the backend has it.",
    )


@dataclass(frozen=True)
class LlamaFlags:
    """The flags of llama.cpp that a command was given."""

    threads: int | None = option(
        "-t",
        "--threads",
        type=click.IntRange(1),
        help="Threads.  [default: physical cores, fewer for tiny models]",
    )
    batch_size: int = option(
        "-b", "--batch-size", type=click.IntRange(1), default=512, show_default=True, help="Tokens of one decode."
    )
    ubatch_size: int = option(
        "-ub", "--ubatch-size", type=click.IntRange(1), default=512, show_default=True, help="Tokens computed at once."
    )
    n_gpu_layers: int = option(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        type=Parsed("layers", int, _layers),
        default="auto",
        value=AUTO_LAYERS,
        show_default=True,
        metavar="N",
        help="Layers on the GPU; `all`, or `auto`: what fits.",
    )
    device: tuple[str, ...] | None = option(
        "-dev",
        "--device",
        type=WORDS,
        metavar="DEV,...",
        help="Devices to offload to, `none` for none.  [default: all]",
    )
    split_mode: str = option(
        "-sm",
        "--split-mode",
        type=click.Choice(list(SPLIT_MODES)),
        default="layer",
        show_default=True,
        help="How the model is spread over several GPUs.",
    )
    tensor_split: tuple[float, ...] | None = option(
        "-ts",
        "--tensor-split",
        type=Parsed[tuple[float, ...]]("proportions", tuple, _proportions),
        metavar="N0,N1,...",
        help="Share of each GPU, like 3,1.",
    )
    main_gpu: int = option(
        "-mg",
        "--main-gpu",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="The GPU of `-sm none`, or of small tensors with `-sm row`.",
    )
    cpu_moe: bool = option("-cmoe", "--cpu-moe", is_flag=True, help="Keep the experts' weights on the CPU.")
    n_cpu_moe: int = option(
        "-ncmoe",
        "--n-cpu-moe",
        type=click.IntRange(0),
        default=0,
        metavar="N",
        help="Keep the experts' weights of the first N layers on the CPU.",
    )
    override_tensor: tuple[tuple[tuple[str, str], ...], ...] = option(
        "-ot",
        "--override-tensor",
        type=Parsed[tuple[tuple[str, str], ...]]("overrides", tuple, _overrides),
        multiple=True,
        metavar="PATTERN=BUFFER,...",
        help="Buffer type of the tensors whose names match a regular expression.",
    )
    rpc: tuple[str, ...] | None = option(
        "--rpc",
        type=WORDS,
        metavar="HOST:PORT,...",
        help="llama.cpp RPC servers to spread the model over; on trusted networks only (docs/backends.md).",
    )
    flash_attn: str = _flash_attn("off")
    cache_type_k: str = option(
        "-ctk",
        "--cache-type-k",
        type=click.Choice(list(CACHE_TYPES)),
        default="f16",
        show_default=True,
        metavar="TYPE",
        help="Type of the KV cache's keys.",
    )
    cache_type_v: str = option(
        "-ctv",
        "--cache-type-v",
        type=click.Choice(list(CACHE_TYPES)),
        default="f16",
        show_default=True,
        metavar="TYPE",
        help=f"Type of its values: {', '.join(CACHE_TYPES)}.",
    )
    mmap: bool = option("--mmap/--no-mmap", default=True, help="Map the file into memory.  [default: mmap]")
    mlock: bool = option("--mlock", is_flag=True, help="Keep the model in RAM, never swapped out.")
    repack: bool | None = option(
        "--repack/--no-repack",
        " /-nr",
        default=None,
        help="Keep second copies of quantized weights that prompts are faster with.  [default: if they fit]",
    )
    memory_check: bool = option(
        "--memory-check/--no-memory-check",
        default=True,
        help="Refuse what does not fit into free memory before it is loaded.  [default: check]",
    )
    verbose: bool = option("--verbose", is_flag=True, help="Let llama.cpp log to stderr.")

    def __post_init__(self) -> None:
        """Raise UsageError for flags that exclude each other."""
        if self.cache_type_v in QUANTIZED_CACHE_TYPES and self.flash_attn == "off":
            raise UsageError(f"-ctv {self.cache_type_v} needs flash attention; add -fa on")

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of `SteeredLlama` for the model and its devices."""
        return {
            "n_gpu_layers": 0 if self.n_gpu_layers == AUTO_LAYERS else self.n_gpu_layers,
            "devices": () if self.device == ("none",) else self.device,
            "split_mode": SPLIT_MODES[self.split_mode],
            "tensor_split": self.tensor_split and list(self.tensor_split),
            "main_gpu": self.main_gpu,
            "cpu_moe": self.cpu_moe,
            "n_cpu_moe": self.n_cpu_moe,
            "tensor_buft_overrides": tuple(pair for group in self.override_tensor for pair in group),
            "rpc_servers": self.rpc or (),
            "use_mmap": self.mmap,
            "use_mlock": self.mlock,
            "repack": self.repack is not False,
            "verbose": self.verbose,
        }

    def context_arguments(self) -> dict[str, Any]:
        """Arguments of an `Engine`, or a recorder, for its context."""
        return {
            "n_batch": self.batch_size,
            "n_ubatch": self.ubatch_size,
            "n_threads": self.threads,
            "flash_attn": FLASH_ATTN[self.flash_attn],
            "type_k": CACHE_TYPES[self.cache_type_k],
            "type_v": CACHE_TYPES[self.cache_type_v],
        }


@dataclass(frozen=True)
class RecordingFlags(LlamaFlags):
    """Flags of a command that computes prompts only: flash attention, which is faster, where the backend has it."""

    flash_attn: str = _flash_attn("auto")


# What --help shows of them, with the model itself; the rest is for --help-all.
_COMMON = ("n_gpu_layers",)
_HEADINGS = {"": COMPUTING, "n_gpu_layers": MODEL}

llama_options = option_group(LlamaFlags, "flags", heading=_HEADINGS, common=_COMMON)
"""The flags of llama.cpp under its names; the command gets them as `flags` (LlamaFlags)."""

recording_options = option_group(RecordingFlags, "flags", heading=_HEADINGS, common=_COMMON)
"""The same for commands that record prompts; the command gets them as `flags` (RecordingFlags)."""
