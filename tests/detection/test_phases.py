"""Recording by phase: the two phases of the targets add up to all tokens, and each is what it is recorded alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local import (
    ExpertMap,
    Pair,
    RoutingCounts,
    StorageError,
    UntilStable,
    UsageError,
    record_counts,
    save_pairs,
)
from steermoe_local.cli import main
from steermoe_local.detection.checkpoint import CheckpointFile
from steermoe_local.detection.grouping import GroupBuilder
from steermoe_local.detection.recorder import PhaseCounts, record_phases
from steermoe_local.detection.recording_options import RecordingProgress
from steermoe_local.detection.target_phases import TargetPhases
from steermoe_local.llama.rendering import Prompt, Renderer, vocabulary
from steermoe_local.llama.tokenizing import token_bytes
from steermoe_local.maps.map_phases import PhaseSplit
from steermoe_local.maps.pair_counts import PairCounts, PairCountsWriter
from steermoe_local.pairs.pairs import Message
from tests.support.announced import besides
from tests.support.detecting import CACHE, DATA, same, sums_bytes, text_pairs
from tests.support.templated import ANSWER, TURNS, Models, models

FIRST = PhaseSplit(2)
THINKING = PhaseSplit()
THINKS = TURNS + ANSWER + "{# <think> </think> #}"
CHANNELS = (  # Muse's
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'user' %}<|message|>{% endif %}{{ m.content }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}{# to=self #}"
)


def added_up(found: PhaseCounts) -> None:
    """Assert that the phases are all tokens together."""
    whole, parts = found.whole, list(found.phases.values())
    for name in ("a1", "a2", "n1", "n2"):
        assert np.array_equal(sum(getattr(part, name) for part in parts), getattr(whole, name))
    for part in (whole, *parts):
        assert part.sums is not None
    for table in ("logits", "spread", "weights"):
        total = sum(getattr(part.sums, table) for part in parts)
        assert np.allclose(total, getattr(whole.sums, table), rtol=1e-12, atol=1e-9)


#
# by number
#


def cut_by_hand(model: Path, pairs: list[Pair], n: int, first: bool) -> list[Pair]:
    """The pairs whose targets can be cut in text behind their n-th token, with that part of their targets."""
    found = []
    with vocabulary(model) as vocab:
        renderer = Renderer(vocab)
        for pair in pairs:
            targets = []
            for side, target in pair.sides():
                prompt = renderer.prompt(side, target)
                wanted = prompt.target[:n] if first else prompt.target[n:]
                text = b"".join(token_bytes(vocab.vocab, prompt.tokens[i], special=True) for i in wanted).decode()
                if wanted and text in target and renderer.prompt(side, text).target == wanted:
                    targets.append(text)
            if len(targets) == 2:
                found.append(replace(pair, positive_target=targets[0], negative_target=targets[1]))
    return found


@pytest.mark.parametrize("n_batch", [512, 40])
def test_the_first_tokens_and_the_rest(tiny_f32_path: Path, untied_pairs: list[Pair], n_batch: int) -> None:
    options: dict[str, Any] = {"n_threads": 1, "n_batch": n_batch, **CACHE}
    found = record_phases(tiny_f32_path, untied_pairs, phase=FIRST, **options)
    added_up(found)
    assert same(found.whole, record_counts(tiny_f32_path, untied_pairs, **options))
    assert [part.phase for part in found.phases.values()] == ["first:2", "rest:2"] == list(found.phases)
    assert found.whole.phase == ""
    assert found.phases["first:2"].n1 <= 2 * len(untied_pairs)
    for phase, first in (("first:2", True), ("rest:2", False)):
        by_hand = cut_by_hand(tiny_f32_path, untied_pairs, 2, first)
        assert len(by_hand) >= 15
        ids = {pair.id for pair in by_hand}
        originals = [pair for pair in untied_pairs if pair.id in ids]
        alone = record_phases(tiny_f32_path, originals, phase=FIRST, **options).phases[phase]
        assert same(alone, record_counts(tiny_f32_path, by_hand, **options))


@settings(max_examples=200)
@given(st.data(), st.integers(1, 8), st.booleans())
def test_groups_count_each_part_for_its_prompts(data: st.DataObject, n_bins: int, share: bool) -> None:
    builder = GroupBuilder(n_rows=40, n_prompts=12, n_bins=max(8, n_bins), share=share, n_parts=2)
    prompts: list[Prompt] = []
    parts: list[list[int]] = []
    while True:
        pair, of_pair = [], []
        for _ in range(2):
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=6))
            target = sorted(data.draw(st.sets(st.integers(0, len(tokens) - 1), min_size=1)))
            pair.append(Prompt(tokens, target))
            of_pair.append(data.draw(st.lists(st.integers(0, 1), min_size=len(target), max_size=len(target))))
        if not builder.add(pair, of_pair):
            break
        prompts, parts = prompts + pair, parts + of_pair
    group = builder.build()
    assert group.members.shape == (len(group.members), 2 * len(prompts))
    assert len(group.members) <= max(8, n_bins)
    starts = [0, *group.ends.tolist()]
    counted: list[Counter[tuple[int, int]]] = [Counter() for _ in range(2 * len(prompts))]
    for row, bin_ in enumerate(group.bins.tolist()):
        for column in np.flatnonzero(group.members[bin_]) if bin_ >= 0 else ():
            assert column // 2 in group.sequences[starts[row] : starts[row + 1]]
            counted[column][int(group.positions[row]), int(group.tokens[row])] += 1
    for index, (prompt, of_target) in enumerate(zip(prompts, parts, strict=True)):
        for part in (0, 1):
            mine = [place for place, of in zip(prompt.target, of_target, strict=True) if of == part]
            assert counted[2 * index + part] == Counter((place, prompt.tokens[place]) for place in mine)


#
# thinking and answer
#


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Models:
    return models(tmp_path_factory.mktemp("phases"), tiny_path)


def reply_pair(i: int, thought: str, answer: str, target: str | None = None) -> Pair:
    """A pair whose targets are whole replies, or `target`."""

    def side(number: str) -> tuple[Message, ...]:
        reply = thought.format(number) + answer.format(number)
        return Message("user", f"What is {i}?"), Message("assistant", reply)

    def wanted(number: str) -> str:
        return (target or thought + answer).replace("{}", number)

    numbers = f"{i}", f"{i} or so"
    return Pair(f"p{i}", *map(side, numbers), *map(wanted, numbers))


def text_by_phase(model: Path, pair: Pair, split: PhaseSplit = THINKING) -> list[tuple[str, str]]:
    """Texts of the tokens of the two phases, of both sides."""
    found = []
    with vocabulary(model) as vocab:
        renderer = Renderer(vocab)
        part_of = TargetPhases(split, renderer.template, vocab.vocab)
        for side, target in pair.sides():
            prompt = renderer.prompt(side, target)
            texts = ["", ""]
            for index, part in zip(prompt.target, part_of(prompt), strict=True):
                texts[part] += token_bytes(vocab.vocab, prompt.tokens[index], special=True).decode()
            found.append((texts[0], texts[1]))
    return found


THOUGHT, SAID = "<think>\nIt is {}, I think.\n</think>", "\n\nThe number {}."


@pytest.mark.parametrize(
    ("target", "thinking", "answer"),
    [
        (None, THOUGHT, SAID),
        ("It is {}, I", "It is {}, I", ""),
        ("I think.\n</think>\n\nThe number", "I think.\n</think>", "\n\nThe number"),
        ("The number {}.", "", "The number {}."),
    ],
)
def test_thinking_and_answer(templated: Models, target: str | None, thinking: str, answer: str) -> None:
    """Targets may be whole replies, or a part of one: the marker that begins the reasoning is before them."""
    found = text_by_phase(templated(THINKS), reply_pair(7, THOUGHT, SAID, target))
    for (thought, said), number in zip(found, ("7", "7 or so"), strict=True):
        # a tokenizer may put blank space beside a marker, or a letter of a target, into one token
        assert thought.strip() == thinking.format(number).strip()
        assert said.strip() == answer.format(number).strip()


def test_an_earlier_turn_s_reasoning_is_not_the_target_s(templated: Models) -> None:
    pair = reply_pair(7, THOUGHT, SAID)
    earlier = (Message("user", "One?"), Message("assistant", THOUGHT.format(1) + "One."))
    pair = replace(pair, positive=(*earlier, *pair.positive), negative=(*earlier, *pair.negative))
    thought, said = text_by_phase(templated(THINKS), pair)[0]
    assert thought.strip() == THOUGHT.format(7)
    assert said.strip() == SAID.format(7).strip()


def test_messages_with_channels(templated: Models) -> None:
    thought = " to=self<|message|>It is {}.<|eom|>"
    header, said = "<|start|>assistant to=user", "<|message|>The number {}."
    found = text_by_phase(templated(CHANNELS), reply_pair(7, thought, header + said))
    thinking, answer = found[0]
    assert (thinking + answer).strip() == (thought + header + said).replace("{}", "7").strip()
    assert thought.format(7).strip() + header in thinking
    assert "The number" not in thinking, "the token that completes the last marker begins the answer"
    found = text_by_phase(templated(CHANNELS), reply_pair(7, thought, header + said, "It is {}"))
    assert [text.strip() for text in found[0]] == ["It is 7", ""]
    found = text_by_phase(templated(CHANNELS), reply_pair(7, thought, header + said, "The number {}"))
    assert [text.strip() for text in found[0]] == ["", "The number 7"]


def test_plain_texts(templated: Models) -> None:
    pair = Pair(
        "a", "Q: <think>one</think>two", "Q: <think>three</think>four", "one</think>two", "<think>three</think>four"
    )
    assert text_by_phase(templated(THINKS), pair) == [("one</think>", "two"), ("<think>three</think>", "four")]


def test_thinking_is_recorded(templated: Models) -> None:
    model = templated(THINKS)
    pairs = [reply_pair(i, THOUGHT, SAID) for i in range(12)]
    found = record_phases(model, pairs, phase=THINKING, n_threads=1)
    added_up(found)
    assert list(found.phases) == ["thinking", "answer"]
    assert not found.missing
    answers = [reply_pair(i, THOUGHT, SAID, SAID.strip()) for i in range(12)]
    alone = record_phases(model, answers, phase=THINKING, n_threads=1)
    assert list(alone.phases) == ["answer"]
    assert "positive side has tokens of the phase thinking" in alone.missing["thinking"]
    assert same(alone.phases["answer"], alone.whole)


def test_a_model_without_markers(tiny_path: Path) -> None:
    with pytest.raises(UsageError, match="first:16"):
        record_phases(tiny_path, text_pairs(2), phase=THINKING)
    with pytest.raises(UsageError, match="record_phases"):
        record_counts(tiny_path, text_pairs(2), phase=FIRST)
    with pytest.raises(UsageError, match="record_counts"):
        record_phases(tiny_path, text_pairs(2))


@pytest.mark.parametrize(
    "text", ["first", "first:0", "first:-1", "first:1e3", "first:\u0663", "answer", "", "first:1234567890"]
)
def test_no_split(text: str) -> None:
    with pytest.raises(UsageError, match="first:N"):
        PhaseSplit.parse(text)


#
# interrupted
#


class Sinks:
    """Writers of per-pair counts by phase."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.writers: dict[str, PairCountsWriter] = {}

    def __call__(self, identity: Any, digest: str, phase: str) -> PairCountsWriter:
        path = self.folder / f"{phase.replace(':', '') or 'all'}.npz"
        self.writers[phase] = PairCountsWriter(path, identity, pairs_digest=digest)
        return self.writers[phase]

    def loaded(self) -> dict[str, PairCounts]:
        for writer in self.writers.values():
            writer.close()
        return {phase: PairCounts.load(writer._given) for phase, writer in self.writers.items()}


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stable", [None, UntilStable(min_pairs=20, level=0.3)])
def test_resumed_equals_uninterrupted(
    tiny_path: Path, tmp_path: Path, chat_pairs: list[Pair], stable: UntilStable | None
) -> None:
    options: dict[str, Any] = {"phase": FIRST, "n_batch": 64, "n_threads": 1, "until_stable": stable}
    undisturbed = Sinks(tmp_path / "undisturbed")
    whole = record_phases(tiny_path, chat_pairs, per_pair=undisturbed, **options)
    file = CheckpointFile(tmp_path / "m.json")
    left = 3

    def stop(_: RecordingProgress) -> None:
        nonlocal left
        left -= 1
        if not left:
            left = 3
            raise Stopped

    sinks = Sinks(tmp_path / "resumed")
    for _ in range(3):
        with pytest.raises(Stopped):
            record_phases(tiny_path, chat_pairs, checkpoint=file, per_pair=sinks, on_batch=stop, **options)
        for writer in sinks.writers.values():
            writer.abort()
    found = record_phases(tiny_path, chat_pairs, checkpoint=file, per_pair=sinks, **options)
    assert found.whole.stability == whole.whole.stability
    assert (found.whole.stability is None) == (stable is None)
    for one, two in zip((found.whole, *found.phases.values()), (whole.whole, *whole.phases.values()), strict=True):
        assert same(one, two)
        assert sums_bytes(one.sums) == sums_bytes(two.sums)
        assert one.sources == two.sources
    assert all(part.stability is None for part in found.phases.values()), "what is stable is the whole map"
    mine, theirs = sinks.loaded(), undisturbed.loaded()
    for phase, counts in {"": found.whole, **found.phases}.items():
        mine[phase].require_total(counts)
        assert mine[phase].pair_ids == theirs[phase].pair_ids
        for (_, a), (_, b) in zip(mine[phase].chunks(), theirs[phase].chunks(), strict=True):
            assert np.array_equal(a, b)
    assert np.array_equal(mine["first:2"].n + mine["rest:2"].n, mine[""].n)


