"""Which routers of a graph a backend would compute in one operation (top-k MoE), told from the graph's nodes.

Vulkan and Metal have their patterns as lists in the sources of the pinned tree, which are read here. CUDA has a
function, which `CUDA` and `CUDA_TAILS` describe in the same form; SYCL has a copy of it without biases. None of these
backends is needed: the graph is llama.cpp's own, as its scheduler computes it on the CPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from steermoe_local.identity import ModelIdentity
from steermoe_local.llama import backends, capi
from tests.support.low_level import Context, GGMLTensor, native_bias, random_signs
from tests.support.paths import BUILD

GGML = BUILD / "llama.cpp" / "ggml" / "src"
OUTPUT_FLAG = 2  # GGML_TENSOR_FLAG_OUTPUT

Edge = tuple[int, int, int]  # node, its source, the node which that is; all counted from the first of the pattern


@dataclass(frozen=True)
class Node:
    """A node of a graph, with what the patterns ask about."""

    address: int
    name: str
    op: str  # of UNARY the unary operation
    ne: tuple[int, ...]
    sources: tuple[int, ...]
    source_rows: tuple[int, ...]  # rows of each source
    is_output: bool
    view_of: int
    parameters: tuple[int, ...]


class GraphContext(Context):
    """A context that keeps the nodes of each graph, in the order in which they are computed."""

    def __init__(self, model: Any, **kwargs: Any) -> None:
        self.nodes: list[Node] = []
        super().__init__(model, capture=True, **kwargs)

    def _see(self, tensor: int, ask: bool, _: object) -> bool:
        # the scheduler asks about each node in turn; nothing is wanted, so a split is computed as a whole
        if ask:
            self.nodes.append(node_of(tensor))
        return False

    def graph(self, tokens: Sequence[int]) -> list[Node]:
        """Nodes of the graph of one ubatch."""
        self.nodes.clear()
        self.fresh(tokens)
        return list(self.nodes)


@cache
def _names() -> tuple[Any, Any]:
    op = backends.function("ggml_op_name", ctypes.c_char_p, ctypes.c_int)
    unary = backends.function("ggml_unary_op_name", ctypes.c_char_p, ctypes.c_int)
    return op, unary


def node_of(address: int) -> Node:
    """Copy what is needed of a tensor."""
    t = GGMLTensor.from_address(address)
    op, unary = _names()
    name = op(t.op).decode()
    sources = [GGMLTensor.from_address(source) for source in t.src if source]
    return Node(
        address=address,
        name=t.name.decode(),
        op=unary(t.op_params[0]).decode() if name == "UNARY" else name,
        ne=tuple(t.ne),
        sources=tuple(source for source in t.src if source),
        source_rows=tuple(s.ne[1] * s.ne[2] * s.ne[3] for s in sources),
        is_output=bool(t.flags & OUTPUT_FLAG),
        view_of=t.view_src or 0,
        parameters=tuple(t.op_params[:2]),
    )


#
# patterns
#


@dataclass(frozen=True)
class Pattern:
    """Operations that follow each other, how they are connected, and which of them others may read."""

    ops: tuple[str, ...]
    edges: tuple[Edge, ...]
    outputs: tuple[int, int]
    starts: int = 0  # the first node that is fused; those before it are only looked at

    @property
    def bias(self) -> int | None:
        """The addition of a selection bias."""
        return self.ops.index("ADD") if "ADD" in self.ops else None


def _lists(text: str, name: str) -> tuple[str, ...]:
    found = re.search(rf"\b{name}\s*(?:=\s*)?\{{([^}}]*)\}}", text)
    assert found, f"no {name} in the tree; the patterns are elsewhere now"
    return tuple(re.findall(r"GGML_OP_(\w+)", found[1]))


def _edges(text: str, name: str) -> tuple[Edge, ...]:
    found = re.search(rf"\b{name}\s*\{{(.*?)\n\}};", text, re.S)
    assert found, f"no {name} in the tree; the patterns are elsewhere now"
    triples = re.findall(r"\{\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\}", found[1])
    return tuple((int(a), int(b), int(c)) for a, b, c in triples)


# what ggml_vk_can_fuse_topk_moe and its callers ask of these: outputs, unary operation
VULKAN = {
    "early_softmax_norm": ((3, 9), ""),
    "sigmoid_norm_bias": ((4, 10), "SIGMOID"),
    "sqrt_softplus_norm_bias": ((5, 11), "SOFTPLUS"),
    "early_softmax": ((3, 4), ""),
    "late_softmax": ((1, 5), ""),
}


@cache
def vulkan() -> dict[str, Pattern]:
    """The patterns of ggml-vulkan, in its order."""
    text = (GGML / "ggml-vulkan" / "ggml-vulkan-types.h").read_text("utf-8")
    declared = set(re.findall(r"ggml_op> topk_moe_(\w+?)\s*\{", text))
    assert declared == VULKAN.keys(), "other patterns than those that this module knows"
    patterns = {}
    for name, (outputs, unary) in VULKAN.items():
        ops = tuple(unary if op == "UNARY" else op for op in _lists(text, f"topk_moe_{name}"))
        patterns[name] = Pattern(ops, _edges(text, f"topk_moe_{name}_edges"), outputs)
    return patterns


NORM: tuple[tuple[str, ...], tuple[Edge, ...]] = (
    ("RESHAPE", "SUM_ROWS", "CLAMP", "DIV", "RESHAPE"),
    ((0, 0, -1), (1, 0, 0), (2, 0, 1), (3, 0, 0), (3, 1, 2), (4, 0, 3)),
)
SCALE: tuple[tuple[str, ...], tuple[Edge, ...]] = (("SCALE",), ((0, 0, -1),))
# the longest first
CUDA_TAILS = {" norm scale": (NORM, SCALE), " norm": (NORM,), " scale": (SCALE,), "": ()}
EARLY: tuple[Edge, ...] = ((1, 0, 0), (2, 0, 0), (3, 0, 2), (4, 0, 1), (4, 1, 3))
BIASED: tuple[Edge, ...] = ((1, 0, 0), (2, 0, 0), (3, 0, 2), (4, 0, 3), (5, 0, 1), (5, 1, 4))


def _later(edges: Sequence[Edge]) -> tuple[Edge, ...]:
    """The same behind one node more, which the second reads."""
    return ((1, 0, 0), *((node + 1, source, of + 1) for node, source, of in edges))


_CHAIN = ("ARGSORT", "VIEW", "GET_ROWS")
CUDA = {
    "softmax": Pattern(("SOFT_MAX", "RESHAPE", *_CHAIN), EARLY, (3, 4)),
    "softmax bias": Pattern(("SOFT_MAX", "RESHAPE", "ADD", *_CHAIN), BIASED, (4, 5)),
    "sigmoid": Pattern(("SIGMOID", "RESHAPE", *_CHAIN), EARLY, (3, 4)),
    "sigmoid bias": Pattern(("SIGMOID", "RESHAPE", "ADD", *_CHAIN), BIASED, (4, 5)),
    "sqrt softplus": Pattern(("SOFTPLUS", "SQRT", "RESHAPE", *_CHAIN), _later(EARLY), (4, 5)),
    "sqrt softplus bias": Pattern(("SOFTPLUS", "SQRT", "RESHAPE", "ADD", *_CHAIN), _later(BIASED), (5, 6)),
}
LATE = Pattern(
    ("RESHAPE", *_CHAIN, "RESHAPE", "SOFT_MAX", "RESHAPE"),
    ((2, 0, 1), (3, 0, 0), (3, 1, 2), (4, 0, 3), (5, 0, 4), (6, 0, 5)),
    (2, 6),
    starts=1,
)


def with_tail(head: Pattern, tail: Sequence[tuple[tuple[str, ...], tuple[Edge, ...]]]) -> Pattern:
    """A pattern with what follows it; the weights are then the last node."""
    ops, edges = list(head.ops), list(head.edges)
    for more, joined in tail:
        edges += [(node + len(ops), source, of + len(ops)) for node, source, of in joined]
        ops += more
    return Pattern(tuple(ops), tuple(edges), (head.outputs[0], len(ops) - 1), head.starts)


@cache
def cuda() -> dict[str, Pattern]:
    """What ggml_cuda_topk_moe_fusion accepts and ggml_cuda_try_fuse passes on."""
    patterns = {
        name + after: with_tail(head, tail) for name, head in CUDA.items() for after, tail in CUDA_TAILS.items()
    }
    return patterns | {"late softmax": LATE}


@cache
def sycl() -> dict[str, Pattern]:
    """CUDA's of which SYCL has a copy: it leaves biases alone, and knows no softplus."""
    return {name: p for name, p in cuda().items() if p.bias is None and "softplus" not in name}


