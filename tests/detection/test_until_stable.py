"""Recordings that end early: on the embedded model, on random models, resumed, by the command."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from steermoe_local import (
    ExpertMap,
    Pair,
    RoutingCounts,
    UntilStable,
    UsageError,
    load_pairs,
    record_counts,
    risk_difference,
    save_pairs,
)
from steermoe_local.cli import main
from steermoe_local.detection.checkpoint import CheckpointFile
from steermoe_local.detection.recording_options import RecordingProgress
from steermoe_local.maps.pair_counts import PairCounts
from steermoe_local.maps.significance import overlap
from tests.support.detecting import DATA, same, text_pairs
from tests.support.paper_models import N_EXPERT, N_LAYER, K, talking_model
from tests.support.random_models import GPT_OSS, QWEN3MOE, SIGMOID, RandomModel

BEHAVIOURS = ("digits-words", "document-memory", "refuse-comply")
RANDOM = [RandomModel("olmoe", n_layer=N_LAYER, n_expert=N_EXPERT, k=K), QWEN3MOE, GPT_OSS, SIGMOID]
RULE = UntilStable()


def shipped(name: str) -> list[Pair]:
    return load_pairs(DATA / f"{name}.pairs.jsonl")


def by_coin(pairs: list[Pair]) -> list[Pair]:
    """The pairs, each with its sides exchanged or not by a coin: there is no behaviour to find."""
    coin = random.Random(7)
    other = [Pair(p.id, p.negative, p.positive, p.negative_target, p.positive_target) for p in pairs]
    return [coin.choice(both) for both in zip(pairs, other, strict=True)]


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_it_saves_pairs_and_finds_the_same(tiny_path: Path, name: str) -> None:
    pairs = shipped(name)
    whole = record_counts(tiny_path, pairs, n_threads=1)
    early = record_counts(tiny_path, pairs, n_threads=1, until_stable=RULE)
    found = early.stability
    assert found is not None
    assert found.stopped
    assert RULE.min_pairs <= found.n_pairs == early.n_pairs < found.n_given == whole.n_pairs
    assert found.lower is not None
    assert found.lower >= RULE.level
    assert overlap(risk_difference(early), risk_difference(whole), found.first) >= RULE.level
    assert whole.stability is None
    # in another order, and grouped: the same pairs are taken
    grouped = sorted(pairs, key=lambda pair: (pair.positive_target, pair.id))
    again = record_counts(tiny_path, grouped, n_threads=2, until_stable=RULE)
    assert again.stability == found
    assert same(again, early)


def test_batches_change_nothing(tiny_f32_path: Path, untied_pairs: list[Pair]) -> None:
    """Checks come after the same pairs, however many a batch holds. All choices are the same however F32 rounds.

    Flash attention rounds queries to F16 in small batches only.
    """
    rule = UntilStable(level=0.3, checks=1, min_pairs=20, first=10)
    runs = [
        record_counts(tiny_f32_path, untied_pairs, until_stable=rule, n_threads=threads, n_batch=size, flash_attn=False)
        for threads, size in ((1, 64), (2, 512), (1, 2048))
    ]
    for other in runs[1:]:
        assert other.stability == runs[0].stability
        assert same(other, runs[0])


@pytest.mark.parametrize("model", RANDOM, ids=lambda model: model.arch)
def test_random_weights(tmp_path: Path, model: RandomModel) -> None:
    """Weights that learned nothing, sides that do not differ: all pairs are used, and it says so."""
    path = talking_model(tmp_path, model)
    for pairs in (shipped("document-memory"), by_coin(shipped("refuse-comply"))):
        found = record_counts(path, pairs, n_threads=1, until_stable=RULE).stability
        assert found is not None
        assert (found.stopped, found.stable, found.n_pairs) == (False, False, len(pairs))
        assert found.lower is not None
        assert found.lower < RULE.level


def test_no_coin_is_found(tiny_path: Path) -> None:
    found = record_counts(tiny_path, by_coin(shipped("digits-words")), n_threads=1, until_stable=RULE).stability
    assert found is not None
    assert (found.stopped, found.n_pairs) == (False, 120)


def test_resumed_anywhere(tiny_path: Path, tmp_path: Path) -> None:
    """Interrupted after every batch, also between a check's last pair and the check: the same end, and no pair more."""
    pairs, options = shipped("digits-words"), {"n_threads": 1, "n_batch": 256, "until_stable": RULE}
    whole = record_counts(tiny_path, pairs, **options)
    assert whole.stability is not None
    file = CheckpointFile(tmp_path / "m.json")
    done: list[int] = []
    result = None
    for _ in range(100):
        n_reports = 0

        def stop(progress: RecordingProgress) -> None:
            nonlocal n_reports
            n_reports += 1
            if n_reports > 1:  # the first report is of what was done before
                done.append(progress.n_done)
                raise KeyboardInterrupt

        try:
            result = record_counts(tiny_path, pairs, checkpoint=file, on_batch=stop, **options)
            break
        except KeyboardInterrupt:
            pass
    assert result is not None
    assert result.stability == whole.stability
    assert same(result, whole)
    assert {50, 60, 72} <= set(done), "interrupted right before the checks"
    assert done[-1] == 72
    for other in (None, UntilStable(level=0.71)):
        with pytest.raises(UsageError, match="until_stable was"):
            record_counts(tiny_path, pairs, checkpoint=file, **options | {"until_stable": other})


