"""Commands on files whose every text is hostile, in a terminal: no byte comes out that the terminal would obey.

What the program itself draws is taken out first: colours, and what a progress bar and a line editor need.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from steermoe_local import ExpertMap, record_counts, write_bias
from steermoe_local.maps.counts import RoutingCounts
from steermoe_local.pairs.pairs import load_pairs
from steermoe_local.steering.bias_file import BiasFile
from tests.support.gguf_copy import copy_model
from tests.support.hostile import ESCAPES, obeyed
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")

PROGRAM = [sys.executable, "-c", "import sys; sys.argv[0] = 'steermoe'; from steermoe_local.cli import main; main()"]
# Files hold UTF-8: no halves of surrogate pairs. The mark shows that the text came out at all.
EVIL = "MARK" + "".join(text for text in ESCAPES if text.isascii() or "\ud800" not in text) + "[link=http://x]l[/link]"
# rich: colours, cursor up, erase line, hide and show the cursor. prompt_toolkit: modes, cursor, erase, questions.
OWN = re.compile(r"\x1b\[[0-9;]*[mABCDGHJK]|\x1b\[\?(?:1|7|12|25|2004|1004)[hl]|\x1b\[6n|\x1b\[>4;[0-9]m|\x1b[=>]")
PAIRS = ROOT / "examples" / "pairs"


def evil_everywhere(data: Any, keep: set[str]) -> Any:
    """JSON with every text replaced, but for the fields that must stay what they are."""
    if isinstance(data, dict):
        return {key: value if key in keep else evil_everywhere(value, keep) for key, value in data.items()}
    if isinstance(data, list):
        return [evil_everywhere(value, keep) for value in data]
    return EVIL if isinstance(data, str) else data


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Path:
    """A folder of hostile files."""
    folder = tmp_path_factory.mktemp("evil")
    template = "{{ raise_exception(" + json.dumps(EVIL) + ") }}"
    (model,) = copy_model(tiny_path, folder / "template.gguf", template=template)
    named = folder / "named.gguf"
    name = b"Tiny MoE (steering positive control)"
    data = model.read_bytes()
    assert data.count(name) == 1
    named.write_bytes(data.replace(name, EVIL.encode("utf-8")[: len(name)].ljust(len(name), b"\x1b")))
    architecture = tiny_path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0olmoe", b"\x05\0\0\0\0\0\0\0\x1b[2Jx")
    (folder / "architecture.gguf").write_bytes(architecture)
    counts = record_counts(tiny_path, load_pairs(PAIRS / "numbers.jsonl")[:4], behaviour=EVIL, n_threads=1)
    assert isinstance(counts, RoutingCounts)
    counts.save(folder / "counts.npz")
    expert_map = ExpertMap.from_counts(counts)
    expert_map.save(folder / "map.json")
    text = json.loads((folder / "map.json").read_text("utf-8"))
    keep = {"format", "router_sha256", "architecture", "pairs_sha256", "created", "dates", "sha256", "kind"}
    (folder / "map.json").write_text(json.dumps(evil_everywhere(text, keep)), "utf-8")
    (folder / "broken-map.json").write_text(json.dumps(text | {EVIL: EVIL, "format": EVIL}), "utf-8")
    bias = BiasFile.from_signs(expert_map.choose(1, 1), expert_map.identity)
    write_bias(bias, folder / "bias.gguf")
    hint = b"olmoe"
    (folder / "bias.gguf").write_bytes((folder / "bias.gguf").read_bytes().replace(hint, b"\x1b[2Jx"))
    lines = [json.dumps({EVIL: EVIL, "id": EVIL, "positive": EVIL, "negative": EVIL, "target": EVIL})]
    (folder / "pairs.jsonl").write_text("\n".join(lines), "utf-8")
    pair = {
        "id": EVIL,
        "positive": f"a {EVIL}",
        "negative": f"b {EVIL}",
        "target_positive": "a",
        "target_negative": "b",
    }
    (folder / "good-pairs.jsonl").write_text(json.dumps(pair), "utf-8")
    (folder / "prompts.jsonl").write_text(json.dumps({"id": EVIL, "prompt": EVIL, EVIL: 1}), "utf-8")
    head = {"task": {"scorer": "refusal", "name": EVIL, "positive": EVIL, "negative": EVIL, "license": EVIL}}
    (folder / "task.jsonl").write_text(f"{json.dumps(head)}\n{json.dumps({'id': EVIL, 'prompt': EVIL})}\n", "utf-8")
    (folder / "bad-task.jsonl").write_text(f"{json.dumps(head)}\n{json.dumps({'id': EVIL, EVIL: EVIL})}\n", "utf-8")
    rule = {"phase": "answer", "after": EVIL, "map": "map", "activate": 1}
    rules = [rule, f"thinking until {json.dumps(EVIL)}: none"]
    (folder / "evil.plan.json").write_text(json.dumps({"rules": rules}), "utf-8")
    (folder / "broken.plan.json").write_text(json.dumps({"rules": [rule, EVIL]}), "utf-8")
    (folder / "lost.plan.json").write_text(json.dumps({"rules": [rule | {"map": EVIL}]}), "utf-8")
    (folder / "table.csv").write_text(f'"{EVIL}",b\n"{EVIL}",1\n', "utf-8", newline="")
    toml = json.dumps(EVIL).replace("\\udb40\\udc41\\udb40\\udc7f", "\\U000e0041")  # TOML has no surrogate pairs
    (folder / "config.toml").write_text(f"[run]\n{toml} = {toml}\n", "utf-8")
    (folder / "chat.json").write_text(
        json.dumps({"format": EVIL, "messages": [{"role": EVIL, "content": EVIL}]}), "utf-8"
    )
    (folder / "name\x1b]0;t\x07\n\u202e.json").write_text("{}")
    return folder


COMMANDS = [
    "info {}/named.gguf",
    "info {}/named.gguf --json",
    "info {}/template.gguf",
    "info {}/architecture.gguf",
    "models --models-dir {}",
    "models --models-dir {} --json",
    "models --models-dir {} --maps {}",
    "map show {}/map.json",
    "map show {}/map.json --json",
    "map show {}/broken-map.json",
    "map diff {}/map.json {}/map.json",
    "map merge {}/counts.npz -o {}/merged.json",
    "map card {}/map.json --base-model a/b --license MIT -o {}/card.md",
    "map export {}/map.json --format json -o {}/out.json",
    "map show {}/NAME",
    "bias show {}/bias.gguf",
    "bias show {}/bias.gguf -m tiny",
    "bias build {}/map.json -o {}/built.gguf --activate 1 -m {}/architecture.gguf",
    "pairs check {}/pairs.jsonl -m tiny",
    "pairs check {}/good-pairs.jsonl -m tiny",
    "pairs check {}/good-pairs.jsonl -m {}/template.gguf",
    "pairs from-csv {}/table.csv --prompt-column x --positive-column b --negative-column c -o {}/p.jsonl",
    "detect -m tiny --pairs {}/good-pairs.jsonl -o {}/d.json",
    "detect -m tiny --pairs {}/pairs.jsonl -o {}/d2.json",
    "tasks check {}/task.jsonl",
    "tasks check {}/bad-task.jsonl",
    "tasks check {}/task.jsonl -m {}/template.gguf",
    "run -m {}/template.gguf -p hi -n 1",
    "run -m {}/named.gguf --raw -p hi -n 1",
    "run -m tiny --n-prompts {}/prompts.jsonl -n 1",
    "run -m tiny -p hi -n 1 --map {}/map.json --activate 1 --compare",
    "run -m tiny -p hi -n 1 --bias {}/bias.gguf",
    "run -m tiny -p hi -n 1 --plan {}/evil.plan.json --json",
    "run -m tiny -p hi -n 1 --plan {}/broken.plan.json",
    "run -m tiny -p hi -n 1 --plan {}/lost.plan.json",
    "config show",
    "eval -m tiny --map {}/map.json --activate 1 --task {}/task.jsonl --neutral none --benign none -n 1 -o {}/e",
]


def shown(raw: str) -> str:
    """What is left of the output without what the program draws, and without its line ends."""
    return OWN.sub("", raw).replace("\r", "").replace("\n", "").replace("\t", "")


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command(words: str, evil: Path, start: Any) -> None:
    name = next(path.name for path in evil.iterdir() if path.name.startswith("name"))
    args = [word.replace("{}", str(evil)).replace("NAME", name) for word in words.split()]
    env = {"STEERMOE_CONFIG": str(evil / "config.toml")} if words.startswith("config") else {}
    terminal = start(*args, program=PROGRAM, env={"PYTHONPATH": str(ROOT), **env})
    status = terminal.end()
    assert status in (0, 1, 2)
    assert terminal.raw.strip()
    assert "unexpected" not in terminal.raw
    found = obeyed(shown(terminal.raw))
    assert not found, (found[:10], terminal.raw[:3000])


def test_the_texts_came_out(evil: Path, start: Any) -> None:
    """Else the tests above could not fail."""
    for words in (
        ["info", f"{evil}/named.gguf"],
        ["map", "show", f"{evil}/map.json"],
        ["tasks", "check", f"{evil}/task.jsonl"],
    ):
        terminal = start(*words, program=PROGRAM, env={"PYTHONPATH": str(ROOT)})
        assert terminal.end() == 0, terminal.raw
        assert "MARK\u241b[2J" in terminal.raw


def test_a_chat(evil: Path, start: Any) -> None:
    """Files that are named in its commands, completions of names, and a chat that was saved."""
    terminal = start("chat", "-m", "tiny", program=PROGRAM, env={"PYTHONPATH": str(ROOT)})
    terminal.prompt()
    assert "MARK" in terminal.say(f"/steer {evil}/evil.plan.json"), "the text of a rule came out"
    for line in (
        f"/steer {evil}/map.json",
        f"/steer {evil}/broken-map.json",
        f"/steer {evil}/bias.gguf",
        "/steer",
        f"/steer {evil}/broken.plan.json",
        f"/steer {evil}/lost.plan.json",
        f"/load {evil}/chat.json",
        f"/model {evil}/architecture.gguf",
        "/why",
    ):
        terminal.say(line)
    terminal.child.send(f"/load {evil}/na\t")
    terminal.until(lambda: "named.gguf" in terminal.raw)
    terminal.child.send("\x03")  # drops the line
    terminal.prompt(terminal.n_prompts + 1)
    terminal.child.send("\x04")
    terminal.end()
    found = obeyed(shown(terminal.raw).replace("\b", ""))  # with which prompt_toolkit moves the cursor
    assert not found, (found[:10], shown(terminal.raw)[:3000])
