"""The page's map of a model of 48 layers of 128 experts: it fits the panel, and both signs are told apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from steermoe_local.model_files.model_info import model_info
from tests.support import browser as browsers
from tests.support import random_models
from tests.support.builders import table_map
from tests.support.gguf_copy import copy_model
from tests.support.page_desk import Desk, desk
from tests.support.random_models import RandomModel, write_random_model
from tests.support.running_server import TINY, running

pytestmark = browsers.marks()

SHAPE = (48, 128)


@pytest.fixture(scope="module", params=["light", "dark"])
def wide(request: pytest.FixtureRequest, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("wide")
    with mock.patch.object(random_models, "N_VOCAB", 1280):  # of the embedded model
        plain = write_random_model(folder / "plain.gguf", RandomModel("olmoe", *SHAPE, k=8))
    (model,) = copy_model(plain, folder / "wide.gguf", tokenizer_of=TINY)
    (folder / "maps").mkdir()
    rd = np.clip(np.random.default_rng(0).standard_t(3, SHAPE) / 20, -1, 1)
    made = replace(table_map(rd, 8, n1=100, n2=90, n_pairs=5), identity=model_info(model).require_moe())
    made.save(folder / "maps" / "wide.json")
    with (
        running(model=model, n_ctx=128, parallel=1, maps_folder=folder / "maps") as server,
        desk(browser, server, size=(1280, 860), color_scheme=request.param) as tab,
    ):
        tab.open().steer("wide", activate=6, deactivate=6)
        yield tab


def test_a_wide_map_fits_the_panel(wide: Desk) -> None:
    box = wide.page.locator("#map-scroll").evaluate("(box) => [box.scrollWidth, box.clientWidth]")
    assert box[0] <= box[1], "nothing to scroll"
    data = wide.page.locator("#heatmap").evaluate("(canvas) => ({ ...canvas.dataset })")
    assert (int(data["layers"]), int(data["experts"])) == SHAPE
    assert float(data["cell"]) >= 2
    assert wide.page.locator("#heatmap").bounding_box()["height"] <= 860


def test_every_expert_is_found_under_the_pointer(wide: Desk) -> None:
    for layer, expert in ((0, 0), (47, 127), (20, 63)):
        assert wide.tooltip(layer, expert)[0] == f"Layer {layer}, expert {expert}"
