"""The benchmarks' own parts: the random models load and route, and the arithmetic of the report is right. Not timed."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, dequantize

from tests.support.low_level import Context, open_model
from tests.support.paths import ROOT

SHAPES = ("toy", "toy-olmoe")


pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


@pytest.fixture(scope="module")
def random_q4(benchmarks_on_path: None) -> ModuleType:
    import random_q4

    return random_q4


@pytest.fixture(scope="module")
def performance(benchmarks_on_path: None) -> ModuleType:
    import performance

    return performance


@pytest.fixture(scope="module", params=SHAPES)
def made(request: pytest.FixtureRequest, random_q4: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A shape and its model."""
    shape = random_q4.SHAPES[request.param]
    return shape, random_q4.write_model(tmp_path_factory.mktemp("q4") / "model.gguf", shape)


def test_olmoe_has_no_grouped_attention(random_q4: Any) -> None:
    with pytest.raises(ValueError, match="not 2"):
        replace(random_q4.SHAPES["olmoe"], n_head_kv=2)


def test_model_is_q4_0_with_f32_routers(made: tuple[Any, Path], random_q4: Any) -> None:
    shape, path = made
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert found.keys() == random_q4.tensors(shape).keys()
    for name, size in random_q4.tensors(shape).items():
        tensor = found[name]
        assert tuple(int(n) for n in tensor.shape) == size[::-1]
        matrix = len(size) > 1 and "ffn_gate_inp" not in name
        assert tensor.tensor_type == (GGMLQuantizationType.Q4_0 if matrix else GGMLQuantizationType.F32)


def test_values_have_the_wanted_spread(random_q4: Any) -> None:
    rows = random_q4.q4_0(np.random.default_rng(0), (4, 64, 512), 0.25)
    values = dequantize(rows, GGMLQuantizationType.Q4_0)
    assert values.shape == (4, 64, 512)
    assert np.isfinite(values).all()
    # scales of 0.5 to 1.5 times the mean one widen the spread by 4%; q - 8 is -8..7, half a step below zero
    assert values.std() == pytest.approx(0.25, rel=0.08)
    assert abs(values.mean()) < 0.05


def test_model_runs_and_its_choice_depends_on_the_token(made: tuple[Any, Path]) -> None:
    shape, path = made
    model = open_model(path)
    try:
        with Context(model, capture=True) as context:
            logits = context.fresh(range(40))
            chosen = [context.seen[f"ffn_moe_topk-{layer}"][-1].reshape(40, shape.k) for layer in range(shape.n_layer)]
        assert np.isfinite(logits).all()
        assert len(np.unique(logits)) > 1000
        for choice in chosen:
            assert len({tuple(sorted(row)) for row in choice.tolist()}) > 5
        tokens = model.tokenize(b"hello world", False, True)
        assert len(tokens) == len("hello world")
    finally:
        model.close()


def test_model_is_the_same_every_time_and_leaves_no_half_file(random_q4: Any, tmp_path: Path) -> None:
    first = random_q4.write_model(tmp_path / "a.gguf", random_q4.SHAPES["toy"])
    second = random_q4.write_model(tmp_path / "b.gguf", random_q4.SHAPES["toy"])
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_cached_model_is_made_once(random_q4: Any, tmp_path: Path) -> None:
    (tmp_path / "toy-00000000.gguf").write_bytes(b"of an older shape")
    path = random_q4.cached_model("toy", tmp_path)
    before = path.stat().st_mtime_ns
    assert random_q4.cached_model("toy", tmp_path) == path
    assert path.stat().st_mtime_ns == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_shapes_are_those_of_the_real_models(random_q4: Any) -> None:
    def parameters(name: str) -> int:
        return sum(int(np.prod(size)) for size in random_q4.tensors(random_q4.SHAPES[name]).values())

    assert parameters("olmoe") / 1e9 == pytest.approx(6.92, abs=0.01)  # OLMoE-1B-7B
    assert parameters("granite") / 1e9 == pytest.approx(1.33, abs=0.01)  # Granite-3.1-1B-A400M
    assert random_q4.SHAPES["many"].n_experts > 10_000


