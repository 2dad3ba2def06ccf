"""llama.cpp's own programs from the patched tree: steered by the environment, and the traps of the build."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, model_info, write_bias
from steermoe_local.llama import capi
from tests.support.low_level import Context, identity_of, native_bias, open_model, random_signs
from tests.support.paths import BUILD, ROOT

Tool = Callable[..., Any]


@pytest.fixture(scope="module")
def bias_path(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    identity = identity_of(tiny_path)
    rng = np.random.default_rng(8)
    rows = [random_signs(rng, identity.n_expert, identity.n_expert_used, 2, 8) for _ in range(identity.n_layer)]
    path = tmp_path_factory.mktemp("bias") / "b.gguf"
    write_bias(BiasFile.from_signs(np.stack(rows), identity), path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("one two three four five six seven eight nine ten, 1 2 3 4 5 6 7 8 9 10. " * 12)
    return path


def perplexity(tool: Tool, model: Path, text: Path, out: Path, **env: str) -> Any:
    """Run llama-perplexity; its logits go to `out` (its log may be lost, as it exits before that is written)."""
    args = ("-c", 64, "-b", 64, "--chunks", 2, "-t", 1, "--save-all-logits", out)
    return tool("llama-perplexity", "-m", model, "-f", text, *args, env=env)


def test_perplexity_is_steered(tool: Tool, tiny_path: Path, text: Path, bias_path: Path, tmp_path: Path) -> None:
    identity = identity_of(tiny_path)
    write_bias(BiasFile(identity, "hard", {0: np.zeros(identity.n_expert, np.float32)}), tmp_path / "zeros.gguf")
    logits = []
    for value in ("", str(tmp_path / "zeros.gguf"), str(bias_path)):
        out = tmp_path / "logits"
        done = perplexity(tool, tiny_path, text, out, STEERMOE_BIAS=value)
        assert done.returncode == 0, done.stderr[-2000:]
        logits.append(out.read_bytes())
        out.unlink()
    plain, zeros, steered = logits
    assert len(plain) > 10000
    assert zeros == plain, "a bias of zeros changes the logits"
    assert steered != plain, "the environment does not steer"
    assert len(steered) == len(plain)


def test_bench_runs_steered(tool: Tool, tiny_path: Path, bias_path: Path) -> None:
    args = ("llama-bench", "-m", tiny_path, "-p", 16, "-n", 4, "-r", 1, "-t", 1, "-o", "json")
    done = tool(*args, env={"STEERMOE_BIAS": str(bias_path)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert [run["n_prompt"] for run in json.loads(done.stdout)] == [16, 0]


def bad_files(tmp_path: Path, identity: Any) -> dict[str, tuple[Path, str]]:
    damaged, foreign = tmp_path / "damaged.gguf", tmp_path / "foreign.gguf"
    damaged.write_bytes(b"GGUF" + bytes(30))
    other = type(identity)(**(identity.to_dict() | {"router_sha256": "0" * 64}))
    write_bias(BiasFile.from_signs(np.eye(*identity.shape, dtype=np.float32), other), foreign)
    return {
        "damaged": (damaged, f"STEERMOE_BIAS: {damaged}: not a valid GGUF file"),
        "foreign": (foreign, f"STEERMOE_BIAS: {foreign}: made for olmoe"),
        "missing": (tmp_path / "missing.gguf", f"STEERMOE_BIAS: {tmp_path / 'missing.gguf'}: cannot be opened"),
    }


@pytest.mark.parametrize("case", ["damaged", "foreign", "missing"])
@pytest.mark.parametrize("name", ["llama-bench", "llama-perplexity"])
def test_a_bad_file_stops_the_program(
    tool: Tool, tiny_path: Path, text: Path, tmp_path: Path, name: str, case: str
) -> None:
    path, words = bad_files(tmp_path, identity_of(tiny_path))[case]
    env = {"STEERMOE_BIAS": str(path)}
    if name == "llama-bench":
        done = tool(name, "-m", tiny_path, "-p", 8, "-n", 0, "-r", 1, "-t", 1, env=env)
    else:
        done = perplexity(tool, tiny_path, text, tmp_path / "logits", **env)
    assert done.returncode != 0, "ran unsteered"
    assert f"error: {words}" in done.stderr, done.stderr[-3000:]


def test_force_from_the_environment(tool: Tool, tiny_path: Path, text: Path, tmp_path: Path) -> None:
    foreign, _ = bad_files(tmp_path, identity_of(tiny_path))["foreign"]
    for force, works in (("0", False), ("", False), ("1", True)):
        env = {"STEERMOE_BIAS": str(foreign), "STEERMOE_FORCE": force}
        done = perplexity(tool, tiny_path, text, tmp_path / "logits", **env)
        assert (done.returncode == 0) == works, done.stderr[-2000:]


#
# quantization
#


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_a_quantization_is_the_same_model(
    tool: Tool, tiny_path: Path, tiny_model: Any, tmp_path: Path, kind: str
) -> None:
    """Also a smoke test of the AMX code, which a wrong optimisation level crashes on a Q4_0 product."""
    path = tmp_path / f"{kind}.gguf"
    done = tool("llama-quantize", tiny_path, path, kind, 1)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    info = model_info(path)
    assert info.file_type == kind
    identity = identity_of(tiny_path)
    assert info.require_moe() == identity, "a quantization changed the routers"
    model = open_model(path)
    tokens = list(range(3, 35))
    signs = {layer: np.eye(identity.n_expert)[layer] for layer in range(identity.n_layer)}
    with Context(model, capture=True) as context:
        plain = context.decode(tokens)
        assert np.isfinite(plain).all()
        context.seen.clear()
        capi.attach(context.ctx, native_bias(identity, signs))
        steered = context.fresh(tokens)
        assert np.isfinite(steered).all()
        for layer in signs:
            topk = context.seen[f"ffn_moe_topk-{layer}"][0].reshape(len(tokens), -1)
            assert (topk == layer).any(axis=1).all(), f"expert {layer} of layer {layer} is not always chosen"
        context.decode([3], len(tokens))
    model.close()


#
# how it was compiled
#


def compile_commands() -> list[dict[str, str]]:
    path = BUILD / "compile_commands.json"
    if not path.exists():
        pytest.skip("no compile_commands.json: make build")
    commands: list[dict[str, str]] = json.loads(path.read_text("utf-8"))
    return commands


def flags(command: dict[str, str]) -> list[str]:
    return shlex.split(command["command"])


def is_gnu(command: dict[str, str]) -> bool:
    return Path(flags(command)[0]).name.startswith(("g++", "c++", "x86_64-linux-gnu-g++"))


def test_amx_is_compiled_at_o2() -> None:
    """GCC 12 at -O3 miscompiles these files: SIGSEGV in ggml_backend_amx_mul_mat (see CMakeLists.txt)."""
    amx = [c for c in compile_commands() if "/ggml-cpu/amx/" in c["file"]]
    others = [c for c in compile_commands() if c["file"].endswith("/ggml-cpu/ops.cpp")]
    if not amx or not is_gnu(amx[0]):
        pytest.skip("no AMX sources, or another compiler")
    for command in amx:
        levels = [flag for flag in flags(command) if flag.startswith("-O")]
        assert levels[-1] == "-O2", f"{command['file']}: {levels}"
    for command in others:
        assert [flag for flag in flags(command) if flag.startswith("-O")][-1] == "-O3"


@pytest.mark.parametrize(("folder", "library"), [("src", "llama.dir"), ("src/ggml", "ggml-cpu.dir")])
def test_our_sources_are_in_the_libraries(folder: str, library: str) -> None:
    sources = ROOT / "native" / folder
    ours = [c for c in compile_commands() if Path(c["file"]).parent == sources]
    assert {Path(c["file"]).name for c in ours} == {path.name for path in sources.glob("*.cpp")}
    assert all(f"/{library}/" in c["output"] for c in ours)
