"""The benchmark of prompts: who takes which turns, what its tables say of the figures. Nothing is timed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")
KEY = "X 1B, Q4_0, 2"


def times(*seconds: float) -> list[dict[str, float]]:
    """CPU seconds of the rounds; the wall time is half of them."""
    return [{"cpu": each, "seconds": each / 2} for each in seconds]


def figures(**more: Any) -> dict[str, Any]:
    """Of one model: prompts twice as fast as stock's, decoding 1.05 times; everything holds but for the changes."""
    prompt = {"stock": times(2, 4, 40), "ours": times(1, 2, 20), "transformers": times(1, 3, 30)}
    return {
        "times": {
            "prompt 64": dict(prompt),
            "prompt 512": prompt | {"recorder": times(1, 2, 16), "not repacked": times(2, 4, 50)},
            "prompt 2048": prompt | {"ours": times(1, 1, 8)},
            "detection 512": {"recorder": times(1, 1, 1), "transformers": times(1.25, 1.3, 1.2)},
            "decode": {"stock": times(1, 1.05, 1.2), "ours": times(1, 1, 1)},
        },
        "rounds_with_other_logits": 0,
        "load": {
            name: {"cpu": cpu, "seconds": 9.0} for name, cpu in (("stock", 1), ("ours", 2), ("not repacked", 0.5))
        },
        "peak_mb": {"stock": 100.0, "ours": 99.0, "recorder": 98.0, "not repacked": 55.0},
        "transformers": {"how": {"prompt 512": "bfloat16 eager"}},
        "imatrix": {
            "cpu_seconds": {"detect": [1.0, 1.0, 2.0], "imatrix": [1.5, 2.5, 6.0]},
            "wall_seconds": {"detect": [1.0, 1.0, 2.0], "imatrix": [3.0, 3.0, 6.0]},
        },
    } | more


def report(layers: dict[str, Any]) -> dict[str, Any]:
    import performance

    return performance.circumstances() | {"seconds": 1, "rounds": 3, "versions": {"torch": "9.9"}, "layers": layers}


