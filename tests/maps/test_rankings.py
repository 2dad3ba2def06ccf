"""Imported rankings: what a table needs is read, and nothing else of a pickle ever runs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import read_bias
from steermoe_local.cli import main
from steermoe_local.errors import FormatError, ModelMismatchError
from steermoe_local.identity import UNKNOWN_ROUTER, ModelIdentity
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.pickle_frames import read_frame
from steermoe_local.maps.rankings import ranking_name, read_rankings
from steermoe_local.steering.presets import PAPER_MODELS
from tests.support import pickled_frames as frames
from tests.support.builders import identity, random_counts
from tests.support.hostile_pickles import GOOD
from tests.support.paths import GOLDEN, ROOT

FRAMES = GOLDEN / "frames"
REFERENCE = ROOT.parent / "shared" / "reference"
# The frame in tests/golden/frames: 3 layers of 4 experts, top-2, 10 and 14 tokens
A1 = [[10, 6, 3, 1], [2, 8, 5, 5], [7, 7, 0, 6]]
A2 = [[4, 4, 10, 10], [14, 0, 7, 7], [6, 8, 12, 2]]


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def written(path: Path, columns: dict[str, Any], protocol: int = 5) -> Path:
    path.write_bytes(frames.dumps(frames.frame(columns), protocol))
    return path


#
# what is read
#


@pytest.mark.parametrize("path", sorted(FRAMES.glob("*.pkl")), ids=lambda path: path.stem)
def test_frames_of_pandas(path: Path) -> None:
    """Written by pandas 1.1 to 3.0 with protocols 0 to 5, with other indexes, columns and types."""
    found = read_rankings(path)
    assert found.a1.tolist() == A1
    assert found.a2.tolist() == A2
    assert (found.n1, found.n2, found.n_expert_used, found.shape) == (10, 14, 2, (3, 4))


def test_all_golden_frames_are_there() -> None:
    assert len(list(FRAMES.glob("*.pkl"))) >= 12


def test_columns_that_hold_no_numbers_are_none() -> None:
    frame = read_frame((FRAMES / "pandas-2.2.3-categorical.pkl").read_bytes(), "x")
    assert frame.columns["Layer_Expert"] is None, "codes of a category are no values"
    assert [*frame.columns][:4] != []
    assert frame.n_rows == 12


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("layout", ["short", "long"])
def test_both_layouts(tmp_path: Path, layout: str, protocol: int) -> None:
    path = written(tmp_path / "r.pkl", frames.ranking(**GOOD, layout=layout), protocol)
    found = read_rankings(path)
    assert found.a1.tolist() == GOOD["a1"]
    assert (found.n1, found.n2, found.n_expert_used) == (4, 5, 1)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 6), st.sampled_from(["short", "long"]))
def test_a_ranking_of_counts_is_the_map_of_the_counts(seed: int, n_layer: int, n_expert: int, layout: str) -> None:
    model = identity(n_layer, n_expert, 1 + seed % (n_expert - 1))
    counts = random_counts(seed, model)
    if len(counts.moe_layers) < n_layer:  # the builder's dense layer: rankings have none
        model = identity(n_layer - 1, n_expert, model.n_expert_used)
    a1, a2 = (a[-model.n_layer :] for a in (counts.a1, counts.a2))
    data = frames.dumps(frames.frame(frames.ranking(a1, a2, counts.n1, counts.n2, layout)))
    frame = read_frame(data, "x")
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"ranking-{os.getpid()}.pkl"
    path.write_bytes(data)
    try:
        made = read_rankings(path).to_map(model, "b", where="x")
    finally:
        path.unlink()
    assert frame.n_rows == made.rd.size
    assert made.a1 is not None
    assert np.array_equal(made.a1, a1)
    assert np.array_equal(made.rd, a1 / counts.n1 - a2 / counts.n2)


#
# what is refused
#


def spoiled(**changes: Any) -> dict[str, Any]:
    columns = frames.ranking(**GOOD)
    return {name: values for name, values in (columns | changes).items() if values is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a1": None}, "a1: "),
        ({"layer": np.array(list("abcd"), dtype=object)}, "layer: "),
        ({"risk_diff": None}, "risk_diff: "),
        ({"layer": np.array([0, 0, 1, 2])}, "4 rows are not each of 3 layers and 2 experts once"),
        ({"layer": np.array([0, 0, 0, 0])}, "rows are not each of"),
        ({"expert": np.array([0, 1, 10**9, 1])}, "numbers beyond any model's"),
        ({"expert": np.array([0, 1, -1, 1])}, "expert: "),
        ({"layer": np.array([0, 0.5, 1, 1])}, "layer: "),
        ({"d1": np.array([1.0, 2, 3, np.nan])}, "d1: "),
        ({"d1": np.array([1.0, 2, 3, np.inf])}, "d1: "),
        ({"d1": np.array([1.0, 1, 1, 1])}, "not the same number of tokens in every row"),
        ({"a2": np.zeros(4), "d2": np.full(4, 5.0)}, "a2: "),
        ({"a1": np.zeros(4), "d1": np.zeros(4)}, "a1 \\+ d1: not the same number of tokens"),
        ({"risk_diff": np.full(4, 0.5)}, "risk_diff: "),
        ({"risk_diff": np.full(4, np.nan)}, "risk_diff: "),
        ({name: np.zeros(0) for name in frames.ranking(**GOOD)}, "no rows"),
    ],
)
def test_tables_that_are_no_rankings(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = written(tmp_path / "r.pkl", spoiled(**changes))
    with pytest.raises(FormatError, match=words) as caught:
        read_rankings(path)
    assert str(caught.value).startswith(f"{path}: ")


#
# the published files
#


def published() -> list[Path]:
    return sorted((REFERENCE / "steermoe").glob("*.pkl"))


needs_reference = pytest.mark.skipif(
    not published(),
    reason="the authors' rankings are not in ../shared/reference (noncommercial licence, never shipped)",
)


@needs_reference
def test_published_figures() -> None:
    """The figures in the reference's README come out."""
    text = (REFERENCE / "README.md").read_text("utf-8")
    rows = re.findall(
        r"^\| (\S+) (faithfulness|safety) \| (\d+) x (\d+), (\d+) \| (\d+) / (\d+) \| (\d+) / (\d+) \| (.+) \|$",
        text,
        re.M,
    )
    assert len(rows) == len(published()) == 3
    for model, behaviour, *numbers, first in rows:
        n_layer, n_expert, k, n1, n2, plus, minus = map(int, numbers)
        (path,) = [p for p in published() if model.lower() in p.name.lower() and f"[{behaviour}]" in p.name]
        found = read_rankings(path)
        assert (*found.shape, found.n_expert_used, found.n1, found.n2) == (n_layer, n_expert, k, n1, n2)
        made = found.to_map(_paper_identity(path), behaviour, where=str(path))
        assert (int((made.rd > 0).sum()), int((made.rd < 0).sum())) == (plus, minus)
        top = [f"({layer},{expert},{rd:.6f})" for layer, expert, rd in made.top(3)]
        assert " ".join(top) == first
        frame = read_frame(path.read_bytes(), str(path))
        risk = np.asarray(frame.columns["risk_diff"])
        cells = np.asarray(frame.columns["layer"]), np.asarray(frame.columns["expert"])
        assert np.array_equal(made.rd[cells], risk), "the same float64"


