"""Rankings of models whose first layers have no experts: which of the model's layers the ranked ones are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.errors import FormatError, ModelMismatchError, UsageError
from steermoe_local.maps.cards import render_card
from steermoe_local.maps.expert_map import ExpertMap, format_layers, parse_layers
from steermoe_local.maps.export import plain_ranking
from steermoe_local.maps.rankings import LEADING_DENSE, Rankings, read_rankings
from steermoe_local.model_files.model_info import model_info
from steermoe_local.steering.presets import PAPER_MODELS
from tests.support import pickled_frames as frames
from tests.support.builders import identity, model_parts, random_counts, write_gguf

COUNTS = random_counts(7)  # 3 layers of 4 experts, the first dense
A1, A2, N1, N2 = COUNTS.a1, COUNTS.a2, COUNTS.n1, COUNTS.n2
RANKED = [np.asarray(table[1:]) for table in (A1, A2)]
NAMES = ("--model-id", "x/y", "--behaviour", "b")


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def ranking(path: Path, layers: Any = None, a1: Any = RANKED[0], a2: Any = RANKED[1]) -> Path:
    """A ranking of the two layers with experts, which it numbers `layers`."""
    columns = frames.ranking(a1, a2, N1, N2)
    if layers is not None:
        columns["layer"] = np.asarray(layers)[columns["layer"]]
    path.write_bytes(frames.dumps(frames.frame(columns)))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", "olmoe", *model_parts())


def bad_import(*args: Any) -> str:
    result = run("map", "import", *args, *NAMES)
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_only_layers_with_experts_are_numbered(tmp_path: Path, model: Path) -> None:
    """Refused with the option that names the layers, and imported with it."""
    path, out = ranking(tmp_path / "r.pkl"), tmp_path / "m.json"
    message = bad_import(path, "-m", model, "-o", out)
    (option,) = re.findall(r"--moe-layers \S+", message)
    assert option == "--moe-layers 1-2"
    assert not out.exists()
    result = run("map", "import", path, "-m", model, "-o", out, *NAMES, *option.split(), "--json")
    assert result.exit_code == 0, result.stderr
    made = ExpertMap.load(out)
    assert made.identity == model_info(model).identity
    assert np.array_equal(made.rd, A1 / N1 - A2 / N2)
    assert made.a1 is not None
    assert np.array_equal(made.a1, A1)


def test_without_the_model(tmp_path: Path, model: Path) -> None:
    """The architecture alone does not tell where the layers are, so it asks; the map then fits the model."""
    path, out = ranking(tmp_path / "r.pkl"), tmp_path / "m.json"
    message = bad_import(path, "--arch", "deepseek2", "-o", out)
    assert "--moe-layers" in message
    assert "1-2" in message
    for layers, n_layer in (("1-2", 3), ("0-1", 2), ("3-4", 5)):
        result = run("map", "import", path, "--arch", "deepseek2", "--moe-layers", layers, "-o", out, *NAMES)
        assert result.exit_code == 0, result.stderr
        made = ExpertMap.load(out)
        assert made.identity.shape == (n_layer, 4)
        assert np.array_equal(made.rd[list(parse_layers(layers))], RANKED[0] / N1 - RANKED[1] / N2)
        assert np.count_nonzero(made.rd.any(axis=1)) == 2
    assert run("map", "import", path, "--arch", "olmoe", "-o", out, *NAMES).exit_code == 0
    run("map", "import", path, "--arch", "olmoe", "--moe-layers", "1-2", "-o", out, *NAMES)
    built = run("bias", "build", out, "-m", model, "--force", "--activate", 1, "-o", tmp_path / "b.gguf")
    assert built.exit_code == 0, built.stderr


@pytest.mark.parametrize("kind", ["numbered as in the model", "with rows of zeros"])
def test_rankings_that_tell_the_layers(tmp_path: Path, model: Path, kind: str) -> None:
    """The model's own numbers without the dense layers, or a row of zeros for each expert that is not there."""
    if kind == "with rows of zeros":
        path = ranking(tmp_path / "r.pkl", a1=A1, a2=A2)
    else:
        path = ranking(tmp_path / "r.pkl", (1, 2))
    assert read_rankings(path).layers == (1, 2)
    for more in (("-m", model), ("--arch", "deepseek2"), ("--arch", "olmoe"), ("-m", model, "--moe-layers", "1-2")):
        result = run("map", "import", path, *more, "-o", tmp_path / "m.json", *NAMES)
        assert result.exit_code == 0, result.stderr
        made = ExpertMap.load(tmp_path / "m.json")
        assert made.identity.n_layer == 3
        assert np.array_equal(made.rd, A1 / N1 - A2 / N2)
    assert "says itself that its layers are 1-2" in bad_import(
        path, "--arch", "olmoe", "--moe-layers", "0-1", "-o", tmp_path / "x"
    )


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("1", "1 layers, but"),
        ("0-2", "3 layers, but"),
        ("0-1", "take the ranking of this model"),
        ("1,3", "take the ranking of this model"),
        ("2-1", "layers: "),
        ("x", "layers: "),
    ],
)
def test_layers_that_cannot_be(tmp_path: Path, model: Path, layers: str, words: str) -> None:
    path = ranking(tmp_path / "r.pkl")
    assert words in bad_import(path, "-m", model, "--moe-layers", layers, "-o", tmp_path / "m.json")
    assert not (tmp_path / "m.json").exists()