def test_a_checkpoint_of_another_split_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    pairs = text_pairs(40)

    def stop(progress: RecordingProgress) -> None:
        if progress.n_done:  # a batch is done, and kept
            raise Stopped

    file = CheckpointFile(tmp_path / "m.json")
    with pytest.raises(Stopped):
        record_phases(tiny_path, pairs, checkpoint=file, on_batch=stop, n_batch=32, phase=PhaseSplit(1))
    kept = file.path.read_bytes()
    with pytest.raises(UsageError, match=r"phase was 'first:1', now it is 'first:2'"):
        record_phases(tiny_path, pairs, checkpoint=file, n_batch=32, phase=FIRST)
    with pytest.raises(UsageError, match=r"phase was 'first:1', now it is None"):
        record_counts(tiny_path, pairs, checkpoint=file, n_batch=32)
    assert file.path.read_bytes() == kept
    file.remove()
    with pytest.raises(Stopped):
        record_counts(tiny_path, pairs, checkpoint=file, on_batch=stop, n_batch=32)
    with pytest.raises(UsageError, match=r"phase was None, now it is 'first:2'"):
        record_phases(tiny_path, pairs, checkpoint=file, n_batch=32, phase=FIRST)


#
# the command
#


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="steermoe")


PAIRS = DATA / "digits-words.pairs.jsonl"