def test_skipped_pairs_do_not_count(tiny_path: Path) -> None:
    bad = [Pair(f"bad{i}", f"{'a ' * 300}{i} b", "b", "b", "b") for i in range(30)]
    reasons: list[str] = []
    counts = record_counts(
        tiny_path,
        bad + shipped("digits-words"),
        n_threads=1,
        n_ctx=200,
        until_stable=RULE,
        on_skip=lambda pair, reason: reasons.append(pair.id),
    )
    assert counts.stability is not None
    assert (counts.stability.n_given, counts.stability.n_pairs, counts.stability.stopped) == (150, 72, True)
    assert counts.n_skipped == len(reasons)
    assert 0 < counts.n_skipped < 30


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="steermoe")


def test_the_command(tmp_path: Path) -> None:
    output, counts, per_pair = (tmp_path / name for name in ("m.json", "c.npz", "p.npz"))
    flags = ["detect", "-m", "tiny", "--pairs", DATA / "digits-words.pairs.jsonl", "-t", "1", "-o", output]
    done = run(*flags, "--until-stable", "--counts", counts, "--per-pair", per_pair, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    expert_map = ExpertMap.load(output)
    assert expert_map.stability is not None
    assert found["until_stable"] == expert_map.stability.to_dict()
    assert found["n_pairs"] == expert_map.n_pairs == expert_map.stability.n_pairs == 72
    assert RoutingCounts.load(counts).stability == expert_map.stability
    assert expert_map.confidence is not None
    assert expert_map.confidence.n_pairs == PairCounts.load(per_pair).n_pairs == 72
    shown = run("map", "show", output)
    assert "72 of 120 pairs: stable" in " ".join(shown.stdout.split())
    # merged with other pairs it is no longer the run that ended
    save_pairs(text_pairs(9), tmp_path / "digits-words.jsonl")
    more = ["--pairs", tmp_path / "digits-words.jsonl", "--counts", tmp_path / "d.npz", "-o", tmp_path / "n.json"]
    done = run(*flags[:3], *more)
    assert done.exit_code == 0, done.stderr
    merged = run("map", "merge", counts, tmp_path / "d.npz", "-o", tmp_path / "s.json")
    assert merged.exit_code == 0, merged.stderr
    assert ExpertMap.load(tmp_path / "s.json").stability is None


def test_never_stable_is_no_error(tmp_path: Path) -> None:
    save_pairs(by_coin(shipped("digits-words"))[:70], tmp_path / "coin.jsonl")
    flags = ["detect", "-m", "tiny", "--pairs", tmp_path / "coin.jsonl", "-t", "1", "-o", tmp_path / "m.json"]
    done = run(*flags, "--until-stable")
    assert done.exit_code == 0, done.stderr
    assert "70 of 70 pairs: all" in " ".join(done.stdout.split())
    done = run(*flags, "--until-stable", "--stable-min", "71", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["until_stable"]
    assert (found["agreement"], found["n_checks"], found["n_pairs"], found["stopped"]) == (None, 0, 70, False)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--stable-level", "0.5"], "--stable-level"),
        (["--stable-first", "5"], "--stable-first"),
        (["--stable-checks", "5"], "--stable-checks"),
        (["--stable-min", "50"], "--stable-min"),
        (["--until-stable", "--stable-level", "0"], "0"),
        (["--until-stable", "--stable-level", "1"], "1"),
        (["--until-stable", "--stable-level", "nan"], "nan"),
        (["--until-stable", "--stable-min", "19"], "19"),
        (["--until-stable", "--stable-first", "0"], "0"),
        (["--until-stable", "--stable-checks", "x"], "'x'"),
        (["--until-stable", "--shard", "1/2"], "shard 1/2"),
    ],
)
def test_refused(tmp_path: Path, options: list[str], named: str) -> None:
    flags = ["detect", "-m", "tiny", "--pairs", DATA / "digits-words.pairs.jsonl", "-o", tmp_path / "m.json"]
    refused = run(*flags, *options)
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert named in refused.stderr
    assert not list(tmp_path.iterdir())


def test_a_map_of_other_pairs_than_it_says(tmp_path: Path) -> None:
    data = json.loads((DATA.parents[1] / "expert_maps" / "tiny" / "digits-words.json").read_text("utf-8"))
    found = {"rule": {"level": 0.7, "first": 20, "checks": 3, "min_pairs": 50}, "n_given": 300, "n_pairs": 90}
    found |= {"n_checks": 9, "stopped": True, "first": 20, "agreement": 0.9, "chance": 0.1, "error": 0.1, "lower": 0.8}
    data["until_stable"] = found | {"p": 0.002, "alpha": 0.005}
    assert data["n_pairs"] != 90
    path = tmp_path / "m.json"
    path.write_text(json.dumps(data), "utf-8")
    shown = run("map", "show", path)
    assert shown.exit_code == 1, shown.stderr
    assert "until_stable" in shown.stderr
    assert np.isfinite(data["rd"]).all()
