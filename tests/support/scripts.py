"""Scripts of the project that are in no package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tests.support.paths import ROOT


def load_script(name: str) -> ModuleType:
    """A new module of a script, which is named by its path in the project, such as "native/prepare_source.py"."""
    path = ROOT / name
    spec = importlib.util.spec_from_file_location(Path(name).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