def test_files_of_the_phases(tmp_path: Path) -> None:
    names = ["m.json", "c.npz", "run.pairs.npz"]
    files = ["-o", tmp_path / names[0], "--counts", tmp_path / names[1], "--per-pair", tmp_path / names[2]]
    command = ["detect", "-m", "tiny", "-t", 1, "--pairs", PAIRS, *files, "--phase", "first:2"]
    done = run(*command, "--json")
    assert done.exit_code == 0, done.stderr
    parts = [
        f"{name.rpartition('.')[0]}.{phase}.{name.rpartition('.')[2]}"
        for phase in ("first2", "rest2")
        for name in names
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names + parts)
    data = json.loads(done.stdout)
    assert list(data["phases"]) == ["first:2", "rest:2"]
    maps = [ExpertMap.load(tmp_path / name) for name in ("m.json", "m.first2.json", "m.rest2.json")]
    assert [found.phase for found in maps] == ["", "first:2", "rest:2"]
    for found, part in zip(maps[1:], data["phases"].values(), strict=True):
        assert (part["n1"], part["n2"]) == (found.n1, found.n2)
        assert part["map"].endswith(f"m.{found.phase.replace(':', '')}.json")
        assert found.confidence is not None, "intervals, stability and the control of each phase"
        assert found.n_pairs == maps[0].n_pairs
        counts = RoutingCounts.load(part["counts"])
        assert counts.phase == found.phase
        PairCounts.load(part["per_pair"]).require_total(counts)
    assert maps[0].a1 is not None
    assert np.array_equal(maps[1].a1 + maps[2].a1, maps[0].a1)
    shown = run("map", "show", tmp_path / "m.first2.json", "--json")
    assert json.loads(shown.stdout)["phase"] == "first:2"
    assert "first 2 tokens" in run("map", "show", tmp_path / "m.first2.json").stdout
    compared = run("map", "diff", tmp_path / "m.first2.json", tmp_path / "m.rest2.json")
    assert "first 2 tokens" in compared.stdout
    assert "behind the first 2" in compared.stdout
    compared = run("map", "diff", tmp_path / "m.json", tmp_path / "m.rest2.json", "--json")
    assert json.loads(compared.stdout)["phases"] == [None, "rest:2"]
    printed = run(*command)
    assert printed.exit_code == 0
    assert "overlap" in printed.stdout
    assert "m.rest2.json" in printed.stdout + printed.stderr


