"""The promise of steering on every Mixture-of-Experts architecture of llama.cpp (docs/architectures.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.architecture_checks import check, check_upstream, checker
from tests.support.architectures import ARCHITECTURES, WITHOUT_ROUTERS, variants, widen, write_upstream
from tests.support.fused_routing import BACKENDS, fused_routers, graphs_by_rule
from tests.support.low_level import identity_of, open_model
from tests.support.paths import BUILD, ROOT

# every way of gating, groups, large logits, latent attention, recurrent layers, GELU from a table in F16
REPRESENTATIVE = ("deepseek2", "deepseek4", "dots1", "gpt-oss", "grok", "grovemoe", "llama4", "olmoe", "qwen3next")
ROUTED = [arch for arch in ARCHITECTURES if arch not in WITHOUT_ROUTERS]


@pytest.fixture(scope="session")
def upstream(tool: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """llama.cpp's own random models by architecture."""
    tool("test-llama-archs", "-h")  # skips or fails when it is not built
    paths = write_upstream(BUILD / "bin" / "test-llama-archs", tmp_path_factory.mktemp("architectures"))
    return {path.name.removesuffix("-moe.gguf"): path for path in paths}


def test_the_list_is_complete(upstream: dict[str, Path]) -> None:
    assert sorted(upstream) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_as_written_by_llama_cpp(upstream: dict[str, Path], arch: str) -> None:
    found = check_upstream(upstream[arch], arch)
    assert bool(found.not_a_moe) == (arch in WITHOUT_ROUTERS)
    assert bool(found.steerable) == (arch not in WITHOUT_ROUTERS)


@pytest.mark.parametrize(
    ("arch", "variant"),
    [
        pytest.param(arch, variant, marks=pytest.mark.numeric if arch in REPRESENTATIVE else ())
        for arch in ROUTED
        for variant in variants(arch)
    ],
)
def test_promise(upstream: dict[str, Path], tmp_path: Path, arch: str, variant: str) -> None:
    path = widen(upstream[arch], tmp_path / "model.gguf", variant)
    found = check(path, arch, variant)
    path.unlink()
    assert len(found.steerable) + len(found.obstacles) >= found.n_layer - 2
    assert bool(found.obstacles) == (variant == "hash")
    if not variant:
        gating, bias, layers = page_rows()[arch][:3]
        assert gating == found.gating.replace("_", " ")
        assert bias == ("yes" if found.selection_bias else "no")
        assert layers.startswith(f"{len(found.steerable)} of {found.n_layer}")


def test_experts_of_other_groups_are_forced(upstream: dict[str, Path], tmp_path: Path) -> None:
    """+1 experts outside the chosen groups; and so many -1 that experts of other groups must step in."""
    with checker(widen(upstream["dots1"], tmp_path / "model.gguf", "groups"), "dots1") as c:
        groups = np.arange(8) // 2
        for group in range(4):
            plus = np.where(groups == group, 1.0, 0.0).astype(np.float32)
            c.check_promise(dict.fromkeys(c.steerable, plus))
        keep = np.where(groups == 0, 0.0, -1.0).astype(np.float32)
        keep[7] = 0.0  # three remain, of two groups that are seldom chosen together
        c.check_promise(dict.fromkeys(c.steerable, keep))


@pytest.mark.parametrize("arch", ROUTED)
def test_fused_routing(upstream: dict[str, Path], tmp_path: Path, arch: str) -> None:
    """What docs/backends.md says that GPU backends do with the edited routers of the architecture."""
    path = widen(upstream[arch], tmp_path / "model.gguf")
    model = open_model(path)
    graphs = graphs_by_rule(model, identity_of(path))
    model.close()
    path.unlink()
    unsteered, edited = fused_cells()[arch]
    for (rule, _), nodes in graphs.items():
        fused_by = []
        for backend in BACKENDS:
            found = fused_routers(nodes, backend)
            assert len({one and one.pattern for one in found.values()}) == 1
            (one, *_) = found.values()
            if one is not None:
                assert one.bias_rows in (None, 1)
                fused_by.append(backend)
        assert fused_by == (unsteered if rule in ("none", "soft") else edited), rule


def fused_cells() -> dict[str, tuple[list[str], list[str]]]:
    """By architecture: the backends that fuse its unsteered routers, and those edited by the hard rule."""
    page = (ROOT / "docs" / "backends.md").read_text("utf-8").split("### Fused routing")[1].split("\n### ")[0]
    cells = {}
    for line in page.splitlines():
        row = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(row) == 4 and row[3].startswith("`"):
            first, second = ([] if cell == "none" else cell.split(", ") for cell in row[1:3])
            cells |= {arch.strip("`"): (first, second) for arch in row[3].split(", ")}
    return cells


def page_rows() -> dict[str, list[str]]:
    """Cells of docs/architectures.md behind the name of each architecture."""
    page = (ROOT / "docs" / "architectures.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_the_page_lists_them_all() -> None:
    assert set(ARCHITECTURES) <= page_rows().keys()
