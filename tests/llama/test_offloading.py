"""-ngl auto: what fits into devices, and what the command line makes of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from steermoe_local.cli import main
from steermoe_local.cli.options import opening
from steermoe_local.cli.options.llama import AUTO_LAYERS, LlamaFlags
from steermoe_local.llama import offloading
from steermoe_local.llama.offloading import ALL, MARGIN, NONE, Offloading, fitting, gpu_memory
from steermoe_local.model_files.model_info import model_info

N_LAYER = 4
TENSORS = {"token_embd.weight": 900, "output.weight": 100, "output_norm.weight": 1}
for _layer in range(N_LAYER):
    TENSORS |= {f"blk.{_layer}.attn_q.weight": 10, f"blk.{_layer}.ffn_gate_inp.weight": 2}
    TENSORS |= {f"blk.{_layer}.ffn_{part}_exps.weight": 100 for part in ("up", "gate", "down")}
DENSE, EXPERTS, REST, CACHE, COMPUTE = 12, 300, 101, 40, 7
WHOLE = REST + N_LAYER * (DENSE + EXPERTS) + CACHE


def fits(room: int, *devices: int, **options: Any) -> Offloading:
    """`room` bytes besides margin and buffers, on one device, or with `devices` in so many parts."""
    free = [part + MARGIN + COMPUTE for part in devices or (room,)]
    return fitting(free, TENSORS, N_LAYER, CACHE, COMPUTE, **options)


def test_all_of_it() -> None:
    assert fits(WHOLE) == Offloading(ALL)
    assert fits(0, WHOLE // 2, WHOLE - WHOLE // 2) == Offloading(ALL), "over two devices"


def test_experts_stay_first() -> None:
    assert fits(WHOLE - 1) == Offloading(ALL, 1)
    assert fits(WHOLE - EXPERTS - 1) == Offloading(ALL, 2)
    assert fits(WHOLE - 4 * EXPERTS) == Offloading(ALL, 4)


def test_then_layers_do() -> None:
    least = REST + DENSE + CACHE // N_LAYER
    assert fits(WHOLE - 4 * EXPERTS - 1) == Offloading(4, N_LAYER), "three layers and the output"
    assert fits(least) == Offloading(2, N_LAYER)
    assert fits(least - 1) == NONE


def test_where_the_flags_place_the_experts() -> None:
    assert fits(WHOLE, keep_experts=False) == Offloading(ALL)
    assert fits(WHOLE - 1, keep_experts=False) == Offloading(4)
    assert fits(REST + DENSE, keep_experts=False) == NONE


def test_no_room() -> None:
    assert fitting([], TENSORS, N_LAYER, CACHE, COMPUTE) == NONE
    assert fitting([MARGIN], TENSORS, N_LAYER, CACHE, COMPUTE) == NONE
    assert fitting([0, 10], TENSORS, N_LAYER, CACHE, COMPUTE) == NONE


def test_tied_embeddings_are_loaded_as_the_output() -> None:
    tied = {name: size for name, size in TENSORS.items() if name != "output.weight"}
    free = [WHOLE + 800 + MARGIN + COMPUTE]
    assert fitting(free, tied, N_LAYER, CACHE, COMPUTE) == Offloading(ALL)
    assert fitting([free[0] - 1], tied, N_LAYER, CACHE, COMPUTE) == Offloading(ALL, 1)


def test_this_library() -> None:
    """Its GPUs, if any: a build for the CPU alone has none."""
    assert gpu_memory(()) == []
    assert all(free >= 0 for free in gpu_memory(None))


#
# the command line
#


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Free memory of GPUs that are not there."""
    found: list[int] = []
    monkeypatch.setattr(offloading, "gpu_memory", lambda devices, rpc=(): found if devices != () else [])
    return found


def test_the_default_is_auto_and_means_none_without_a_gpu(
    tiny_path: Path, free: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = LlamaFlags()
    assert flags.n_gpu_layers == AUTO_LAYERS
    checked = opening.check_memory(model_info(tiny_path), flags, 256)
    assert (checked.n_gpu_layers, checked.n_cpu_moe) == (0, 0)
    assert checked.model_arguments()["n_gpu_layers"] == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("memory_check", [True, False])
def test_with_a_gpu(tiny_path: Path, free: list[int], memory_check: bool) -> None:
    facts = model_info(tiny_path)

    def auto(**flags: Any) -> tuple[int, int]:
        checked = opening.check_memory(facts, LlamaFlags(memory_check=memory_check, **flags), 256)
        return checked.n_gpu_layers, checked.n_cpu_moe

    free[:] = [4 << 30]
    assert auto() == (-1, 0)
    assert auto(cpu_moe=True) == (-1, 0)
    assert auto(n_gpu_layers=3) == (3, 0), "what is given stays"
    assert auto(device=("none",)) == (0, 0)
    free[:] = [MARGIN]
    assert auto() == (0, 0)
    whole = facts.size_bytes
    found = set()
    for n in range(40):  # more and more memory: never less is offloaded
        free[:] = [MARGIN + whole * n // 10]
        found.add(auto())
    assert {(0, 0), (-1, 0)} < found
    assert any(n_gpu == -1 and n_cpu for n_gpu, n_cpu in found), "experts of some layers stay"


def test_a_warning_where_a_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    from steermoe_local.llama import backends

    monkeypatch.setattr(backends, "device_names", list)
    run = ["run", "-m", "tiny", "-p", "What comes after two?", "-n", "1", "-t", "1"]

    def warnings(*flags: str) -> list[str]:
        opening._warned.clear()
        done = CliRunner().invoke(main, [*run, *flags])
        assert done.exit_code == 0, done.output
        return [line for line in done.stderr.splitlines() if line.startswith("warning:")]

    for flags, named in ((["-ngl", "99"], "-ngl"), (["-ngl", "all", "-ts", "1,1"], "-ngl, -ts"), (["-ts", "1"], "-ts")):
        (line,) = warnings(*flags)
        assert line.startswith(f"warning: {named}: ignored")
        assert "CMAKE_ARGS=" in line
    for flags in ([], ["-ngl", "0"], ["-ngl", "auto"], ["-ngl", "9", "-dev", "none"]):
        assert not warnings(*flags), flags
    refused = CliRunner().invoke(main, [*run, "-dev", "CUDA0"])
    assert refused.exit_code == 2
    assert re.search(r"unknown device 'CUDA0'.*(GPU backend|this library has \w)", refused.stderr)
