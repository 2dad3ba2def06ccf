"""Fixtures of the tests of the page: a browser, servers, and open pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import browser as browsers
from tests.support.page_desk import Desk, desk
from tests.support.run_models import talker
from tests.support.running_server import TINY, Running, running, slow, until


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsers.chromium() as found:
        yield found


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(n_ctx=512) as found:
        yield found


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model whose answers go on and on, slowly enough to look at them."""
    model = talker(tmp_path_factory.mktemp("talker"), TINY)
    with running(model=model, n_ctx=2048, parallel=2, queue_limit=0, timeout=600) as found:
        slow(found, 0.02)
        yield found


@pytest.fixture
def tab(browser: Any, server: Running) -> Iterator[Desk]:
    with desk(browser, server) as made:
        yield made.open()


@pytest.fixture
def slow_tab(browser: Any, endless: Running) -> Iterator[Desk]:
    until(lambda: endless.worker.n_running == 0)
    with desk(browser, endless) as made:
        yield made.open()
