"""Flash attention's tiles, and operations with one value for a row, have the bits of an unpatched ggml.

Both are built here, from ops.cpp and binary-ops.cpp of the prepared tree and of the tree without patches
(tests/native/tile_ops.cmake): for this machine's instructions, for AVX2, and for SSE4.2, for which the header has no
vectors.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import row_products
from tests.support.row_products import Products, Worker, lacks

pytestmark = pytest.mark.skipif(lacks() is not None, reason=str(lacks()))

SETS = ("native", "avx2", "sse42")
MASKS = ("none", "causal", "window", "sequences", "empty", "noise")
VALUES = ("normal", "large", "equal")
SIZES = (1, 7, 8, 16, 17, 40, 64, 72, 100, 128, 192)  # of a head
QUERIES = (1, 2, 63, 64, 65, 130, 200)  # tiles have 64, fewer queries none
KEYS = (1, 3, 63, 64, 65, 100, 256, 515)


@dataclass(frozen=True)
class Attention:
    """A case; the fields are explained in tile_ops.cpp."""

    type: str
    dk: int
    dv: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    sequences: int
    mask: str
    slopes: int
    softcap: int
    sinks: int
    values: str
    threads: int
    seed: int

    def __str__(self) -> str:
        return " ".join(map(str, ("attention", *astuple(self))))


@dataclass(frozen=True)
class Binary:
    """A case of an operation with two operands."""

    op: str
    a: str
    b: str
    n: int
    rows: int
    planes: int
    n1: int
    rows1: int
    apart: int
    threads: int
    seed: int

    def __str__(self) -> str:
        return " ".join(map(str, astuple(self)))


def attention_cases() -> list[Attention]:
    """Every number of queries with every number of keys, mask and type; the rest by a fixed seed."""
    draw, found = random.Random("attention"), []
    for queries, keys, mask, type_name in product(QUERIES, KEYS, MASKS, ("f16", "f32", "bf16")):
        if type_name == "bf16" and queries > 64:  # has no tiles
            continue
        kv_heads = draw.choice((1, 2))
        found.append(
            Attention(
                type=type_name,
                dk=draw.choice(SIZES),
                dv=draw.choice(SIZES),
                heads=kv_heads * draw.choice((1, 2, 3)),
                kv_heads=kv_heads,
                queries=queries,
                keys=keys,
                sequences=draw.choice((1, 1, 2)),
                mask=mask,
                slopes=draw.choice((0, 0, 1)) if mask != "none" else 0,
                softcap=draw.choice((0, 0, 1)),
                sinks=draw.choice((0, 0, 1)),
                values=draw.choice(VALUES),
                threads=draw.choice((1, 2, 3, 7)),
                seed=len(found),
            )
        )
    return found


def binary_cases() -> list[Binary]:
    types = (("f32", "f32"), ("f16", "f16"), ("bf16", "bf16"), ("bf16", "f32"), ("f16", "f32"))
    draw, found = random.Random("binary"), []
    for op, (a, b), n, n1 in product(("add", "sub", "mul", "div"), types, (1, 5, 16, 77, 1024), ("one", "n")):
        rows = draw.choice((1, 3, 8))
        found.append(
            Binary(
                op=op,
                a=a,
                b=b,
                n=n,
                rows=rows,
                planes=draw.choice((1, 2, 9)),
                n1=1 if n1 == "one" else n,
                rows1=draw.choice((1, rows)),
                apart=draw.choice((0, 0, 1)),
                threads=draw.choice((1, 2, 5)),
                seed=len(found),
            )
        )
    return found


def names(kernels: str) -> tuple[str, str]:
    return f"{kernels}-tiles-ours", f"{kernels}-tiles-stock"


@pytest.fixture(scope="module")
def built() -> Path:
    """The folder of the libraries; built the first time (a minute of CPU time)."""
    return row_products.build(["tile_ops", *(name for kernels in SETS for name in names(kernels))])


def run(folder: Path, library: str, cases: list[Attention] | list[Binary]) -> list[Products]:
    return row_products.run(folder / "tile_ops", folder / f"{library}.so", cases)


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("cases", [attention_cases(), binary_cases()], ids=["attention", "binary"])
def test_bits_of_stock(built: Path, kernels: str, cases: list[Attention] | list[Binary]) -> None:
    ours, stock = (run(built, library, cases) for library in names(kernels))
    assert [f"{case}: {a} {b}" for case, a, b in zip(cases, ours, stock, strict=True) if a != b] == []
    for case, found in zip(cases, ours, strict=True):
        if isinstance(case, Attention):
            assert found.n_hashed == case.dv * case.heads * case.queries * case.sequences, case
            assert found.n_finite == found.n_hashed, case
            if case.mask == "none":  # every query sees a key: nothing was left out
                assert found.n_zero < found.n_hashed / 2, case
        else:
            assert found.n_hashed == case.n * case.rows * case.planes, case


def test_threads_change_nothing(built: Path) -> None:
    """A tile computes the same wherever it begins in a thread's scratch, and whichever rows the thread has."""
    cases = [case for case in attention_cases() if case.queries >= 64 and case.type != "bf16"][::2]
    for kernels in SETS:
        library = names(kernels)[0]
        alone, many = (run(built, library, [replace(case, threads=n) for case in cases]) for n in (1, 5))
        assert alone == many, kernels


