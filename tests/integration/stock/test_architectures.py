"""Unsteered, every architecture computes bit for bit what an unpatched library does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steermoe_local.llama.library import library_folder
from tests.integration.stock.test_stock import STOCK, run_driver
from tests.support.architectures import ARCHITECTURES, WITHOUT_ROUTERS, variants, widen, write_upstream
from tests.support.paths import BUILD

pytestmark = pytest.mark.stock

DRIVER = Path(__file__).with_name("driver_many.py")


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ours and the unpatched library's by model: each architecture as written, and widened in all ways."""
    folder, wide = tmp_path_factory.mktemp("upstream"), tmp_path_factory.mktemp("wide")
    output = folder / "logits.npz"
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for arch in ARCHITECTURES:
        (path,) = write_upstream(BUILD / "bin" / "test-llama-archs", folder, arch)
        models = [path.rename(folder / f"{arch}--upstream.gguf")]
        if arch not in WITHOUT_ROUTERS:
            models += [widen(models[0], wide / f"{arch}--{v or 'wide'}.gguf", v) for v in variants(arch)]
        ours, stock = (
            run_driver(DRIVER, libraries, output, output, *models) for libraries in (library_folder(), STOCK)
        )
        assert (bool(ours.pop("patched")), bool(stock.pop("patched"))) == (True, False)
        assert ours.keys() == stock.keys()
        found |= {name: (ours[name], stock[name]) for name in ours}
        for model in models:
            model.unlink()
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_same_bits(logits: dict[str, tuple[np.ndarray, np.ndarray]], arch: str) -> None:
    names = [name for name in logits if name.startswith(f"{arch}--")]
    assert len(names) == 1 + (arch not in WITHOUT_ROUTERS) * len(variants(arch))
    for name in names:
        ours, stock = logits[name]
        assert np.isfinite(stock).all(), name
        assert len(np.unique(stock)) > 100, name
        assert ours.tobytes() == stock.tobytes(), name
