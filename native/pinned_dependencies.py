"""Metadata plugin for scikit-build-core: the dependencies, with llama-cpp-python's version from the pin file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PIN_FILE = Path(__file__).resolve().parent.parent / "steermoe_local" / "llama_cpp_pin.txt"


def dynamic_metadata(field: str, settings: Mapping[str, Any]) -> list[str]:
    """Dependencies of the package: the pinned llama-cpp-python and `settings["others"]`."""
    if field != "dependencies":
        raise RuntimeError(f"pinned_dependencies provides dependencies, not {field}")
    match = re.match(r"(llama-cpp-python==\S+) ", PIN_FILE.read_text("utf-8"))
    if match is None:
        raise RuntimeError(f"{PIN_FILE}: expected `llama-cpp-python==X --hash=sha256:Y`")
    return [match[1], *settings["others"]]


def dynamic_metadata_needs(field: str, settings: Mapping[str, Any]) -> list[str]:
    """No field is needed for this one."""
    return []
