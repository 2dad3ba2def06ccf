"""Every chat template under the server, over HTTP: schemas, forced calls, rounds of calls, reasoning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steermoe_local.server.api_errors import ApiError
from tests.integration.rehearsal import serving
from tests.integration.rehearsal.conversations import RENDERINGS
from tests.integration.rehearsal.families import fitted
from tests.integration.rehearsal.gguf_files import TINY, write_model
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


@each_template
def test_an_answer(server: Running) -> None:
    serving.check_answer(server)


@each_template
def test_a_schema(server: Running) -> None:
    serving.check_schema(server)


@each_template
def test_a_forced_call(server: Running) -> None:
    serving.check_forced_call(server)


@each_template
def test_a_tool_round(desk: Desk, server: Running) -> None:
    serving.check_tool_round(server, refused=desk.knows_no_tools())


@each_template
def test_what_transformers_refuses(desk: Desk, tool: Any, tmp_path: Path) -> None:
    """It is rendered as llama.cpp's server does, or refused like there."""
    cases = [case for case in RENDERINGS if desk.refuses_request(case)]
    if not cases:
        return
    tool("llama-server", "--version")
    template = tmp_path / "template.jinja"
    template.write_text(desk.template, "utf-8")
    with serving.llama_server(TINY, "--chat-template-file", template) as client:
        for case in cases:
            messages, tools = RENDERINGS[case]
            body = {"messages": desk.right_messages(messages), "chat_template_kwargs": desk.renderer.template_arguments}
            response = client.post("/apply-template", json=body | ({"tools": tools} if tools else {}))
            if response.status_code == 200:
                assert desk.prompt(messages, tools).text == response.json()["prompt"], case
            else:
                with pytest.raises(ApiError):
                    desk.prompt(messages, tools)


@each_template
def test_reasoning(server: Running) -> None:
    serving.check_reasoning(server)


@each_template
def test_system_messages(server: Running) -> None:
    serving.check_system(server)