def test_ratio_is_the_median_of_rounds_with_its_interval() -> None:
    from ratios import Ratio, speed_ratios

    # ours takes half the time in one round, the same in another: faster is above 1
    assert speed_ratios([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]) == [2.0, 1.0, 0.5]
    ratio = Ratio.of([2.0, 1.0, 0.5])
    assert (ratio.median, ratio.min, ratio.max, ratio.n) == (1.0, 0.5, 2.0, 3)
    assert ratio.min <= ratio.low <= ratio.median <= ratio.high <= ratio.max
    # the interval narrows as rounds are added, the extremes do not
    rng = np.random.default_rng(0)
    few, many = (Ratio.of(list(rng.uniform(0.9, 1.1, size=n))) for n in (5, 200))
    assert many.high - many.low < (few.high - few.low) / 2
    assert many.low < 1 < many.high
    assert Ratio.of([1.5] * 5) == Ratio(1.5, 1.5, 1.5, 1.5, 1.5, 5)
    for bad in ([], [1.0, 0.0], [1.0, -2.0]):
        with pytest.raises(ValueError, match="positive"):
            Ratio.of(bad)


@pytest.mark.parametrize(
    ("median", "high", "noise", "expected"),
    [
        (1.000, 1.010, 0.00, "yes"),
        (0.990, 0.990, 0.00, "yes"),
        (0.985, 0.995, 0.00, "within noise"),
        (0.980, 0.982, 0.01, "within noise"),
        (0.970, 0.975, 0.01, "no"),
        (0.989, 0.9899, 0.00, "no"),
        (1.100, 1.200, 0.06, "too noisy"),
        (0.800, 0.850, 0.06, "no"),
    ],
)
def test_verdict(median: float, high: float, noise: float, expected: str) -> None:
    from ratios import Ratio, verdict

    assert verdict(Ratio(median, median - 0.01, high, median - 0.02, high + 0.01, 9), 0.99, noise) == expected


def test_noise_is_the_farther_end() -> None:
    from ratios import Ratio, noise_of

    assert noise_of(Ratio(1.0, 0.97, 1.01, 0.9, 1.1, 9)) == pytest.approx(0.03)
    assert noise_of(Ratio(1.0, 0.995, 1.02, 0.9, 1.1, 9)) == pytest.approx(0.02)


def times(**factors: float) -> dict[str, list[float]]:
    """Seconds of five rounds, each round slower than the last; `factors` multiply a variant's time."""
    rounds = [1.0, 1.1, 1.5, 2.0, 4.0]
    names = {"stock_0", "stock_1", "plain", "hard", "soft", "recorder"}
    return {
        f"{name.replace('_', ' ')}: {task}": [t * factors.get(name, 1.0) for t in rounds]
        for name in names
        for task in ("prompt", "decode")
        if (name, task) != ("recorder", "decode")
    }


def test_compare_takes_both_stock_runs_of_the_same_round(performance: Any) -> None:
    found = performance.compare(times(stock_1=1.02, hard=1.25, recorder=0.5))
    # a drift over the rounds cancels; the reference is the mean of the two stock runs
    assert found["noise"]["prompt"]["median"] == pytest.approx(1.02)
    ratios = found["ratios"]
    assert ratios["plain: prompt"]["median"] == pytest.approx(1.01)
    assert ratios["hard: decode"]["median"] == pytest.approx(1.01 / 1.25)
    assert ratios["recorder: prompt"]["median"] == pytest.approx(2.02)
    assert "recorder: decode" not in ratios
    assert [ratios[f"{name}: decode"]["holds"] for name in ("plain", "hard", "soft")] == ["yes", "no", "yes"]
    assert ratios["plain: decode"]["at_least"] == 1.0
    assert ratios["hard: decode"]["at_least"] == 0.99


def test_biases_are_judged_by_their_median(performance: Any) -> None:
    found = performance.summarize_biases(
        {
            "a token": [1.0, 2.0, 9.0],
            "set": [1.0, 4.0, 50.0],
            "set: next token": [3.0],
            "swap": [6.0],
            "swap: next token": [2],
        }
    )
    assert found["a_token"] == 2.0
    assert found["steps"]["set"] == {"median": 4.0, "max": 50.0, "next_token_over": 1.0, "holds": "yes"}
    assert found["steps"]["swap"]["holds"] == "no"
    assert found["steps"].keys() == {"set", "swap"}


def report(performance: Any, **factors: float) -> dict[str, Any]:
    speed = {
        "n_prompt": 8,
        "n_decode": 2,
        "n_rounds": 5,
        "rounds_with_other_logits": 0,
        "tokens_per_second": dict.fromkeys(times(), 10.0),
        **performance.compare(times(**factors)),
    }
    return {
        "date": "today",
        "commit": "c",
        "seconds": 1,
        "machine": {"cpu": "a CPU", "cores": 2, "system": "Linux"},
        "threads": 2,
        "load_before": [0.0, 0.0, 0.0],
        "speed": {"toy": speed},
        "biases": {},
        "memory": {"toy": {"skipped": "no /proc"}},
        "transformers": {"toy": {"skipped": "not installed"}},
    }


