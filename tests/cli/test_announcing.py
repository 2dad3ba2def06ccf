"""Before long work: how much there is, as many as are then done, how long it takes, and what makes it shorter."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.cli.options.announcing import Announcer
from steermoe_local.evaluation.measuring.evaluator import Evaluator
from steermoe_local.evaluation.measuring.workload import Work, Workload
from tests.support.paths import ROOT

PAIRS = ROOT / "steermoe_local" / "data" / "digits-words.pairs.jsonl"


def run(*arguments: Any) -> Result:
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code in (0, 1), done.output
    return done


def announced(done: Result, what: str) -> tuple[int, int, bool]:
    """(answers, texts, whether they are the most) of the only line of a study; it names what makes it shorter."""
    pattern = rf"^{what}: (at most )?([\d,]+) answers?(?: and ([\d,]+) texts?)? \(shorter with .+\)$"
    lines = [found for line in done.stderr.splitlines() if (found := re.match(pattern, line))]
    assert len(lines) == 1, done.stderr
    answers, texts = (int((lines[0][group] or "0").replace(",", "")) for group in (2, 3))
    return answers, texts, bool(lines[0][1])


def measured(folder: Path, name: str = "records.jsonl") -> tuple[int, int]:
    """(answers, texts) that a run has kept."""
    records = [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]
    records = [record for record in records if "id" in record]
    n_texts = sum(record["id"].endswith("/text") for record in records)
    return len(records) - n_texts, n_texts


DIGITS = ("-m", "tiny", "--map", "digits-words", "-t", 1, "-n", 3)


def test_eval(tmp_path: Path) -> None:
    out = tmp_path / "o"
    done = run("eval", *DIGITS, "--no-controls", "--benign", "none", "-o", out)
    assert announced(done, "eval") == (9, 3, False)
    assert measured(out) == (9, 3)


def test_eval_with_benign_prompts(tmp_path: Path) -> None:
    done = run("eval", *DIGITS, "--no-controls", "--no-away", "-o", tmp_path)
    assert announced(done, "eval")[:2] == measured(tmp_path)


def test_eval_with_controls(tmp_path: Path) -> None:
    """Controls are counted before they are drawn: at most so many, as draws may be equal to others."""
    done = run("eval", *DIGITS, "--benign", "none", "--control-draws", 2, "-o", tmp_path)
    answers, texts, at_most = announced(done, "eval")
    n_answers, n_texts = measured(tmp_path)
    controls = json.loads((tmp_path / "summary.json").read_text("utf-8"))["controls"]
    draws = sum(control["n"] for control in controls)
    assert at_most
    assert answers == 9 + 2 * 3 * draws, "each draw both ways, three items"
    assert 9 < n_answers <= answers
    assert texts == n_texts == 3


def test_a_resumed_run_announces_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steermoe_local.evaluation.measuring.evaluator import Evaluator

    keep = Evaluator._keep

    def interrupted(self: Evaluator, record: dict[str, Any]) -> None:
        keep(self, record)
        if self.n_computed == 4:
            raise KeyboardInterrupt

    arguments = ("eval", *DIGITS, "--no-controls", "--benign", "none", "-o", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_keep", interrupted)
        CliRunner().invoke(main, [*map(str, arguments)])
    done = run(*arguments, "--resume")
    assert announced(done, "eval") == (5, 3, False)


def test_sweep(tmp_path: Path) -> None:
    done = run("sweep", *DIGITS, "--benign", "none", "--activate", "0,1,2", "--deactivate", "0,1", "-o", tmp_path)
    answers, texts, at_most = announced(done, "sweep")
    assert (answers, texts) == measured(tmp_path) == (18, 6)
    assert not at_most


def test_tune(tmp_path: Path) -> None:
    arguments = ("-m", "tiny", "--map", "digits-words", "-t", 1, "-n", 8, "--max-ppl-increase", "5%")
    done = run("tune", *arguments, "--max-choices", 5, "-o", tmp_path)
    answers, texts, at_most = announced(done, "tune")
    n_answers, n_texts = measured(tmp_path)
    assert at_most
    assert (answers, texts) == (6 * 4 + 3 * 4, 6), "the unsteered model, five choices, and three on the other items"
    assert 0 < n_answers <= answers
    assert 0 < n_texts <= texts


def test_experiment(tmp_path: Path) -> None:
    done = run("experiment", "random10", "-t", 1, "-n", 3, "--benign", "none", "--draws", 2, "-o", tmp_path)
    answers, texts, at_most = announced(done, "experiment")
    assert (answers, texts) == measured(tmp_path) == (9 + 2 * 2 * 3, 3)
    assert at_most


def test_audit(tmp_path: Path) -> None:
    arguments = ("--promote", "none", "--suppress", "5%", "--draws", 2, "--layer-draws", 2, "--blocks", 1)
    done = run("audit", "-m", "tiny", "--task", "builtin:refuse-comply", "-t", 1, "-n", 3, *arguments, "-o", tmp_path)
    assert done.exit_code == 0, done.output
    (line,) = re.findall(
        r"^base: \d+ random steerings, (\d+) answers.* \(shorter with .+\)$", done.stderr, re.MULTILINE
    )
    n_unsteered = 6  # of the task, and of the unrelated one
    assert int(line) + n_unsteered == measured(tmp_path, "base.records.jsonl")[0]


def test_transfer(tmp_path: Path) -> None:
    done = run("transfer", *DIGITS, "--quants", "Q8_0", "--pairs", "none", "-o", tmp_path)
    assert "transfer: the same on 2 models, one after the other: base, Q8_0" in done.stderr
    for name in ("base", "Q8_0"):
        assert announced(done, name)[:2] == measured(tmp_path, f"{name}.records.jsonl") == (9, 3)


def test_many_prompts(tmp_path: Path) -> None:
    prompts, answers = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What comes after {n}?"}) + "\n" for n in ("one", "two", "six")))
    done = run("run", "-m", "tiny", "-t", 1, "--n-prompts", prompts, "-n", 4, "-o", answers)
    assert re.search(r"^run: 3 answers of at most 4 tokens \(shorter with -n N", done.stderr, re.MULTILINE)
    assert len([line for line in answers.read_text().splitlines() if '"id"' in line]) == 3


@pytest.fixture
def few_pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(PAIRS.read_text("utf-8").splitlines(keepends=True)[:24]))
    return path


def test_detect(tmp_path: Path, few_pairs: Path) -> None:
    done = run("detect", "-m", "tiny", "-t", 1, "--pairs", few_pairs, "-o", tmp_path / "m.json", "--json")
    assert "detect: 24 pairs, 48 texts (shorter with --until-stable, or fewer pairs)" in done.stderr
    assert json.loads(done.stdout)["n_pairs"] == 24


def test_condition(few_pairs: Path) -> None:
    """Pairs that are skipped then are counted: a condition cannot look at sides that do not differ."""
    done = run("condition", "fit", "-m", "tiny", "-t", 1, "--pairs", few_pairs, "--over", "prompt", "--json")
    assert "condition fit: 24 pairs, 48 texts (shorter with fewer pairs)" in done.stderr
    assert "none of the 24 pairs could be counted" in done.stderr


def test_trace(tmp_path: Path, few_pairs: Path) -> None:
    done = run("trace", "-m", "tiny", "-t", 1, "--pairs", few_pairs, "-o", tmp_path / "t.npz")
    assert re.search(r"48 texts?.*\(shorter with fewer texts\)$", done.stderr, re.MULTILINE)


def test_a_trace_tells_its_time_by_what_is_read(
    tmp_path: Path, few_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several texts are read at once before the first is written: that is no measure of the others."""
    clock = SimpleNamespace(monotonic=itertools.count(0.0, 2.0).__next__)
    monkeypatch.setattr("steermoe_local.cli.run.tracing.time", clock)
    monkeypatch.setattr("steermoe_local.cli.run.tracing._SAID", 0.0)
    done = run("trace", "-m", "tiny", "-t", 1, "--pairs", few_pairs, "-b", 64, "-o", tmp_path / "t.npz")
    found = re.search(r"trace: about (\d+) s for the other (\d+) texts", done.stderr)
    assert found is not None, done.stderr
    seconds, left = map(int, found.groups())
    assert left < 47, "more than one text was read"
    assert seconds == round(2 / (48 - left) * left)


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_written = 0
    measure = Evaluator.measure

    def counted(self: Evaluator, biases: Any, **how: Any) -> Any:
        nonlocal n_written
        found = measure(self, biases, **how)
        n_written += sum(len(one.answers) + len(one.benign_values) for one in found)
        return found

    monkeypatch.setattr(Evaluator, "measure", counted)
    done = run("demo", "-n", 2, "--draws", 1, "-o", tmp_path / "o")
    assert announced(done, "demo") == (n_written, 0, False)


