"""What other files and maps say about effects of interventions: exports, cards, comparisons."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import ModelMismatchError
from steermoe_local.maps.cards import render_card
from steermoe_local.maps.effect_comparison import compare_effects
from steermoe_local.maps.effects import ACTIONS, ATTRIBUTE, COLUMNS
from steermoe_local.maps.export import plain_ranking, steermoe_csv
from tests.support.builders import table_map
from tests.support.random_effects import RD, attribution, effects, effects_map, five_effects, random_effects

BARE = {"effects": None, "logit": None, "weight": None}


def test_the_first_are_significant_and_large() -> None:
    assert five_effects().first().tolist() == [3, 4, 0, 2, 1]
    assert five_effects().first(2).tolist() == [3, 4]
    assert five_effects().numbers(1) == {"n": 3, "n_significant": 1, "n_random": 1, "n_random_significant": 0}
    assert five_effects().numbers(-1) == {"n": 2, "n_significant": 2, "n_random": 0, "n_random_significant": 0}


def test_at_an_expert() -> None:
    found = five_effects().at(1, 0)
    assert set(found) == set(ACTIONS)
    assert set(found["suppress"]) == set(COLUMNS)
    assert (found["suppress"]["effect"], found["suppress"]["significant"]) == (0.75, True)
    assert "confirm" not in found["promote"]
    assert set(five_effects().at(0, 3)) == {"promote"}
    assert five_effects().at(1, 3) == {}


#
# exports
#


def test_csv_has_them_behind_the_columns_of_the_frames() -> None:
    made = effects_map()
    rows = list(csv.DictReader(io.StringIO(steermoe_csv(made))))
    bare = list(csv.DictReader(io.StringIO(steermoe_csv(effects_map(**BARE)))))
    columns, frame = list(rows[0]), list(bare[0])
    assert columns[: len(frame)] == frame
    assert columns[len(frame) :] == ["logit", "weight", *(f"{a}_{name}" for a in ACTIONS for name in COLUMNS)]
    assert [{name: row[name] for name in frame} for row in rows] == bare
    assert made.effects is not None
    assert made.logit is not None
    for row in rows:
        place = int(row["layer"]), int(row["expert"])
        assert float(row["logit"]) == made.logit[place]
        for action in ACTIONS:
            tried = made.effects.at(*place).get(action, {})
            for name in COLUMNS:
                assert row[f"{action}_{name}"] == (repr(tried[name]) if name in tried else "")


def test_plain_json_has_them() -> None:
    made = effects_map()
    data = json.loads(plain_ranking(made))
    assert made.effects is not None
    assert made.weight is not None
    assert data["attribution"] == made.effects.facts.to_dict()
    for entry in data["experts"]:
        place = entry["layer"], entry["expert"]
        assert entry["weight"] == made.weight[place]
        assert {name: entry[name] for name in ACTIONS if name in entry} == made.effects.at(*place)
    bare = json.loads(plain_ranking(effects_map(**BARE)))
    assert "attribution" not in bare
    assert set(bare["experts"][0]) == {"layer", "expert", "rd"}


#
# cards
#


def test_card_tells_effects() -> None:
    card = render_card(effects_map(), "a/b", license="MIT")
    for fact in (
        "interventions on 24 pairs:\n",
        "- promote: 1 of 3 experts significant at 5%, R2 0.75 on held-out draws\n",
        "- suppress: 2 of 2 experts significant at 5%, R2 0.50 on held-out draws; **not stable**\n",
        "| 1 | 0 | suppress | +0.7500 | 0.1250 | 0 | 0.5000 | -0.9000 |\n",
        "| 0 | 3 | promote (random control) | -0.2500 |",
    ):
        assert fact in card
    assert card.index("| 1 | 0 | suppress |") < card.index("| 0 | 0 | promote |") < card.index("(random control)")
    assert "steermoe attribute" not in card
    assert "\n\n\n" not in card
    assert max(map(len, card.splitlines())) < 200
    one = render_card(effects_map(effects=random_effects((2, 4), actions=("suppress",))), "a/b", license="MIT")
    assert "- promote" not in one


def test_card_without_effects_names_the_command() -> None:
    card = render_card(table_map(RD), "a/b", license="MIT")
    assert f"`{ATTRIBUTE}`" in card
    assert "| action |" not in card
    assert "\n\n\n" not in card


@given(st.text(max_size=30))
def test_a_tasks_name_cannot_break_a_card(text: str) -> None:
    found = effects({"layer": 0, "expert": 0, "action": "promote"}, response=text, neutral=text)
    card = render_card(effects_map(effects=found), "a/b", license="MIT")
    assert card.count("\n## ") == render_card(effects_map(), "a/b", license="MIT").count("\n## ")


#
# comparisons
#


def test_comparison_by_hand() -> None:
    rows = five_effects().rows()
    rows[0] |= {"effect": -0.5}  # the other side, significantly
    rows[3] |= {"p": 0.5}
    del rows[2]
    found = compare_effects(effects_map(), effects_map(effects=effects(*rows)))
    assert found is not None
    promote, suppress = found["promote"], found["suppress"]
    assert (promote.n, promote.n_significant, promote.n_same_sign) == (2, 1, 0)
    assert (promote.pearson, promote.spearman) == pytest.approx((-1, -1))
    assert (suppress.n, suppress.n_significant, suppress.n_same_sign) == (2, 1, 1)
    assert (suppress.pearson, suppress.spearman) == pytest.approx((1, 1))


def test_comparison_of_what_both_tried() -> None:
    assert compare_effects(effects_map(), effects_map(effects=None)) is None
    other = effects({"layer": 1, "expert": 3, "action": "promote", "effect": 0.5})
    found = compare_effects(effects_map(), effects_map(effects=other))
    assert found is not None
    assert [(of.n, of.pearson, of.spearman) for of in found.values()] == [(0, 0, 0), (0, 0, 0)]
    with pytest.raises(ModelMismatchError):
        compare_effects(effects_map(), table_map(np.zeros((1, 4))))
    large = table_map(np.zeros((48, 128)), effects=random_effects((48, 128), n=6144))
    same = compare_effects(large, large)
    assert same is not None
    assert {of.n for of in same.values()} == {6144}
    assert attribution() == five_effects().facts