def test_broken_promises_are_found(performance: Any) -> None:
    good = report(performance)
    assert performance.broken_promises(good) == []
    bad = report(performance, soft=1.2)
    bad["speed"]["toy"]["rounds_with_other_logits"] = 1
    found = performance.broken_promises(bad)
    assert len(found) == 3
    assert any("logits" in line for line in found)
    assert any("soft: prompt" in line for line in found)


def test_tables_go_between_the_markers(
    performance: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    docs, source = tmp_path / "performance.md", tmp_path / "figures.json"
    docs.write_text(f"before\n{performance.START}\nstale\n{performance.END}\nafter\n", encoding="utf-8")
    source.write_text(json.dumps(report(performance, hard=1.25)), encoding="utf-8")
    monkeypatch.setattr(performance, "DOCS", docs)
    for options, status in (([], None), (["--check"], 1)):
        monkeypatch.setattr(sys, "argv", ["performance.py", "--from", str(source), "--write-docs", *options])
        if status is None:
            performance.main()
        else:
            with pytest.raises(SystemExit) as exit_:
                performance.main()
            assert exit_.value.code == status
    text = docs.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale" not in text
    assert "| hard rule in all layers | decode | 10.0 | 0.800 | 0.800 to 0.800 | 0.800 to 0.800 | ≥ 0.99 | no |" in text
    assert "Skipped: not installed." in text
    assert "does not hold: speed" in capsys.readouterr().err


def test_docs_have_the_markers(performance: Any) -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert text.index(performance.START) < text.index(performance.END)


def test_missing_markers_are_an_error(performance: Any, tmp_path: Path) -> None:
    docs = tmp_path / "x.md"
    docs.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="put them back"):
        performance.write_docs(docs, "text")
    assert docs.read_text(encoding="utf-8") == "nothing"


def test_load_for_servers() -> None:
    """The client of the serving benchmark counts what a real server answers, and is not content with less."""
    from servers import Ask, Server
    from workers import WorkerError

    from tests.support.running_server import running

    with running(parallel=2, n_ctx=256) as found:
        server = Server(int(found.url.rpartition(":")[2]), os.getpid(), 0, steers=True)
        prompt = list(range(300, 340))
        seconds, answers = server.load([Ask(prompt, 5), Ask(prompt, 5, "digits-words")] * 2, 2)
        assert [(answer.n_prompt, answer.n_generated) for answer in answers] == [(40, 5)] * 4
        assert all(0 < answer.first <= answer.seconds <= seconds for answer in answers)
        assert server.ask(Ask([*prompt, 5], 1, "digits-words")).n_cached == 40
        assert server.ask(Ask([*prompt, 6], 7, stream=False)).n_generated == 7
        assert (server.cpu_seconds() or 0.0) > 0 or not Path("/proc").exists()
        with pytest.raises(WorkerError, match="of 5 tokens"):
            server.ask(Ask(prompt, 5, "unknown"))
        with pytest.raises(WorkerError, match="of 900 tokens"):
            server.ask(Ask(prompt, 900))
        with pytest.raises(WorkerError, match="of 900 tokens"):
            server.ask(Ask(prompt, 900, stream=False))


def test_serving_report() -> None:
    import serving
    from servers import Server

    costs = serving.Costs({}, {})
    seconds = {
        "llama-server 1": 2.0,
        "one": 8.0,
        "off": 2.0,
        "same": 2.2,
        "mixed": 4.0,
        serving.WHOLE: 1.0,
        "whole": 1.25,
    }
    for _ in range(5):
        known = {name: [(value, 2 * value)] for name, value in seconds.items()}
        costs.add({**known, "llama-server 0": [(1.0, None), (3.0, 1.0)]})
    found = serving.compare(costs, 64)
    assert found["n_rounds"] == 5
    assert found["tokens_per_second"]["mixed"] == 16.0
    assert found["cpu_us_per_token"]["mixed"] == 125_000
    assert "llama-server 0" not in found["cpu_us_per_token"], "a mean of some turns would be compared with one of all"
    assert found["ratios"]["whole"]["median"] == 0.8, "with llama-server's that are sent whole"
    assert found["ratios"]["mixed"]["median"] == 0.5
    assert [found["ratios"][name]["holds"] for name in ("off", "same", "mixed")] == ["yes", "yes", "no"]
    assert "holds" not in found["ratios"]["one"]
    assert found["over_one"]["same"]["median"] == pytest.approx(8 / 2.2)
    text = serving.load_section("toy", "chat", found | {"n_prompt": 16, "n_answer": 8, "n_requests": 8}, "4")
    assert "| under 4 steerings, in one batch | 16 | 125000 µs | 0.50 |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1, "all rows have all cells"
    prompts = serving.Prompts((10, 20))
    assert prompts.next(30) != prompts.next(30)
    assert Server(1, 1, 0, steers=False)


