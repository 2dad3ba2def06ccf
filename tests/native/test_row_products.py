"""Products with many rows have the bits of an unpatched ggml, by every kernel that an x86-64 CPU can run.

Both are built here, from repack.cpp, ggml-cpu.c and tiled/ of the prepared tree and of the tree without patches
(tests/native/row_products.cmake): for this machine's instructions, for AVX2, for AVX-VNNI with its instruction
emulated, for AVX-512 without VNNI, and with the kernels left out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from filecmp import cmpfiles
from itertools import count, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import native_programs, row_products
from tests.support.row_products import (
    ACTIVATIONS,
    NOT_REPACKED,
    PAIRS,
    PRODUCTS,
    REPACKED,
    ROUTINGS,
    WEIGHTS,
    Case,
    Products,
    Worker,
    block_size,
    lacks,
)

pytestmark = pytest.mark.skipif(lacks() is not None, reason=str(lacks()))

TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 28, 60, 63, 64, 65, 130, 512)
THREADS = (1, 2, 3, 4, 7, 16)
EXPERTS = ((1, 1), (2, 1), (4, 2), (4, 4), (8, 3), (32, 8), (256, 4))  # how many, how many are used


def cases_of(op: str, type_name: str) -> list[Case]:
    """Every number of tokens with every number of threads and every routing, and these with one another.

    The rest in turns, by a fixed seed.
    """
    draw, seeds, found = random.Random(f"{op} {type_name}"), count(1), []
    routings = ROUTINGS if op == "id" else len(THREADS) * ("-",)
    for (i, tokens), (j, routing), half in product(enumerate(TOKENS), enumerate(routings), range(2)):
        threads = THREADS[(i + j + half * len(THREADS) // 2) % len(THREADS)]
        few = tokens <= 16  # large shapes, too
        experts, used = draw.choice(EXPERTS if few else EXPERTS[:-1]) if op == "id" else (0, 0)
        found.append(
            Case(
                op=op,
                type=type_name,
                k=block_size(type_name) * draw.choice((1, 2, 3, 7, 24) if few and experts < 64 else (1, 2, 3)),
                m=8 * draw.choice((1, 2, 3, 4, 5, 7, 8, 9, 17, 33) if experts < 64 else (1, 3, 4))
                - (0 if type_name in REPACKED else draw.randrange(8)),
                experts=experts,
                used=used,
                tokens=tokens,
                ne11=draw.choice((1, used) if op == "id" else (1, 1, 2, 3)),
                # with rows apart, the unpatched MUL_MAT is wrong (below)
                pad=draw.choice((0, 0, 8, 5)) if op == "id" else 0,
                threads=threads,
                routing=routing,
                activations=draw.choice(("normal", *ACTIVATIONS)),
                weights=draw.choice(("random", "random", "random", *WEIGHTS)),
                seed=next(seeds),
            )
        )
    return found


def differing(cases: list[Case], ours: list[Products], stock: list[Products]) -> list[str]:
    return [f"{case}: {a} {b}" for case, a, b in zip(cases, ours, stock, strict=True) if a != b]


@pytest.fixture(scope="module")
def built() -> Path:
    """The folder of the libraries; built the first time (a minute of CPU time)."""
    return row_products.build(runnable())


def runnable() -> list[str]:
    """Libraries that this CPU can run."""
    return sorted({library for name, pair in PAIRS.items() if lacks(name) is None for library in pair})


@pytest.fixture(params=PAIRS)
def kernels(request: pytest.FixtureRequest) -> str:
    if reason := lacks(request.param):
        pytest.skip(reason)
    return str(request.param)


def run(folder: Path, library: str, cases: list[Case]) -> list[Products]:
    return row_products.run(folder / "row_products", folder / f"{library}.so", cases)


@pytest.mark.parametrize(("op", "type_name"), PRODUCTS)
def test_bits_of_stock(built: Path, kernels: str, op: str, type_name: str) -> None:
    cases = cases_of(op, type_name)
    ours, stock = (run(built, library, cases) for library in PAIRS[kernels])
    assert differing(cases, ours, stock) == []
    for case, found in zip(cases, ours, strict=True):
        if case.activations not in ("nan", "inf"):
            assert found.n_hashed == case.m * case.tokens * (case.used if op == "id" else case.ne11), case
        # what F16 holds, in which these types keep the activations or their sums
        ordinary = ("normal",) if type_name in ("f16", "q4_1", "q5_1") else ("normal", "outliers", "extreme")
        if case.activations in ordinary and case.weights == "random":
            assert found.n_finite == found.n_hashed, case
            assert found.n_zero < found.n_hashed / 2, case


@pytest.mark.parametrize("op", ["id", "mm"])
def test_threads_and_gaps_between_rows_change_nothing(built: Path, kernels: str, op: str) -> None:
    """Of MUL_MAT with gaps, an unpatched ggml quantizes what lies in them: ours is compared with ours."""
    cases = [case for of, name in PRODUCTS for case in cases_of(of, name) if of == op and case.tokens <= 130][::5]
    simplest = run(built, PAIRS[kernels][0], [replace(case, pad=0, threads=1) for case in cases])
    pad = 0 if kernels == "off" and op == "mm" else 5
    others = run(built, PAIRS[kernels][0], [replace(case, pad=pad, threads=case.threads + 1) for case in cases])
    assert differing(cases, others, simplest) == []


def test_an_expert_has_the_bits_of_one_alone(built: Path, kernels: str) -> None:
    """All tokens on one expert, in any number: a token's products do not depend on the tokens beside it."""
    base = Case("id", "q4_0", 96, 40, 1, 1, 1, 1, 0, 1, "all", "normal", "random", 5)
    for name in (*REPACKED, *NOT_REPACKED):
        case = replace(base, type=name, k=3 * block_size(name))
        # a stock kernel of MUL_MAT for one row is the one of MUL_MAT_ID
        one = replace(case, op="mm", experts=0, used=0, routing="-")
        expert, dense = (run(built, PAIRS[kernels][0], [product]) for product in (case, one))
        assert expert == dense, name


