"""A server whose model says a given text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steermoe_local.generation.engine import Sampling
from steermoe_local.server.service import Service
from tests.support.gguf_copy import copy_model
from tests.support.running_server import TINY, Running, running


@contextmanager
def saying(text: str, template: str, folder: Path) -> Iterator[Running]:
    """A server whose model answers this text: a grammar leaves it no other."""
    (model,) = copy_model(TINY, folder / "m.gguf", template=template)
    sampling_of = Service.sampling_of

    def bound(self: Service, request: Any, grammar: str | None = None) -> Sampling:
        own = f"root ::= {json.dumps(text, ensure_ascii=False)}"
        return replace(sampling_of(self, request, grammar), grammar=grammar or own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Service, "sampling_of", bound)
        with running(model=model, parallel=1, n_ctx=4096, max_tokens=600) as server:
            yield server
