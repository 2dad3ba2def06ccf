"""steermoe behaviours."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from steermoe_local.behaviours import behaviours
from steermoe_local.cli import main
from tests.support.pages import load_generate
from tests.support.paths import ROOT


def test_the_list() -> None:
    done = CliRunner().invoke(main, ["behaviours"])
    assert done.exit_code == 0
    for one in behaviours():
        assert f"\n{one.name} " in f"\n{done.stdout}"
    assert "refuse only" in done.stdout
    data = json.loads(CliRunner().invoke(main, ["behaviours", "--json"]).stdout)
    assert [row["name"] for row in data] == [one.name for one in behaviours()]
    assert all(row["error_rate"] <= 0.1 for row in data)


def test_one_of_them() -> None:
    for one in behaviours():
        done = CliRunner().invoke(main, ["behaviours", one.name])
        assert done.exit_code == 0
        assert done.stdout.rstrip().splitlines()[-1] == f"steermoe learn {one.name} -m {one.model or 'MODEL'}"
        for text in (one.like, one.unlike, one.pairs()[0].positive_target.splitlines()[0], f"builtin:{one.name}"):
            assert text in done.stdout
    data = json.loads(CliRunner().invoke(main, ["behaviours", "formal", "--json"]).stdout)
    assert (data["n_pairs"], data["n_heldout"], len(data["examples"])) == (120, 104, 2)


def test_an_unknown_name() -> None:
    done = CliRunner().invoke(main, ["behaviours", "germna"])
    assert done.exit_code == 2
    assert done.stderr.strip() == (
        "error: 'germna' is no behaviour that ships; did you mean german?; steermoe behaviours lists them"
    )


def test_a_behaviour_is_a_task(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main,
        ["eval", "-m", "tiny", "--task", "builtin:formal", "--map", "digits-words", "--activate", "2", "-n", "3",
         "--no-controls", "--benign", "none", "--neutral", "none", "-o", str(tmp_path / "out")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "formal" in done.stdout


def test_the_page_s_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "behaviours.md").read_text("utf-8")
    commands, script = re.findall(r"^```(?:sh|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(script, {})
    assert capsys.readouterr().out == "120 digits\n"
    for line in commands.splitlines():
        assert CliRunner().invoke(main, line.split()[1:]).exit_code == 0


def test_the_table_of_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "behaviours.md").read_text("utf-8")
    assert load_generate().behaviours_page(page) == page, "run make docs"
