"""The README's shell and Python blocks run as they stand, in order, and its facts are the project's."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from steermoe_local.llama.library import pinned_version
from steermoe_local.maps.expert_map import ExpertMap
from tests.support.pages import run
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text("utf-8")
SHELL = ["bash", "-euo", "pipefail", "-c"]
BLOCK = re.compile(r"(<!-- not run: [^\n]*-->\n)?^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for skipped, kind, text in BLOCK.findall(README) if kind == language and not skipped]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "examples" / "pairs", tmp_path / "examples" / "pairs")
    return tmp_path


def test_the_shell_blocks_run_and_steer(workplace: Path) -> None:
    learnt, steps, straight = (run([*SHELL, script], workplace) for script in blocks("sh")[:3])
    assert learnt.startswith("works: ")
    assert learnt.strip().splitlines()[-1] == "4"
    digits, words = steps.strip().splitlines()[-2:]
    assert digits.strip().isdigit()
    assert words.strip().isalpha()
    compared, _, data = straight.partition("{")
    unsteered, steered = re.fullmatch(r"== unsteered\n(\w+)\n+== steered: [^\n]+\n(\w+)\n+", compared).groups()
    assert unsteered.isdigit()
    assert steered.isalpha()
    assert json.loads("{" + data)["steering"]["n_active"] == 2


def test_the_command_with_a_plan_runs(workplace: Path) -> None:
    printed = run([*SHELL, blocks("sh")[3]], workplace)
    assert printed.startswith("three, four, ")


def test_the_commands_about_causes_run(workplace: Path) -> None:
    printed = run([*SHELL, blocks("sh")[4]], workplace)
    assert ExpertMap.load(workplace / "causes.json").effects is not None
    assert printed.strip().splitlines()[-1].strip().isdigit()
    assert len(blocks("sh")) == 6, "each block is run by a test"


def test_the_commands_that_measure_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With less of the guards than they would take, which is most of their time."""
    for name, value in (("BENIGN", "none"), ("N_TEXT", "50")):
        monkeypatch.setenv(f"STEERMOE_{name}", value)
    script = blocks("sh")[5]
    before = {path.name for path in workplace.iterdir()}
    run([*SHELL, script], workplace)
    assert {path.name for path in workplace.iterdir()} - before == {"eval", "sweep", "tune", "transfer", "audit"}
    pages = {"eval": "evaluation", "sweep": "tuning", "tune": "tuning", "transfer": "transfer", "audit": "audit"}
    for folder, name in pages.items():
        page = (ROOT / "docs" / f"{name}.md").read_text("utf-8")
        for file in (workplace / folder).iterdir():
            assert f"`{file.name.replace('base.', 'Q4_K_M.')}`" in page, "each file that is written is described"
    assert (workplace / "tune" / "bias.gguf").is_file()


def test_the_python_blocks_run_and_steer(workplace: Path) -> None:
    scripts = blocks("python")
    assert scripts
    for script in scripts:
        digits, words = run([sys.executable, "-c", script], workplace).strip().splitlines()[-2:]
        assert digits.strip().isdigit()
        assert words.strip().isalpha()


def test_the_pinned_version_is_the_documented_one() -> None:
    assert set(re.findall(r"llama-cpp-python==([0-9.]+)", README)) == {pinned_version()}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_to_files_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
