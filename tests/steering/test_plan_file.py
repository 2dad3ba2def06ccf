"""Files of steering plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steermoe_local.errors import FormatError, SteerMoEError
from steermoe_local.steering.plan_file import SUFFIXES, read_plan
from steermoe_local.steering.plan_text import parse_rules

TEXTS = ["thinking: none", 'answer after "Answer:": careful +0 -20']
OBJECT = {"phase": "answer", "after": "Answer:", "map": "careful", "activate": 0, "deactivate": 20}
TOML = (
    'rules = ["thinking: none", {phase = "answer", after = "Answer:", map = "careful", activate = 0, deactivate = 20}]'
)
TABLES = """
[[rules]]
phase = "thinking"
map = "none"
[[rules]]
phase = "answer"
after = "Answer:"
map = "careful"
activate = 0
deactivate = 20
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.plan.json", json.dumps({"rules": TEXTS})),
        ("x.plan.json", json.dumps({"rules": [TEXTS[0], OBJECT]})),
        ("x.plan.toml", TOML),
        ("x.plan.toml", TABLES),
        ("elsewhere", json.dumps({"rules": TEXTS})),
    ],
)
def test_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_plan(tmp_path / name) == parse_rules(TEXTS)


def test_suffixes() -> None:
    assert SUFFIXES == (".plan.json", ".plan.toml")


BAD = {
    "not JSON": ("x.plan.json", b"rules = []", "JSON"),
    "not TOML": ("x.plan.toml", b"rules = [\n\n,", "x.plan.toml:3: "),
    "not UTF-8": ("x.plan.json", b'{"rules": ["\xff: x"]}', "JSON"),
    "not UTF-8 either": ("x.plan.toml", b'rules = ["\xff: x"]', "TOML"),
    "a list": ("x.plan.json", b'["answer: x"]', "object"),
    "nothing": ("x.plan.json", b"{}", "no rules"),
    "an empty file": ("x.plan.toml", b"", "no rules"),
    "an odd part": ("x.plan.json", b'{"rules": ["x"], "na\\u001bme": 1}', "'na\\x1bme'"),
    "no rule": ("x.plan.json", b'{"rules": []}', "1 to 64"),
    "too many": ("x.plan.json", json.dumps({"rules": ["x"] * 65}).encode(), "65"),
    "no list": ("x.plan.json", b'{"rules": "x"}', "list"),
    "a bad text": ("x.plan.toml", b'rules = ["x", "answer x"]', "rule 2 'answer x': "),
    "a bad object": ("x.plan.json", b'{"rules": ["x", "y", {"map": "x", "every": 0}]}', "rule 3: every 0"),
    "twice": ("x.plan.json", b'{"rules": ["x"], "rules": ["y"]}', "rules"),
    "half a pair": ("x.plan.json", b'{"rules": ["\\ud800"]}', "surrogate"),
    "a huge number": ("x.plan.toml", b'[[rules]]\nmap = "x"\nevery = 0x' + b"f" * 9000, "bits"),
    "deep": ("x.plan.json", b'{"rules": ' + b"[" * 9000 + b"]" * 9000 + b"}", "deep"),
    "large": ("x.plan.json", b'{"rules": ["' + b"x" * (256 << 10) + b'"]}', "large"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(tmp_path: Path, name: str) -> None:
    file, content, words = BAD[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(FormatError) as refused:
        read_plan(tmp_path / file)
    message = str(refused.value)
    assert message.startswith(str(tmp_path / file))
    assert words in message
    assert message.isprintable()


@pytest.mark.parametrize("name", ["missing.plan.json", "."])
def test_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(SteerMoEError, match=name if name != "." else str(tmp_path)):
        read_plan(tmp_path / name)
