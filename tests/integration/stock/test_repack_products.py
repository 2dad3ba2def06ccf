"""Products of repacked weights by the installed library and the unpatched one, built as users build them."""

from __future__ import annotations

from pathlib import Path

import pytest

from steermoe_local.llama.library import library_folder
from tests.integration.stock.test_stock import STOCK
from tests.native.test_repack_products import OPS, cases_of, differing
from tests.support import repack_products
from tests.support.repack_products import TYPES, lacks

pytestmark = [pytest.mark.stock, pytest.mark.skipif(lacks() is not None, reason=str(lacks()))]


@pytest.fixture(scope="module")
def program() -> Path:
    return repack_products.build_program()


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("op", OPS)
def test_bits_of_stock(program: Path, op: str, type_name: str) -> None:
    cases = cases_of(op, type_name)
    ours, stock = (
        repack_products.run(program, folder / "libggml-cpu.so", cases) for folder in (library_folder(), STOCK)
    )
    assert differing(cases, ours, stock) == []
