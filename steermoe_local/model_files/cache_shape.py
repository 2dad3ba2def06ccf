"""The sizes of a model's KV cache, recurrent states and compute buffers, read from its header."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ..errors import FormatError, ModelError
from .header import GGUFHeader, n_vocab, read_header
from .model_info import ModelInfo

_F32_BYTES = 4
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.(.*)")
_ATTENTION = re.compile(r"attn_(k|k_b|kv_a_mqa|kv_b|kv|kv_latent)\.(weight|bias)")
_RECURRENT = re.compile(r"(ssm_|shortconv|time_mix_|la_|kda_)")
# diffusion models, which have no cache (llama_model::create_memory)
_WITHOUT_CACHE = {"llada-moe", "rnd1", "dream", "llada"}
_COMPRESSED = {"deepseek4"}
_INDEXER_MASKS = 6  # tensors as large as the mask that an indexer of sparse attention leaves in the compute buffer


@dataclass(frozen=True)
class CacheShape:
    """Sizes of a model's cache and of its largest intermediate results.

    `rows` has the numbers of key and value elements of a token in each layer with attention, `state` the F32 elements
    of a sequence in all recurrent layers. The others determine the compute buffers: heads, attention masks (a second
    one for sliding windows, more for an indexer), `n_ff` summed over the experts of a token. With `bound` the
    architecture compresses its cache, and `rows` is an upper bound.
    """

    rows: tuple[tuple[int, int], ...]
    state: int
    n_head: int
    n_masks: int
    n_embd: int
    n_ff: int
    n_vocab: int
    bound: bool = False

    def cache_bytes(self, n_cells: int, n_sequences: int, type_k: int, type_v: int, flash_attn: bool) -> int:
        """Bytes of the KV cache and the recurrent states, as llama.cpp allocates them.

        Without flash attention the values are transposed and every layer takes as much as the widest (llama_kv_cache).
        Sliding windows get all cells, as in llama.cpp's library (`swa_full`). For indexers and compressed caches this
        is an estimate.
        """
        widest = max((values for _, values in self.rows), default=0)
        a_token = 0
        for keys, values in self.rows:
            v = values if flash_attn or not values else widest
            a_token += _row_bytes(keys, type_k) + _row_bytes(v, type_v)
        return a_token * n_cells + self.state * _F32_BYTES * n_sequences

    def compute_bytes(self, n_cells: int, n_ubatch: int, flash_attn: bool) -> int:
        """Estimated bytes of the compute buffer.

        It holds the largest of the attention scores (without flash attention), the experts' results and the logits,
        which are never there at the same time, and masks and other results.
        """
        mask = self.n_masks * n_cells * n_ubatch * (_F32_BYTES // 2 if flash_attn else _F32_BYTES)
        scores = 0 if flash_attn else self.n_head * n_cells * n_ubatch * _F32_BYTES
        experts = 3 * self.n_ff * n_ubatch * _F32_BYTES
        logits = self.n_vocab * n_ubatch * _F32_BYTES
        rest = 16 * self.n_embd * n_ubatch * _F32_BYTES
        return mask + max(scores, experts, logits) + rest


def read_headers(facts: ModelInfo) -> list[GGUFHeader]:
    """Read the headers of all parts of a model again. Raises ModelError."""
    try:
        return [read_header(path) for path in facts.paths]
    except FormatError as error:
        raise ModelError(str(error)) from error


def cache_shape(facts: ModelInfo, headers: Sequence[GGUFHeader]) -> CacheShape:
    """The sizes by the headers of all parts; in hybrid models, the tensors' names tell which layers have attention.

    Raises FormatError for numbers that no model has.
    """
    head, arch = headers[0], facts.architecture
    n_heads = _per_layer(head, f"{arch}.attention.head_count", facts.n_layer, 0)
    n_heads_kv = _per_layer(head, f"{arch}.attention.head_count_kv", facts.n_layer, n_heads)
    n_head = max(n_heads, default=0)
    default = facts.embedding_length // n_head if n_head else 0
    keys = head.number(f"{arch}.attention.key_length", default)
    values = head.number(f"{arch}.attention.value_length", default)
    window = (
        max(keys, head.number(f"{arch}.attention.key_length_swa")),
        max(values, head.number(f"{arch}.attention.value_length_swa")),
    )
    latent = head.number(f"{arch}.attention.key_length_mla") > 0  # DeepSeek's MLA keeps keys alone
    indexer = head.number(f"{arch}.attention.indexer.key_length")
    attention, recurrent = _layers(name for header in headers for name in header.tensors)
    flags = head.value(f"{arch}.attention.recurrent_layers")
    listed = {layer for layer, is_recurrent in enumerate(flags if isinstance(flags, tuple) else ()) if is_recurrent}
    attention, recurrent = attention - listed, recurrent | listed
    rows: list[tuple[int, int]] = []
    n_recurrent = 0
    for layer in range(facts.n_layer):
        if layer in recurrent:
            n_recurrent += 1
            if layer not in attention:
                continue
        n_kv = n_heads_kv[layer]
        if n_kv and arch not in _WITHOUT_CACHE:
            rows.append((window[0] * n_kv + indexer, 0 if latent else window[1] * n_kv))
    n_ff = max(
        head.number(f"{arch}.expert_feed_forward_length") * max(facts.n_expert_used, 1),
        max(_per_layer(head, f"{arch}.feed_forward_length", facts.n_layer, 0), default=0),
        facts.embedding_length * max(facts.n_expert_used, 1),
    )
    masks = 2 if head.value(f"{arch}.attention.sliding_window") else 1
    return CacheShape(
        rows=tuple(rows),
        state=n_recurrent * _state(head, arch, facts.embedding_length, n_head),
        n_head=n_head,
        n_masks=_INDEXER_MASKS if indexer and latent else masks,
        n_embd=facts.embedding_length,
        n_ff=n_ff,
        n_vocab=n_vocab(headers),
        bound=arch in _COMPRESSED,
    )


def _layers(names: Iterable[str]) -> tuple[set[int], set[int]]:
    """(layers with attention, layers with a recurrent state), by the names of the tensors."""
    attention: set[int] = set()
    recurrent: set[int] = set()
    for name in names:
        if (match := _BLOCK.fullmatch(name)) is None:
            continue
        if _ATTENTION.fullmatch(match[2]):
            attention.add(int(match[1]))
        elif _RECURRENT.match(match[2]):
            recurrent.add(int(match[1]))
    return attention, recurrent


def _state(head: GGUFHeader, arch: str, n_embd: int, n_head: int) -> int:
    """F32 elements of a layer's recurrent state (llama_hparams::n_embd_r and n_embd_s)."""
    if convolution := head.number(f"{arch}.shortconv.l_cache"):
        return n_embd * (convolution - 1)
    kernel, inner = head.number(f"{arch}.ssm.conv_kernel"), head.number(f"{arch}.ssm.inner_size")
    if width := head.number(f"{arch}.kda.head_dim"):
        return 3 * (kernel - 1 if kernel else 3) * n_head * width + width * width * n_head
    states, groups = head.number(f"{arch}.ssm.state_size"), head.number(f"{arch}.ssm.group_count")
    return max(kernel - 1, 0) * (inner + 2 * groups * states) + states * inner


def _per_layer(head: GGUFHeader, key: str, n_layer: int, default: int | list[int]) -> list[int]:
    """A number for each layer; llama.cpp takes one for all, or a list."""
    value = head.value(key)
    if isinstance(value, tuple) and all(type(v) is int and v >= 0 for v in value):
        if len(value) < n_layer:
            raise FormatError(f"{head.path}: {key} has {len(value)} numbers for {n_layer} layers; fetch it again")
        return [head.bounded(key, v) for v in value[:n_layer]]
    if type(value) is int and value >= 0:
        return [head.bounded(key, value)] * n_layer
    return [default] * n_layer if isinstance(default, int) else default


def _row_bytes(n: int, type_: int) -> int:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(type_)]
    return int(-(-n // block) * size)