def test_a_phase_without_tokens(tmp_path: Path) -> None:
    """All else is written: nothing is recorded again for it."""
    files = ["-o", tmp_path / "m.json", "--per-pair", tmp_path / "p.npz"]
    done = run("detect", "-m", "tiny", "-t", 1, "--pairs", PAIRS, *files, "--phase", "first:99", "--json")
    assert done.exit_code == 1
    said = besides(done.stderr, "detect: 120 pairs, 240 texts")
    assert len(said.strip().splitlines()) == 1
    assert "m.rest99.json: not written" in said
    assert "fewer than 99" in said
    written = {"m.json", "p.npz", "m.first99.json", "p.first99.npz"}
    assert {path.name for path in tmp_path.iterdir()} == written
    assert list(json.loads(done.stdout)["phases"]) == ["first:99"]
    assert np.array_equal(ExpertMap.load(tmp_path / "m.json").rd, ExpertMap.load(tmp_path / "m.first99.json").rd)


def test_a_disk_that_is_full_between_two_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts stay until the last map is written: with --resume nothing is recorded again."""
    command = [
        "detect",
        "-m",
        "tiny",
        "-t",
        1,
        "--pairs",
        PAIRS,
        "-o",
        tmp_path / "m.json",
        "--phase",
        "first:2",
        "--json",
    ]
    command += ["--per-pair", tmp_path / "p.npz"]
    save = ExpertMap.save

    def full(made: ExpertMap, path: Any) -> None:
        if "rest" in Path(path).name:
            raise StorageError(f"{path}: the disk is full; make room")
        save(made, path)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertMap, "save", full)
        failed = run(*command)
    assert failed.exit_code == 1
    assert failed.stdout == ""
    assert "m.rest2.json" in failed.stderr
    assert CheckpointFile(tmp_path / "m.json").exists()
    assert run(*command).exit_code == 2, "neither --resume nor --restart"
    done = run(*command, "--resume")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["n_tokens"] == 0
    maps = [ExpertMap.load(tmp_path / name) for name in ("m.json", "m.first2.json", "m.rest2.json")]
    assert maps[0].a1 is not None
    assert np.array_equal(maps[1].a1 + maps[2].a1, maps[0].a1)
    assert all(made.confidence is not None for made in maps)
    assert not list(tmp_path.glob("*partial*"))


def test_phases_of_shards_add_up_and_do_not_mix(tmp_path: Path) -> None:
    for shard in ("1", "2"):
        files = ["-o", tmp_path / f"{shard}.json", "--counts", tmp_path / f"{shard}.npz", "--phase", "first:1"]
        done = run("detect", "-m", "tiny", "-t", 1, "--pairs", PAIRS, "--shard", f"{shard}/2", *files)
        assert done.exit_code == 0, done.stderr
    done = run("map", "merge", tmp_path / "1.first1.npz", tmp_path / "2.first1.npz", "-o", tmp_path / "sum.json")
    assert done.exit_code == 0, done.stderr
    assert ExpertMap.load(tmp_path / "sum.json").phase == "first:1"
    for other in ("2.rest1.npz", "2.npz"):
        refused = run("map", "merge", tmp_path / "1.first1.npz", tmp_path / other, "-o", tmp_path / "no.json")
        assert refused.exit_code == 2
        assert "one phase" in refused.stderr
    assert not (tmp_path / "no.json").exists()


def test_outputs_that_are_one_file(tmp_path: Path) -> None:
    save_pairs(text_pairs(2), tmp_path / "p.jsonl")
    files = ["-o", tmp_path / "m.npz", "--counts", tmp_path / "m.first1.npz"]
    refused = run("detect", "-m", "tiny", "--pairs", tmp_path / "p.jsonl", *files, "--phase", "first:1")
    assert refused.exit_code == 2
    assert "m.first1.npz: is another output too" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]
