"""Effects of interventions in a map: what they say, and version 2 of the map's file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import Attribution, Effects
from steermoe_local.errors import FormatError
from steermoe_local.maps.effects import PROMOTE, SUPPRESS
from steermoe_local.maps.expert_map import ExpertMap
from tests.support.builders import HEX, identity, table_map
from tests.support.paths import GOLDEN
from tests.support.random_effects import RD, attribution, effects, effects_map, five_effects

ROW = {"layer": 0, "expert": 0, "action": "promote", "effect": 0.5, "effect_se": 0.1, "p": 0.5, "control": False}


#
# what they say
#


def test_tables_have_what_was_tried() -> None:
    found = five_effects().table(PROMOTE, "effect", (2, 4))
    nan = np.nan
    assert np.array_equal(found, [[0.5, nan, nan, -0.25], [0.0625, nan, nan, nan]], equal_nan=True)
    cost = five_effects().table(SUPPRESS, "cost", (2, 4))
    assert np.array_equal(cost, [[-0.01, nan, nan, nan], [0.5, nan, nan, nan]], equal_nan=True)
    controls = five_effects().table(PROMOTE, "control", (2, 4))
    assert np.array_equal(controls, [[0, nan, nan, 1], [0, nan, nan, nan]], equal_nan=True)


def test_significant_by_the_corrected_p() -> None:
    assert five_effects().significant.tolist() == [True, False, False, True, True]
    at_the_level = effects({"layer": 0, "expert": 0, "action": "promote", "p": 0.05})
    assert at_the_level.significant.tolist() == [True]


def test_efficiency_is_bounded_by_the_error_of_the_cost() -> None:
    made = five_effects()
    assert made.efficiency[:2].tolist() == [0.5 / 0.25, 0.0625 / 0.25], (
        "a cost below its error is not known to be lower"
    )
    assert made.efficiency[2] == pytest.approx(-0.25e9)
    assert made.efficiency[4] == -0.625 / 0.125
    free = effects({"layer": 0, "expert": 0, "action": "promote", "effect": 0.5})
    assert np.isnan(free.efficiency).all()


def test_arrays_are_read_only_copies() -> None:
    layer = np.array([0])
    made = dataclasses.replace(effects(ROW), layer=layer)
    layer[0] = 1
    assert made.layer.tolist() == [0]
    with pytest.raises(ValueError, match="read-only"):
        made.effect[0] = 1


#
# the file
#


def test_golden_text() -> None:
    made = effects_map()
    assert made.to_json() == (GOLDEN / "effects-map.json").read_text("utf-8")
    loaded = ExpertMap.load(GOLDEN / "effects-map.json")
    assert loaded.to_json() == made.to_json()
    assert loaded.sha256 == made.sha256
    assert loaded.effects is not None
    assert loaded.effects.rows() == five_effects().rows()
    assert loaded.effects.facts == five_effects().facts


@pytest.mark.parametrize("field", ["logit", "weight", "effects"])
def test_version_two_is_written_where_a_field_needs_it(field: str) -> None:
    only = {name: None for name in ("logit", "weight", "effects") if name != field}
    data = json.loads(effects_map(**only).to_json())
    assert data["version"] == 2
    assert ExpertMap.from_dict(data).to_json() == effects_map(**only).to_json()
    data["version"] = 1
    with pytest.raises(FormatError) as caught:
        ExpertMap.from_dict(data, "m.json")
    assert str(caught.value).startswith(f"m.json: {'attribution' if field == 'effects' else field}: ")
    bare = effects_map(logit=None, weight=None, effects=None)
    assert json.loads(bare.to_json())["version"] == 1
    assert '"logit"' not in bare.to_json()


FLOATS = st.floats(-1e9, 1e9)
ERRORS = st.floats(0, 1e9)


@st.composite
def rows(draw: Any) -> list[dict[str, Any]]:
    """Rows for a model of 2 layers of 4 experts."""
    places = st.tuples(st.integers(0, 1), st.integers(0, 3), st.sampled_from(["promote", "suppress"]))
    found = []
    for layer, expert, action in draw(st.lists(places, min_size=1, max_size=16, unique=True)):
        row = {"layer": layer, "expert": expert, "action": action, "control": draw(st.booleans())}
        row |= {"effect": draw(FLOATS), "effect_se": draw(ERRORS), "p": draw(st.floats(0, 1))}
        if draw(st.booleans()):
            row |= {"cost": draw(FLOATS), "cost_se": draw(ERRORS)}
        if draw(st.booleans()):
            row |= {"confirm": draw(FLOATS), "confirm_se": draw(ERRORS)}
        found.append(row)
    return found


@given(rows(), st.text(max_size=20), st.integers(0, 1 << 53), st.floats(-1e300, 1))
def test_reads_back_exactly(given_rows: list[dict[str, Any]], name: str, seed: int, r2: float) -> None:
    name = name.encode("utf-8", "ignore").decode()
    facts = attribution(response=name, neutral=name, seed=seed, r2={"promote": r2, "suppress": 0})
    made = table_map(RD, effects=Effects.from_rows(facts, given_rows))
    again = ExpertMap.from_dict(json.loads(made.to_json()))
    assert again.effects is not None
    assert again.effects.facts == facts
    assert again.to_json() == made.to_json()
    wanted = [{key: row[key] for key in sorted(row)} for row in given_rows]
    assert [{key: row[key] for key in sorted(row)} for row in again.effects.rows()] == wanted


@given(st.lists(st.floats(-1e9, 1e9), min_size=8, max_size=8), st.sampled_from(["logit", "weight"]))
def test_scores_read_back_exactly(values: list[float], name: str) -> None:
    made = table_map(RD, **{name: np.reshape(values, (2, 4))})
    again = ExpertMap.from_dict(json.loads(made.to_json()))
    assert np.array_equal(getattr(again, name), getattr(made, name))
    assert again.sha256 == made.sha256


def edited(path: str, value: Any) -> dict[str, Any]:
    """The golden map with one value changed, or left out (...)."""
    data: Any = json.loads((GOLDEN / "effects-map.json").read_text("utf-8"))
    at: Any = data
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    for part in parents:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return dict(data)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("effects", ..., "effects, attribution: "),
        ("attribution", ..., "effects, attribution: "),
        ("effects", [], "effects: "),
        ("effects", {}, "effects: "),
        ("effects", None, "effects: "),
        ("effects", "promote", "effects: "),
        ("effects.1", [], "effects: row 1: "),
        ("effects.1", None, "effects: row 1: "),
        ("effects.1.layer", 2, "effects: "),
        ("effects.1.layer", -1, "effects: row 1: layer: -1"),
        ("effects.1.layer", 1.0, "effects: row 1: layer: 1.0"),
        ("effects.1.layer", True, "effects: row 1: layer: True"),
        ("effects.1.layer", 1 << 70, "effects: row 1: layer: "),
        ("effects.1.expert", 4, "effects: "),
        ("effects.1.expert", "0", "effects: row 1: expert: "),
        ("effects.1.action", "promoted", "effects: row 1: action: promoted"),
        ("effects.1.action", 1, "effects: row 1: action: 1"),
        ("effects.1.action", ["promote"], "effects: row 1: action: "),
        ("effects.1.effect", None, "effects: row 1: effect: "),
        ("effects.1.effect", "x" * 5000, "effects: row 1: effect: "),
        ("effects.1.effect", 10**20, "effects: row 1: effect: "),
        ("effects.1.effect", True, "effects: row 1: effect: "),
        ("effects.1.effect", ..., "effects: row 1: "),
        ("effects.1.effect_se", -0.1, "effects: effect_se: "),
        ("effects.1.p", 1.5, "effects: p: "),
        ("effects.1.p", -0.5, "effects: p: "),
        ("effects.1.cost", -2e9, "effects: row 1: cost: "),
        ("effects.1.cost_se", -1, "effects: cost_se: "),
        ("effects.1.cost_se", ..., "effects: cost, cost_se: "),
        ("effects.3.confirm", ..., "effects: confirm, confirm_se: "),
        ("effects.3.confirm_se", -1, "effects: confirm_se: "),
        ("effects.1.control", 0, "effects: row 1: control: "),
        ("effects.1.control", ..., "effects: row 1: "),
        ("effects.1.more", 0, "effects: row 1: "),
        ("effects.1", edited("n1", 1)["effects"][0], "effects: an action on an expert"),
        ("attribution", [], "attribution: "),
        ("attribution.response", 1, "attribution.response: "),
        ("attribution.response", ..., "attribution: "),
        ("attribution.more", 1, "attribution: "),
        ("attribution.items_sha256", "x", "attribution.items_sha256: "),
        ("attribution.n_items", -1, "attribution.n_items: "),
        ("attribution.n_items", 1.5, "attribution.n_items: "),
        ("attribution.n_confirm", 1 << 60, "attribution.n_confirm: "),
        ("attribution.neutral", None, "attribution.neutral: "),
        ("attribution.n_text", True, "attribution.n_text: "),
        ("attribution.steer", "prompt", "attribution.steer: 'prompt'"),
        ("attribution.steer", [], "attribution.steer: "),
        ("attribution.seed", "3", "attribution.seed: "),
        ("attribution.first", None, "attribution.first: "),
        ("attribution.n_draws", {}, "attribution.n_draws: "),
        ("attribution.n_draws", {"promote": 1}, "attribution."),
        ("attribution.n_draws", {"promote": 1, "suppress": 1, "other": 1}, "attribution.n_draws: "),
        ("attribution.n_draws", 128, "attribution.n_draws: "),
        ("attribution.n_draws.promote", 1.5, "attribution.n_draws: 1.5"),
        ("attribution.n_draws.promote", -1, "attribution.n_draws: -1"),
        ("attribution.rate.promote", 1.5, "attribution.rate: 1.5"),
        ("attribution.rate.promote", None, "attribution.rate: None"),
        ("attribution.r2.promote", "0.5", "attribution.r2: 0.5"),
        ("attribution.r2.suppress", ..., "attribution.r2: "),
        ("attribution.r2.promote", 10**400, "attribution.r2: "),
        ("attribution.r2_cost", {"promote": 0.5}, "attribution.r2_cost: "),
        ("attribution.agreement.promote", True, "attribution.agreement: True"),
        ("attribution.stable.promote", 1, "attribution.stable: 1"),
        ("logit", [[0.0] * 4], "logit: not a table of 2 rows of 4"),
        ("logit.0.0", "1", "logit: "),
        ("logit.0.0", None, "logit: "),
        ("weight.0.0", 1e10, "weight: "),
        ("weight", None, "weight: "),
    ],
)
def test_refuses(path: str, value: Any, words: str) -> None:
    data = edited(path, value)
    with pytest.raises(FormatError) as caught:
        ExpertMap.from_dict(data, "m.json")
    message = str(caught.value)
    assert message.startswith(f"m.json: {words}")
    assert "\n" not in message
    assert len(message) < 400


def test_what_may_be_left_out() -> None:
    assert ExpertMap.from_dict(edited("attribution.r2_cost", {})).effects is not None
    row = {name: value for name, value in five_effects().rows()[1].items() if not name.startswith("cost")}
    loaded = ExpertMap.from_dict(edited("effects.1", row)).effects
    assert loaded is not None
    for name in ("cost", "cost_se"):
        assert np.isnan(getattr(loaded, name)).tolist() == [False, True, False, False, False]
    assert loaded.rows()[1] == row


def test_rows_are_of_actions_that_the_facts_know() -> None:
    with pytest.raises(FormatError, match="suppress"):
        effects(ROW | {"action": "suppress"}, actions=("promote",))
    assert effects(ROW, actions=("promote",)).rows()[0]["action"] == "promote"


@pytest.mark.parametrize("name", ["layer", "expert", "action", "effect", "p", "control"])
def test_columns_have_one_length(name: str) -> None:
    made = five_effects()
    with pytest.raises(FormatError, match=f"effects: {name if name != 'layer' else 'expert'}: "):
        dataclasses.replace(made, **{name: np.append(getattr(made, name), getattr(made, name)[:1])})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(value: float) -> None:
    made = five_effects()
    for name in ("effect", "effect_se", "p"):
        with pytest.raises(FormatError, match=name):
            dataclasses.replace(made, **{name: np.full(5, value)})
    with pytest.raises(FormatError, match="action"):
        dataclasses.replace(made, action=np.zeros(5))
    for name in ("logit", "weight"):
        with pytest.raises(FormatError, match=name):
            table_map(RD, **{name: np.full((2, 4), value)})


def test_of_another_model() -> None:
    with pytest.raises(FormatError, match="outside 1 layers of 4"):
        table_map(RD[:1], effects=five_effects())
    with pytest.raises(FormatError, match="logit: not a table of 3 rows"):
        table_map(np.zeros((3, 4)), logit=RD)


def test_facts_are_checked_where_they_are_made() -> None:
    made = attribution()
    assert Attribution.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert attribution(rate={"promote": 1, "suppress": 0}).to_dict()["rate"] == {"promote": 1.0, "suppress": 0.0}
    for bad in ({"r2": {"promote": np.nan, "suppress": 0.0}}, {"items_sha256": HEX[:-1]}, {"steer": "prompt"}):
        with pytest.raises(FormatError, match=next(iter(bad))):
            attribution(**bad)


def test_damaged_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    whole = (GOLDEN / "effects-map.json").read_bytes()
    for at in range(0, len(whole) - 1, 3):
        path.write_bytes(whole[:at])
        with pytest.raises(FormatError):
            ExpertMap.load(path)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with contextlib.suppress(FormatError):
            ExpertMap.load(path)


def test_replaced_maps_keep_them() -> None:
    made = dataclasses.replace(effects_map(), notes="n", identity=identity(2, 4, 1, architecture="qwen3moe"))
    assert made.effects is not None
    assert made.effects.rows() == five_effects().rows()
    assert made.logit is not None
    assert made.logit.tolist() == (np.array(RD) * 2).tolist()