def test_the_threads_are_there(built: Path) -> None:
    """Equal bits for all numbers of threads mean nothing if there was one."""
    if not Path("/proc/self/task").exists():
        pytest.skip("threads are counted in /proc")
    case = cases_of("id", "q4_0")[0]
    for library in ("avx2-ours", "avx2-stock"):
        worker = Worker(built / "row_products", built / f"{library}.so")
        worker.run(replace(case, threads=1, m=264))
        alone = worker.n_threads()
        worker.run(replace(case, threads=16, m=264))
        if worker.n_threads() == alone:  # without OpenMP, threads end with the product
            symbols = (built / f"{library}.so").read_bytes()
            assert b"GOMP_parallel" not in symbols
            assert b"__kmpc_fork_call" not in symbols
        else:
            assert worker.n_threads() == 16
        worker.close()


def test_trees_differ_where_the_libraries_do(built: Path) -> None:
    """All but these files is compiled once, from the prepared tree: a patch of it would stand on both sides."""
    prepared, stock = (tree / "ggml" / "src" / "ggml-cpu" for tree in (native_programs.TREE, row_products.stock_tree()))
    names = [str(path.relative_to(stock)) for path in stock.rglob("*") if path.is_file()]
    equal, different, missing = cmpfiles(prepared, stock, names, shallow=False)
    assert len(equal) > 50
    # those of test_tile_ops.py, too
    patched = ["binary-ops.cpp", "ggml-cpu.c", "ops.cpp", "repack.cpp", "tiled/tiled-kernel.cpp", "tiled/tiled.cpp"]
    assert sorted(different) == patched
    assert missing == []


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    op, type_name = draw(st.sampled_from(PRODUCTS))
    is_id = op == "id"
    experts = draw(st.integers(1, 40)) if is_id else 0
    used = draw(st.integers(1, min(experts, 9))) if is_id else 0
    divisors = [n for n in range(1, used + 1) if used % n == 0]
    return Case(
        op=op,
        type=type_name,
        k=block_size(type_name) * draw(st.integers(1, 9)),
        m=8 * draw(st.integers(1, 40)) - (0 if type_name in REPACKED else draw(st.integers(0, 7))),
        experts=experts,
        used=used,
        tokens=draw(st.integers(1, 200)),
        ne11=draw(st.sampled_from(divisors) if is_id else st.integers(1, 4)),
        pad=draw(st.integers(0, 40)) if is_id else 0,
        threads=draw(st.integers(1, 12)),
        routing=draw(st.sampled_from(ROUTINGS)) if is_id else "-",
        activations=draw(st.sampled_from(ACTIVATIONS)),
        weights=draw(st.sampled_from(WEIGHTS)),
        seed=draw(st.integers(0, 2**63)),
    )


@pytest.fixture(scope="module")
def workers(built: Path) -> Iterator[dict[str, Worker]]:
    found = {name: Worker(built / "row_products", built / f"{name}.so") for name in runnable()}
    yield found
    for worker in found.values():
        worker.close()


@given(any_case())
@settings(max_examples=400)
def test_bits_of_stock_for_any_shape(workers: dict[str, Worker], case: Case) -> None:
    found = {name: worker.run(case) for name, worker in workers.items()}
    for ours, stock in PAIRS.values():
        assert found.get(ours) == found.get(stock)
