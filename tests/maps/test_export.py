"""Maps for other tools, the schema, the maps that ship, and cards."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.cli import main
from steermoe_local.errors import ChoiceError, FormatError, UsageError
from steermoe_local.identity import UNKNOWN_ROUTER
from steermoe_local.maps.cards import render_card
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.export import easysteer_config, plain_ranking, steermoe_csv
from steermoe_local.maps.stability import Stability, UntilStable
from steermoe_local.model_files.model_info import model_info
from steermoe_local.models.embedded import behaviours
from steermoe_local.pairs.pairs import load_pairs, pairs_digest
from tests.support.builders import DATE, identity, random_counts, table_map
from tests.support.paths import GOLDEN, ROOT
from tests.support.random_effects import effects_map

MAPS = ROOT / "expert_maps"
SHIPPED = sorted(MAPS.glob("*/*.json"))
TABLE = [[0.5, -0.4, 0.3, 0.0], [-0.9, 0.5, 0.1, 0.2]]
NOT_A_MAP = {"map.schema.json"}


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def schema() -> Any:
    data = json.loads((MAPS / "map.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(data)
    return jsonschema.Draft202012Validator(data)


def counted(seed: int = 4) -> ExpertMap:
    return ExpertMap.from_counts(
        random_counts(seed), positive="digits", negative="words", license="CC0-1.0", created=DATE
    )


#
# EasySteer
#


def effect(config: dict[str, Any], n_expert: int) -> list[int]:
    """What EasySteer's moe_router does with one layer's entry: its mode says where expert_ids belong."""
    active, inactive = list(config.get("activate_ids", [])), list(config.get("deactivate_ids", []))
    {"activate": active, "deactivate": inactive}[config["mode"]].extend(config["expert_ids"])
    return [(e in active) - (e in inactive) for e in range(n_expert)]


def test_easysteer_by_hand() -> None:
    signs = np.array([[1, -1, 0, -1], [0, 0, 0, 0], [0, -1, -1, 0], [0, 0, 0, 1]], dtype=np.int8)
    assert json.loads(easysteer_config(signs)) == {
        "layer_configs": {
            "0": {"mode": "activate", "expert_ids": [0], "deactivate_ids": [1, 3]},
            "2": {"mode": "deactivate", "expert_ids": [1, 2]},
            "3": {"mode": "activate", "expert_ids": [3]},
        }
    }
    assert json.loads(easysteer_config(signs, 0.5))["layer_configs"]["2"]["epsilon"] == 0.5
    with pytest.raises(ChoiceError, match="no expert"):
        easysteer_config(np.zeros((2, 4), dtype=np.int8))


@given(st.lists(st.lists(st.sampled_from([-1, 0, 1]), min_size=5, max_size=5), min_size=1, max_size=6))
def test_easysteer_steers_the_same_experts(rows: list[list[int]]) -> None:
    signs = np.array(rows, dtype=np.int8)
    if not signs.any():
        return
    layers = json.loads(easysteer_config(signs))["layer_configs"]
    for layer, row in enumerate(rows):
        if any(row):
            config = layers.pop(str(layer))
            assert config["expert_ids"], "older versions of EasySteer want some in every entry"
            assert effect(config, 5) == row
    assert not layers


def test_export_easysteer_chooses_as_bias_build(tmp_path: Path) -> None:
    table_map(TABLE, k=2).save(tmp_path / "m.json")
    export = ("map", "export", tmp_path / "m.json", "--format", "easysteer", "-o", tmp_path / "e.json")
    for options, choice in (
        ((), {}),
        (("--reverse",), {"reverse": True}),
        (("--layers", "1"), {"layers": [1]}),
    ):
        result = run(*export, "--activate", 3, "--deactivate", 1, *options)
        assert result.exit_code == 0, result.output
        layers = json.loads((tmp_path / "e.json").read_text())["layer_configs"]
        signs = table_map(TABLE, k=2).choose(3, 1, **choice)
        found = [effect(layers[str(i)], 4) if str(i) in layers else [0] * 4 for i in range(2)]
        assert found == signs.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["easysteer"], "nothing to steer"),
        (["easysteer", "--activate", 0], "nothing to steer"),
        (["easysteer", "--preset", "safe", "--reverse"], "leave out"),
        (["easysteer", "--preset", "safe"], "the paper has no numbers"),
        (["easysteer", "--activate", 1, "--layers", "7"], "no layer 7"),
        (["json", "--activate", 1], "writes all experts"),
        (["steermoe-csv", "--reverse"], "writes all experts"),
    ],
)
def test_export_refuses(tmp_path: Path, options: list[Any], words: str) -> None:
    table_map(TABLE).save(tmp_path / "m.json")
    result = run("map", "export", tmp_path / "m.json", "-o", tmp_path / "out", "--format", *options)
    assert result.exit_code in (1, 2)
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


#
# CSV and JSON
#


def test_csv_is_the_ranking(tmp_path: Path) -> None:
    made = counted()
    rows = list(csv.DictReader(io.StringIO(steermoe_csv(made))))
    columns = ["layer", "expert", "a1", "a2", "d1", "d2", "a1_n", "a2_n", "risk_diff", "Layer_Expert", "risk_diff_abs"]
    assert [*rows[0]] == columns
    assert [(int(r["layer"]), int(r["expert"]), float(r["risk_diff"])) for r in rows] == made.top(made.rd.size)
    assert made.a1 is not None
    for row in rows:
        place = int(row["layer"]), int(row["expert"])
        assert int(row["a1"]) == made.a1[place]
        assert int(row["a1"]) + int(row["d1"]) == made.n1
        assert int(row["a2"]) + int(row["d2"]) == made.n2
        assert float(row["a1_n"]) - float(row["a2_n"]) == float(row["risk_diff"]) == made.rd[place]
        assert row["Layer_Expert"] == f"L{place[0]:02d}\nE{place[1]:02d}"
    bare = list(csv.DictReader(io.StringIO(steermoe_csv(table_map(TABLE)))))
    assert [*bare[0]] == ["layer", "expert", "risk_diff", "Layer_Expert", "risk_diff_abs"]
    made.save(tmp_path / "m.json")
    assert (
        run("map", "export", tmp_path / "m.json", "--format", "steermoe-csv", "-o", tmp_path / "r.csv").exit_code == 0
    )
    assert (tmp_path / "r.csv").read_bytes() == steermoe_csv(made).encode()


def test_plain_json(tmp_path: Path) -> None:
    made = counted()
    data = json.loads(plain_ranking(made))
    assert [(e["layer"], e["expert"], e["rd"]) for e in data["experts"]] == made.top(made.rd.size)
    assert all(e["p1"] - e["p2"] == e["rd"] for e in data["experts"])
    assert data["map_sha256"] == made.sha256
    assert data["model"] == made.identity.to_dict()
    assert "p1" not in json.loads(plain_ranking(table_map(TABLE)))["experts"][0]
    made.save(tmp_path / "m.json")
    assert run("map", "export", tmp_path / "m.json", "--format", "json", "-o", tmp_path / "r.json").exit_code == 0
    assert json.loads((tmp_path / "r.json").read_text("utf-8")) == data


#
# the schema and the maps that ship
#


def test_maps_fit_the_schema(schema: Any, tmp_path: Path) -> None:
    texts = [counted().to_json(), table_map(TABLE).to_json(), (GOLDEN / "map.json").read_text("utf-8")]
    texts += [
        effects_map().to_json(),
        effects_map(logit=None, weight=None).to_json(),
        effects_map(effects=None).to_json(),
    ]
    texts += [path.read_text("utf-8") for path in SHIPPED]
    for text in texts:
        schema.validate(json.loads(text))


def good_map() -> dict[str, Any]:
    """A map with every field."""
    data: dict[str, Any] = json.loads((MAPS / "tiny" / "digits-words.json").read_text("utf-8"))
    ended = Stability(
        UntilStable(), 2 * data["n_pairs"], data["n_pairs"], 9, True, 20, 0.9, 0.1, 0.05, 0.8, 0.002, 0.005
    )
    made = effects_map()
    assert made.effects is not None
    data |= {"version": 2, "attribution": made.effects.facts.to_dict(), "effects": made.effects.rows()}
    data |= {name: (np.array(data["rd"]) / 2).tolist() for name in ("logit", "weight")}
    return data | {"notes": "n", "dates": ["2026-08-06"], "until_stable": ended.to_dict(), "phase": "first:16"}


def test_the_schema_knows_every_field(schema: Any) -> None:
    """A field that is added to the format has to be added here."""
    properties = schema.schema["properties"]
    assert set(properties) == set(good_map())
    for name in ("model", "behaviour", "confidence", "until_stable", "attribution"):
        assert set(properties[name]["properties"]) == set(good_map()[name])
    fields = {field for row in good_map()["effects"] for field in row}
    assert set(properties["effects"]["items"]["properties"]) == fields
    schema.validate(good_map())
    assert ExpertMap.from_dict(good_map()).stability is not None


def change(data: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        data = data[int(part) if part.isdecimal() else part]
    if value is ...:
        del data[last]
    else:
        data[int(last) if last.isdecimal() else last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", "x"),
        ("version", 3),
        ("version", True),
        ("version", [2]),
        ("version", 1),  # which has no effects
        ("rd", ...),
        ("colour", 1),
        ("model", ...),
        ("model.architecture", ""),
        ("model.n_layer", 0),
        ("model.n_layer", "5"),
        ("model.n_expert", 10**6),
        ("model.n_expert_used", ...),
        ("model.router_sha256", "A" * 64),
        ("model.router_sha256", "0" * 63),
        ("model.more", 1),
        ("behaviour", "digits"),
        ("behaviour.name", ...),
        ("behaviour.positive", 1),
        ("behaviour.more", ""),
        ("n1", -1),
        ("n1", 1.5),
        ("n1", ...),
        ("n2", 1 << 60),
        ("n_pairs", "3"),
        ("pairs_sha256", "x"),
        ("pairs_sha256", ["x"]),
        ("license", 1),
        ("notes", None),
        ("rd", []),
        ("rd", [1.0]),
        ("rd.0.0", 1.5),
        ("rd.0.0", "0.5"),
        ("rd.0.0", None),
        ("rd.0", []),
        ("a1", ...),
        ("a1.0.0", -1),
        ("a1.0.0", 0.5),
        ("se", ...),
        ("se.0.0", -0.1),
        ("confidence", ...),
        ("confidence.draws", 0),
        ("confidence.seed", -1),
        ("confidence.moe_layers", []),
        ("confidence.more", 1),
        ("confidence.max_rd", ...),
        ("confidence.max_rd.p", 2),
        ("confidence.max_rd.value", 7),
        ("confidence.sum_top.more", 7),
        ("confidence.split_half.spearman", -2),
        ("confidence.split_half.repeats", ...),
        ("until_stable", None),
        ("until_stable.p", ...),
        ("until_stable.stopped", 1),
        ("until_stable.n_given", 0),
        ("until_stable.rule.level", 1),
        ("until_stable.rule.min_pairs", 19),
        ("until_stable.rule.more", 1),
        ("phase", None),
        ("phase", ""),
        ("phase", 5),
        ("phase", "first"),
        ("phase", "rest:0"),
        ("phase", "first:1234567890"),
        ("phase", "prompt"),
        ("a1", None),
        ("logit", None),
        ("logit.0.0", 2e9),
        ("weight.0", []),
        ("weight.0.0", "1"),
        ("attribution", ...),
        ("attribution.response", 1),
        ("attribution.items_sha256", "x"),
        ("attribution.steer", "prompt"),
        ("attribution.n_text", -1),
        ("attribution.n_draws", {}),
        ("attribution.n_draws.promote", 0.5),
        ("attribution.rate.promote", 1.5),
        ("attribution.rate.third", 0.5),
        ("attribution.r2.promote", None),
        ("attribution.stable.promote", 1),
        ("attribution.more", 1),
        ("effects", ...),
        ("effects", []),
        ("effects.0", 1),
        ("effects.0.layer", -1),
        ("effects.0.layer", 4096),
        ("effects.0.expert", "1"),
        ("effects.0.action", 1),
        ("effects.0.effect", ...),
        ("effects.0.effect_se", -1),
        ("effects.0.p", 1.5),
        ("effects.0.cost", None),
        ("effects.0.cost_se", -1),
        ("effects.0.cost_se", ...),
        ("effects.3.confirm_se", "x"),
        ("effects.0.control", 1),
        ("effects.0.more", 1),
    ],
)
def test_schema_and_reader_refuse(schema: Any, tmp_path: Path, path: str, value: Any) -> None:
    data = good_map()
    change(data, path, value)
    assert not schema.is_valid(data)
    (tmp_path / "m.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(FormatError):
        ExpertMap.load(tmp_path / "m.json")


def test_the_maps_of_the_embedded_model(tiny_path: Path) -> None:
    known = {b.name: b for b in behaviours()}
    identity_ = model_info(tiny_path).require_moe()
    assert SHIPPED
    for path in SHIPPED:
        made = ExpertMap.load(path)
        behaviour = known[made.behaviour]
        assert path == MAPS / "tiny" / f"{made.behaviour}.json"
        assert made.to_json() == path.read_text("utf-8")
        assert made.identity == identity_
        assert made.license == "MIT"
        assert made.pairs_sha256 == (pairs_digest(load_pairs(behaviour.pairs)),)
        assert made.confidence is not None
        assert made.confidence.differs_from_shuffled
        assert (made.positive, made.negative) == (behaviour.positive, behaviour.negative)
        signs = made.choose(behaviour.n_activate, behaviour.n_deactivate)
        assert {(int(i), int(j)) for i, j in np.argwhere(signs > 0)} <= behaviour.planted_positive
        assert {(int(i), int(j)) for i, j in np.argwhere(signs < 0)} <= behaviour.planted_negative


def test_detect_makes_the_shipped_map(tmp_path: Path, schema: Any) -> None:
    """Again on this machine: the same counts up to what rounding may turn, and a file that fits the schema."""
    shipped = ExpertMap.load(MAPS / "tiny" / "digits-words.json")
    pairs = next(b.pairs for b in behaviours() if b.name == "digits-words")
    result = run("detect", "-m", "tiny", "-t", 1, "--pairs", pairs, "-o", tmp_path / "m.json")
    assert result.exit_code == 0, result.output
    made = ExpertMap.load(tmp_path / "m.json")
    schema.validate(json.loads((tmp_path / "m.json").read_text("utf-8")))
    assert (made.n1, made.n2, made.identity) == (shipped.n1, shipped.n2, shipped.identity)
    assert np.abs(made.rd - shipped.rd).max() < 0.02


def test_no_map_of_a_refusal_ships() -> None:
    """A map can be reversed, so none that tells refusing from complying is in the project, the toy's included."""
    words = re.compile(r"refus|comply|safe|harm|jailbreak", re.IGNORECASE)
    files = [path for path in ROOT.glob("expert_maps/**/*.json") if path.name not in NOT_A_MAP]
    assert {path.relative_to(ROOT) for path in files} == {path.relative_to(ROOT) for path in SHIPPED}
    for path in files:
        head = json.dumps(json.loads(path.read_text("utf-8"))["behaviour"])
        assert not words.search(f"{path.name} {head}")


