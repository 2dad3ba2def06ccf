"""`steermoe detect` and `map merge` at scale: killed and resumed, shards, skipped pairs, memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from steermoe_local import (
    ExpertMap,
    Pair,
    PairsError,
    RoutingCounts,
    load_pairs,
    record_counts,
    save_pairs,
)
from steermoe_local.cli import main
from steermoe_local.maps.pair_counts import PairCounts
from steermoe_local.pairs.pairs import PairsFile, pairs_digest
from tests.support.announced import besides
from tests.support.detecting import DATA, PROGRAM, same, text_pairs
from tests.support.held import HELD, hold, patience

#
# the command
#


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="steermoe")


def quantized(source: Path, target: Path) -> Path:
    from tests.support.low_level import internals, lib

    internals()
    params = lib().llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, 7  # Q8_0
    assert lib().llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
    return target


@pytest.fixture
def pairs_file(tmp_path: Path, chat_pairs: list[Pair]) -> Path:
    path = tmp_path / "behaviour.jsonl"
    save_pairs(chat_pairs, path)
    return path


def next_of(path: Path) -> int:
    try:
        with np.load(path) as arrays:
            return int(json.loads(str(arrays["meta"]))["next"])
    except FileNotFoundError:
        return 0


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_at_any_moment(tiny_path: Path, tmp_path: Path, pairs_file: Path) -> None:
    """kill -9 again and again; the run goes on from what it had, and the end is that of an undisturbed run."""
    flags = ["-m", "tiny", "--pairs", pairs_file, "-t", "1", "-b", "48", "-ub", "48"]
    undisturbed = ["--counts", tmp_path / "u.npz", "--per-pair", tmp_path / "u.pairs.npz", "-o", tmp_path / "u.json"]
    done = run("detect", *flags, *undisturbed)
    assert done.exit_code == 0, done.stderr
    output, partial = tmp_path / "m.json", tmp_path / "m.json.partial.npz"
    files = ["--counts", tmp_path / "c.npz", "--per-pair", tmp_path / "p.npz", "-o", output]
    rng = np.random.default_rng(int(time.time()) if os.environ.get("STEERMOE_RANDOM_KILLS") else 5)
    command = ["detect", *map(str, [*flags, *files]), "--resume"]
    last = 0
    for n_checkpoints in (1, 3, 5):
        # it waits a little later, so that it cannot end before it is killed
        env = os.environ | hold(checkpoints=n_checkpoints + 4)
        with subprocess.Popen([*HELD, *command], stdout=subprocess.DEVNULL, env=env) as process:
            for _ in range(n_checkpoints):
                patience(process, lambda before=last: next_of(partial) != before)
                now = next_of(partial)
                assert now > last
                last = now
            time.sleep(rng.uniform(0, 0.03))  # anywhere within a batch, or within the writing of a checkpoint
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not output.exists()
        assert next_of(partial) >= last, "what was counted is lost"
        last = next_of(partial)
    done = run(*command)
    assert done.exit_code == 0, done.stderr
    one, two = RoutingCounts.load(tmp_path / "u.npz"), RoutingCounts.load(tmp_path / "c.npz")
    assert same(one, two)
    assert one.sources == two.sources
    mine, theirs = PairCounts.load(tmp_path / "p.npz"), PairCounts.load(tmp_path / "u.pairs.npz")
    assert mine.pair_ids == theirs.pair_ids
    assert np.array_equal(mine.n, theirs.n)
    for (_, a), (_, b) in zip(mine.chunks(), theirs.chunks(), strict=True):
        assert np.array_equal(a, b)
    assert np.array_equal(ExpertMap.load(output).rd, ExpertMap.load(tmp_path / "u.json").rd)
    assert not list(tmp_path.glob("*partial*")), "nothing of the checkpoint is left"
    assert not list(tmp_path.glob(".m.json*"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupted_resumed_restarted(tmp_path: Path, pairs_file: Path) -> None:
    output, partial = tmp_path / "m.json", tmp_path / "m.json.partial.npz"
    flags = ["detect", "-m", "tiny", "--pairs", pairs_file, "-t", "1", "-b", "32", "-o", output]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | hold(checkpoints=6)  # each counts at least one pair more
    with subprocess.Popen([*HELD, *map(str, flags)], env=env, **pipes) as process:  # type: ignore[call-overload]
        patience(process, lambda: next_of(partial) >= 4)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr.splitlines()[-1] == "error: interrupted"
    assert "of 48 pairs" in stderr
    assert "--resume" in stderr
    at = next_of(partial)
    assert 4 <= at < 48

    refused = run(*flags)
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert "--resume" in refused.stderr
    assert "--restart" in refused.stderr
    both = run(*flags, "--resume", "--restart")
    assert both.exit_code == 2

    other = quantized(DATA / "tiny-moe.gguf", tmp_path / "q8.gguf")
    for words, change in (
        ("model file was", ["-m", other]),
        ("pairs was", ["--pairs", DATA / "digits-words.pairs.jsonl", "--behaviour", "behaviour"]),
        ("n_batch was 32, now it is 33", ["-b", "33"]),
    ):
        refused = run(*flags, *change, "--resume")
        assert refused.exit_code == 2, refused.stderr
        assert refused.stderr.count("\n") == 1
        assert words in refused.stderr
    assert next_of(partial) == at, "a refused run changes nothing"

    resumed = run(*flags, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    figures = json.loads(resumed.stdout)
    assert figures["n_pairs"] == 48
    resumed_rd = ExpertMap.load(output).rd
    assert not partial.exists()
    fresh = run(*flags, "--restart", "--json")
    again = json.loads(fresh.stdout)
    assert again["n_tokens"] > figures["n_tokens"], "the resumed run did not start over"
    assert np.array_equal(resumed_rd, ExpertMap.load(output).rd)


def test_shards_and_merge(tmp_path: Path, tiny_f32_path: Path, untied_pairs: list[Pair]) -> None:
    pairs_file, n_pairs, names = tmp_path / "behaviour.jsonl", len(untied_pairs), {}
    save_pairs(untied_pairs, pairs_file)
    for part in ("1/1", "1/2", "2/2", "1/3"):
        name = part.replace("/", "-")
        names[part] = [tmp_path / f"{name}.npz", tmp_path / f"{name}.pairs.npz"]
        done = run(
            *("detect", "-m", tiny_f32_path, "-ctk", "f32", "-ctv", "f32", "-fa", "off"),
            *("--pairs", pairs_file, "-t", 1),
            *("--shard", part, "-o", tmp_path / f"{name}.json"),
            *("--counts", names[part][0], "--per-pair", names[part][1], "--json"),
        )
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["shard"] == part
    merged = [tmp_path / "sum.npz", tmp_path / "sum.pairs.npz"]
    done = run(
        *("map", "merge", *names["1/2"], *names["2/2"], "-o", tmp_path / "sum.json"),
        *("--counts", merged[0], "--per-pair", merged[1], "--positive", "yes", "--json"),
    )
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["n_files"], facts["n_pairs"]) == (2, n_pairs)
    assert [source["shard"] for source in facts["sources"]] == ["1/2", "2/2"]
    whole, total = RoutingCounts.load(names["1/1"][0]), RoutingCounts.load(merged[0])
    assert same(whole, total)
    assert PairCounts.load(merged[1]).n_pairs == n_pairs
    expert_map = ExpertMap.load(tmp_path / "sum.json")
    assert np.array_equal(expert_map.rd, ExpertMap.load(tmp_path / "1-1.json").rd)
    assert (expert_map.behaviour, expert_map.positive) == ("behaviour", "yes")
    assert expert_map.se is not None
    for files, words in (
        ([names["1/2"][0], names["1/2"][0]], "named twice"),
        ([names["1/2"][0], names["1/3"][0]], "would count twice"),  # pair 1 is in both
        ([names["1/1"][0], merged[0]], "would count twice"),
        ([names["1/2"][0], names["2/2"][0], names["2/2"][1]], f"n_pairs is {len(untied_pairs[1::2])}, but {n_pairs}"),
        ([names["1/2"][1]], "name the counts"),
        ([pairs_file], str(pairs_file)),
    ):
        refused = run("map", "merge", *files, "-o", tmp_path / "no.json")
        assert refused.exit_code != 0
        assert words in refused.stderr, refused.stderr
        assert refused.stderr.count("\n") == 1
    refused = run("map", "merge", names["1/2"][0], "--per-pair", merged[1], "-o", tmp_path / "no.json")
    assert refused.exit_code == 2
    assert f"--per-pair {merged[1]}: no per-pair counts" in refused.stderr
    assert PairCounts.load(merged[1]).n_pairs == n_pairs
    assert not (tmp_path / "no.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_merge_of_different_pairs_files(tmp_path: Path, tiny_path: Path, chat_pairs: list[Pair]) -> None:
    for name, pairs in (("a", chat_pairs[:9]), ("b", chat_pairs[9:20])):
        record_counts(tiny_path, pairs, n_threads=1).save(tmp_path / f"{name}.npz")
    done = run("map", "merge", tmp_path / "a.npz", tmp_path / "b.npz", "-o", tmp_path / "m.json", "--behaviour", "x")
    assert done.exit_code == 0, done.stderr
    expert_map = ExpertMap.load(tmp_path / "m.json")
    assert expert_map.n_pairs == 20
    assert set(expert_map.pairs_sha256) == {pairs_digest(chat_pairs[:9]), pairs_digest(chat_pairs[9:20])}


def test_a_map_of_shuffled_pairs_is_warned_of(tmp_path: Path, tiny_path: Path) -> None:
    """Sides swapped at random are noise; detect and merge say so, and say nothing of the pairs as they were."""
    from steermoe_local.models.embedded import behaviour

    for shuffled in (False, True):
        pairs = tmp_path / "b.jsonl"
        save_pairs(load_pairs(behaviour("digits-words").pairs)[:40], pairs)
        if shuffled:
            done = run("pairs", "shuffle", pairs, "-o", tmp_path / "s.jsonl", "--seed", 2)
            assert done.exit_code == 0, done.stderr
            pairs = tmp_path / "s.jsonl"
        name = [tmp_path / f"{shuffled}.{end}" for end in ("json", "npz", "pairs.npz", "merged.json")]
        detected = run(
            *("detect", "-m", "tiny", "--pairs", pairs, "-t", 1, "-o", name[0], "--counts", name[1], "--per-pair"),
            name[2],
        )
        merged = run("map", "merge", name[1], name[2], "-o", name[3])
        announced = ["detect: 40 pairs, 80 texts"]
        for done, output in ((detected, name[0]), (merged, name[3])):
            assert done.exit_code == 0, done.stderr
            said = besides(done.stderr, *(announced if done is detected else ()))
            warning = f"warning: {output}: does not differ"
            assert said.startswith(warning) if shuffled else not said, said


def test_skipped_pairs_of_the_command(tmp_path: Path) -> None:
    pairs = [*text_pairs(4), Pair("too long", "word " * 60 + "1", "1", "1", "1")]
    save_pairs(pairs, tmp_path / "p.jsonl")
    flags = ["detect", "-m", "tiny", "--pairs", tmp_path / "p.jsonl", "-t", 1, "-o", tmp_path / "m.json"]
    done = run(*flags, "-c", 40, "--json", "--counts", tmp_path / "c.npz")
    assert done.exit_code == 0
    said = besides(done.stderr, "detect: 5 pairs, 10 texts")
    assert said.count("\n") == 1
    assert said.startswith("skipped: pair 'too long': ")
    assert json.loads(done.stdout)["n_skipped"] == 1
    assert RoutingCounts.load(tmp_path / "c.npz").n_skipped == 1
    assert ExpertMap.load(tmp_path / "m.json").n_pairs == 4
    none = run(*flags[:-1], tmp_path / "n.json", "-c", 3)
    assert none.exit_code == 1
    assert none.stderr.count("skipped: pair ") == 3  # of five alike
    assert "5 in all: skipped: " in none.stderr
    assert none.stderr.splitlines()[-1].startswith("error: none of the 5")
    assert not (tmp_path / "n.json").exists()
    assert not list(tmp_path.glob("*.partial.*"))


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_progress_on_a_terminal(tmp_path: Path, pairs_file: Path) -> None:
    """Pairs, tokens per second and the time that is left, on stderr; nothing of it where that is no terminal."""
    import pty

    flags = ["detect", "-m", "tiny", "--pairs", pairs_file, "-t", "1", "-b", "32", "-o", tmp_path / "m.json", "--json"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while data := os.read(ours, 65536):
            seen += data
    stdout, _ = process.communicate(timeout=60)
    os.close(ours)
    text = seen.decode()
    assert process.returncode == 0
    assert "48/48" in text
    assert "tokens/s" in text
    assert "0:00:" in text
    assert json.loads(stdout)["tokens_per_second"] > 0
    assert besides(run(*flags).stderr, "detect: 48 pairs, 96 texts") == ""


#
# memory
#

MEMORY = """
import sys
from pathlib import Path
from functools import partial
from steermoe_local import PhaseSplit, record_counts, record_phases
from steermoe_local.cli import main
from steermoe_local.detection.checkpoint import CheckpointFile
from steermoe_local.pairs.pairs import PairsFile
model, pairs, output, phase = sys.argv[1:]
record = partial(record_phases, phase=PhaseSplit.parse(phase)) if phase else record_counts
class Sink:
    def append(self, *arrays): pass
