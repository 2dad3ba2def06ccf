"""Makes the source distribution, as `make sdist` does, and unpacks it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

from tests.support.paths import ROOT


def make_sdist(folder: Path) -> Path:
    """The source distribution of the source tree."""
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    return archive


def unpack(archive: Path, folder: Path) -> Path:
    """The source tree in it."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree
