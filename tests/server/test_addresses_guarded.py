"""The API key is asked for under every spelling of an address."""

from __future__ import annotations

import httpx

from tests.support.running_server import running


def test_no_spelling_goes_around_the_key() -> None:
    with running(api_key="a-key", parallel=1) as server, httpx.Client(timeout=60, trust_env=False) as stranger:
        for path in (
            "/v1/models",
            "/models",
            "//models",
            "/v1/v1/models/",
            "/health/%2e%2e/v1/models",
            "/page//%2e%2e/models",
        ):
            assert stranger.get(server.url + path).status_code in (401, 404), path
            assert "tiny" not in stranger.get(server.url + path).text
        for path in ("//health", "/v1/health", "/page/%2e%2e/health"):
            assert stranger.get(server.url + path).status_code in (401, 404), "only the plain address is public"
        assert stranger.get(server.url + "/health").status_code == 200
        for path in ("/models/", "/v1/health", "//health"):
            assert server.client.get(server.url + path).status_code == 200