def _paper_identity(path: Path) -> ModelIdentity:
    name, _ = ranking_name(path)
    (paper,) = [paper for paper in PAPER_MODELS if paper.name == name]
    return ModelIdentity(paper.architecture, paper.n_layer, paper.n_expert, paper.n_expert_used, UNKNOWN_ROUTER)


def reference_choice(rows: list[tuple[int, int, float]], k: int, plus: int, minus: int) -> dict[tuple[int, int], int]:
    """What the reference steers, row by row: its rows stand in the order of |RD|."""
    chosen: dict[tuple[int, int], int] = {}
    room: dict[int, int] = {}
    for layer, expert, _ in [row for row in rows if row[2] > 0][:plus]:
        if room.get(layer, 0) < k:
            room[layer] = room.get(layer, 0) + 1
            chosen[layer, expert] = 1
    for layer, expert, _ in [row for row in rows if row[2] < 0][:minus]:
        chosen[layer, expert] = -1
    return chosen


@needs_reference
@pytest.mark.parametrize("path", published(), ids=lambda path: path.stem)
def test_choosing_is_the_reference_s(path: Path) -> None:
    lines = (REFERENCE / "steermoe" / "num_experts.jsonl").read_text("utf-8").splitlines()
    name, behaviour = ranking_name(path)
    numbers: dict[tuple[str, bool], dict[str, int]] = {}
    for line in map(json.loads, lines):
        if (line["model"], line["Task"]) == (name, behaviour):
            side = numbers.setdefault((line["Steering"], bool(line["Reverse"])), {})
            side[line["Activation"]] = line["Num Experts"]
    assert numbers
    frame = read_frame(path.read_bytes(), str(path))
    columns = [np.asarray(frame.columns[column]).tolist() for column in ("layer", "expert", "risk_diff")]
    rows = list(zip(*columns, strict=True))
    made = read_rankings(path).to_map(_paper_identity(path), behaviour, where=str(path))
    k = made.identity.n_expert_used
    cases = [(n["Activated"], n["Deactivated"], reverse) for (_, reverse), n in numbers.items()]
    # more of them, so that the cap of top-k per layer is reached
    cases += [(plus, minus, reverse) for plus, minus in ((40, 0), (150, 60), (300, 20)) for reverse in (False, True)]
    capped = 0
    for plus, minus, reverse in cases:
        signed = [(layer, expert, -rd if reverse else rd) for layer, expert, rd in rows]
        expected = reference_choice(signed, k, plus, minus)
        signs = made.choose(plus, minus, reverse=reverse)
        ours = {(int(i), int(j)): int(signs[i, j]) for i, j in np.argwhere(signs)}
        assert ours == expected
        capped += sum(sign > 0 for sign in ours.values()) < plus
    assert capped, "no case reached the cap"


