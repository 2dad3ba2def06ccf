"""A choice of steering, the bias that it comes to, and its form in a saved chat."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import (
    BiasFile,
    ChoiceError,
    ExpertMap,
    FormatError,
    ModelIdentity,
    ModelMismatchError,
    SteerMoEError,
    UsageError,
    read_bias,
    write_bias,
)
from steermoe_local.cli import main
from steermoe_local.steering.old_digests import chat_digest
from steermoe_local.steering.steering import Steering
from tests.support.builders import HEX
from tests.support.paths import ROOT

MAP = ROOT / "expert_maps" / "tiny" / "digits-words.json"
EXPERT_MAP = ExpertMap.load(MAP)
IDENTITY = EXPERT_MAP.identity
OLMOE = ModelIdentity("olmoe", 16, 64, 8, HEX)


def opened(**choice: Any) -> Steering:
    return Steering.open(map_file=MAP, **choice)


def built(steering: Steering) -> BiasFile:
    bias = steering.build()
    assert bias is not None
    return bias


@pytest.fixture
def bias_path(tmp_path: Path) -> Path:
    path = tmp_path / "digits.gguf"
    write_bias(built(opened(activate=8, deactivate=8)), path)
    return path


def olmoe_map(positive: str = "document", negative: str = "memory") -> ExpertMap:
    rd = np.random.default_rng(1).uniform(-1, 1, OLMOE.shape)
    return ExpertMap(OLMOE, "", rd, positive=positive, negative=negative)


#
# the bias
#


@given(
    st.integers(0, 40),
    st.integers(0, 40),
    st.booleans(),
    st.sampled_from([None, "1-2", "0,4", "3"]),
    st.sampled_from([None, 2.5, 0.0, 1.0]),
)
def test_the_bias_is_the_choice(
    activate: int, deactivate: int, reverse: bool, layers: str | None, scale: float | None
) -> None:
    steering = opened(activate=activate, deactivate=deactivate, reverse=reverse, layers=layers, scale=scale)
    numbers = {None: None, "1-2": [1, 2], "0,4": [0, 4], "3": [3]}[layers]
    try:
        signs = EXPERT_MAP.choose(activate, deactivate, reverse=reverse, layers=numbers)
    except ChoiceError as error:
        with pytest.raises(ChoiceError, match=str(error).split(";")[0]):
            steering.build()
        return
    bias = steering.bias_file()
    if not activate and not deactivate:
        assert bias is None
        assert steering.build() is None
        return
    assert bias is not None
    effective = steering.build()
    if not signs.any() or scale == 0:
        assert effective is None
    else:
        assert effective is not None
        assert effective.key == bias.key
    assert bias.identity == IDENTITY
    assert bias.mode == steering.mode == ("hard" if scale is None else "soft")
    assert np.array_equal(bias.dense(), signs * (1.0 if scale is None else scale))
    assert bias.provenance["map_sha256"] == EXPERT_MAP.sha256
    facts = steering.to_dict()
    assert (facts["n_active"], facts["n_inactive"]) == (bias.n_active, bias.n_inactive)


def test_provenance() -> None:
    """The texts that stand in bias files since their first version: files stay the same to the byte."""
    bias = built(opened(activate=8, deactivate=7, reverse=True, layers="1-3"))
    assert bias.provenance == {
        "behaviour": "digits-words",
        "map_sha256": EXPERT_MAP.sha256,
        "choice": '{"activate": 8, "deactivate": 7, "reverse": true, "layers": "1-3"}',
        "tool": EXPERT_MAP.tool,
    }
    assert bias.epsilon == pytest.approx(0.01)
    assert built(opened(activate=1, epsilon=0.5)).epsilon == 0.5
    soft = built(opened(activate=1, scale=2.0))
    assert soft.provenance["choice"] == (
        '{"activate": 1, "deactivate": 0, "reverse": false, "layers": null, "scale": 2.0}'
    )
    preset, warnings = Steering("m", olmoe_map()).with_preset("faithful")
    assert warnings == []
    assert built(preset.changed(scale=1.0)).provenance["choice"] == (
        '{"activate": 0, "deactivate": 50, "reverse": false, "layers": null, "preset": "faithful", '
        '"preset_model": "allenai/OLMoE-1B-7B-0125-Instruct", "scale": 1.0}'
    )


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (["--activate", 8, "--deactivate", 8], {"activate": 8, "deactivate": 8}),
        (["--activate", 3, "--reverse", "--layers", "1-2"], {"activate": 3, "reverse": True, "layers": "1-2"}),
        (["--deactivate", 5, "--mode", "soft"], {"deactivate": 5, "scale": 1.0}),
        (["--deactivate", 5, "--epsilon", 0.5], {"deactivate": 5, "epsilon": 0.5}),
    ],
)
def test_the_command_writes_the_same_bytes(tmp_path: Path, options: list[Any], fields: dict[str, Any]) -> None:
    command = ["bias", "build", MAP, "-o", tmp_path / "a.gguf", *options]
    done = CliRunner().invoke(main, [str(arg) for arg in command])
    assert done.exit_code == 0, done.output
    write_bias(built(opened(**fields)), tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_for_another_router() -> None:
    other = ModelIdentity("olmoe", *IDENTITY.shape, IDENTITY.n_expert_used, HEX)
    steering = opened(activate=2)
    assert steering.identity == IDENTITY
    with pytest.raises(ModelMismatchError, match=r"digits-words\.json: .* here "):
        steering.check(other, "here")
    assert "used because it was forced" in steering.check(other, "here", force=True)[0]
    bias = steering.build(other)
    assert bias is not None
    assert bias.identity == other
    assert steering.check(IDENTITY, "here") == []
    assert Steering("nothing").check(other, "here") == []


#
# changes
#


def test_changed() -> None:
    steering = opened(activate=8)
    changed = steering.changed(deactivate=4, scale=2.5, layers="1")
    assert (steering.deactivate, steering.scale, steering.layers) == (0, None, None)
    assert (changed.activate, changed.deactivate, changed.scale, changed.layers) == (8, 4, 2.5, "1")
    assert changed.expert_map is steering.expert_map
    assert changed.changed(scale=None).mode == "hard"
    assert steering.changed(reverse=True).side == "words"
    assert steering.side == "digits"
    with pytest.raises(UsageError, match=r"^strength: "):
        steering.changed(strength=1)


def test_a_preset_stays_on_its_side() -> None:
    preset, _ = Steering("m", olmoe_map()).with_preset("faithful")
    assert (preset.activate, preset.deactivate, preset.preset_model) == (0, 50, "allenai/OLMoE-1B-7B-0125-Instruct")
    with pytest.raises(UsageError, match="preset faithful: "):
        preset.changed(reverse=True)
    own = preset.changed(deactivate=20)
    assert own.preset is None
    assert "preset" not in own.choice
    assert own.changed(reverse=True).reverse
    with pytest.raises(UsageError, match=r"^m: .* preset safe"):
        Steering("m", olmoe_map("comply", "refuse")).with_preset("safe")
    _, warnings = Steering("m", olmoe_map("refuse", "comply")).with_preset("faithful")
    (warning,) = warnings
    assert warning.startswith("m: ")
    for value in ("preset safe", "faithful"):
        assert value in warning
    with pytest.raises(UsageError, match="no numbers"):
        opened().with_preset("safe")


def test_a_bias_file_is_taken_as_it_is(bias_path: Path) -> None:
    steering = Steering.open(bias=bias_path)
    assert steering.name == "digits"
    assert steering.mode == "hard"
    assert steering.side == ""
    assert np.array_equal(built(steering).dense(), read_bias(bias_path).dense())
    with pytest.raises(UsageError, match=r"activate: digits .*--map MAP"):
        steering.changed(activate=3)
    with pytest.raises(UsageError, match="scale: digits "):
        steering.changed(scale=2.0)
    with pytest.raises(UsageError, match="preset safe: digits "):
        steering.with_preset("safe")
    assert steering.changed(name="other").name == "other"
    with pytest.raises(UsageError, match="both steer"):
        Steering("x", EXPERT_MAP, steering.bias)


def test_open() -> None:
    assert opened().name == "digits-words"
    assert opened(name="mine").name == "mine"
    assert Steering.open(map_file=str(MAP)).path == MAP
    for nothing in (opened(), Steering("nothing")):
        assert nothing.build() is None
        assert nothing.bias_file() is None
    with pytest.raises(UsageError, match="not both"):
        Steering.open()
    with pytest.raises(UsageError, match="not both"):
        Steering.open(map_file=MAP, bias=MAP)
    with pytest.raises(FormatError, match=re.escape(f"{__file__}: ")):
        Steering.open(map_file=__file__)


#
# saved
#


def test_saved_and_opened_again(tmp_path: Path, bias_path: Path) -> None:
    path = tmp_path / "m.json"
    shutil.copy(MAP, path)
    choices: list[dict[str, Any]] = [{"activate": 8, "deactivate": 2}, {"activate": 3, "scale": 2.0, "layers": "1-3"}]
    for steering in [Steering.open(map_file=path, name="a", **choice) for choice in choices] + [
        Steering.open(map_file=path, deactivate=3, reverse=True, epsilon=0.5),
        Steering.open(map_file=path),
        Steering.open(bias=bias_path),
    ]:
        data = json.loads(json.dumps(steering.to_dict()))
        again = Steering.from_dict(data)
        assert again.name == steering.name
        assert again.path == steering.path
        assert again.to_dict() == data
        before, after = steering.build(), again.build()
        assert (before is None) == (after is None)
        if before is not None and after is not None:
            assert before.key == after.key
            assert np.array_equal(before.dense(), after.dense())
            assert (before.epsilon, before.provenance) == (after.epsilon, after.provenance)


def test_a_saved_bias_of_an_earlier_version(tmp_path: Path, bias_path: Path) -> None:
    """Saved chats had a digest that covers the provenance; the file is recognized by it as well as by its key."""
    bias = read_bias(bias_path)
    data = Steering.open(bias=bias_path).to_dict()
    assert data["bias_digest"] == bias.key
    old = data | {"bias_digest": chat_digest(bias)}
    assert old != data
    assert Steering.from_dict(old).to_dict() == data
    write_bias(replace(bias, provenance={"tool": "another"}), bias_path)
    assert Steering.from_dict(data).bias is not None
    with pytest.raises(FormatError, match="not the file"):
        Steering.from_dict(old)


def test_a_ready_bias_file_that_changes_nothing(tmp_path: Path) -> None:
    empty = BiasFile(IDENTITY, "hard", {0: np.zeros(IDENTITY.n_expert)}, provenance={"tool": "x"})
    write_bias(empty, tmp_path / "empty.gguf")
    steering = Steering.open(bias=tmp_path / "empty.gguf")
    assert steering.build() is None
    assert steering.bias_file() is steering.bias
    assert Steering.from_dict(steering.to_dict()).build() is None


def test_another_layout_of_the_same_map(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    shutil.copy(MAP, path)
    data = Steering.open(map_file=path, activate=2).to_dict()
    path.write_text(json.dumps(json.loads(path.read_text("utf-8"))), "utf-8")
    assert Steering.from_dict(data).activate == 2


def test_the_file_is_gone_or_another(tmp_path: Path, bias_path: Path) -> None:
    path = tmp_path / "m.json"
    shutil.copy(MAP, path)
    from_map = Steering.open(map_file=path, activate=2).to_dict()
    from_bias = Steering.open(bias=bias_path).to_dict()
    path.write_bytes((MAP.parent / "document-memory.json").read_bytes())
    with pytest.raises(FormatError, match=r"^chat: steering\.map: .*m\.json: not the"):
        Steering.from_dict(from_map, "chat: steering")
    write_bias(built(opened(activate=1)), bias_path)
    with pytest.raises(FormatError, match="not the file"):
        Steering.from_dict(from_bias)
    before = built(opened(activate=8, deactivate=8))
    write_bias(BiasFile.from_signs(-before.signs, before.identity, before.epsilon, before.provenance), bias_path)
    with pytest.raises(FormatError, match="not the file"):  # though it says to come from the same choice
        Steering.from_dict(from_bias)
    path.unlink()
    bias_path.unlink()
    with pytest.raises(FormatError, match=r"m\.json: no such file"):
        Steering.from_dict(from_map)
    with pytest.raises(FormatError, match="no such file"):
        Steering.from_dict(from_bias)


def test_made_in_memory_cannot_be_opened_again() -> None:
    data = Steering("m", EXPERT_MAP, activate=2).to_dict()
    assert data["map"] is None
    with pytest.raises(FormatError, match="'m'"):
        Steering.from_dict(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FIELDS = sorted(opened(activate=2).to_dict())


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3), st.sets(st.sampled_from(FIELDS)))
def test_damaged(changes: dict[str, Any], missing: set[str]) -> None:
    data = opened(activate=2).to_dict() | changes
    data = {name: value for name, value in data.items() if name not in missing}
    try:
        steering = Steering.from_dict(data)
    except FormatError:
        return
    assert steering.expert_map is not None
    with contextlib.suppress(SteerMoEError):
        steering.build()


@given(JSON)
def test_no_steering_at_all(data: Any) -> None:
    with pytest.raises(FormatError, match=r"^steering"):
        Steering.from_dict(data)


@pytest.mark.parametrize("path", ["/dev/zero", ".", "", "a\0b"])
def test_paths_that_are_no_files(path: str) -> None:
    with pytest.raises(FormatError):
        Steering.from_dict(opened(activate=2).to_dict() | {"map": path})
