"""Pickled pandas frames without pandas: stand-in classes under pandas' names, written by Python's own pickler."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np


class DataFrame:
    """Its state is its __dict__, as pandas'."""


class BlockManager:
    def __init__(self, blocks: tuple[Any, ...], axes: list[Any]) -> None:
        self.parts = (blocks, axes)

    def __reduce__(self) -> Any:
        return BlockManager, self.parts


class Block:
    def __init__(self, values: Any, places: Any) -> None:
        self.parts = (values, places, 2)

    def __reduce__(self) -> Any:
        return _unpickle_block, self.parts


def _unpickle_block(*_: Any) -> None: ...


class Index:
    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce__(self) -> Any:
        return _new_Index, (Index, {"data": self.data, "name": None})


class RangeIndex:
    def __init__(self, stop: int, start: int = 0, step: int = 1) -> None:
        self.bounds = {"name": None, "start": start, "stop": stop, "step": step}

    def __reduce__(self) -> Any:
        return _new_Index, (RangeIndex, self.bounds)


def _new_Index(*_: Any) -> None: ...


_HOMES = {
    DataFrame: "pandas.core.frame",
    BlockManager: "pandas.core.internals.managers",
    _unpickle_block: "pandas._libs.internals",
    Index: "pandas.core.indexes.base",
    _new_Index: "pandas.core.indexes.base",
    RangeIndex: "pandas.core.indexes.range",
}


def labels(names: list[str]) -> Index:
    return Index(np.array(names, dtype=object))


def frame(columns: Mapping[str, Any]) -> DataFrame:
    """A frame of one block per column, whose parts a test may spoil before it is pickled."""
    blocks = tuple(
        Block(np.asarray(values).reshape(1, -1), slice(place, place + 1, 1))
        for place, values in enumerate(columns.values())
    )
    made = DataFrame()
    rows = len(next(iter(columns.values())))
    made.__dict__ = {
        "_mgr": BlockManager(blocks, [labels(list(columns)), RangeIndex(rows)]),
        "_typ": "dataframe",
        "_metadata": [],
        "attrs": {},
        "_flags": {"allows_duplicate_labels": True},
    }
    return made


def dumps(value: Any, protocol: int = 5) -> bytes:
    """Pickle `value`, which may hold the stand-ins, under pandas' names."""
    modules: dict[str, ModuleType] = {}
    for item, home in _HOMES.items():
        parts = home.split(".")
        for i in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        setattr(modules[home], item.__name__, item)
    with mock.patch.dict(sys.modules, modules):
        old = {item: item.__module__ for item in _HOMES}
        try:
            for item, home in _HOMES.items():
                item.__module__ = home
            return pickle.dumps(value, protocol)
        finally:
            for item, home in old.items():
                item.__module__ = home


def ranking(a1: Any, a2: Any, n1: int, n2: int, layout: str = "short") -> dict[str, Any]:
    """The columns of a SteerMoE ranking, rows in the order of |RD|; layouts "short" (9 of 12 files) and "long"."""
    a1, a2 = np.asarray(a1, dtype=np.float64), np.asarray(a2, dtype=np.float64)
    layer, expert = (grid.ravel() for grid in np.indices(a1.shape))
    a1, a2 = a1.ravel(), a2.ravel()
    risk = a1 / n1 - a2 / n2
    order = np.argsort(-np.abs(risk), kind="stable")
    columns: dict[str, Any] = {"layer": layer, "expert": expert}
    if layout == "long":
        columns |= {"activated_only_in_1": a1, "log_odds_ratio": np.full(a1.size, np.inf), "p_value": a1 * np.nan}
    columns |= {"a1": a1, "a2": a2, "d1": n1 - a1, "d2": n2 - a2}
    if layout == "short":
        columns |= {"a1_n": a1 / n1, "a2_n": a2 / n2}
    names = [f"L{one:02d}\nE{two:02d}" for one, two in zip(layer, expert, strict=True)]
    columns |= {"risk_diff": risk, "Layer_Expert": np.array(names, dtype=object), "risk_diff_abs": np.abs(risk)}
    return {name: np.asarray(values)[order] for name, values in columns.items()}