def test_turns_alternate_between_the_servers() -> None:
    import serving

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def cpu_seconds(self) -> float:
            return 2.0 * len(turns)

        def load(self, asks: list[Any], concurrency: int) -> tuple[float, list[Any]]:
            assert len(asks) == 8, "as many as are answered at once"
            assert len({ask.stream for ask in asks}) == 1
            turns.append((self.name, {ask.steering for ask in asks}, concurrency, asks[0].stream))
            return 1.0, []

    turns: list[tuple[str, set[Any], int, bool]] = []
    ours, theirs = Recorded("ours"), [Recorded("0"), Recorded("1")]
    plan = serving.Plan(("toy",), (8,), {}, 0.0, 2, 0)
    names = ["a", "b", "c", "d"]
    costs = serving.measure_load(ours, theirs, serving.Load(4, 1, 4), names, serving.Prompts((0, 9)), plan, 8)
    assert costs.n_rounds == 2
    variants = [*serving.NAMES, "llama-server 0", "llama-server 1", serving.WHOLE]
    assert costs.seconds == {name: [1.0, 1.0] for name in variants}
    assert costs.cpu == {name: [2.0, 2.0] for name in variants}
    measured = turns[4:]  # behind the warming up
    first, second = ["0", "1", "0", "1", "0"], ["1", "0", "1", "0", "1"]
    assert [name for name, *_ in measured] == [name for which in first + second for name in (which, "ours")]
    assert [steerings for name, steerings, *_ in measured if name != "ours"] == [{None}] * 10
    forms = [stream for *_, stream in measured]
    assert forms[::2] == forms[1::2], "each is compared with llama-server's in the same form"
    mine = [turn[1:] for turn in measured if turn[0] == "ours"]
    assert mine[:5] == [
        ({None}, 8, True),
        ({None}, 8, False),
        ({"a"}, 8, True),
        (set(names), 8, True),
        ({"a"}, 1, True),
    ]
    assert mine[5:] == [*mine[1:5], mine[0]]


def interval(value: float, n: int = 10) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n, "method": "wilson"}


def test_tables_of_the_results() -> None:
    """Every section contains the figures of the summaries; each figure has a value of its own."""
    import results_tables

    fluency = {"perplexity": 1.25, "perplexity_ratio": 1.5, "kl": 0.25, "distinct_2": 0.75, "looping": 0.125}
    fluency |= {"empty": 0.02, "cut": 0.03, "ill_formed": 0.04, "refused": interval(0.6)}
    sides = [
        {"name": name, "n_active": 3, "n_inactive": 4, "rate": interval(value), "fluency": fluency}
        for name, value in (("unsteered", 0.5), ("towards", 0.81), ("away", 0.22))
    ]
    control = {"kind": "random", "n": 20, "mean": 0.09, "low": 0.01, "high": 0.41, "percentile": 0.95, "p": 0.095}
    left_out = {"kind": "shuffled", "n": 0, "note": "no pairs"}
    about = {"model": {"file": "x.gguf", "quantization": "F16"}, "seed": 7}
    effects = {"towards": interval(0.31), "away": interval(-0.28), "swing": interval(0.59)}
    evaluated = {
        "positive": "one",
        "negative": "other",
        "sides": sides,
        "effects": effects,
        "controls": [control, left_out],
        "signatures": [{"name": "over-refusal", "side": "towards", "found": "60%", "rule": "more than 10 points"}],
        "provenance": about,
    }
    point = {"activate": 1, "deactivate": 2, "reverse": False, "swing": interval(0.33), "fluency": fluency}
    column = {
        "name": "Q4_0",
        "file": {"file_type": "Q4_0", "bits_per_weight": 4.9},
        "map": {"pearson": 0.987, "overlap": 0.9},
        "routing": {"same_sets": 0.83},
        "text": {"kl": 0.0123},
        "perplexity": 1.4,
        "effect": {"effects": effects, "headline": "swing"},
        "own_effect": None,
    }
    part = {"name": "early", "n_active": 1, "n_inactive": 0, "away": None, "towards": interval(0.11), "swing": None}
    layers: dict[str, Any] = {"experiment": "layers", "verdict": "against", "finding": "The early third does most."}
    layers["about"] = {"n_items": 40}
    row = {"behaviour": "b", "side": "one", "n_choices": 99}
    chosen = {"activate": 1, "deactivate": 0}
    gain = {"gain": interval(0.47)}
    for method, tried in (("search", 7), ("grid", 63)):
        row[method] = {"chosen": chosen, "strongest": chosen, "outcome": "found", "heldout": gain}
        row[method] |= {"heldout_strongest": gain, "n_tried": tried, "n_answers": 10 * tried}
    text = results_tables.render(
        {
            "about": {"tool": "t 1", "date": "2030-01-01", "machine": "m", "items": None},
            "behaviours": {
                "b": {
                    "eval": evaluated,
                    "sweep": {"points": [point, point | {"reverse": True}]},
                    "transfer": {"base": column | {"name": "base", "map": None}, "columns": [column]},
                    "layers": layers | {"figures": {"divided": {"parts": [part]}}},
                }
            },
            "commands": {"eval": "steermoe eval"},
            "tuning": {"rows": [row], "grid": [0, 1, 2]},
        }
    )
    for words in (
        "x.gguf (F16), greedy decoding, seed 7",
        "| b (one / other) | 10 | 3 / 4 | 22% (12 to 32) | 50% (40 to 60) | 81% (71 to 91) | -28 (-38 to -18) |",
        "| b | random | 20 | 9 (1 to 41) | 95% | 0.095 |",
        "| b | shuffled | 0 | no pairs |  |  |",
        "| b | away | 1.250 | 1.500 | 0.2500 | 0.75 | 12% | 2% | 3% | 4% | 60% (50 to 70) |",
        "| b | over-refusal (towards) | 60% | more than 10 points |",
        "| layers | b | against | The early third does most. |",
        "| +1 | +33, 1.50 |",
        "7 choices tried against 63 (89% saved), 70 answers against 630 (89% saved).",
        "a grid of 3 x 3 numbers",
        "| b | early | 1 / 0 | - | +11 (+1 to +21) | - |",
        "| b | Q4_0 | 4.9 | 0.987 | 90% | 83% | 0.0123 | 1.400 | +59 (+49 to +69) | - |",
        "| b | base (Q4_0) | 4.9 | - | - |",
    ):
        assert words in text, words


