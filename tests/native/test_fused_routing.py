"""What GPU backends would compute of a router in one operation, told from the graph and the backends' patterns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.fused_routing import (
    BACKENDS,
    GGML,
    Fused,
    GraphContext,
    Node,
    choices,
    function_sha256,
    fused_routers,
    graphs_by_rule,
    takes,
)
from tests.support.low_level import identity_of, open_model
from tests.support.random_models import GPT_OSS, OLMOE, QWEN3MOE, SELECTION_BIAS, SIGMOID, RandomModel

SIGMOID_NORM = replace(SIGMOID, norm=True)
BIAS_NORM = replace(SELECTION_BIAS, gating=2, norm=True)
# by backend: the pattern of the unsteered router, and of a router under the hard rule
KINDS: dict[str, tuple[RandomModel, dict[str, str], dict[str, str]]] = {
    "softmax": (
        OLMOE,
        early := {"CUDA": "softmax", "Vulkan": "early_softmax", "Metal": "softmax", "SYCL": "softmax"},
        early,
    ),
    "softmax norm": (
        QWEN3MOE,
        norm := {
            "CUDA": "softmax norm",
            "Vulkan": "early_softmax_norm",
            "Metal": "softmax norm",
            "SYCL": "softmax norm",
        },
        norm,
    ),
    "late softmax": (
        replace(GPT_OSS, n_expert=16),
        late := {"CUDA": "late softmax", "Vulkan": "late_softmax", "SYCL": "late softmax"},
        late,
    ),
    "sigmoid": (SIGMOID, {"CUDA": "sigmoid", "SYCL": "sigmoid"}, {}),
    "sigmoid norm": (SIGMOID_NORM, {"CUDA": "sigmoid norm", "SYCL": "sigmoid norm"}, {}),
    "bias": (SELECTION_BIAS, {"CUDA": "softmax bias"}, {}),
    "bias norm": (BIAS_NORM, {"CUDA": "sigmoid bias norm", "Vulkan": "sigmoid_norm_bias"}, {}),
}


@pytest.fixture(scope="module", params=KINDS)
def graphs(request: Any, random_model: Any) -> Iterator[tuple[str, dict[tuple[str, int], list[Node]]]]:
    """Graphs of one kind of router by rule and number of tokens."""
    path: Path = random_model(KINDS[request.param][0])
    model = open_model(path)
    yield request.param, graphs_by_rule(model, identity_of(path))
    model.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_kinds_of_routers(graphs: Any, backend: str) -> None:
    """The soft rule leaves the chain whole; the hard and the capped one where the logits alone decide."""
    kind, by_rule = graphs
    _, unsteered, hard = KINDS[kind]
    for (rule, n_tokens), nodes in by_rule.items():
        wanted = (unsteered if rule in ("none", "soft") else hard).get(backend)
        found = fused_routers(nodes, backend)
        assert found, "no router in the graph"
        assert {one and one.pattern for one in found.values()} == {wanted}, (rule, n_tokens)


def test_a_bias_of_each_token_is_never_fused(graphs: Any) -> None:
    """CUDA takes the bias of a fused router for one row, whatever it is: ours must not match in any order of nodes."""
    kind, by_rule = graphs
    for (rule, _), nodes in by_rule.items():
        # as if a backend had moved what fetches the ranks before the chain
        ranks = [node for node in nodes if node.op == "GET_ROWS" and is_rank(node, nodes)]
        moved = [*ranks, *(node for node in nodes if node not in ranks)]
        assert bool(ranks) == (rule in ("hard", "capped") and not KINDS[kind][2])
        for order in (nodes, moved):
            fused = [one for one in fused_routers(order, "CUDA").values() if one]
            assert {one.bias_rows for one in fused} <= {None, 1}
            assert not (ranks and fused), "an edited selection matches a pattern"


def is_rank(node: Node, nodes: list[Node]) -> bool:
    """Is it added to the scores of a steered selection."""
    return any(n.name.startswith("ffn_moe_probs_steered") and node.address in n.sources for n in nodes)


def test_the_check_sees_a_bias_of_each_token(random_model: Any) -> None:
    """With the addends the other way round and the ranks fetched before, CUDA would fuse it."""
    path: Path = random_model(SIGMOID)
    model = open_model(path)
    nodes = graphs_by_rule(model, identity_of(path))["hard", 5]
    model.close()
    ranks = [node for node in nodes if node.op == "GET_ROWS" and is_rank(node, nodes)]
    turned = [
        replace(node, sources=node.sources[::-1], source_rows=node.source_rows[::-1])
        if node.name.startswith("ffn_moe_probs_steered")
        else node
        for node in nodes
    ]
    moved = [*ranks, *(node for node in turned if node not in ranks)]
    assert set(fused_routers(turned, "CUDA").values()) == {None}, "the ranks between the nodes break the chain"
    assert set(fused_routers(moved, "CUDA").values()) == {Fused("sigmoid bias", bias_rows=5)}
    assert set(fused_routers(moved, "Vulkan").values()) == {None}, "Vulkan counts the rows"


def test_a_reader_of_what_is_fused_prevents_it(random_model: Any) -> None:
    path: Path = random_model(OLMOE)
    model = open_model(path)
    with GraphContext(model, n_seq_max=1) as context:
        nodes = context.graph([1, 2, 3])
    model.close()
    place, layer = next(iter(choices(nodes)))
    softmax = nodes[place - 2]
    assert softmax.op == "SOFT_MAX"
    reader = replace(nodes[-1], sources=(softmax.address,), address=1)
    for backend in BACKENDS:
        assert fused_routers(nodes, backend)[layer]
        assert fused_routers([*nodes, reader], backend)[layer] is None
        # and nodes that do not follow each other
        assert fused_routers([*nodes[:place], reader, *nodes[place:]], backend)[layer] is None


@pytest.mark.parametrize(
    ("file", "name", "sha256"),
    [
        ("ggml-cuda/ggml-cuda.cu", "ggml_cuda_topk_moe_fusion", "42b01718d7b039f3"),
        ("ggml-sycl/topk-moe.cpp", "ggml_sycl_topk_moe_fusion", "bc3e9124bebb05c7"),
        ("ggml-metal/ggml-metal-fusion.cpp", "ggml_metal_fusion_check_topk_moe", "1b271ad16c68593b"),
        ("ggml-vulkan/ggml-vulkan.cpp", "ggml_vk_can_fuse_topk_moe", "2f232654cafe0a98"),
    ],
)
def test_the_backends_are_those_that_were_read(file: str, name: str, sha256: str) -> None:
    """What this module says of them was written from these functions; read them again when they change."""
    assert function_sha256(GGML / file, name).startswith(sha256)


def test_numbers_of_experts() -> None:
    """Which there is a kernel for."""
    numbers = (2, 12, 64, 288, 320, 512, 576, 1024, 2048)
    assert {backend: [n for n in numbers if takes(backend, n)] for backend in BACKENDS} == {
        "CUDA": [2, 64, 288, 512, 576],
        "Vulkan": [2, 12, 64, 288, 320, 512],
        "Metal": [2, 12, 64, 288, 320, 512, 576, 1024],
        "SYCL": [2, 64, 512],
    }
