"""Products with many rows by the installed library and the unpatched one, built as users build them."""

from __future__ import annotations

from pathlib import Path

import pytest

from steermoe_local.llama.library import library_folder
from tests.integration.stock.test_stock import STOCK
from tests.native.test_row_products import cases_of, differing
from tests.support import row_products
from tests.support.row_products import PRODUCTS, lacks

pytestmark = [pytest.mark.stock, pytest.mark.skipif(lacks() is not None, reason=str(lacks()))]


@pytest.fixture(scope="module")
def program() -> Path:
    return row_products.build_program()


@pytest.mark.parametrize(("op", "type_name"), PRODUCTS)
def test_bits_of_stock(program: Path, op: str, type_name: str) -> None:
    cases = cases_of(op, type_name)
    ours, stock = (row_products.run(program, folder / "libggml-cpu.so", cases) for folder in (library_folder(), STOCK))
    assert differing(cases, ours, stock) == []
