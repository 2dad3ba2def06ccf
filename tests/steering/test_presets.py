"""Presets: the paper's numbers of experts, found by a map's model, and steering to one side only."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from click.testing import CliRunner, Result

from steermoe_local import ExpertMap, ModelIdentity, UsageError, read_bias
from steermoe_local.cli import main
from steermoe_local.steering.presets import PAPER_MODELS, PRESETS, PaperModel, check_sides, preset_for
from tests.support import random_models
from tests.support.builders import DATE, HEX, TOOL
from tests.support.gguf_copy import copy_model
from tests.support.low_level import identity_of
from tests.support.paths import ROOT
from tests.support.random_models import RandomModel, write_random_model

NAMES = [model.name.split("/")[1] for model in PAPER_MODELS]
SIDES = {"faithful": ("document", "memory"), "safe": ("refuse", "comply")}


def run(*args: Any, **kwargs: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], **kwargs)


def identity(model: PaperModel, **changes: Any) -> ModelIdentity:
    fields = {"n_layer": model.n_layer, "n_expert": model.n_expert, "n_expert_used": model.n_expert_used}
    return ModelIdentity(**({"architecture": model.architecture, "router_sha256": HEX} | fields | changes))


def save_map(path: Path, model: ModelIdentity, preset: str, **changes: Any) -> ExpertMap:
    """A map with random scores, half of each sign in every layer."""
    scores = np.random.default_rng(3).uniform(0.01, 1, model.shape)
    scores[:, ::2] *= -1
    positive, negative = SIDES[preset]
    fields: dict[str, Any] = {"behaviour": "test", "positive": positive, "negative": negative}
    expert_map = ExpertMap(model, rd=scores, created=DATE, tool=TOOL, **(fields | changes))
    expert_map.save(path)
    return expert_map


#
# the table
#


def test_the_table() -> None:
    """arXiv 2509.09660, table of steered experts; its totals are layers times experts."""
    totals = {model.name: model.n_layer * model.n_expert for model in PAPER_MODELS}
    assert totals == {
        "Qwen/Qwen3-30B-A3B": 6144,
        "allenai/OLMoE-1B-7B-0125-Instruct": 1024,
        "microsoft/Phi-3.5-MoE-instruct": 512,
        "mistralai/Mixtral-8x7B-Instruct-v0.1": 256,
        "openai/gpt-oss-120b": 4608,
        "openai/gpt-oss-20b": 768,
    }
    assert [model.faithful for model in PAPER_MODELS] == [(0, 500), (0, 50), (10, 75), (10, 100), (5, 100), (10, 50)]
    assert [model.safe for model in PAPER_MODELS] == [(15, 0), (5, 0), (5, 0), (20, 0), (5, 0), (5, 0)]
    assert len({(m.architecture, m.n_layer, m.n_expert, m.n_expert_used) for m in PAPER_MODELS}) == 6


def test_the_page_and_the_command_have_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "presets.md").read_text("utf-8")
    rows = [re.split(r" *\| *", line.strip("| ")) for line in page.splitlines() if line.startswith("|")]
    shown = [line.split() for line in run("presets").stdout.splitlines()]
    assert shown[0] == rows[0]
    for model, row, line in zip(PAPER_MODELS, rows[2:], shown[1:], strict=True):
        numbers = [f"+{plus} -{minus}" for plus, minus in (model.faithful, model.safe)]
        facts = [model.name, model.architecture, model.n_layer, model.n_expert, model.n_expert_used]
        assert row == [*map(str, facts), *numbers]
        assert line == " ".join(row).split()
    block = re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block
    exec(block[1], {})
    assert capsys.readouterr().out == "0 50\n"
    data = json.loads(run("presets", "--json").stdout)
    assert [entry["name"] for entry in data] == [model.name for model in PAPER_MODELS]
    assert data[0]["safe"] == {"activate": 15, "deactivate": 0}


@pytest.mark.parametrize("model", PAPER_MODELS, ids=NAMES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_is_known_by_its_routing(model: PaperModel, preset: str) -> None:
    numbers = preset_for(preset, identity(model))
    assert (numbers.name, numbers.model) == (preset, model.name)
    assert (numbers.n_activate, numbers.n_deactivate) == getattr(model, preset)
    for change in ({"architecture": "dots1"}, {"n_layer": 47}, {"n_expert": 127}, {"n_expert_used": 1}):
        with pytest.raises(UsageError) as caught:
            preset_for(preset, identity(model, **change))
        assert str(caught.value).endswith(f" {', '.join(NAMES)}")
        assert identity(model, **change).short in str(caught.value)


def test_unknown_preset() -> None:
    for name in ("unsafe", "Safe", ""):
        with pytest.raises(UsageError, match=rf"^'{name}'.* faithful, safe$"):
            preset_for(name, identity(PAPER_MODELS[0]))


#
# the sides
#


@pytest.mark.parametrize(
    ("preset", "positive", "negative"),
    [
        ("safe", "comply", "refuse"),
        ("safe", "unsafe", "safe"),
        ("safe", "Unsafe reply", ""),
        ("safe", "", "refusal"),
        ("safe", "a", "safe"),
        ("faithful", "memory", "document"),
        ("faithful", "", "faithful"),
    ],
)
def test_sides_the_other_way_round(preset: str, positive: str, negative: str) -> None:
    with pytest.raises(UsageError, match=rf"m\.json: .* preset {preset} "):
        check_sides(preset, "test", positive, negative, "m.json")


@pytest.mark.parametrize(
    ("preset", "behaviour", "positive", "negative"),
    [
        ("safe", "refuse-comply", "refuse", "comply"),
        ("safe", "refuse-comply", "", ""),
        ("safe", "safety", "refuses harmful requests", "answers harmful requests"),
        ("safe", "x", "refuses", "does not refuse"),
        ("safe", "x", "doesn't comply", "complies"),
        ("faithful", "squad", "document", "no document"),
        ("faithful", "squad", "uses the context", "ignores the context"),
        ("faithful", "digits-words", "digits", "words"),
        ("safe", "", "", ""),
    ],
)
def test_sides_that_are_right_or_say_nothing(preset: str, behaviour: str, positive: str, negative: str) -> None:
    assert check_sides(preset, behaviour, positive, negative, "m.json") == []


def test_a_map_for_the_other_preset() -> None:
    warning = "m.json: looks like a map for preset faithful, and the numbers are those of safe"
    assert check_sides("safe", "x", "document", "memory", "m.json") == [warning]
    assert check_sides("safe", "faithfulness", "", "", "m.json") == [warning]
    assert check_sides("safe", "faithfulness and safety", "", "", "m.json") == []
    assert len(check_sides("faithful", "refuse-comply", "", "", "m.json")) == 1


#
# the command line
#


@pytest.mark.parametrize("model", PAPER_MODELS, ids=NAMES)
@pytest.mark.parametrize("preset", PRESETS)
def test_bias_build(model: PaperModel, preset: str, tmp_path: Path) -> None:
    expert_map = save_map(tmp_path / "m.json", identity(model), preset)
    done = run("bias", "build", tmp_path / "m.json", "-o", tmp_path / "b.gguf", "--preset", preset)
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    bias = read_bias(tmp_path / "b.gguf")
    assert (bias.signs == expert_map.choose(*getattr(model, preset))).all()
    assert bias.n_inactive == getattr(model, preset)[1]
    choice = json.loads(bias.provenance["choice"])
    assert (choice["preset"], choice["preset_model"]) == (preset, model.name)
    assert (choice["activate"], choice["deactivate"]) == getattr(model, preset)


def test_layers_and_the_soft_rule_go_with_a_preset(tmp_path: Path) -> None:
    expert_map = save_map(tmp_path / "m.json", identity(PAPER_MODELS[1]), "safe")
    flags = ["--preset", "safe", "--layers", "3-9", "--mode", "soft", "--scale", "2"]
    assert run("bias", "build", tmp_path / "m.json", "-o", tmp_path / "b.gguf", *flags).exit_code == 0
    assert (read_bias(tmp_path / "b.gguf").dense() == 2 * expert_map.choose(5, 0, layers=range(3, 10))).all()


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--preset", "safe", "--activate", "3"], 2, "--preset gives"),
        (["--preset", "safe", "--activate", "0"], 2, "--preset gives"),
        (["--preset", "safe", "--deactivate", "3"], 2, "--preset gives"),
        (["--preset", "safe", "--reverse"], 2, "--preset gives"),
        (["--preset", "unsafe"], 2, "'unsafe'"),
        ([], 2, "or give a --preset"),
    ],
)
def test_flags_that_exclude_each_other(flags: list[str], status: int, words: str, tmp_path: Path) -> None:
    save_map(tmp_path / "m.json", identity(PAPER_MODELS[1]), "safe")
    done = run("bias", "build", tmp_path / "m.json", "-o", tmp_path / "b.gguf", *flags)
    assert done.exit_code == status
    assert words in done.stderr
    assert not (tmp_path / "b.gguf").exists()


def test_maps_that_a_preset_refuses(tmp_path: Path) -> None:
    model = PAPER_MODELS[1]
    save_map(tmp_path / "turned.json", identity(model), "safe", positive="comply", negative="refuse")
    save_map(tmp_path / "unknown.json", identity(model, n_layer=5), "safe")
    for name, words in (("turned", "other way round"), ("unknown", "no numbers for olmoe (5 layers")):
        done = run("bias", "build", tmp_path / f"{name}.json", "-o", tmp_path / "b.gguf", "--preset", "safe")
        assert done.exit_code == 2
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "b.gguf").exists()
    save_map(tmp_path / "other.json", identity(model), "faithful")
    done = run("bias", "build", tmp_path / "other.json", "-o", tmp_path / "b.gguf", "--preset", "safe", "--json")
    assert done.exit_code == 0
    assert done.stderr.startswith("warning: ")
    assert "preset faithful" in done.stderr
    assert json.loads(done.stdout)["n_active"] == read_bias(tmp_path / "b.gguf").n_active


@pytest.fixture(scope="module")
def small_olmoe(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with the layers and experts of OLMoE-1B-7B, and the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("olmoe")
    with mock.patch.object(random_models, "N_VOCAB", 1280):  # of the embedded model
        plain = write_random_model(folder / "plain.gguf", RandomModel("olmoe", n_layer=16, n_expert=64, k=8))
    (path,) = copy_model(plain, folder / "olmoe.gguf", tokenizer_of=tiny_path)
    return path


def test_run_by_map_and_preset(small_olmoe: Path, tmp_path: Path) -> None:
    found = tmp_path / "m.json"
    save_map(found, identity_of(small_olmoe), "faithful")
    bias = tmp_path / "b.gguf"
    assert run("bias", "build", found, "-o", bias, "--preset", "faithful", "-m", small_olmoe).exit_code == 0
    # sampled, as the likeliest token of random weights is often the same
    base = ["run", "-m", small_olmoe, "-t", 1, "-c", 128, "--temp", 2, "-s", 1, "-n", 24, "-p", "one two", "--json"]
    by_map = run(*base, "--map", found, "--preset", "faithful")
    assert by_map.exit_code == 0, by_map.stderr
    results = [json.loads(done.stdout) for done in (by_map, run(*base, "--bias", bias), run(*base))]
    assert results[0]["text"] == results[1]["text"] != results[2]["text"]
    steering = results[0]["steering"]
    assert (steering["map"], steering["n_active"], steering["n_inactive"]) == (str(found), 0, 50)
    assert json.loads(steering["choice"])["preset_model"] == "allenai/OLMoE-1B-7B-0125-Instruct"
    # what is said wins over the environment
    again = run(*base, "--map", found, "--preset", "faithful", env={"STEERMOE_BIAS": "missing.gguf"})
    assert json.loads(again.stdout)["text"] == results[0]["text"]


def test_run_says_what_is_wrong(small_olmoe: Path, tmp_path: Path) -> None:
    found, foreign = tmp_path / "m.json", tmp_path / "foreign.json"
    save_map(found, identity_of(small_olmoe), "faithful")
    save_map(foreign, identity(PAPER_MODELS[1]), "faithful")
    base = ["run", "-m", small_olmoe, "-t", 1, "-c", 128, "--temp", 0, "-n", 1, "-p", "one two"]
    for flags, status, words in (
        (
            ["--map", found],
            2,
            "--activate N, --deactivate N or both",
        ),
        (["--preset", "safe"], 2, "--map MAP"),
        (["--map", found, "--preset", "safe", "--bias", "b.gguf"], 2, "--bias and --map"),
        (["--map", foreign, "--preset", "faithful"], 1, f"{foreign}: made for olmoe"),
        (["--map", tmp_path / "none.json", "--preset", "faithful"], 1, "none.json"),
    ):
        done = run(*base, *flags)
        assert done.exit_code == status, done.output
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    done = run(*base, "--map", foreign, "--preset", "faithful", "--force")
    assert done.exit_code == 0
    assert done.stderr.startswith(f"warning: {foreign}: made for olmoe")


def test_build_and_show_can_check_the_model(small_olmoe: Path, tmp_path: Path) -> None:
    found, bias = tmp_path / "m.json", tmp_path / "b.gguf"
    save_map(found, identity(PAPER_MODELS[1]), "safe")
    done = run("bias", "build", found, "-o", bias, "--preset", "safe", "-m", small_olmoe)
    assert done.exit_code == 1
    assert f"{found}: made for olmoe" in done.stderr
    assert "steermoe detect" in done.stderr
    assert not bias.exists()
    assert run("bias", "build", found, "-o", bias, "--preset", "safe").exit_code == 0
    assert run("bias", "show", bias).exit_code == 0
    done = run("bias", "show", bias, "-m", small_olmoe)
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"{bias}: made for olmoe" in done.stderr
