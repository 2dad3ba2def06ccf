"""Steering per token: wrong rows, decodes that fail, rows that come and go, what other calls say of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from steermoe_local.errors import ModelError, ModelMismatchError, NativeError
from steermoe_local.identity import ModelIdentity
from steermoe_local.llama import capi
from steermoe_local.llama.signatures import lib as native
from tests.support.low_level import Context, Row, identity_of, lib, native_bias, open_model
from tests.support.random_models import DENSE_FIRST
from tests.support.sequence_steering import ARGUMENT, NONE, Loaded, Steering, attach, steerings, tokens
from tests.support.token_rows import RowContext

pytestmark = pytest.mark.numeric

REFUSED = -1  # llama.h: llama_decode
NO_SLOT, ABORTED = 1, 2
N = 9


def prompt(n: int = N, start: int = 0) -> list[Row]:
    return [(t, start + i, 0, True) for i, t in enumerate(tokens(0, n))]


@contextmanager
def fails(status: int, message: str = "") -> Iterator[None]:
    """llama_decode fails with this status, and steermoe_last_error says this."""
    with pytest.raises(NativeError) as caught:
        yield
    assert caught.value.code == status
    assert message in native().steermoe_last_error().decode()


def decode(context: Context, rows: list[Row]) -> None:
    """llama_decode, whose failure is a NativeError."""
    batch = lib().llama_batch_init(len(rows), 0, 1)
    try:
        capi.decode(context.ctx, batch, rows)
    finally:
        lib().llama_batch_free(batch)


def position(context: Context) -> int:
    """The last position in the memory of sequence 0."""
    return int(lib().llama_memory_seq_pos_max(lib().llama_get_memory(context.ctx), 0))


#
# arguments
#


def test_rows_that_do_not_exist(olmoe: Loaded) -> None:
    identity, model = olmoe
    bias = steerings(identity)[0].native(identity)
    with RowContext(model, identity, [steerings(identity)[0]]) as context:
        known = context.numbers[0]
        capi.set_token_rows(context.ctx, [known] * N)
        for number in (-1, capi.MAX_ROWS, 2**31 - 1, -(2**31)):
            calls: list[Callable[[], None]] = [
                lambda number=number: capi.attach_row(context.ctx, number, bias),
                lambda number=number: capi.detach_row(context.ctx, number),
            ]
            if number != -1:
                calls.append(lambda number=number: capi.set_token_rows(context.ctx, [known, number]))
            for call in calls:
                with pytest.raises(NativeError, match=rf"row {number}\b.* 0 to {capi.MAX_ROWS - 1}") as caught:
                    call()
                assert caught.value.code == ARGUMENT
        for number in (0, 5, capi.MAX_ROWS - 2):
            with pytest.raises(NativeError, match=rf"token 2 .* row {number}, to which no bias") as caught:
                capi.set_token_rows(context.ctx, [known, -1, number])
            assert caught.value.code == ARGUMENT
        # a failure changes nothing: the first rows wait for the decode
        found = context.decode_rows(prompt())
    with Context(model) as context:
        capi.attach(context.ctx, bias)
        assert context.decode_rows(prompt()).tobytes() == found.tobytes()


def test_null_and_negative(olmoe: Loaded) -> None:
    identity, model = olmoe
    bias = steerings(identity)[0].native(identity)
    functions = native()
    with Context(model) as context:
        rows = (ctypes.c_int32 * 2)(-1, -1)
        for status in (
            functions.steermoe_row_attach(None, 0, bias._handle, 0),
            functions.steermoe_row_attach(context.ctx, 0, None, 0),
            functions.steermoe_row_detach(None, 0),
            functions.steermoe_set_token_rows(None, rows, 2),
            functions.steermoe_set_token_rows(context.ctx, None, 2),
            functions.steermoe_set_token_rows(context.ctx, rows, -1),
        ):
            assert status == ARGUMENT
        assert functions.steermoe_set_token_rows(context.ctx, None, 0) == 0
        capi.detach_row(context.ctx, 3)  # it has no bias: nothing to do


def test_an_error_leaves_the_row(olmoe: Loaded, random_model: Any) -> None:
    identity, model = olmoe
    one, other = steerings(identity)[:2]
    stranger = ModelIdentity(**(identity.to_dict() | {"router_sha256": "0" * 64}))
    with RowContext(model, identity, [one]) as context:
        before = context.decode_under(prompt(), [0] * N)
        with pytest.raises(ModelMismatchError, match="force it"):
            capi.attach_row(context.ctx, context.numbers[0], other.native(stranger))
        context.clear()
        assert context.decode_under(prompt(), [0] * N).tobytes() == before.tobytes()
        capi.attach_row(context.ctx, context.numbers[0], other.native(stranger), force=True)
        context.clear()
        forced = context.decode_under(prompt(), [0] * N)
    with RowContext(model, identity, [other]) as context:
        assert context.decode_under(prompt(), [0] * N).tobytes() == forced.tobytes()
    path = random_model(DENSE_FIRST)
    dense = open_model(path)
    with Context(dense) as context, pytest.raises(ModelError, match="layer 0 cannot be steered:"):
        capi.attach_row(context.ctx, 0, native_bias(identity_of(path), {0: np.eye(DENSE_FIRST.n_expert)[1]}))
    dense.close()


#
# decodes that fail
#


@pytest.mark.parametrize("n_rows", [1, N - 1, N + 1, 100])
def test_rows_of_another_batch(olmoe: Loaded, n_rows: int) -> None:
    """As many rows as tokens, or nothing is computed; and then the rows are gone."""
    identity, model = olmoe
    one = steerings(identity)[0]
    with RowContext(model, identity, [one]) as context:
        context.decode_under(prompt(), [0] * N)
        capi.set_token_rows(context.ctx, [context.numbers[0]] * n_rows)
        with fails(REFUSED, f"{n_rows} rows were given for a batch of {N} tokens"):
            decode(context, prompt(start=N))
        assert position(context) == N - 1, "nothing may have changed"
        plain = context.decode_rows(prompt(start=N))
    with RowContext(model, identity, [one]) as context:
        context.decode_under(prompt(), [0] * N)
        assert context.decode_rows(prompt(start=N)).tobytes() == plain.tobytes()


@pytest.mark.parametrize("way", ["detached", "all detached"])
def test_a_row_in_use_is_detached(olmoe: Loaded, way: str) -> None:
    identity, model = olmoe
    one, other = steerings(identity)[0], steerings(identity)[1]
    with RowContext(model, identity, [one, other]) as context:
        capi.set_token_rows(context.ctx, context.numbers * 4)
        if way == "detached":
            capi.detach_row(context.ctx, context.numbers[1])
            with fails(REFUSED, f"token 1 of the batch has row {context.numbers[1]}, to which no bias is attached"):
                decode(context, prompt(8))
            assert position(context) == -1
        else:
            capi.detach(context.ctx)  # the rows of the next batch are forgotten with it
        unsteered = context.decode_rows(prompt(8))
        with pytest.raises(NativeError, match="no bias"):
            capi.set_token_rows(context.ctx, context.numbers)
    with Context(model) as context:
        assert context.decode_rows(prompt(8)).tobytes() == unsteered.tobytes()


def test_the_bias_at_the_time_of_the_decode(olmoe: Loaded) -> None:
    """A row may get another bias between the call and the decode, also after it was detached."""
    identity, model = olmoe
    one, other = steerings(identity)[0], steerings(identity)[1]
    with RowContext(model, identity, [one]) as context:
        capi.set_token_rows(context.ctx, [context.numbers[0]] * N)
        capi.detach_row(context.ctx, context.numbers[0])
        capi.attach_row(context.ctx, context.numbers[0], other.native(identity))
        found = context.decode_rows(prompt())
    with Context(model) as context:
        capi.attach(context.ctx, other.native(identity))
        assert context.decode_rows(prompt()).tobytes() == found.tobytes()


def aborting(context: Context, nodes: int) -> Any:
    """Let each graph stop after some nodes, for ever; keep what this returns."""
    kind = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
    left = iter(range(nodes))
    callback = kind(lambda _: next(left, None) is None)
    lib().llama_set_abort_callback(context.ctx, callback, None)
    return callback


@pytest.mark.parametrize("way", ["token", "sequence", "no slot", "aborted", "aborted later"])
def test_a_decode_that_fails_takes_its_rows(olmoe: Loaded, way: str) -> None:
    """Whether llama.cpp refuses the batch, finds no place for it, or ends its graph: the next decode has no rows."""
    identity, model = olmoe
    one, other = steerings(identity)[0], steerings(identity)[4]
    rows = prompt(start=250 if way == "no slot" else 0)
    if way == "token":
        rows[3] = (10**6, *rows[3][1:])
    elif way == "sequence":
        rows[3] = (*rows[3][:2], 999, True)
    status = {"no slot": NO_SLOT, "aborted": ABORTED, "aborted later": ABORTED}.get(way, REFUSED)
    with RowContext(model, identity, [one], n_ctx=256, n_ubatch=4) as context:
        attach(context, identity, [other])
        if way == "no slot":
            context.decode_rows(prompt(250))
        capi.set_token_rows(context.ctx, [context.numbers[0]] * N)
        callback = aborting(context, 250 if way == "aborted later" else 5) if "aborted" in way else None
        with fails(status):
            decode(context, rows)
        if callback is not None:
            first, last = (0, N - 2) if way == "aborted later" else (-1, -1)
            assert first <= position(context) <= last, "the graph did not end where it should"
            lib().llama_set_abort_callback(context.ctx, type(callback)(), None)
        context.clear()
        found = context.decode_rows(prompt())
    with Context(model, n_ctx=256, n_ubatch=4) as context:
        attach(context, identity, [other])
        assert context.decode_rows(prompt()).tobytes() == found.tobytes()


#
# what other calls say
#


def test_layer_info_tells_of_any_row(olmoe: Loaded) -> None:
    identity, model = olmoe
    under = [Steering({2: np.eye(16)[1]}), NONE, Steering({0: np.eye(16)[1]}, "soft")]

    def steered(context: Context) -> list[bool]:
        return [capi.layer_info(context.ctx, layer).steered for layer in range(4)]

    with RowContext(model, identity, under) as context:
        assert steered(context) == [True, False, True, False]
        capi.detach_row(context.ctx, context.numbers[0])
        assert steered(context) == [True, False, False, False]
        capi.detach(context.ctx)
        assert steered(context) == [False] * 4


def test_a_row_without_values(olmoe: Loaded) -> None:
    """It exists, and its tokens are unsteered."""
    identity, model = olmoe
    with Context(model) as context:
        capi.attach_row(context.ctx, 7, NONE.native(identity))
        capi.set_token_rows(context.ctx, [7] * N)
        attach(context, identity, [steerings(identity)[0]])
        found = context.decode_rows(prompt())
    with Context(model) as context:
        assert context.decode_rows(prompt()).tobytes() == found.tobytes()


def test_rows_come_and_go(olmoe: Loaded) -> None:
    """In any order of changes, a batch computes what it computes in a context that was made for it."""
    identity, model = olmoe
    pool = [*steerings(identity), *steerings(identity, seed=2)]
    rng = np.random.default_rng(17)
    held: dict[int, Steering] = {}
    seen = set()
    with Context(model) as context:
        for step in range(40):
            row = int(rng.integers(0, 6)) * 200
            if step == 25:
                capi.detach(context.ctx)
                held = {}
            if row in held and rng.integers(0, 3) == 0:
                capi.detach_row(context.ctx, row)
                del held[row]
            else:
                held[row] = pool[int(rng.integers(0, len(pool)))]
                capi.attach_row(context.ctx, row, held[row].native(identity))
            rows = [int(row) for row in rng.choice([*held, -1], N)]
            capi.set_token_rows(context.ctx, rows)
            context.clear()
            found = context.decode_rows(prompt())
            names = sorted(set(rows))
            with RowContext(model, identity, [held.get(row, NONE) for row in names]) as fresh:
                wanted = fresh.decode_under(prompt(), [names.index(row) for row in rows])
            assert wanted.tobytes() == found.tobytes(), f"step {step}"
            seen.add(found.tobytes())
    assert len(seen) > 20
