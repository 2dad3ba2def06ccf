"""The kernels for many rows under sanitizers, on cases of test_row_products.py, with the same bits.

The unpatched kernels are not run here: UBSan reports that ggml's own gemm of Q4_K loads from addresses that are not
aligned.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.test_row_products import cases_of, differing
from tests.support import row_products
from tests.support.row_products import PAIRS, PRODUCTS, Case, lacks

pytestmark = pytest.mark.skipif(lacks() is not None, reason=str(lacks()))


def cases(max_threads: int, step: int) -> list[Case]:
    every = (case for op, name in PRODUCTS for case in cases_of(op, name))
    return [case for case in every if case.tokens <= 130 and case.threads <= max_threads][::step]


def check(folder: Path, kernels: str, some: list[Case]) -> None:
    ours, stock = PAIRS[kernels]
    plain = row_products.build([stock])
    found = row_products.run(folder / "row_products", folder / f"{ours}.so", some)
    expected = row_products.run(plain / "row_products", plain / f"{stock}.so", some)
    assert differing(some, found, expected) == []


@pytest.mark.parametrize("kernels", ["native", "avx2", "vnni"])
def test_no_sanitizer_report(kernels: str) -> None:
    """A case's work buffer has the size that its product asked for: what lies behind it is seen."""
    folder = row_products.build([PAIRS[kernels][0]], "address,undefined")
    symbols = (folder / f"{PAIRS[kernels][0]}.so").read_bytes()
    assert b"__asan_report_load" in symbols  # an empty report means nothing without instruments
    assert b"__ubsan_handle" in symbols
    check(folder, kernels, cases(16, 2))


def test_threads_do_not_race() -> None:
    folder = row_products.build(["avx2-ours"], "thread")
    assert b"__tsan_read" in (folder / "avx2-ours.so").read_bytes()
    some = [case for case in cases(3, 2) if case.threads > 1]
    assert len(some) > 100
    check(folder, "avx2", some)
