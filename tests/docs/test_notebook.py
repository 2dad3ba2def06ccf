"""The notebook in examples/ runs from top to bottom, and shows its pictures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

NOTEBOOK = ROOT / "examples" / "steering.ipynb"


def test_it_runs(tmp_path: Path) -> None:
    copy = tmp_path / NOTEBOOK.name
    copy.write_bytes(NOTEBOOK.read_bytes())
    # a pytest of its own: our settings (warnings are errors) are not the kernel's
    words = [sys.executable, "-m", "pytest", "-q", "--nbmake", "--nbmake-timeout=600", "--overwrite", "-c", "/dev/null"]
    done = subprocess.run(
        [*words, "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(copy)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    cells = json.loads(copy.read_text("utf-8"))["cells"]
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 5
    said = "".join("".join(output.get("text", "")) for output in outputs if output["output_type"] == "stream")
    assert "towards: 4" in said
    assert "away: four" in said
    assert re.search(r"^It works: digits in \d+% of the answers unsteered, .*; random experts change it by", said, re.M)
    assert re.search(r"^It works: promoting \d+ and suppressing \d+ experts takes digits from", said, re.M)


def test_it_is_kept_without_outputs() -> None:
    """Outputs of a person's machine do not belong in the repository."""
    for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