@cache
def metal() -> dict[str, Pattern]:
    """The patterns of ggml-metal, the longest first."""
    text = (GGML / "ggml-metal" / "ggml-metal-fusion.cpp").read_text("utf-8")
    patterns = {}
    for end, tail in (("_norm_scale", (NORM, SCALE)), ("_norm", (NORM,)), ("_scale", (SCALE,)), ("", ())):
        patterns[f"softmax{end.replace('_', ' ')}"] = pattern = with_tail(CUDA["softmax"], tail)
        assert _lists(text, f"ops_topk_moe{end}") == pattern.ops, "Metal has other patterns than this module knows"
    return patterns


BACKENDS = {"CUDA": cuda, "Vulkan": vulkan, "Metal": metal, "SYCL": sycl}


def function_sha256(path: Path, name: str) -> str:
    """SHA-256 of a function of a source file, whatever its spaces and comments."""
    found = re.search(rf"^[^\n]*\b{name}\([^;]*?\)\s*\{{\n.*?^\}}", path.read_text("utf-8"), re.S | re.M)
    assert found, f"no {name} in {path.name}"
    text = re.sub(r"//[^\n]*", "", found[0])
    return hashlib.sha256(re.sub(r"\s+", "", text).encode()).hexdigest()


#
# graphs
#


