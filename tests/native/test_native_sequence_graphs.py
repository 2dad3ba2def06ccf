"""Steering per sequence: which changes of steering need another graph, and which keep it."""

from __future__ import annotations

import numpy as np
import pytest

from steermoe_local.llama import capi
from tests.support.low_level import Context, Row, lib, random_signs
from tests.support.sequence_steering import (
    NONE,
    Loaded,
    Steering,
    attach,
    steerings,
    turns,
)

pytestmark = pytest.mark.numeric


def test_equal_steering_has_the_graph_of_the_context(olmoe: Loaded) -> None:
    """Sixteen sequences with equal biases, each created separately: the graph and the bits of a steered context."""
    identity, model = olmoe
    one, soft = steerings(identity)[:2]
    batch = turns(16, 0, 2)
    name = "ffn_moe_logits_steered-0"
    with Context(model, capture=True, n_seq_max=16) as context:
        capi.attach(context.ctx, one.native(identity))
        plain = context.decode_rows(batch)
        plain_ops = context.ops[name]
    with Context(model, capture=True, n_seq_max=16) as context:
        attach(context, identity, [one] * 16)
        assert context.decode_rows(batch).tobytes() == plain.tobytes()
        assert context.ops[name] == plain_ops
        capi.attach_sequence(context.ctx, 3, soft.native(identity))
        context.clear()
        context.decode_rows(batch)
        assert context.ops[name][-1] == plain_ops[0], "the soft rule needs no nodes that the hard rule does not have"
        attach(context, identity, [None] * 3 + [one])
        context.clear()
        assert context.decode_rows(batch).tobytes() == plain.tobytes()
        assert context.ops[name][-1] == plain_ops[0]
        # all unsteered: nothing is edited
        context.seen.clear()
        attach(context, identity, [NONE] * 16)
        context.clear()
        unsteered = context.decode_rows(batch)
        assert name not in context.seen
    with Context(model, n_seq_max=16) as context:
        assert context.decode_rows(batch).tobytes() == unsteered.tobytes()


def test_changes_between_decodes(olmoe: Loaded) -> None:
    """In any order of changes, a batch computes what it computes in a context that was made for it."""
    identity, model = olmoe
    pool: list[Steering | None] = [*steerings(identity), *steerings(identity, seed=2), None]
    own_pool = [steerings(identity)[1], steerings(identity, 3)[0], steerings(identity, 3)[7], NONE]
    rng = np.random.default_rng(17)
    given: list[Steering | None] = [None] * 4
    own = NONE
    batch = turns(4, 0, 3)
    seen = set()
    with Context(model) as context:
        for step in range(40):
            s = int(rng.integers(0, 4))
            choice = int(rng.integers(0, len(pool)))
            given[s] = pool[choice]
            if given[s] is None:
                capi.detach_sequence(context.ctx, s)
            else:
                attach(context, identity, [None] * s + [given[s]])
            if step % 5 == 4:
                own = own_pool[int(rng.integers(0, 4))]
                capi.attach(context.ctx, own.native(identity))  # without values: those without their own run plain
            if step == 27:
                capi.detach(context.ctx)
                given, own = [None] * 4, NONE
            context.clear()
            found = context.decode_rows(batch)
            with Context(model) as fresh:
                if own.rows:
                    capi.attach(fresh.ctx, own.native(identity))
                attach(fresh, identity, given)
                assert fresh.decode_rows(batch).tobytes() == found.tobytes(), f"step {step}"
            seen.add(found.tobytes())
    assert len(seen) > 20


def n_reused(context: Context) -> int:
    return int(lib().llama_perf_context(context.ctx).n_reused)


def test_new_values_keep_the_graph(olmoe: Loaded) -> None:
    """A change of one sequence's values between single tokens: the next graph is the last one again."""
    identity, model = olmoe
    variants = [steerings(identity, seed) for seed in range(6)]
    with Context(model) as context:
        attach(context, identity, [variants[0][0], variants[0][1], NONE])
        for position in range(3):
            context.decode_rows(turns(3, position, position + 1))
        before = n_reused(context)
        for step in range(1, 6):
            attach(context, identity, [variants[step][0], variants[step][1]])
            context.decode_rows(turns(3, 2 + step, 3 + step))
        assert n_reused(context) - before == 5
        # the fifth steering is one more than the bank holds: one new graph, then the same again
        attach(context, identity, [None] * 3 + [variants[0][0], variants[1][0], variants[2][0]])
        for position in range(8, 11):
            context.decode_rows(turns(3, position, position + 1))
        assert n_reused(context) - before == 5 + 2


def test_new_values_of_one_sequence_alone_keep_the_graph(olmoe: Loaded) -> None:
    identity, model = olmoe
    with Context(model) as context:
        attach(context, identity, [NONE, steerings(identity, 0)[0]])
        for position in range(3):
            context.decode_rows([(5, position, 1, True)])
        before = n_reused(context)
        for step in range(1, 6):
            attach(context, identity, [None, steerings(identity, step)[0]])
            context.decode_rows([(5, 2 + step, 1, True)])
        assert n_reused(context) - before == 5


