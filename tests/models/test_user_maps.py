"""The user's maps folder: maps by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from steermoe_local._util.closest import did_you_mean
from steermoe_local.errors import UsageError
from steermoe_local.models.shipped_maps import map_path, shipped_map, shipped_maps
from steermoe_local.models.user_maps import (
    beside_map,
    check_map_name,
    is_learnt,
    map_label,
    user_maps,
    user_maps_folder,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A maps folder with a learnt steering, a loose map and other files."""
    found = tmp_path / "maps"
    (found / "formal").mkdir(parents=True)
    monkeypatch.setenv("STEERMOE_MAPS", str(found))
    data = shipped_maps()["digits-words"].read_bytes()
    for name in ("formal/map.json", "formal.json", "loose.json", "Big.json", "a.choice.json", "p.plan.json"):
        (found / name).write_bytes(data)
    (found / "formal" / "pairs.jsonl").touch()
    (found / "empty").mkdir()
    return found


def test_names_are_those_of_learnt_steerings_and_of_files(folder: Path) -> None:
    assert user_maps() == {"formal": folder / "formal" / "map.json", "loose": folder / "loose.json"}
    assert map_path("formal") == folder / "formal" / "map.json"
    assert map_path("loose") == folder / "loose.json"
    assert map_path("digits-words") == shipped_maps()["digits-words"]


def test_the_users_map_comes_before_a_shipped_one(folder: Path) -> None:
    (folder / "digits-words.json").write_bytes((folder / "loose.json").read_bytes())
    assert map_path("digits-words") == folder / "digits-words.json"
    assert map_path("tiny/digits-words") == shipped_maps()["digits-words"]


def test_shipped_maps_are_of_the_model_whose_name_goes_before() -> None:
    digits = shipped_maps()["digits-words"]
    assert shipped_map("digits-words") == shipped_map("tiny/digits-words") == digits
    assert shipped_map("small/digits-words") is None
    assert shipped_map("/digits-words") is None
    assert len(list(digits.parent.parent.glob("*/*.json"))) == len(shipped_maps()), "two maps of one name"


def test_paths_come_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("formal").touch()
    assert map_path("formal") == Path("formal")
    assert map_path(folder / "formal") == folder / "formal" / "map.json"


def test_a_folder_of_a_name_hides_no_map(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("formal").mkdir()
    assert map_path("formal") == folder / "formal" / "map.json"


def test_an_unknown_name_is_told_the_nearest(folder: Path) -> None:
    with pytest.raises(UsageError, match="did you mean formal"):
        map_path("fromal")
    assert did_you_mean("x", ["formal"]) == ""


def test_what_lies_beside_a_map(folder: Path) -> None:
    learnt = folder / "formal" / "map.json"
    assert is_learnt(learnt)
    assert not is_learnt(folder / "loose.json")
    assert beside_map(learnt, "pairs.jsonl") == folder / "formal" / "pairs.jsonl"
    assert beside_map(learnt, "task.jsonl") is None
    assert (map_label(learnt), map_label(folder / "loose.json")) == ("formal", "loose")


def test_the_folder_is_that_of_the_variable_else_of_the_users_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERMOE_MAPS", "~/maps")
    assert user_maps_folder() == Path.home() / "maps"
    monkeypatch.delenv("STEERMOE_MAPS")
    assert user_maps_folder().parts[-2:] == ("steermoe-local", "maps")
    assert user_maps() == {}


@pytest.mark.parametrize("name", ["", "Formal", ".x", "a/b", "x" * 65, "a.choice", "none", "-x"])
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        check_map_name(name)
    assert check_map_name("qwen3.6-formal_2") == "qwen3.6-formal_2"
