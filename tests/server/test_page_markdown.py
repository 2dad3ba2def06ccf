"""`POST /page/markdown`: the page's own address for what a model wrote."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from steermoe_local._util import markdown
from steermoe_local._util.children import Limits
from steermoe_local.server import routes_page
from tests.support.running_server import Running, running

FIRST = {
    "tag": "p",
    "from": 0,
    "children": [{"text": "a ", "at": 0}, {"tag": "em", "children": [{"text": "b", "at": 3}]}],
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(parallel=1) as found:
        yield found


def post(server: Running, body: Any) -> Any:
    return server.client.post("/page/markdown", json=body)


def test_blocks(server: Running) -> None:
    assert post(server, {"text": "a *b*\n\n***"}).json() == {
        "blocks": [FIRST, {"tag": "hr", "from": 7, "children": []}],
    }
    assert post(server, {"text": ""}).json() == {"blocks": []}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, None),
        ({"text": 5}, None),
        ({"text": "a", "html": True}, None),
        ({"text": "a" * (markdown.MOST_CHARACTERS + 1)}, None),
        ({"text": "> " * 100 + "a"}, "too_complex"),
    ],
)
def test_refused(server: Running, body: Any, code: str | None) -> None:
    response = post(server, body)
    assert response.status_code == 400
    assert code is None or response.json()["error"]["code"] == code
    assert post(server, {"text": "a *b*"}).json() == {"blocks": [FIRST]}


def test_half_a_surrogate_pair(server: Running) -> None:
    response = server.client.post(
        "/page/markdown", content=b'{"text": "\\ud800"}', headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400


def test_needs_the_key_and_json() -> None:
    with running(parallel=1, api_key="a key") as server:
        client = server.client
        assert client.post("/page/markdown", json={"text": "a"}, headers={"Authorization": ""}).status_code == 401
        headers = {"Authorization": "Bearer a key", "Content-Type": "text/plain"}
        assert client.post("/page/markdown", content="{}", headers=headers).status_code == 415


def test_a_text_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its child is ended; the next text gets another one."""
    monkeypatch.setattr(routes_page, "_SECONDS", 0.0)
    with running(parallel=1) as server:
        assert post(server, {"text": "a *b*"}).json()["error"]["code"] == "too_complex"
        monkeypatch.setattr(routes_page, "_SECONDS", 60.0)
        assert post(server, {"text": "a *b*"}).json() == {"blocks": [FIRST]}


def test_memory_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_page, "_LIMITS", Limits(memory=1 << 20))
    with running(parallel=1) as server:
        assert post(server, {"text": "a|b\n-|-\n" + "c|d\n" * 15_000}).json()["error"]["code"] == "too_complex"


def test_many_at_once(server: Running) -> None:
    """All are answered, or told to come again."""
    statuses: list[int] = []

    def one() -> None:
        statuses.append(post(server, {"text": "| a | b |\n|--|--|\n" * 500}).status_code)

    threads = [threading.Thread(target=one) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 40
    assert set(statuses) <= {200, 429}
    assert 200 in statuses


def test_it_is_not_of_the_api(server: Running) -> None:
    assert "/page/markdown" not in server.client.get("/openapi.json").json()["paths"]
