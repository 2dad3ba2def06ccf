"""EasySteer's current API (August 2026): the exported SteeringSpec, against its schema and what its loader does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.errors import UsageError
from steermoe_local.maps.export import easysteer_spec
from tests.support.builders import table_map

TABLE = [[0.5, -0.4, 0.3, 0.0], [-0.9, 0.5, 0.1, 0.2], [0.0, 0.0, 0.0, 0.01]]

# Restated from vllm/steer_vectors/api.py of EasySteer's vLLM (commit 6267ca0, 2026-08-06): classes that take no unknown
# field, what each field holds, and the rules for the algorithm moe_router.
IDS = {"type": ["array", "null"], "items": {"type": "integer"}, "minItems": 1}
POSITIVE_IDS = IDS | {"items": {"type": "integer", "minimum": 0}}
WINDOW = {"type": ["array", "null"], "prefixItems": [{"type": "integer"}, {"type": ["integer", "null"]}], "minItems": 2}
PHASE = {"enum": ["all", None]}
SELECTORS = {
    f"{twin}{phase}_{name}": schema
    for twin in ("", "exclude_")
    for phase in ("prompt", "generation")
    for name, schema in (
        ("tokens", POSITIVE_IDS),
        ("positions", IDS if phase == "prompt" else POSITIVE_IDS),
        ("window", WINDOW),
    )
}
INCLUDES = ["prompt", "generation", *(name for name in SELECTORS if not name.startswith("exclude"))]
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$defs": {
        "apply": {
            "type": "object",
            "properties": {"prompt": PHASE, "generation": PHASE} | SELECTORS,
            "anyOf": [{"required": [name]} for name in INCLUDES],
            "additionalProperties": False,
        },
        "vector": {
            "type": "object",
            "properties": {
                "source": {"type": ["string", "null"], "pattern": "^[^|]*$"},
                "data": {},
                "algorithm": {"type": "string", "default": "direct"},
                "scale": {"type": "number"},
                "layers": IDS,
                "normalize": {"type": "boolean"},
                "apply": {"$ref": "#/$defs/apply"},
                "params": {"type": "object"},
                "name": {"type": ["string", "null"]},
            },
            "required": ["apply"],
            "additionalProperties": False,
            "if": {"properties": {"algorithm": {"const": "moe_router"}}, "required": ["algorithm"]},
            "then": {
                "properties": {
                    "data": {"const": None},
                    "params": {
                        "propertyNames": {"enum": ["expert_ids", "mode", "lambda", "topk"]},
                        "properties": {
                            "mode": {"enum": ["activate", "deactivate", "soft", "soft_topk", "soft_random"]}
                        },
                    },
                },
                "if": {"properties": {"source": {"const": None}}},
                "then": {"required": ["layers", "params"], "properties": {"params": {"required": ["expert_ids"]}}},
            },
        },
    },
    "type": "object",
    "properties": {
        "vectors": {"type": "array", "items": {"$ref": "#/$defs/vector"}, "minItems": 1},
        "conflict": {"enum": ["priority", "sequential", "error"]},
    },
    "required": ["vectors"],
    "additionalProperties": False,
    # a spec with moe_router has one vector
    "if": {"properties": {"vectors": {"contains": {"properties": {"algorithm": {"const": "moe_router"}}}}}},
    "then": {"properties": {"vectors": {"maxItems": 1}}},
}
# what load_from_path of algorithms/moe_router.py takes of a file, in the modes that are exported
LAYER = {
    "type": "object",
    "properties": {
        "mode": {"enum": ["activate", "deactivate"]},
        "epsilon": {"type": "number"},
        **dict.fromkeys(("expert_ids", "activate_ids", "deactivate_ids"), POSITIVE_IDS),
    },
    "required": ["mode"],
    "anyOf": [{"required": [name]} for name in ("expert_ids", "activate_ids", "deactivate_ids")],
    "additionalProperties": False,
}
FILE = {
    "type": "object",
    "properties": {
        "layer_configs": {"type": "object", "patternProperties": {"^[0-9]+$": LAYER}, "additionalProperties": False}
    },
    "required": ["layer_configs"],
}


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def valid(data: Any, schema: dict[str, Any] = SCHEMA) -> bool:
    jsonschema.Draft202012Validator.check_schema(schema)
    return bool(jsonschema.Draft202012Validator(schema).is_valid(data))


def steered(spec: dict[str, Any]) -> dict[int, tuple[set[int], set[int]]]:
    """The experts that a spec activates and deactivates in each layer, as the worker makes them of spec and file."""
    (vector,) = spec["vectors"]
    assert vector["algorithm"] == "moe_router"
    result = {}
    for layer, config in json.loads(Path(vector["source"]).read_text("utf-8"))["layer_configs"].items():
        if vector.get("layers") and int(layer) not in vector["layers"]:
            continue
        sides = {"activate": config.get("activate_ids", []), "deactivate": config.get("deactivate_ids", [])}
        sides[config["mode"]] = sides[config["mode"]] + config.get("expert_ids", [])
        result[int(layer)] = (set(sides["activate"]), set(sides["deactivate"]))
    return result


@pytest.fixture
def a_map(tmp_path: Path) -> Path:
    table_map(TABLE, k=2).save(tmp_path / "m.json")
    return tmp_path / "m.json"


def export(a_map: Path, *more: Any) -> Result:
    return run("map", "export", a_map, "--format", "easysteer", *more)


@pytest.mark.parametrize("options", [(), ("--reverse",), ("--layers", "1-2"), ("--epsilon", 0.5)])
def test_the_spec_steers_every_chosen_expert(a_map: Path, tmp_path: Path, options: tuple[Any, ...]) -> None:
    config, spec = tmp_path / "experts.json", tmp_path / "spec.json"
    result = export(a_map, "-o", config, "--spec", spec, "--activate", 5, "--deactivate", 1, *options)
    assert result.exit_code == 0, result.stderr
    data = json.loads(spec.read_text("utf-8"))
    assert valid(data)
    assert valid(json.loads(config.read_text("utf-8")), FILE)
    assert data["vectors"][0]["apply"] == {"prompt": "all", "generation": "all"}
    choice = {"reverse": "--reverse" in options, "layers": [1, 2] if "--layers" in options else None}
    signs = table_map(TABLE, k=2).choose(5, 1, **choice)
    assert steered(data) == {
        layer: ({e for e in range(4) if row[e] > 0}, {e for e in range(4) if row[e] < 0})
        for layer, row in enumerate(signs.tolist())
        if any(row)
    }


def test_the_file_is_as_without_a_spec(a_map: Path, tmp_path: Path) -> None:
    choice = ("--activate", 2, "--deactivate", 2)
    assert export(a_map, "-o", tmp_path / "a.json", *choice).exit_code == 0
    assert export(a_map, "-o", tmp_path / "b.json", "--spec", tmp_path / "s.json", *choice).exit_code == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not text exist on Linux")
def test_a_folder_whose_name_is_not_text(a_map: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spec cannot name a file in it: nothing is written, unless the server's path is given."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xff"))
    folder.mkdir()
    monkeypatch.chdir(folder)
    result = export(a_map, "-o", "e.json", "--spec", "s.json", "--activate", 1)
    assert result.exit_code == 2, result.output
    assert "--source" in result.stderr
    assert not list(folder.iterdir())
    assert export(a_map, "-o", "e.json", "--spec", "s.json", "--source", "/e.json", "--activate", 1).exit_code == 0
    assert valid(json.loads((folder / "s.json").read_text("utf-8")))


def test_where_the_server_finds_the_file(a_map: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for more, source in (((), os.path.join(os.getcwd(), "e.json")), (("--source", "/srv/é.json"), "/srv/é.json")):
        assert export(a_map, "-o", "e.json", "--spec", "s.json", "--activate", 1, *more).exit_code == 0
        assert json.loads(Path("s.json").read_text("utf-8"))["vectors"][0]["source"] == source


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--source", "x"), "give --spec FILE"),
        (("--spec", "s.json", "--source", "a|b"), "'a|b'"),
        (("--spec", "s.json", "--source", ""), "''"),
        (("--spec", "e.json"), "is the output too"),
        (("--spec", "none/s.json"), "does not exist"),
    ],
)
def test_refused(a_map: Path, tmp_path: Path, options: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    result = export(a_map, "-o", "e.json", "--activate", 1, *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert set(tmp_path.iterdir()) == before
    other = run("map", "export", a_map, "--format", "json", "-o", "e.json", "--spec", "s.json")
    assert other.exit_code == 2
    with pytest.raises(UsageError):
        easysteer_spec("a|b")


def test_the_schema_refuses_what_easysteer_refuses() -> None:
    """Cases of its own tests/cpu/test_api_spec.py, so that the restated schema can fail."""
    apply = {"prompt": "all", "generation": "all"}
    good = {"source": "x.json", "algorithm": "moe_router", "apply": apply}
    assert valid({"vectors": [good]})
    assert valid({"vectors": [good | {"source": None, "layers": [3], "params": {"expert_ids": [1]}}]})
    for bad in (
        {"vectors": []},
        {"vectors": [good, good]},
        {"vectors": [good], "phases": []},
        {"vectors": [{"source": "x.json", "algorithm": "moe_router"}]},
        {"vectors": [good | {"source": "x|moe_router"}]},
        {"vectors": [good | {"apply": {}}]},
        {"vectors": [good | {"apply": {"prompt": "some"}}]},
        {"vectors": [good | {"apply": {"exclude_prompt_tokens": [1]}}]},
        {"vectors": [good | {"layers": []}]},
        {"vectors": [good | {"source": None, "layers": [3]}]},
        {"vectors": [good | {"params": {"beta": 1}}]},
        {"vectors": [good | {"data": {}}]},
        {"vectors": [good | {"prefill_trigger_tokens": [-1]}]},
    ):
        assert not valid(bad), bad
