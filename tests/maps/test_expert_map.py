"""Expert maps: the choice of experts, and the file."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import ChoiceError, FormatError, UsageError
from steermoe_local.maps.expert_map import ExpertMap, parse_layers
from steermoe_local.maps.scores import risk_difference
from tests.support.builders import DATE, identity, random_counts, table_map
from tests.support.paths import GOLDEN

SMALL = [[0.5, -0.4, 0.3, 0.0], [-0.9, 0.5, 0.1, 0.2]]


def test_choose_by_hand() -> None:
    made = table_map(SMALL)
    # By |RD|: (1,0)- (0,0)+ (1,1)+ (0,1)- (0,2)+ (1,3)+ (1,2)+
    assert made.choose(1).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    assert made.choose(2).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert made.choose(0, 1).tolist() == [[0, 0, 0, 0], [-1, 0, 0, 0]]
    assert made.choose(1, 2).tolist() == [[1, -1, 0, 0], [-1, 0, 0, 0]]
    assert not made.choose().any()
    assert made.choose().dtype == np.int8


def test_what_is_over_the_cap_is_dropped_not_replaced() -> None:
    # The third of the list is (0,2), over the cap of layer 0: (1,3) does not move up.
    assert table_map(SMALL).choose(3).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert table_map(SMALL, k=2).choose(3).tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]
    assert table_map(SMALL, k=2).choose(9, max_active_per_layer=0).any() == np.False_


def test_reverse_and_more_than_there_are() -> None:
    made = table_map(SMALL)
    assert made.choose(1, 1, reverse=True).tolist() == [[-1, 0, 0, 0], [1, 0, 0, 0]]
    assert made.choose(0, 1000).tolist() == [[0, -1, 0, 0], [-1, 0, 0, 0]]


def test_layers_restrict_before_counting() -> None:
    made = table_map(SMALL)
    assert made.choose(1, layers=[1]).tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]
    assert made.choose(1, layers=range(0, 2)).tolist() == made.choose(1).tolist()
    for bad, words in (([2], "no layer 2; olmoe has layers 0 to 1"), ([-1], "no layer -1")):
        with pytest.raises(ChoiceError, match=words):
            made.choose(1, layers=bad)
    with pytest.raises(ChoiceError, match="none given"):
        made.choose(1, layers=[])


def test_a_layer_keeps_top_k_experts() -> None:
    made = table_map([[-0.5, -0.4, -0.3], [-0.1, 0.0, 0.0]], k=2)
    assert made.choose(0, 1).sum() == -1
    with pytest.raises(ChoiceError) as caught:
        made.choose(0, 4)
    for value in ("layer 0: deactivating 4", "2 experts", "at most 1"):
        assert value in str(caught.value)
    made.choose(0, 1)


@pytest.mark.parametrize(
    "arguments",
    [{"n_activate": -1}, {"n_deactivate": -1}, {"max_active_per_layer": 2}, {"n_activate": 1.5}],
)
def test_bad_numbers(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(arguments))):
        table_map(SMALL).choose(**arguments)


def slow_choice(
    rd: list[list[float]], k: int, n_plus: int, n_minus: int, reverse: bool, layers: set[int]
) -> list[list[int]] | None:
    """The rule word by word; None where a layer would keep fewer than k experts."""
    cells = [
        (-v if reverse else v, layer, e) for layer, row in enumerate(rd) for e, v in enumerate(row) if layer in layers
    ]
    cells.sort(key=lambda cell: (-abs(cell[0]), cell[1], cell[2]))
    signs = [[0] * len(row) for row in rd]
    for v, layer, e in [cell for cell in cells if cell[0] > 0][:n_plus]:
        if signs[layer].count(1) < k and v:
            signs[layer][e] = 1
    for _, layer, e in [cell for cell in cells if cell[0] < 0][:n_minus]:
        signs[layer][e] = -1
    if any(len(row) - row.count(-1) < k for row in signs):
        return None
    return signs


VALUES = st.sampled_from([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 0.1, -0.1])


@given(st.data())
def test_choose_against_the_slow_rule(data: Any) -> None:
    n_layer, n_expert = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    row = st.lists(VALUES, min_size=n_expert, max_size=n_expert)
    rd = data.draw(st.lists(row, min_size=n_layer, max_size=n_layer))
    k = data.draw(st.integers(1, n_expert))
    plus, minus = data.draw(st.integers(0, 25)), data.draw(st.integers(0, 25))
    reverse = data.draw(st.booleans())
    layers = data.draw(st.none() | st.sets(st.integers(0, n_layer - 1), min_size=1))
    made = table_map(rd, k)
    chosen = set(range(n_layer)) if layers is None else layers
    expected = slow_choice(rd, k, plus, minus, reverse, chosen)
    if expected is not None:
        signs = made.choose(plus, minus, reverse=reverse, layers=layers)
        assert signs.tolist() == expected
        return
    with pytest.raises(ChoiceError) as caught:
        made.choose(plus, minus, reverse=reverse, layers=layers)
    most = int(str(caught.value).rsplit(" ", 1)[1])
    made.choose(plus, most, reverse=reverse, layers=layers)
    assert slow_choice(rd, k, plus, most + 1, reverse, chosen) is None


@given(st.data())
def test_numbers_are_those_that_make_different_choices(data: Any) -> None:
    n_layer, n_expert = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    row = st.lists(VALUES, min_size=n_expert, max_size=n_expert)
    made = table_map(data.draw(st.lists(row, min_size=n_layer, max_size=n_layer)), data.draw(st.integers(1, n_expert)))
    scope: dict[str, Any] = {"reverse": data.draw(st.booleans())}
    scope["layers"] = data.draw(st.none() | st.sets(st.integers(0, n_layer - 1), min_size=1))
    activate, deactivate = made.numbers(**scope)
    for numbers, name in ((activate, "n_activate"), (deactivate, "n_deactivate")):
        different, seen = [], set()
        for n in range(n_layer * n_expert + 1):
            try:
                signs = made.choose(**{name: n}, **scope).tobytes()
            except ChoiceError:
                break
            if signs not in seen:
                different.append(n)
            seen.add(signs)
        assert list(numbers) == different
    with pytest.raises(ChoiceError, match="no layer 9"):
        made.numbers(layers=[9])


def test_top() -> None:
    assert table_map(SMALL).top(3) == [(1, 0, -0.9), (0, 0, 0.5), (1, 1, 0.5)]
    assert len(table_map(SMALL).top(99)) == 8
    with pytest.raises(UsageError, match="n: -1"):
        table_map(SMALL).top(-1)


def test_from_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    counts = random_counts(4)
    made = ExpertMap.from_counts(counts, positive="digits", license="CC0-1.0")
    assert made.behaviour == "digits-words"
    assert np.array_equal(made.rd, risk_difference(counts))
    assert made.a1 is not None
    assert np.array_equal(made.a1, counts.a1)
    assert made.pairs_sha256 == counts.pairs_digest
    assert made.created == "1970-01-01T00:00:00Z"
    assert ExpertMap.from_counts(counts, "x", created=DATE).created == DATE


def same(one: ExpertMap, two: ExpertMap) -> bool:
    return one.to_json() == two.to_json() and np.array_equal(one.rd, two.rd)


def test_round_trip(tmp_path: Path) -> None:
    made = ExpertMap.from_counts(random_counts(4), positive="dígits", notes="n", created=DATE)
    made.save(tmp_path / "map.json")
    assert same(ExpertMap.load(tmp_path / "map.json"), made)
    assert made.sha256 == hashlib.sha256((tmp_path / "map.json").read_bytes()).hexdigest()
    bare = table_map(SMALL)
    bare.save(tmp_path / "map.json")
    loaded = ExpertMap.load(tmp_path / "map.json")
    assert same(loaded, bare)
    assert loaded.a1 is None


@given(st.lists(st.floats(-1, 1), min_size=6, max_size=6))
def test_scores_read_back_exactly(values: list[float]) -> None:
    made = table_map(np.reshape(values, (2, 3)))
    assert np.array_equal(json.loads(made.to_json())["rd"], made.rd)


def test_golden_text() -> None:
    made = table_map(SMALL, n1=10, n2=20, n_pairs=2, positive="digits", license="CC0-1.0")
    assert made.to_json() == (GOLDEN / "map.json").read_text(encoding="utf-8")
    assert same(ExpertMap.load(GOLDEN / "map.json"), made)


def edited(**changes: Any) -> str:
    data = json.loads(table_map(SMALL).to_json()) | changes
    return json.dumps({key: value for key, value in data.items() if value is not ...})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "x"}, "not an expert map"),
        ({"version": 3}, "version 3, this program reads 1 to 2; upgrade steermoe-local"),
        ({"rd": ...}, "rd: "),
        ({"colour": 1}, "colour: "),
        ({"model": {}}, "model.architecture: "),
        ({"model": identity(3, 4, 1).to_dict()}, "rd: not a table of 3 rows of 4 numbers"),
        ({"rd": [[1.0], [1.0, 0.0]]}, "rd: not a table of 2 rows"),
        ({"rd": [["a"] * 4] * 2}, "rd: "),
        ({"rd": [[True] * 4] * 2}, "rd: "),
        ({"rd": [[None] * 4] * 2}, "rd: "),
        ({"rd": [[10**400] * 4] * 2}, "is too large"),
        ({"rd": [[2.0] * 4] * 2}, "rd: values that are not within -1 to 1"),
        ({"behaviour": "x"}, "behaviour: "),
        ({"behaviour": {"name": 1}}, "behaviour.name: "),
        ({"behaviour": {"name": "x", "y": ""}}, "behaviour: "),
        ({"n1": -1}, "n1: -1 is not a count"),
        ({"n1": 1.5}, "n1: 1.5 is not a count"),
        ({"pairs_sha256": "x"}, "pairs_sha256: "),
        ({"pairs_sha256": [1]}, "pairs_sha256: not SHA-256"),
        ({"license": 1}, "license: "),
        ({"a1": [[0] * 4] * 2}, "a1, a2: "),
        ({"a1": [[0] * 4] * 2, "a2": [[0] * 4] * 2}, "a1: counts outside 0 to 0"),
        ({"a1": [[0] * 4] * 2, "a2": [[0] * 4] * 2, "n1": 1, "n2": 1}, "rd: is not a1 / n1"),
    ],
)
def test_load_refuses(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(edited(**changes), encoding="utf-8")
    with pytest.raises(FormatError) as caught:
        ExpertMap.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "1", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "\ud800", "[" * 99999, "9" * 9999],
)
def test_not_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(FormatError, match="not an expert"):
        ExpertMap.load(path)
    path.write_text(edited().replace("0.5", "1e999", 1))
    with pytest.raises(FormatError, match="1e999 is too large"):
        ExpertMap.load(path)


def test_damaged_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    data = table_map(SMALL).to_json().encode()
    for at in range(len(data) - 1):  # without its last newline the file is still whole
        path.write_bytes(data[:at])
        with pytest.raises(FormatError):
            ExpertMap.load(path)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with contextlib.suppress(FormatError):
            ExpertMap.load(path)


def test_parse_layers() -> None:
    assert parse_layers("3-7,9") == (3, 4, 5, 6, 7, 9)
    assert parse_layers(" 2 , 0-1,1") == (0, 1, 2)
    for bad in ("", "a", "3-", "-3", "7-3", "1,,2", "1-2-3", "0-99999", "²", "9" * 5000):
        with pytest.raises(UsageError, match="layers: "):
            parse_layers(bad)
