"""A stand-in hub with models, and clients of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.builders import model_parts, write_gguf
from tests.support.gguf_copy import copy_model
from tests.support.hub_client import Client
from tests.support.hub_models import SPLIT
from tests.support.hub_stand_in import Hub, running
from tests.support.random_models import OLMOE, write_random_model


@pytest.fixture(scope="module")
def contents(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, bytes]]]:
    """Repositories: the embedded model in a file and in parts, a random one, a dense one, and what lies beside."""
    folder = tmp_path_factory.mktemp("contents")
    tiny = tiny_path.read_bytes()
    parts = copy_model(tiny_path, folder / "t.gguf", max_tensors=25)
    fields = {"llama.block_count": 1, "general.file_type": 7}
    dense = write_gguf(folder / "d.gguf", "llama", fields, {"blk.0.ffn_up.weight": np.zeros((64, 32), np.float32)})
    fields, tensors = model_parts()
    other = write_gguf(
        folder / "o.gguf", "newmoe", {k.replace("olmoe", "newmoe"): v for k, v in fields.items()}, tensors
    )
    random = write_random_model(folder / "r.gguf", OLMOE).read_bytes()
    return {
        "lab/tiny-GGUF": {
            "main": {
                "README.md": b"# tiny",
                "mmproj-Q4_K_M.gguf": b"GGUF" + bytes(2000),
                "tiny-Q4_K_M.gguf": tiny,
                **{name: part.read_bytes() for name, part in zip(SPLIT, parts, strict=True)},
            },
            "v1": {"tiny-Q4_K_M.gguf": random, "tiny-old-Q2_K.gguf": random},
        },
        "lab/random-GGUF": {"main": {"base-Q4_K_M.gguf": random, "chat-Q4_K_M.gguf": random}},
        "lab/dense-GGUF": {"main": {"dense-Q8_0.gguf": dense.read_bytes(), "config.json": b"{}"}},
        "lab/new-GGUF": {"main": {"new-Q8_0.gguf": other.read_bytes()}},
        "lab/damaged-GGUF": {
            "main": {"page-Q8_0.gguf": b"<html>" * 999, "cut-Q4_0.gguf": tiny[:1_000_000], "small-Q2_K.gguf": b"GGUF"}
        },
        "lab/parts-GGUF": {"main": {SPLIT[0]: parts[0].read_bytes(), SPLIT[2]: parts[2].read_bytes()}},
        "lab/nothing": {"main": {"README.md": b"# nothing", "model.safetensors": bytes(4000)}},
    }


@pytest.fixture
def hub(contents: Any) -> Iterator[Hub]:
    with running(Hub(models=contents)) as hub:
        yield hub


@pytest.fixture
def client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    return Client(hub, tmp_path, monkeypatch)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client without a network."""
    return Client(None, tmp_path, monkeypatch)