def test_the_library(tmp_path: Path) -> None:
    found = Rankings(*RANKED, N1, N2, 2)
    for bad in ({}, {"model_layers": (1, 2)}, {"moe_layers": (2, 3)}, {"moe_layers": (0, 1), "model_layers": (1, 2)}):
        with pytest.raises(ModelMismatchError):
            found.to_map(identity(), "b", where="x", **bad)
    with pytest.raises(UsageError):
        found.to_map(identity(), "b", where="x", moe_layers=(1,))
    made = found.to_map(identity(), "b", where="x", moe_layers=(1, 2))
    assert np.array_equal(made.rd, A1 / N1 - A2 / N2)
    with pytest.raises(FormatError, match="no activations"):
        read_rankings(ranking(tmp_path / "r.pkl", a1=RANKED[0] * 0, a2=RANKED[1] * 0))


@pytest.mark.parametrize(
    ("layers", "text"), [((), ""), ((0,), "0"), ((0, 1, 2, 5), "0-2,5"), ((3, 5, 6), "3,5-6"), (range(1, 27), "1-26")]
)
def test_layers_in_words(layers: Any, text: str) -> None:
    assert format_layers(layers) == text
    if text:
        assert parse_layers(text) == tuple(layers)


@pytest.mark.parametrize("risk", [0.0, np.nan])
def test_a_dense_layer_of_zeros_in_all_columns(tmp_path: Path, model: Path, risk: float) -> None:
    """Its rows count no tokens at all, so its risk difference is 0 / 0."""
    columns = frames.ranking(A1, A2, N1, N2)
    dense = columns["layer"] == 0
    columns |= {name: np.where(dense, 0, columns[name]) for name in ("a1", "a2", "d1", "d2")}
    columns["risk_diff"] = np.where(dense, risk, columns["risk_diff"])
    path = tmp_path / "r.pkl"
    path.write_bytes(frames.dumps(frames.frame(columns)))
    found = read_rankings(path)
    assert (found.layers, found.n1, found.n2) == ((1, 2), N1, N2)
    assert run("map", "import", path, "-m", model, "-o", tmp_path / "m.json", *NAMES).exit_code == 0
    assert np.array_equal(ExpertMap.load(tmp_path / "m.json").rd, A1 / N1 - A2 / N2)


def test_the_paper_s_models_have_no_dense_layers() -> None:
    """Their published rankings are imported without a model at hand."""
    assert not {paper.architecture for paper in PAPER_MODELS} & LEADING_DENSE


def test_the_number_of_pairs_is_unknown(tmp_path: Path, model: Path) -> None:
    """Nowhere is an imported map said to be made of 0 pairs."""
    out = tmp_path / "m.json"
    assert run("map", "import", ranking(tmp_path / "r.pkl", (1, 2)), "-m", model, "-o", out, *NAMES).exit_code == 0
    for shown in (
        run("map", "show", out).stdout,
        run("map", "import", ranking(tmp_path / "r.pkl", (1, 2)), "-m", model, "-o", out, *NAMES).stdout,
    ):
        (pairs,) = [line for line in shown.splitlines() if line.startswith("pairs")]
        assert pairs.split()[1] == "unknown,"
        assert f"target tokens {N1} / {N2}" in pairs
    card = render_card(ExpertMap.load(out), "x/y", license="MIT")
    assert "| pairs | 0" not in card
    bare = ExpertMap(identity(1, 2, 1), "b", np.array([[0.5, -0.5]]))
    bare.save(out)
    assert "target tokens unknown" in run("map", "show", out).stdout
    assert run("map", "plot", out, "-o", tmp_path / "m.svg").exit_code == 0
    assert "0 pairs" not in (tmp_path / "m.svg").read_text("utf-8")
    assert json.loads(run("map", "show", out, "--json").stdout)["n_pairs"] is None
    assert json.loads(plain_ranking(ExpertMap.load(out)))["n_pairs"] is None