#
# the parts
#


def test_time_is_told_once_by_the_first_seconds() -> None:
    now, lines, shown = [0.0], list[str](), list[tuple[str, int, int]]()
    announcer = Announcer("-n N", first=5, clock=lambda: now[0], print_line=lines.append)
    show = announcer.timed(lambda *what: shown.append(what))
    announcer.announce("eval", Work(100, at_most=True), at_most=True)
    for seconds in range(0, 100, 2):
        now[0] = seconds
        show("other", seconds, 100)
        show("eval", seconds, 100)
    assert lines == [
        "eval: at most 100 answers (shorter with -n N)",
        "eval: at most about 94 s left on this machine, by the first 6 s",
    ]
    assert shown[:2] == [("other", 0, 100), ("eval", 0, 100)]
    assert len(shown) == 100, "all is shown"


def test_short_work_is_not_timed() -> None:
    now, lines = [0.0], list[str]()
    announcer = Announcer(first=5, clock=lambda: now[0], print_line=lines.append)
    show = announcer.timed(lambda *_: None)
    announcer.announce("eval", "3 answers")
    for n in range(4):
        now[0] = n
        show("eval", n, 3)
    now[0] = 9
    show("eval", 3, 3)
    assert lines == ["eval: 3 answers"]


def test_progress_knows_its_total_from_the_start() -> None:
    shown: list[tuple[str, int, int]] = []
    told: list[Work] = []
    load = Workload(lambda *what: shown.append(what), told.append)
    load.expect("eval", {"sides": Work(4, 1), "controls": Work(6, at_most=True)})
    load.begin("sides", Work(4, 1))(5)
    load.begin("controls", Work(5))(5)  # one draw was equal to another
    assert shown == [("eval", 0, 11), ("eval", 5, 11), ("eval", 5, 10), ("eval", 10, 10)]
    load.begin("layers", Work(2))(2)  # a study of one part
    load.begin("layers", Work(0))
    assert shown[4:] == [("layers", 0, 2), ("layers", 2, 2)]
    assert [str(work) for work in told] == ["at most 10 answers and 1 text", "2 answers"]
