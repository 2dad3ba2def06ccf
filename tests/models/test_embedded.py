"""The embedded model and its data: what ships is what the generator makes, and held-out prompts are unseen ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from steermoe_local import UsageError, load_pairs, model_info
from steermoe_local.cli import main
from steermoe_local.cli.options.positionals import names_model
from steermoe_local.models import embedded
from steermoe_local.models.embedded import behaviour, behaviours, card, data_folder, embedded_model
from steermoe_local.models.local_models import LocalModels, resolve_model
from tests.support.paths import ROOT


def test_tiny_is_the_embedded_model_and_paths_stay_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model("tiny") == data_folder() / "tiny-moe.gguf"
    assert resolve_model("some/model.gguf") == Path("some/model.gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").touch()
    assert resolve_model("tiny") == Path("tiny"), "a file of that name goes first"


def test_a_second_model_that_ships_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.gguf"
    shutil.copy(embedded_model(), other)
    monkeypatch.setattr(embedded, "_FILES", {"tiny": "tiny-moe.gguf", "other": str(other)})
    assert resolve_model("other") == other
    found = LocalModels.scan([tmp_path / "none"])
    assert found.names()[:2] == ["tiny", "other"]
    assert [found.name_of(model) for model in found.models()[:2]] == ["tiny", "other"]
    assert names_model("other", ())
    refused = CliRunner().invoke(main, ["pull", "other"])
    assert refused.exit_code != 0
    assert "other: ships with the program" in refused.output


def test_it_is_what_the_card_says() -> None:
    info = model_info(embedded_model())
    sizes = card()["sizes"]
    assert info.architecture == card()["architecture"] == "olmoe"
    assert (info.n_layer, info.n_expert, info.n_expert_used) == (sizes["layers"], sizes["experts"], sizes["top_k"])
    assert info.file_type == "F16"
    assert info.size_bytes <= 16e6
    assert info.chat_template
    assert not info.obstacle
    for b in behaviours():
        assert b.planted_positive
        assert b.planted_negative
        assert not b.planted_positive & b.planted_negative
        for layer, expert in b.planted_positive | b.planted_negative:
            assert 0 <= layer < info.n_layer
            assert 0 <= expert < info.n_expert


@pytest.mark.parametrize("name", ["digits-words", "document-memory", "refuse-comply"])
def test_held_out_prompts_are_not_in_the_pairs(name: str) -> None:
    b = behaviour(name)
    pairs = load_pairs(b.pairs)
    heldout = [json.loads(line) for line in b.heldout.read_text("utf-8").splitlines()]
    assert len(heldout) >= 100
    asked = {pair.positive[-2].content for pair in pairs if not isinstance(pair.positive, str)}
    assert len(asked) == len(pairs)
    for item in heldout:
        assert item["messages"][-1]["content"] not in asked
        assert item["positive"] != item["negative"]
    for pair in pairs:
        assert pair.positive[:-1] == pair.negative[:-1], "the same prompt, two replies"


def test_an_unknown_behaviour_is_refused() -> None:
    with pytest.raises(UsageError, match="digits-words"):
        behaviour("sarcasm")


def test_the_data_files_are_what_the_generator_makes(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; import data; data.write_files(Path(sys.argv[1]))"
    folder = ROOT / "examples" / "tiny_moe"
    subprocess.run([sys.executable, "-B", "-c", script, str(tmp_path)], cwd=folder, check=True)
    made = sorted(path.name for path in tmp_path.glob("*.jsonl"))
    by_hand = {"benign.jsonl", "refusals.labelled.jsonl"}
    assert set(made) == {path.name for path in data_folder().glob("*.jsonl")} - by_hand
    for name in made:
        assert (tmp_path / name).read_bytes() == (data_folder() / name).read_bytes(), name