def rows(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_tables() -> None:
    from prompts_tables import render

    text = render(report({KEY: figures()}))
    over_stock, over_others, repack = rows(text, "| X 1B | Q4_0 | 2 |")
    ratios = "2.00 (2.00) | 2.00 (2.00) | 4.00 (4.00) | 2.00 (2.00) | 1.05 (1.05)"
    assert over_stock == f"| X 1B | Q4_0 | 2 | {ratios} | 0.50 | -1 MB | same bits | 512 |"
    ratios = "1.50 (1.50) | 1.50 (1.50) | 3.00 (3.00) | 1.25 (1.25)"
    assert over_others == f"| X 1B | Q4_0 | 2 | {ratios} | bfloat16 eager | 2.50 (3.00) |"
    assert repack == "| X 1B | Q4_0 | 2 | 0.50 (0.50) | 4.00 | 99 MB | 55 MB |"
    assert "torch 9.9" in text


def test_aims() -> None:
    from prompts_tables import AIMS, N_MISSES, render

    def verdicts(layers: dict[str, Any]) -> dict[str, list[str]]:
        text = render(report(layers))
        found = {aim.text: [cell.strip() for cell in rows(text, f"| {aim.text} |")[0].split("|")[2:-1]] for aim in AIMS}
        assert len(found) == len(AIMS)
        return found

    found = verdicts({KEY: figures()})
    assert found.pop("prompts, Q4_0: at least 2 times stock") == ["yes", "3 of 3", "0", ""]
    assert found.pop("recorder, Q4_0: at least 2 times stock") == ["yes", "1 of 1", "0", ""]
    # one round was above 1.1
    assert found.pop("decode, Q4_0: at least 1.1 times stock") == ["yes", "0 of 1", "1", ""]
    assert found.pop("decode, all types: not slower than stock") == ["yes", "1 of 1", "0", ""]
    assert found.pop("load: not slower than stock") == ["no", "0 of 1", "0", f"{KEY} threads: load 0.50"]
    assert {name: cells[0] for name, cells in found.items() if "Q4_K_M" in name} == {
        "prompts, Q4_K_M and MXFP4: at least 1.5 times stock": "not measured",
        "recorder, Q4_K_M and MXFP4: at least 1.5 times stock": "not measured",
    }
    assert [cells[0] for name, cells in found.items() if "Q4_K_M" not in name] == ["yes"] * 4

    slow = {"detection 512": {"recorder": times(3, 3), "transformers": times(3, 3.3)}}
    slow |= {"prompt 64": {"stock": times(3, 3), "ours": times(2, 2.5)}}
    other = figures(peak_mb={"stock": 100.0, "ours": 120.0}, rounds_with_other_logits=1)
    other["times"] |= slow
    other["imatrix"] = {"skipped": "not built"}
    found = verdicts({"Y, Q4_0, 1": other, KEY: figures()})
    assert found["prompts, Q4_0: at least 2 times stock"] == [
        "in part",
        "5 of 6",
        "0",
        "Y, Q4_0, 1 thread: prompt 64 1.35",
    ]
    assert found["detection: at least 1.2 times transformers' best"][3] == "Y, Q4_0, 1 thread: detection 512 1.05"
    assert found["detection: at least 2 times llama-imatrix, on the same text"][:2] == ["yes", "1 of 1"]
    assert found["peak memory: not above stock's"][3] == "Y, Q4_0, 1 thread: peak memory +20 MB"
    assert found["the logits of all tokens have stock's bits"][3] == "Y, Q4_0, 1 thread: logits other bits 1 times"

    many = verdicts({f"Z{i}, Q4_0, 1": other for i in range(N_MISSES + 3)})
    assert many["load: not slower than stock"][3].endswith("; 3 more")


@pytest.mark.parametrize(
    ("stock", "ours", "holds"),
    [
        (1.0, 1.0, "yes"),
        (1.0, 1.04, "within noise"),
        (1.0, 1.06, "no"),
        (0.05, 0.058, "within noise"),
        (0.05, 0.07, "no"),
    ],
)
def test_loads_within_noise(stock: float, ours: float, holds: str) -> None:
    from prompts_tables import judge_load

    found = judge_load("Q4_0", {"load": {"stock": {"cpu": stock}, "ours": {"cpu": ours}}})
    assert found == [("load", holds, f"{stock / ours:.2f}")]


def test_broken_promises() -> None:
    import performance
    from prompts_tables import render

    good = report({KEY: figures()})
    assert performance.broken_promises(good) == []
    bad = report({KEY: figures(rounds_with_other_logits=2)})
    assert len(performance.broken_promises(bad)) == 1
    assert "| other bits 2 times |" in render(bad)


def test_what_was_not_measured_is_told() -> None:
    from prompts_tables import render

    missing = {"transformers": {"skipped": "no torch"}, "imatrix": {"skipped": "not built"}}
    one = figures(**missing)
    for task in one["times"].values():
        task.pop("transformers", None)
    text = render(report({KEY: one, "Y, Q8_0, 1": figures()}))
    assert "transformers was not measured: no torch (X 1B, Q4_0, 2)." in text
    assert rows(text, "| X 1B | Q4_0 | 2 |")[1] == "| X 1B | Q4_0 | 2 | - | - | - | - | - | - |"
    text = render(report({KEY: missing}))
    assert "llama-imatrix was not measured: not built." in text
    assert rows(text, "| X 1B | Q4_0 | 2 |")[0] == f"| X 1B | Q4_0 | 2 |{' - |' * 9}"
    assert rows(text, "| load: not slower than stock |") == ["| load: not slower than stock | not measured |  |  |  |"]


def test_everybody_takes_turns() -> None:
    """In a round each side does every task of its own once, in another order than in the round before."""
    import prompts

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def ask(self, do: str, **request: Any) -> dict[str, Any]:
            turns.append((self.name, do, request["n"]))
            return {"cpu": 1.0, "seconds": 1.0, "logits": self.name if request["n"] == 2048 else ""}

    turns: list[tuple[str, str, int]] = []
    ours = prompts.Ours.__new__(prompts.Ours)
    ours.workers = {name: Recorded(name) for name in ("stock", "ours", "recorder", "not repacked")}
    ours.times, ours.n_different = {}, 0
    for number in range(2):
        for task in prompts.TASKS:
            ours.take_turn(task, number)
    half = len(turns) // 2
    assert sorted(turns[:half]) == sorted(turns[half:])
    assert turns[:half] != turns[half:]
    assert {name for name, _, n in turns if n == 512} == {"stock", "ours", "recorder", "not repacked"}
    assert ("recorder", "prompt", 1024) in turns
    assert ours.n_different == 2  # the prompts of 2048
    assert ours.times["detection 512"] == {"recorder": [{"cpu": 0.5, "seconds": 0.5}] * 2}  # of one of its two prompts
    assert {side for task in ours.times.values() for side in task} == set(ours.workers)


def test_figures_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails leaves what it measured before, and another one adds what is missing."""
    import prompts
    from workers import WorkerError

    def measure_models(shape: str, *_: Any) -> dict[str, Any]:
        if shape == "qwen3-layers" and not mended:
            raise WorkerError("no memory")
        return {"Q4_0": figures()}

    def run(**more: Any) -> dict[str, Any]:
        words = {"only": "granite,qwen", "parts": "stock,imatrix", "threads": [1, 2], "rounds": 1, "imatrix_rounds": 1}
        words |= {"quick": False, "json": tmp_path / "figures.json", "models": tmp_path, "add": False} | more
        return prompts.measure(argparse.Namespace(**words), lambda _: None)

    mended = False
    monkeypatch.setattr(prompts, "models_of", lambda *_: {"Q4_0": tmp_path / "m.gguf"})
    monkeypatch.setattr(prompts, "measure_models", measure_models)
    monkeypatch.setattr(prompts, "measure_imatrix", lambda *_: {"skipped": "not built"})
    with pytest.raises(WorkerError, match="no memory"):
        run()
    granite = ["Granite 1B-A400M, Q4_0, 1", "Granite 1B-A400M, Q4_0, 2"]
    kept = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert list(kept["layers"]) == granite
    assert kept["layers"][granite[0]] == figures(imatrix={"skipped": "not built"})
    mended = True
    found = run(only="qwen", add=True)
    assert list(found["layers"]) == [*granite, "Qwen3 30B-A3B, Q4_0, 1", "Qwen3 30B-A3B, Q4_0, 2"]
    assert json.loads((tmp_path / "figures.json").read_text(encoding="utf-8")) == found


def test_tables_go_to_the_top_of_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import performance
    import prompts

    text = performance.DOCS.read_text(encoding="utf-8")
    assert text.index(prompts.START) < text.index(prompts.END) < text.index(performance.START)
    docs, source = tmp_path / "performance.md", tmp_path / "figures.json"
    docs.write_text(f"{prompts.START}\nstale\n{prompts.END}\n", encoding="utf-8")
    source.write_text(json.dumps(report({KEY: figures()})), encoding="utf-8")
    monkeypatch.setattr(performance, "DOCS", docs)
    monkeypatch.setattr(sys, "argv", ["prompts.py", "--from", str(source), "--write-docs"])
    prompts.main()
    text = docs.read_text(encoding="utf-8")
    assert "stale" not in text
    assert "| X 1B | Q4_0 | 2 |" in text
    monkeypatch.setattr(sys, "argv", ["prompts.py", "--parts", "stock,torch"])
    with pytest.raises(SystemExit) as exit_:
        prompts.main()
    assert exit_.value.code == 2
    assert "torch" in capsys.readouterr().err