#
# the command line
#


def test_import_by_the_file_s_name(tmp_path: Path) -> None:
    counts = random_counts(3, identity(16, 64, 8), n1=9, n2=11, moe_layers=tuple(range(16)))
    a = np.zeros((2, 16, 64), dtype=np.int64)
    a[0, :, :8], a[1, :, 8:16] = 9, 11
    assert counts.identity.shape == (16, 64)
    path = written(
        tmp_path / "activations_[allenai--OLMoE-1B-7B-0125-Instruct]_[faithfulness].pkl",
        frames.ranking(a[0], a[1], 9, 11),
    )
    result = run("map", "import", path, "-o", tmp_path / "m.json", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["model_id"] == "allenai/OLMoE-1B-7B-0125-Instruct"
    assert data["model"]["architecture"] == "olmoe"
    assert data["model"]["router_sha256"] == UNKNOWN_ROUTER
    assert (data["n_positive"], data["n_negative"]) == (128, 128)
    assert "not known" in result.stderr
    made = ExpertMap.load(tmp_path / "m.json")
    assert (made.behaviour, made.positive) == ("faithfulness", "document")
    assert "router unknown" in run("map", "show", tmp_path / "m.json").stdout
    assert run("bias", "build", tmp_path / "m.json", "--preset", "faithful", "-o", tmp_path / "b.gguf").exit_code == 0
    other = run("map", "import", path, "--model-id", "x/y", "--arch", "olmoe", "-o", tmp_path / "m.json")
    assert "allenai/OLMoE-1B-7B-0125-Instruct, not of x/y" in other.stderr


def bad_import(*args: Any) -> str:
    result = run("map", "import", *args)
    assert result.exit_code != 0
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_import_says_what_is_missing(tmp_path: Path, tiny_path: Path) -> None:
    path = written(tmp_path / "r.pkl", frames.ranking(**GOOD))
    out = ("-o", tmp_path / "m.json")
    assert "give --model-id" in bad_import(path, *out)
    assert "give --behaviour" in bad_import(path, *out, "--model-id", "x/y")
    assert "give -m MODEL.gguf, or --arch" in bad_import(path, *out, "--model-id", "x/y", "--behaviour", "b")
    assert "leave out --arch" in bad_import(path, *out, "-m", tiny_path, "--arch", "olmoe")
    wrong = bad_import(path, *out, "--model-id", "x/y", "--behaviour", "b", "-m", tiny_path)
    assert "ranks 2 layers of 2 experts, top-1, but the model is olmoe (5 layers, 24 experts" in wrong
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(Vtouch x\ntR.")
    assert "holds the name os.system" in bad_import(tmp_path / "evil.pkl", *out)
    assert not (tmp_path / "m.json").exists()


@pytest.fixture
def tiny_ranking(tmp_path: Path) -> Path:
    """A ranking of the embedded model, as its authors' notebook would have written it."""
    made = ExpertMap.load(ROOT / "expert_maps" / "tiny" / "digits-words.json")
    columns = frames.ranking(made.a1, made.a2, made.n1, made.n2)
    return written(tmp_path / "activations_[tiny--moe]_[digits].pkl", columns)


def test_import_for_a_model_at_hand(tmp_path: Path, tiny_ranking: Path) -> None:
    result = run("map", "import", tiny_ranking, "-m", "tiny", "-o", tmp_path / "m.json")
    assert result.exit_code == 0, result.output
    assert not result.stderr
    shipped = ExpertMap.load(ROOT / "expert_maps" / "tiny" / "digits-words.json")
    made = ExpertMap.load(tmp_path / "m.json")
    assert made.identity == shipped.identity
    assert np.array_equal(made.rd, shipped.rd)
    assert np.array_equal(made.choose(2, 2), shipped.choose(2, 2))


def test_an_unknown_router_needs_force_and_then_steers(tmp_path: Path, tiny_ranking: Path) -> None:
    a_map, bias, bound = tmp_path / "m.json", tmp_path / "b.gguf", tmp_path / "bound.gguf"
    assert run("map", "import", tiny_ranking, "--arch", "olmoe", "-o", a_map).exit_code == 0
    choice = ("bias", "build", a_map, "--activate", 2, "--deactivate", 2, "--reverse")
    ask = ("run", "-m", "tiny", "--temp", 0, "-t", 1, "-p", "Which number comes after three?")

    refused_ = run(*choice, "-m", "tiny", "-o", bias)
    assert refused_.exit_code == 1
    assert "cannot be checked" in refused_.stderr
    assert "add --force" in refused_.stderr
    assert "name it with -m" in run(*choice, "--force", "-o", bias).stderr

    assert run(*choice, "-o", bias).exit_code == 0
    assert read_bias(bias).identity.router_sha256 == UNKNOWN_ROUTER
    assert run(*ask, "--bias", bias).exit_code == 1
    forced = run(*ask, "--bias", bias, "--force")
    assert (forced.exit_code, forced.stdout.strip()) == (0, "four"), forced.output

    made = run(*choice, "-m", "tiny", "--force", "-o", bound)
    assert made.exit_code == 0
    assert "used because" in made.stderr
    assert read_bias(bound).identity.router_sha256 != UNKNOWN_ROUTER
    assert run(*ask, "--bias", bound).stdout.strip() == "four"


def test_force_never_takes_another_shape(tmp_path: Path) -> None:
    path = written(tmp_path / "r.pkl", frames.ranking(**GOOD))
    given_ = ("--model-id", "x/y", "--behaviour", "b", "--arch", "olmoe")
    assert run("map", "import", path, *given_, "-o", tmp_path / "m.json").exit_code == 0
    result = run(
        "bias", "build", tmp_path / "m.json", "--activate", 1, "-m", "tiny", "--force", "-o", tmp_path / "b.gguf"
    )
    assert result.exit_code == 1
    assert "run steermoe detect" in result.stderr


def test_the_unknown_router_matches_no_model() -> None:
    unknown, known = identity(router_sha256=UNKNOWN_ROUTER), identity()
    for one, two in ((unknown, known), (known, unknown)):
        with pytest.raises(ModelMismatchError):
            one.require_same(two, "m.json", "model.gguf")
        (warning,) = one.require_same(two, "m.json", "model.gguf", force=True)
        assert "router unknown" in warning or "router is unknown" in warning


def test_names_of_published_files() -> None:
    tell: Callable[[str], tuple[str, str]] = ranking_name
    assert tell("a/activations_[openai--gpt-oss-20b]_[safety].pkl") == ("openai/gpt-oss-20b", "safety")
    assert tell("activations_[Qwen--Qwen3-30B-A3B]_[custom_dataset]_[rd]_[1]_[29].pkl") == (
        "Qwen/Qwen3-30B-A3B",
        "custom_dataset",
    )
    assert tell("activations.pkl") == ("", "")
