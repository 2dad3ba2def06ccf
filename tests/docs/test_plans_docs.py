"""The blocks of docs/plans.md run as they stand, and print what the page says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from steermoe_local.cli import main
from steermoe_local.evaluation.measuring.plans import open_plan
from steermoe_local.steering.plan_rules import MAX_RULES, MAX_TEXT, PHASES
from steermoe_local.steering.plan_text import MAX_RULE, parse_rule, parse_where
from tests.support.pages import Block, blocks_of, run_blocks
from tests.support.paths import ROOT
from tests.support.running_server import running

PAGE = (ROOT / "docs" / "plans.md").read_text("utf-8")
BLOCKS = blocks_of(PAGE)
URL = "http://127.0.0.1:8080"


def of_kind(kind: str) -> list[Block]:
    found = [block for block in BLOCKS if block.kind == kind]
    assert found
    return found


def test_every_block_says_what_it_is() -> None:
    assert len(BLOCKS) == len(re.findall(r"^```\w", PAGE, re.MULTILINE))
    assert {block.kind for block in BLOCKS} == {"tiny", "output", "plan", "config", "server"}


def test_the_blocks_run_and_print_what_they_say(tmp_path: Path) -> None:
    assert run_blocks(BLOCKS, tmp_path) > 0
    assert open_plan(tmp_path / "brief.plan.toml").name == "brief"


def test_the_plan_and_the_rules_are_read(tmp_path: Path) -> None:
    (block,) = of_kind("plan")
    (tmp_path / "a.plan.json").write_text(block.text)
    assert len(open_plan(tmp_path / "a.plan.json").rules) == len(json.loads(block.text)["rules"]) == 4
    indented = re.findall(r"^    (\w.*)$", PAGE, re.MULTILINE)
    assert indented[0] == "WHERE: WHAT"
    for text in indented[1:]:
        assert parse_rule(text).name is None or "formal" in text or "=" in text
    conditions = re.findall(r"^\| `(when [a-z].*?)` \|", PAGE, re.MULTILINE)
    assert len(conditions) >= 5
    for condition in conditions:
        assert parse_where(f"answer {condition}").when is not None


def test_the_tables_and_limits_are_those_of_the_code() -> None:
    phases = re.findall(r"^\| `(\w+)` \| ", PAGE, re.MULTILINE)
    assert phases == [*PHASES, "all"]
    words = " ".join(PAGE.split())
    assert f"at most {MAX_RULES} rules" in words
    assert f"{MAX_RULE:,} characters" in words
    assert f"look for {MAX_TEXT:,}" in words


def test_the_configuration(tmp_path: Path) -> None:
    (block,) = of_kind("config")
    (tmp_path / "config.toml").write_text(block.text)
    env = {"STEERMOE_CONFIG": str(tmp_path / "config.toml")}
    shown = CliRunner().invoke(main, ["config", "show", "--json"], env=env)
    assert shown.exit_code == 0, shown.output
    by_command = {setting["command"]: setting for setting in json.loads(shown.stdout)["settings"]}
    assert by_command["chat"]["value"] == ["thinking: none", "answer: digits-words"]
    assert (by_command["run"]["option"], by_command["run"]["value"]) == ("plan", "brief.plan.toml")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_request(tmp_path: Path) -> None:
    (block,) = of_kind("server")
    assert URL in block.text
    with running() as server:
        words = ["bash", "-euc", block.text.replace(URL, server.url)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"] == "three, four, five, six, seven, eight, nine"
    assert answer["steering"]["kind"] == "plan"
