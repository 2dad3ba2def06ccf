"""-hf in the commands that take a model, and the same without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steermoe_local.models.embedded import behaviours
from tests.support.hub_client import Client, fails
from tests.support.hub_models import pulled
from tests.support.hub_stand_in import Hub

#
# -hf
#


def test_hf_fetches_what_is_missing(hub: Hub, client: Client) -> None:
    question = ["-t", 1, "--temp", 0, "-p", "What is three plus four?"]
    done = client("run", "-hf", "lab/tiny-GGUF:Q4_K_M", *question)
    assert done.stdout == "7\n", done.stderr
    assert "fetching lab/tiny-GGUF:Q4_K_M (tiny-Q4_K_M.gguf, 10.0 MB)" in done.stderr
    hub.requests.clear()
    done = client("run", "-hf", "lab/tiny-GGUF:q4_k_m", *question)
    assert done.stdout == "7\n"
    assert "fetching" not in done.stderr
    assert not hub.requests, "what is here is not asked for"
    done = client("run", "-hfr", "lab/random-GGUF", "-hff", "chat-Q4_K_M.gguf", "-p", "x", "-n", 1, "--raw")
    assert "random-GGUF" in done.stderr
    assert hub.asked("random-GGUF")


def test_hf_in_every_command_that_takes_a_model(hub: Hub, client: Client, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(behaviours()[0].pairs.read_text().splitlines(keepends=True)[:4]))
    done = client("detect", "-hf", "lab/tiny-GGUF", "--pairs", pairs, "-o", tmp_path / "map.json", "-t", 1)
    assert done.exit_code == 0, done.stderr
    identity = json.loads((tmp_path / "map.json").read_text())["model"]
    assert identity["router_sha256"] == json.loads(client("info", "tiny", "--json").stdout)["identity"]["router_sha256"]
    done = client("pairs", "check", pairs, "-m", "lab/tiny-GGUF")
    assert done.exit_code == 0, done.output


def test_hf_refuses_what_cannot_be_steered(client: Client) -> None:
    fails(client("run", "-hf", "lab/dense-GGUF", "-p", "x"), 1, "cannot be steered", "steermoe pull --force")
    pulled(client("pull", "lab/dense-GGUF", "--force"))
    done = client("run", "-hf", "lab/dense-GGUF", "-p", "x")
    assert "nothing was fetched" not in done.stderr, "it is here, so what it can do is the command's to say"


def test_one_model(client: Client, tmp_path: Path) -> None:
    fails(client("run", "-p", "x"), 2, "which model? give -m MODEL", "-hf USER/REPO")
    fails(client("run", "-m", "tiny", "-hf", "lab/tiny-GGUF", "-p", "x"), 2, "-m tiny and -hf lab/tiny-GGUF both name")
    fails(client("run", "-m", "tiny", "-hff", "x.gguf", "-p", "x"), 2, "-hff goes with -hf")
    question = ["-t", 1, "-n", 1, "--temp", 0, "-p", "What is three plus four?"]
    # the command line goes before the environment
    assert client("run", "-hf", "lab/tiny-GGUF", *question, STEERMOE_MODEL="nowhere.gguf").stdout == "7\n"
    assert client("run", "-m", "tiny", *question, STEERMOE_HF_REPO="lab/unknown").stdout == "7\n"
    fails(client("run", *question, STEERMOE_MODEL="tiny", STEERMOE_HF_REPO="lab/x"), 2, "both name a model")


#
# without a network
#


@pytest.mark.parametrize(("flags", "variables"), [(["--offline"], {}), ([], {"HF_HUB_OFFLINE": "1"})])
def test_offline_never_touches_the_network(hub: Hub, client: Client, flags: Any, variables: Any) -> None:
    """No connection may be opened, and the stand-in counts what it is asked."""
    path = pulled(client("pull", "lab/tiny-GGUF"))
    hub.requests.clear()
    client.guard(lambda host: False)
    question = ["-t", 1, "--temp", 0, "-p", "What is three plus four?"]
    assert client("run", "-hf", "lab/tiny-GGUF", *question, *flags, **variables).stdout == "7\n"
    assert client("run", "-m", "lab/tiny-GGUF:Q4_K_M", *question, *flags, **variables).stdout == "7\n"
    assert pulled(client("pull", "lab/tiny-GGUF", *flags, **variables)) == path
    words = ("lab/random-GGUF: not on this machine, and the hub is off", "steermoe pull lab/random-GGUF")
    for arguments in (["run", "-hf", "lab/random-GGUF", *question], ["pull", "lab/random-GGUF", "--file", "x.gguf"]):
        fails(client(*arguments, *flags, **variables), 1, *words)
    for arguments in (["models"], ["info", "lab/tiny-GGUF"]):
        assert client(*arguments, **variables).exit_code == 0
    assert not hub.requests


def test_offline_in_a_process_of_its_own(hub: Hub, client: Client) -> None:
    pulled(client("pull", "lab/tiny-GGUF"))
    hub.requests.clear()
    status, out, err = client.program("models", closed=True)
    assert status == 0, err
    assert "lab/tiny-GGUF:Q4_K_M" in out
    arguments = ["run", "-hf", "lab/random-GGUF", "-p", "x"]
    status, out, err = client.program(*arguments, closed=True, HF_HUB_OFFLINE="1")
    assert (status, out) == (1, ""), err
    assert "hub is off" in err
    assert not hub.requests
    status, _, err = client.program("pull", "lab/tiny-GGUF", closed=True)
    assert (status, err) == (99, "REACHED FOR THE NETWORK"), "the guard sees a connection"


def test_offline_in_the_configuration(hub: Hub, client: Client, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("offline = true\n")
    fails(client("run", "-hf", "lab/tiny-GGUF", "-p", "x", STEERMOE_CONFIG=str(config)), 1, "the hub is off")
    assert not hub.requests


def test_pull_offline_tells_where(client: Client) -> None:
    path = pulled(client("pull", "lab/tiny-GGUF"))
    data = json.loads(client("pull", "lab/tiny-GGUF:Q4_K_M", "--offline", "--json").stdout)
    assert (data["name"], data["paths"], data["fetched"]) == ("lab/tiny-GGUF:Q4_K_M", [str(path)], False)
    fails(client("pull", "lab/tiny-GGUF:Q8_0", "--offline"), 1, "(there is Q4_K_M), and the hub is off")