def test_commands_of_the_results(tmp_path: Path) -> None:
    import results

    found = results.jobs("tiny", None, tmp_path)
    names = [job.name for job in found]
    assert len(set(names)) == len(names)
    assert {"refuse-comply/eval", "document-memory/sweep", "digits-words/transfer", "refuse-comply/layers"} <= set(
        names
    )
    assert found[0].kind == "sweep"
    done = tmp_path / "digits-words" / "eval"
    done.mkdir(parents=True)
    (done / "summary.json").write_text("{}")
    (job,) = [job for job in found if job.name == "digits-words/eval"]
    results.run(job, tmp_path, lambda _: pytest.fail("what is there is not run again"))


def test_switching(made: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is used again after each change, and a table of it; the times of so small a model say nothing."""
    import switching

    for name, value in {"N_CONVERSATION": 40, "N_ANSWER": 6, "N_QUESTION": 4, "N_PROMPT": 30, "N_DECODED": 3}.items():
        monkeypatch.setattr(switching, name, value)
    _, path = made
    runner = switching.Runner(path, 1)
    one, other = switching.biases_of(path)
    switches = switching.measure_switches(runner, one, other, 1, lambda line: None)
    cached = {name: found["cached"][0] for name, found in switches.items()}
    assert cached == {
        "none (unsteered)": 39,
        "none (all tokens)": 39,
        "none (answers)": 33,
        "all tokens: on": 0,
        "all tokens: another": 0,
        "all tokens: off": 0,
        "answers: on": 39,
        "answers: another": 33,
        "answers: off": 33,
    }
    rows = switching.measure_rows(runner, one, other, 2, lambda line: None)
    for times in rows.values():
        times["prompt"], times["answer"] = [2.0, 2.0], [1.0, 1.0]
    rows[switching.ALONE]["answer"] = [1.25, 1.25]
    ratios = switching.compare(rows)
    assert ratios[switching.ALONE]["answer"]["median"] == 0.8
    assert ratios[switching.ALONE]["answer"]["holds"] == "no"
    assert ratios[switching.IN_TURN]["prompt"]["holds"] == "yes"
    assert "holds" not in ratios["unsteered"]["prompt"]
    about = {"machine": {"cpu": "x", "cores": 1, "system": "y"}, "date": "d", "commit": "", "seconds": 1}
    text = switching.render(
        {**about, "threads": 1, "shape": "toy", "rounds": 1, "switches": switches, "ratios": ratios}
    )
    assert "| answers: on | 39 of 44 |" in text
    assert "| answers alone | 1.000 |" in text