sizes = []
def resident(_):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            sizes.append(int(line.split()[1]) / 1024)
record(model, PairsFile(pairs), n_threads=1, checkpoint=CheckpointFile(output), on_batch=resident,
       per_pair=lambda *_: Sink())
print(sizes[4], max(sizes))  # the first report is from before the first batch
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize("phase", ["", "first:1"])
def test_memory_does_not_grow_with_the_pairs(tiny_path: Path, tmp_path: Path, phase: str) -> None:
    peaks = {}
    for n in (200, 5000):
        path = tmp_path / f"{n}.jsonl"
        with open(path, "w") as file:
            for i in range(n):  # half a kilobyte of ids: kept pairs would be seen
                pair = Pair(f"{i}{'-' * 500}", f"x {i}", f"y {i}", f"{i}", f"{i}")
                file.write(json.dumps(pair.to_dict()) + "\n")
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tiny_path), str(path), str(tmp_path / f"{n}.json"), phase],
            capture_output=True,
            text=True,
            check=True,
        )
        early, peak = map(float, done.stdout.split())
        assert peak - early < 3, f"{n} pairs: {early} MB after four batches, {peak} MB at most"
        peaks[n] = peak
    assert peaks[5000] - peaks[200] < 4, peaks


def test_pairs_file_is_read_as_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    save_pairs(text_pairs(5), path)
    pairs = PairsFile(path)
    assert len(pairs) == 5
    assert list(pairs) == load_pairs(path) == list(pairs)
    assert text_pairs(5)[3] in pairs
    assert pairs.digest == pairs_digest(text_pairs(5))
    save_pairs(text_pairs(6), path)
    with pytest.raises(PairsError, match=re.escape(f"{path}: was changed")):
        list(pairs)
    path.write_text("")
    with pytest.raises(PairsError, match="no pairs"):
        PairsFile(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_pairs_from_a_pipe(tmp_path: Path) -> None:
    save_pairs(text_pairs(5), tmp_path / "p.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["sh", "-c", f"cat {tmp_path}/p.jsonl > {tmp_path}/pipe"]):
        pairs = PairsFile(tmp_path / "pipe")
    assert list(pairs) == list(pairs) == text_pairs(5)
