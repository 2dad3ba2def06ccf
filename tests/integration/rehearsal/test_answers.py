"""Every chat template under the server, over HTTP: schemas, forced calls, rounds of calls, reasoning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.rehearsal import serving
from tests.integration.rehearsal.conversations import RENDERINGS
from tests.integration.rehearsal.families import fitted
from tests.integration.rehearsal.gguf_files import write_model
from tests.integration.rehearsal.models import PROGRAM
from tests.integration.rehearsal.rendering import Desk, names
from tests.support.architectures import write_upstream
from tests.support.running_server import Running, running

pytestmark = pytest.mark.rehearsal

each_template = pytest.mark.parametrize("name", names(), scope="module")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model of test-llama-archs."""
    (path,) = write_upstream(PROGRAM, tmp_path_factory.mktemp("source"), "olmoe")
    return path


@pytest.fixture(scope="module")
def desk(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """The template on the vocabulary of the embedded model."""
    with Desk.open(name, tmp_path_factory.mktemp("template"), "tiny") as opened:
        yield opened


@pytest.fixture(scope="module")
def server(desk: Desk, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose model has the template, random weights and the small vocabulary."""
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    write_model(path, source, fitted("tiny", desk.template), desk.template, n_expert=8, k=2, context=1 << 15)
    with running(model=path, parallel=1, n_ctx=1 << 14) as found:
        yield found
    path.unlink()


def refuses_all(desk: Desk) -> bool:
    """A template that needs variables of its own."""
    return desk.refuses(RENDERINGS["one question"][0])


@each_template
def test_an_answer(desk: Desk, server: Running) -> None:
    if refuses_all(desk):
        assert server.chat().status_code == 400
    else:
        serving.check_answer(server)


@each_template
def test_a_schema(desk: Desk, server: Running) -> None:
    if not refuses_all(desk):
        serving.check_schema(server)


@each_template
def test_a_forced_call(desk: Desk, server: Running) -> None:
    if not refuses_all(desk):
        serving.check_forced_call(server)


@each_template
def test_a_tool_round(desk: Desk, server: Running) -> None:
    serving.check_tool_round(server, refused=desk.refuses_tools())


@each_template
def test_reasoning(desk: Desk, server: Running) -> None:
    if not refuses_all(desk):
        serving.check_reasoning(server)


@each_template
def test_system_messages(desk: Desk, server: Running) -> None:
    if not refuses_all(desk):
        serving.check_system(server)
