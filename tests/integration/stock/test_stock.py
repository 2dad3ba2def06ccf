"""Without a bias, or with one of zeros, our library computes bit for bit what an unpatched one does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from steermoe_local.llama.library import library_folder
from steermoe_local.model_files.model_info import ModelInfo, model_info
from steermoe_local.steering.bias_file import BiasFile, Mode, write_bias
from tests.integration.reference.native import data_file
from tests.support.paths import ROOT
from tests.support.random_models import SELECTION_BIAS, SIGMOID, STEERABLE, write_random_model

pytestmark = pytest.mark.stock

DRIVER = Path(__file__).with_name("driver.py")
STOCK = ROOT / "build" / "stock" / "bin"
RANDOM = {**STEERABLE, "sigmoid": SIGMOID, "selection-bias": SELECTION_BIAS}
MODELS = ("tiny-moe", *RANDOM)

Logits = dict[str, np.ndarray]
Run = Callable[..., Logits]


def run_driver(driver: Path, libraries: Path, output: Path, *arguments: object, bias: Path | None = None) -> Logits:
    """Run a driver on the libraries of a folder; what it wrote to `output`. `bias` goes into STEERMOE_BIAS."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("STEERMOE_")}
    environment["LLAMA_CPP_LIB_PATH"] = str(libraries)
    if bias is not None:
        environment["STEERMOE_BIAS"] = str(bias)
    command = [sys.executable, str(driver), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    with np.load(output, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a model by name."""
    folder = tmp_path_factory.mktemp("models")

    @cache
    def make(name: str) -> Path:
        return data_file("tiny-moe.gguf") if name == "tiny-moe" else write_random_model(folder / name, RANDOM[name])

    return make


@pytest.fixture(scope="module")
def run(model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What driver.py finds with the libraries of a folder; `bias` goes into STEERMOE_BIAS."""
    output = tmp_path_factory.mktemp("logits") / "logits.npz"

    @cache
    def start(libraries: Path, name: str, *arguments: object, bias: Path | None = None) -> Logits:
        return run_driver(DRIVER, libraries, output, model(name), output, *arguments, bias=bias)

    return start


def zeros(path: Path, model: Path, mode: Mode) -> Path:
    """A bias file with a row of zeros for every layer; in mode "capped" with signs, and a cap of 0."""
    info = model_info(model)
    identity = info.identity
    assert identity is not None
    if mode == "capped":
        write_bias(BiasFile.from_capped(signs_of(info), identity, 0.0), path)
        return path
    rows = {layer: np.zeros(identity.n_expert, dtype=np.float32) for layer in range(identity.n_layer)}
    write_bias(BiasFile(identity, mode, rows), path)
    return path


def real(path: Path, model: Path) -> Path:
    """A bias file that promotes the first expert of every MoE layer and suppresses the last."""
    info = model_info(model)
    assert info.identity is not None
    write_bias(BiasFile.from_signs(signs_of(info), info.identity), path)
    return path


def signs_of(info: ModelInfo) -> np.ndarray:
    assert info.identity is not None
    signs = np.zeros(info.identity.shape)
    signs[info.moe_layers, 0], signs[info.moe_layers, -1] = 1, -1
    return signs


def assert_same_bits(ours: Logits, stock: Logits) -> None:
    assert (bool(ours["patched"]), bool(stock["patched"])) == (True, False)
    assert ours.keys() == stock.keys()
    for way in ours.keys() - {"patched"}:
        assert np.isfinite(stock[way]).all()
        assert len(np.unique(stock[way])) > 100, way
        assert ours[way].tobytes() == stock[way].tobytes(), way


@pytest.mark.parametrize("name", MODELS)
def test_without_a_bias(run: Run, name: str) -> None:
    assert_same_bits(run(library_folder(), name), run(STOCK, name))


@pytest.mark.parametrize("mode", ["hard", "soft", "capped"])
@pytest.mark.parametrize("name", MODELS)
def test_bias_of_zeros(run: Run, model: Callable[[str], Path], tmp_path: Path, name: str, mode: Mode) -> None:
    bias = zeros(tmp_path / "zeros.gguf", model(name), mode)
    assert_same_bits(run(library_folder(), name, bias=bias), run(STOCK, name))


@pytest.mark.parametrize("name", MODELS)
def test_attached_and_detached(run: Run, model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    bias = real(tmp_path / "real.gguf", model(name))
    assert_same_bits(run(library_folder(), name, "--attach-and-detach", bias), run(STOCK, name))


@pytest.mark.parametrize("name", MODELS)
def test_next_to_a_steered_sequence(run: Run, model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """One sequence is steered; batches of the others are computed by the graph of an unpatched library."""
    bias = real(tmp_path / "real.gguf", model(name))
    assert_same_bits(run(library_folder(), name, "--beside", bias), run(STOCK, name))


@pytest.mark.parametrize("name", MODELS)
def test_a_real_bias_changes_the_bits(run: Run, model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    bias = real(tmp_path / "real.gguf", model(name))
    steered, stock = run(library_folder(), name, bias=bias), run(STOCK, name)
    for way in stock.keys() - {"patched"}:
        assert not np.array_equal(steered[way], stock[way]), way