def test_sequences_of_the_same_rules_share_a_graph(olmoe: Loaded) -> None:
    """Single tokens of sequences with other values and epsilons: only other rules in a layer build a new graph."""
    identity, model = olmoe
    rng = np.random.default_rng(29)
    under = [Steering({0: random_signs(rng, 16, 4, 1, 5)}, epsilon=1 + s / 4) for s in range(3)]
    under += [Steering({0: np.ones(16, np.float32)}, "soft"), Steering({0: under[0].rows[0], 1: under[0].rows[0]})]
    with Context(model) as context:
        attach(context, identity, under)
        context.decode_rows([(5, 0, 0, True)])
        for sequence, reused in enumerate((1, 1, 1, 0, 0)):
            before = n_reused(context)
            context.decode_rows([(6, 1 if sequence == 0 else 0, sequence, True)])
            assert n_reused(context) - before == reused, f"sequence {sequence}"


def test_other_caps_keep_the_graph(olmoe: Loaded) -> None:
    """A cap is a value of its row; the first capped steering of a context needs another graph than its hard ones."""
    identity, model = olmoe
    signs = random_signs(np.random.default_rng(31), 16, 4, 1, 5)
    with Context(model) as context:
        attach(context, identity, [Steering({0: signs})])
        context.decode_rows([(5, 0, 0, True)])
        for position, (cap, reused) in enumerate(((0.5, 0), (0.75, 1), (8.0, 1), (float("inf"), 0), (0.5, 0)), 1):
            before = n_reused(context)
            attach(context, identity, [Steering({0: signs}, "capped", cap=cap)])
            context.decode_rows([(6, position, 0, True)])
            assert n_reused(context) - before == reused, f"cap {cap}"


def test_equal_rows_of_different_cap(olmoe: Loaded) -> None:
    """Hard and capped sequences of the same signs in one batch: each as when all are under its rule."""
    identity, model = olmoe
    rows = steerings(identity)[0].rows
    under = [Steering(rows), *(Steering(rows, "capped", cap=cap) for cap in (0.5, 2.0, float("inf"), 0.0))]

    def run(given: list[Steering]) -> list[bytes]:
        with Context(model) as context:
            attach(context, identity, given)
            logits = context.decode_rows(same_tokens(len(given)))
        return [logits.reshape(4, len(given), -1)[:, s].tobytes() for s in range(len(given))]

    def same_tokens(n: int) -> list[Row]:
        return [(token, position, s, True) for token, position, _, _ in turns(1, 0, 4) for s in range(n)]

    mixed = run(under)
    for sequence, steering in enumerate(under):
        assert run([steering] * len(under))[sequence] == mixed[sequence], f"cap {steering.cap}"
    # at the same place of the batch: kernels may round rows at different places differently
    assert mixed[3] == run([Steering(rows)] * len(under))[3], "an infinite cap is the hard rule"
    assert mixed[4] == run([NONE] * len(under))[4], "a cap of 0 is no steering"
    assert len(set(mixed[1:])) == 4


def test_equal_rows_of_different_epsilon(olmoe: Loaded) -> None:
    identity, model = olmoe
    near = steerings(identity)[0]
    far = Steering(near.rows, epsilon=5.0)
    with Context(model) as context:
        attach(context, identity, [near, far, near])
        mixed = context.decode_rows(turns(3, 0, 4)).reshape(4, 3, -1)
    for sequence, steering in enumerate((near, far, near)):
        with Context(model) as context:
            attach(context, identity, [steering] * 3)
            alike = context.decode_rows(turns(3, 0, 4)).reshape(4, 3, -1)
        assert alike[:, sequence].tobytes() == mixed[:, sequence].tobytes()
        assert not np.array_equal(alike[:, 1 - sequence % 2], mixed[:, 1 - sequence % 2])


def test_a_change_leaves_those_of_equal_steering(olmoe: Loaded) -> None:
    """Equal steering is kept once; a change of one of its sequences must not change it for the others."""
    identity, model = olmoe
    one, other = steerings(identity, 1)[0], steerings(identity, 2)[0]
    batch = turns(4, 0, 3)
    for first in ([one, one, one], [None, one, None]):  # shared among sequences, and with the context
        with Context(model) as context:
            capi.attach(context.ctx, one.native(identity))
            attach(context, identity, first)
            context.decode_rows(batch)
            attach(context, identity, [None, other])
            context.clear()
            found = context.decode_rows(batch)
            capi.attach(context.ctx, other.native(identity))
            context.clear()
            after = context.decode_rows(batch)
        with Context(model) as context:
            attach(context, identity, [one, other, one, one])
            assert context.decode_rows(batch).tobytes() == found.tobytes()
            attach(context, identity, [s or other for s in first] + [other])
            attach(context, identity, [None, other])
            context.clear()
            assert context.decode_rows(batch).tobytes() == after.tobytes()