#
# cards
#


def front(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    data: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return data


def test_card_tells_where_a_map_comes_from() -> None:
    made = ExpertMap.load(MAPS / "tiny" / "digits-words.json")
    card = render_card(made, "someone/tiny-moe", file="digits-words.json")
    data = front(card)
    assert (data["license"], data["base_model"]) == ("MIT", "someone/tiny-moe")
    assert data["steermoe"]["router_sha256"] == made.identity.router_sha256
    assert data["steermoe"]["n_expert_used"] == made.identity.n_expert_used
    assert data["steermoe"]["map_sha256"] == made.sha256
    for fact in (
        "| base model | someone/tiny-moe |",
        "| architecture | olmoe: 5 layers, 24 experts, k = 4 |",
        f"| router SHA-256 | `{made.identity.router_sha256}` |",
        f"| pairs SHA-256 | `{made.pairs_sha256[0]}` |",
        f"| pairs | {made.n_pairs} |",
        f"| target tokens | {made.n1:,} / {made.n2:,} |",
        "| licence | MIT |",
        "| differs from shuffled pairs | yes (needed, not enough), p = 0.001",
        "| RD > 0 | digits |",
        "steermoe bias build digits-words.json",
    ):
        assert fact in card
    assert "--force" not in card
    layer, expert, rd = made.top(1)[0]
    assert f"| {layer} | {expert} | {rd:+.4f} | " in card
    assert card == render_card(made, "someone/tiny-moe", file="digits-words.json")
    first = render_card(replace(made, phase="first:16"), "someone/tiny-moe")
    assert f"| target tokens | {made.n1:,} / {made.n2:,}: the first 16 tokens of each target |" in first
    assert "\n\n\n" not in card
    assert card.endswith(".\n")


def test_card_of_an_imported_map() -> None:
    made = ExpertMap(identity(2, 4, 1, router_sha256=UNKNOWN_ROUTER), "b", np.array(TABLE), created=DATE)
    card = render_card(made, "a/b", license="other")
    assert "not known: imported, use with `--force`" in card
    assert "-m MODEL.gguf --force\n" in card
    assert "| pairs | not known |" in card
    assert front(card)["license"] == "other"


@given(st.text(max_size=40))
def test_texts_of_a_map_cannot_break_its_card(text: str) -> None:
    made = ExpertMap(
        identity(2, 4, 1), text, np.array(TABLE), positive=text, notes=text, license=text + "x", created=DATE
    )
    card = render_card(made, "a/b")
    data = front(card)
    assert data["license"] == text + "x"
    assert data["steermoe"]["behaviour"] == text
    table = [line for line in card.splitlines() if line.startswith("| behaviour |")]
    assert len(table) == 1
    assert not re.search(r"(?<!\\)[<>`]", table[0].removeprefix("| behaviour |"))


@pytest.mark.parametrize("name", ["", "a b", "a/b/c", "../x", "a/b\n", "-x", "https://x/y"])
def test_card_refuses_names(name: str) -> None:
    with pytest.raises(UsageError, match="not the name"):
        render_card(counted(), name)


def test_card_command(tmp_path: Path) -> None:
    counted().save(tmp_path / "m.json")
    card = ("map", "card", tmp_path / "m.json", "--base-model", "org/model", "-o", tmp_path / "README.md")
    assert run(*card).exit_code == 0
    assert "steermoe bias build m.json" in (tmp_path / "README.md").read_text("utf-8")
    assert run(*card, "--license", "MIT").exit_code == 0
    assert front((tmp_path / "README.md").read_text("utf-8"))["license"] == "MIT"
    table_map(TABLE).save(tmp_path / "m.json")
    bare = run(*card)
    assert bare.exit_code == 2
    assert "give one, like --license CC0-1.0" in bare.stderr