def test_the_cases_tell_bits_apart(built: Path) -> None:
    """Another seed, mask, cap or slope gives another hash, or equal hashes would mean nothing."""
    base = Attention("f16", 64, 64, 2, 1, 65, 130, 1, "causal", 0, 0, 0, "normal", 1, 1)
    others = [replace(base, **{field: value}) for field, value in (("seed", 2), ("mask", "window"), ("softcap", 1))]
    others += [replace(base, slopes=1), replace(base, sinks=1), replace(base, type="f32")]
    found = run(built, "native-tiles-ours", [base, *others])
    assert len({one.hash for one in found}) == len(found)


def test_no_sanitizer_report() -> None:
    """A case's work buffer has the size that its graph asked for: what lies behind it is seen."""
    folder = row_products.build(["native-tiles-ours", "tile_ops"], "address,undefined")
    symbols = (folder / "native-tiles-ours.so").read_bytes()
    assert b"__asan_report_load" in symbols  # an empty report means nothing without instruments
    assert b"__ubsan_handle" in symbols
    for cases in (attention_cases()[::3], binary_cases()):
        # not compared: where the compiler fuses multiplication and addition depends on its other options
        assert len(run(folder, "native-tiles-ours", cases)) == len(cases)


@st.composite
def any_attention(draw: st.DrawFn) -> Attention:
    kv_heads, queries = draw(st.integers(1, 3)), draw(st.integers(1, 140))
    mask = draw(st.sampled_from(MASKS))
    return Attention(
        type=draw(st.sampled_from(("f16", "f16", "f32"))),
        dk=draw(st.integers(1, 140)),
        dv=draw(st.integers(1, 140)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        queries=queries,
        keys=draw(st.integers(1, 300)),
        sequences=draw(st.integers(1, 2)),
        mask=mask,
        slopes=draw(st.integers(0, 1)) if mask != "none" else 0,
        softcap=draw(st.integers(0, 1)),
        sinks=draw(st.integers(0, 1)),
        values=draw(st.sampled_from(VALUES)),
        threads=draw(st.integers(1, 8)),
        seed=draw(st.integers(0, 2**63)),
    )


@pytest.fixture(scope="module")
def workers(built: Path) -> Iterator[dict[str, Worker]]:
    every = [name for kernels in SETS for name in names(kernels)]
    found = {name: Worker(built / "tile_ops", built / f"{name}.so") for name in every}
    yield found
    for worker in found.values():
        worker.close()


@given(any_attention())
@settings(max_examples=200)
def test_bits_of_stock_for_any_shape(workers: dict[str, Worker], case: Attention) -> None:
    found = {name: worker.run(case) for name, worker in workers.items()}
    for kernels in SETS:
        ours, stock = names(kernels)
        assert found[ours] == found[stock], kernels