def matches(nodes: Sequence[Node], start: int, pattern: Pattern) -> bool:
    """Does the pattern begin at this node, as ggml_can_fuse_subgraph and the pattern's edges ask."""
    part = nodes[start : start + len(pattern.ops)]
    if tuple(node.op for node in part) != pattern.ops:
        return False
    for node, source, of in pattern.edges:
        if len(part[node].sources) <= source or part[node].sources[source] != part[of].address:
            return False
    fused = part[pattern.starts :]
    inside = {node.address for node in fused}
    kept = {part[i].address for i in pattern.outputs}
    for node in fused:
        if node.op == "SOFT_MAX" and (node.parameters != SOFTMAX_PARAMETERS or len(node.sources) > 1):
            return False
        if node.address in kept:
            continue
        readers = [other for other in nodes if node.address in other.sources]
        if node.is_output or any(other.address not in inside for other in readers):
            return False
        if node.view_of and node.view_of not in inside:
            return False
    return True


# scale 1, no ALiBi: what a router's softmax has; the backends leave others alone
SOFTMAX_PARAMETERS = (0x3F800000, 0)


@dataclass(frozen=True)
class Fused:
    """The pattern by which a layer's routing is fused, and the rows of the bias that goes with it."""

    pattern: str
    bias_rows: int | None = None


def fused_routers(nodes: Sequence[Node], backend: str) -> dict[int, Fused | None]:
    """By layer that chooses experts: how the backend would fuse the choice, None where it would not."""
    patterns = BACKENDS[backend]()
    found: dict[int, Fused | None] = {}
    for place, layer in choices(nodes):
        found[layer] = None
        if not takes(backend, nodes[place].ne[0]):
            continue
        for name, pattern in patterns.items():
            start = place - pattern.ops.index("ARGSORT")
            if start >= 0 and matches(nodes, start, pattern):
                rows = None if pattern.bias is None else nodes[start + pattern.bias].source_rows[1]
                # ggml_vk_can_fuse_topk_moe takes one row for all tokens; CUDA does not look
                if backend == "Vulkan" and rows not in (None, 1):
                    continue
                found[layer] = Fused(name, rows)
                break
    return found


def takes(backend: str, n_expert: int) -> bool:
    """Does the backend have a kernel for so many experts."""
    power = n_expert & (n_expert - 1) == 0
    limits = {
        "CUDA": (power and n_expert <= 512) or n_expert in (288, 576),
        "Vulkan": n_expert <= 512,
        "Metal": n_expert <= 1024,
        "SYCL": power and n_expert <= 512,
    }
    return limits[backend]


def choices(nodes: Sequence[Node]) -> Iterator[tuple[int, int]]:
    """Places of the sorts that choose experts, with their layers."""
    for place, node in enumerate(nodes):
        named = re.fullmatch(r"ffn_moe_argsort-(\d+)", node.name)
        if named and node.op == "ARGSORT":
            yield place, int(named[1])


def graphs_by_rule(
    model: Any, identity: ModelIdentity, n_tokens: Sequence[int] = (5, 1)
) -> dict[tuple[str, int], list[Node]]:
    """Nodes of the graphs of a model unsteered and under each rule, in every layer that can be steered."""
    rng = np.random.default_rng(1)
    found = {}
    for rule in ("none", "soft", "hard", "capped"):
        with GraphContext(model, n_seq_max=1) as context:
            layers = [i for i in range(identity.n_layer) if capi.layer_info(context.ctx, i).steerable]
            rows = {i: random_signs(rng, identity.n_expert, identity.n_expert_used, 1, 3) for i in layers}
            if rule != "none":
                bias = native_bias(identity, rows, rule, cap=1.0 if rule == "capped" else None)
                capi.attach(context.ctx, bias)
            for n in n_tokens:
                found[rule, n] = context.graph(range(1, n + 1))
    return found
