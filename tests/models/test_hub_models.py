"""Models of the hub through the real client: what a name fetches, what is checked before, access."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from steermoe_local.model_files.model_info import model_info
from tests.support.hub_client import Client, fails
from tests.support.hub_models import SPLIT, pulled
from tests.support.hub_stand_in import Hub
from tests.support.random_models import OLMOE

#
# a download
#


def test_a_user_fetches_a_model_and_runs_it(hub: Hub, client: Client, tiny_path: Path) -> None:
    status, out, err = client.program("pull", "lab/tiny-GGUF")
    assert status == 0, err
    path = Path(out.strip())
    assert path.read_bytes() == tiny_path.read_bytes()
    commit = hub.commit("lab/tiny-GGUF", "main", "models")
    assert path == client.cache / "models--lab--tiny-GGUF" / "snapshots" / str(commit) / "tiny-Q4_K_M.gguf"
    assert err.splitlines() == [
        "lab/tiny-GGUF:Q4_K_M (tiny-Q4_K_M.gguf, 10.0 MB)",
        "olmoe, 24 experts, top-4, 5 layers",
        "maps that fit: digits-words, document-memory",
        'try it: steermoe run -m lab/tiny-GGUF:Q4_K_M -p "..."',
    ], "no progress bars without a terminal"
    hub.requests.clear()
    for name in ("lab/tiny-GGUF:Q4_K_M", "lab/tiny-GGUF"):
        status, out, err = client.program(
            *["run", "-m", name, "--map", "digits-words", "--temp", 0, "-p", "Which number comes after three?"],
            closed=True,
        )
        assert (status, out) == (0, "4\n"), err
    assert not hub.requests


def test_the_layout_is_the_clients(hub: Hub, client: Client) -> None:
    """What was fetched is found by the hub's own client and by llama.cpp: blobs, snapshots, refs."""
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    path = pulled(client("pull", "lab/tiny-GGUF"))
    commit = hub.commit("lab/tiny-GGUF", "main", "models")
    assert try_to_load_from_cache("lab/tiny-GGUF", "tiny-Q4_K_M.gguf", client.cache) == str(path)
    found = scan_cache_dir(client.cache)
    assert not found.warnings
    (repo,) = found.repos
    (revision,) = repo.revisions
    assert (revision.commit_hash, revision.refs) == (commit, {"main"})
    assert path.is_symlink()
    assert path.resolve().name == hashlib.sha256(path.read_bytes()).hexdigest()
    root = client.cache / "models--lab--tiny-GGUF"
    assert (root / "refs" / "main").read_text() == commit
    assert len(list((root / "blobs").iterdir())) == 1, "nothing is left of the download"


def test_a_second_time_nothing_is_fetched(hub: Hub, client: Client) -> None:
    path = pulled(client("pull", "lab/tiny-GGUF"))
    hub.requests.clear()
    sent = hub.sent
    assert pulled(client("pull", "lab/tiny-GGUF")) == path
    assert [path for _, path in hub.asked()] == ["/api/models/lab/tiny-GGUF/revision/main"]
    assert hub.sent == sent


def test_a_split_model_is_fetched_whole(hub: Hub, client: Client, tiny_path: Path) -> None:
    done = client("pull", "lab/tiny-GGUF:q8_0")
    path = pulled(done)
    assert "lab/tiny-GGUF:Q8_0 (3 files, " in done.stderr
    info = model_info(path)
    assert [part.name for part in info.paths] == [Path(name).name for name in SPLIT]
    assert info.identity == model_info(tiny_path).identity
    again = client("run", "-m", "lab/tiny-GGUF:Q8_0", "-t", 1, "--temp", 0, "-p", "What is three plus four?")
    assert again.stdout == "7\n"
    assert "map that fit" not in again.stderr


def test_by_file(hub: Hub, client: Client) -> None:
    assert pulled(client("pull", "lab/random-GGUF", "--file", "chat-Q4_K_M.gguf")).name == "chat-Q4_K_M.gguf"
    assert pulled(client("pull", "lab/tiny-GGUF", "--file", SPLIT[1])).name == Path(SPLIT[0]).name


def test_a_revision(hub: Hub, client: Client) -> None:
    old = hub.commit("lab/tiny-GGUF", "v1", "models")
    for arguments in (["lab/tiny-GGUF", "--revision", "v1"], ["lab/tiny-GGUF@v1:Q4_K_M"], [f"lab/tiny-GGUF@{old}"]):
        path = pulled(client("pull", *arguments))
        assert path.parent.name == old
    refs = client.cache / "models--lab--tiny-GGUF" / "refs"
    assert [ref.name for ref in refs.iterdir()] == ["v1"], "main was not fetched"
    assert model_info(path).n_expert == OLMOE.n_expert
    hub.requests.clear()
    assert json.loads(client("info", "lab/tiny-GGUF@v1", "--json").stdout)["n_expert"] == OLMOE.n_expert
    assert json.loads(client("info", f"lab/tiny-GGUF@{old}:Q4_K_M", "--json").stdout)["n_expert"] == OLMOE.n_expert
    assert not hub.requests
    pulled(client("pull", "lab/tiny-GGUF"))
    assert json.loads(client("info", "lab/tiny-GGUF", "--json").stdout)["n_expert"] == 24, "main goes first"
    fails(client("pull", "lab/tiny-GGUF", "--revision", "v9"), 1, "no revision 'v9'; check the branch, tag or commit")


def test_the_newest_of_a_branch(hub: Hub, client: Client, contents: Any) -> None:
    first = pulled(client("pull", "lab/tiny-GGUF"))
    changed = {**contents["lab/tiny-GGUF"]["main"], "README.md": b"# changed"}
    hub.models = {**contents, "lab/tiny-GGUF": {"main": changed}}
    sent = hub.sent
    second = pulled(client("pull", "lab/tiny-GGUF"))
    assert second != first
    assert second.resolve() == first.resolve(), "the same content is not fetched again"
    assert hub.sent - sent < 6_000_000, "no more than its header and routers"


def test_dry_run(hub: Hub, client: Client) -> None:
    done = client("pull", "lab/tiny-GGUF:Q8_0", "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("would fetch 10.")
    assert "maps that fit: digits-words" in done.stderr
    data = json.loads(client("pull", "lab/tiny-GGUF:Q8_0", "--dry-run", "--json").stdout)
    assert [item["path"] for item in data["files"]] == SPLIT
    assert (data["quantization"], data["paths"], data["fetched"]) == ("Q8_0", [], False)
    assert (data["n_expert"], data["n_expert_used"], data["here_before_bytes"]) == (24, 4, 0)
    assert not client.cache.exists()
    path = json.loads(client("pull", "lab/tiny-GGUF", "--json").stdout)["paths"]
    assert [Path(item).name for item in path] == ["tiny-Q4_K_M.gguf"]


def test_short_names(hub: Hub, client: Client, contents: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.models = {
        **contents,
        "ggml-org/gpt-oss-20b-GGUF": {"main": {"x-mxfp4.gguf": contents["lab/tiny-GGUF"]["main"]["tiny-Q4_K_M.gguf"]}},
    }
    line = fails(
        client("info", "gpt-oss-20b"), 1, "gpt-oss-20b: not on this machine; fetch it: steermoe pull gpt-oss-20b"
    )
    name = line.rpartition("steermoe pull ")[2]
    path = pulled(client("pull", name))
    assert path.name == "x-mxfp4.gguf"
    for name in ("gpt-oss-20b", "GPT-OSS-20B", "gpt-oss-20b:mxfp4", "ggml-org/gpt-oss-20b-GGUF"):
        assert client("info", name).exit_code == 0
    fails(
        client("info", "gpt-oss-20b:Q8_0"),
        1,
        "not on this machine (there is MXFP4); fetch it: steermoe pull gpt-oss-20b:Q8_0",
    )


#
# what is looked at before the download
#


def test_the_header_is_read_first(hub: Hub, client: Client) -> None:
    """Whatever cannot be steered costs the header, not the file."""
    hub.ranges.clear()
    line = fails(client("pull", "lab/dense-GGUF"), 1, "lab/dense-GGUF:Q8_0: cannot be steered: no layer has experts")
    assert "nothing was fetched" in line
    assert "--force" in line
    assert not client.cache.exists()
    assert len(hub.ranges) == 1
    assert not [path for method, path in hub.asked("/resolve/") if method == "HEAD"]
    fails(client("pull", "lab/new-GGUF"), 1, "knows no Mixture-of-Experts architecture 'newmoe'")
    assert not client.cache.exists()


def test_force_takes_a_dense_model(client: Client) -> None:
    done = client("pull", "lab/dense-GGUF", "--force")
    assert pulled(done).name == "dense-Q8_0.gguf"
    assert "warning: lab/dense-GGUF:Q8_0: cannot be steered" in done.stderr
    fails(client("run", "-hf", "lab/nothing", "-p", "x"), 1, "no GGUF models")


def test_only_the_header_and_routers_are_read(hub: Hub, client: Client) -> None:
    assert client("pull", "lab/tiny-GGUF", "--dry-run").exit_code == 0
    header, *routers = hub.ranges
    assert header == (0, 4 << 20)
    assert {stop - start for start, stop in routers} == {24 * 256 * 4}
    assert len(routers) == 5
    hub.ranges.clear()
    done = client("pull", "lab/random-GGUF", "--file", "chat-Q4_K_M.gguf", "--dry-run")
    assert "maps that fit" not in done.stderr
    assert len(hub.ranges) == 1, "no map has its shape, so its routers are of no interest"


def test_maps_of_a_folder(hub: Hub, client: Client, tmp_path: Path) -> None:
    shutil.copy(Path(str(model_path("expert_maps"))) / "tiny" / "digits-words.json", tmp_path / "mine.json")
    (tmp_path / "card.json").write_text("{}")
    (tmp_path / "bad.json").write_text('{"format": "steermoe-expert-map"')
    done = client("pull", "lab/tiny-GGUF", "--dry-run", "--maps", tmp_path)
    assert f"maps that fit: digits-words, document-memory, {tmp_path / 'mine.json'}" in done.stderr
    assert "warning: " in done.stderr
    assert "bad.json" in done.stderr
    assert "card.json" not in done.stderr


def model_path(name: str) -> Path:
    from tests.support.paths import ROOT

    return ROOT / name


def test_damaged_files(client: Client) -> None:
    fails(client("pull", "lab/damaged-GGUF"), 1, "lab/damaged-GGUF/page-Q8_0.gguf: not a GGUF file")
    fails(client("pull", "lab/damaged-GGUF:Q4_0"), 1, "cut-Q4_0.gguf: damaged GGUF", "cut off")
    fails(client("pull", "lab/damaged-GGUF:Q2_K"), 1, "only 4 bytes")
    fails(client("pull", "lab/parts-GGUF"), 1, "part 2 of 3 is not there")
    assert not client.cache.exists()


def test_which_file(client: Client) -> None:
    fails(client("pull", "lab/random-GGUF"), 1, "several files fit", "base-Q4_K_M.gguf (", "name one with --file")
    fails(client("pull", "lab/tiny-GGUF:Q5_K_M"), 1, "no quantization Q5_K_M; it has Q8_0 (10", "Q4_K_M (10.0 MB)")
    fails(client("pull", "lab/nothing"), 1, "no GGUF models in it")
    fails(client("pull", "lab/tiny-GGUF", "--file", "x.gguf"), 1, "no model file x.gguf; it has Q8_0/tiny")
    fails(client("pull", "no-such-name"), 2, "not the name of a model", "short-names")
    fails(client("pull", "tiny"), 2, "tiny: ships with the program")


def test_room_on_the_disk(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 70_000_000))
    fails(client("pull", "lab/tiny-GGUF"), 1, "10.0 MB are to be fetched, but 70.0 MB are free", "--dir")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 80_000_000))
    pulled(client("pull", "lab/tiny-GGUF"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 0))
    pulled(client("pull", "lab/tiny-GGUF"))


#
# access
#


def test_gated_models(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.gated.add("lab/tiny-GGUF")
    fails(client("pull", "lab/tiny-GGUF"), 1, "the model is gated", "HF_TOKEN")
    for flag in ("--hf-token", "--token", "-hft"):
        assert client("pull", "lab/tiny-GGUF", "--dry-run", flag, hub.token).exit_code == 0
    done = client("pull", "lab/tiny-GGUF", "--dir", tmp_path / "models", token=hub.token)
    assert pulled(done).exists()
    assert hub.token not in done.output
    assert client("info", "lab/tiny-GGUF").exit_code == 1
    hub.requests.clear()
    assert client("run", "-hf", "lab/tiny-GGUF", "-hft", hub.token, "-n", 1, "-p", "x", "-t", 1).exit_code == 0
    assert not hub.leaked, "the content network must not see the token"
    assert [path for _, path in hub.requests if path.startswith("/content/")]


def test_no_access(hub: Hub, client: Client) -> None:
    hub.private.add("lab/tiny-GGUF")
    fails(client("pull", "lab/tiny-GGUF"), 1, "lab/tiny-GGUF: the hub knows no such model; check the name")
    fails(client("pull", "lab/tiny-GGUF", token="hf_wrong"), 1, "the hub knows no such model")
    assert client("pull", "lab/tiny-GGUF", "--dry-run", token=hub.token).exit_code == 0
    fails(client("pull", "lab/unknown"), 1, "the hub knows no such model")
    fails(client("pull", "lab/dense-GGUF", token="hf_expired"), 1, "refuses access with status 401; log in again")
    hub.forbidden.add("lab/dense-GGUF")
    fails(client("pull", "lab/dense-GGUF"), 1, "refuses access with status 403")


def test_what_a_server_says_is_not_trusted(hub: Hub, client: Client, monkeypatch: Any) -> None:
    """Neither its commit nor an ETag becomes a path, nor does its text move the cursor."""
    from steermoe_local.models import hub

    monkeypatch.setattr(Hub, "commit", lambda *_: "../../evil")
    fails(client("pull", "lab/tiny-GGUF"), 1, "the server does not say which commit main is")
    assert hub._line(ValueError("a\x1b[2Jb\nc")) == "a?[2Jb"


def test_an_etag_is_no_path(hub: Hub, client: Client, monkeypatch: Any) -> None:
    monkeypatch.setattr("tests.support.hub_stand_in.sha256", lambda data: "../../../../evil")
    fails(client("pull", "lab/random-GGUF", "--file", "chat-Q4_K_M.gguf"), 1)
    assert not list(client.folder.rglob("*evil*"))


def test_a_hub_out_of_order(hub: Hub, client: Client) -> None:
    hub.broken = True
    fails(client("pull", "lab/tiny-GGUF"), 1, "answers with status 500; try again later")


def test_no_hub(alone: Client) -> None:
    fails(alone("pull", "lab/tiny-GGUF"), 1, "lab/tiny-GGUF: cannot be fetched", "check the network")


def test_a_server_without_ranges(hub: Hub, client: Client) -> None:
    """The header is at the file's beginning, so the beginning of an answer does."""
    hub.whole_files_only = True
    assert client("pull", "lab/random-GGUF", "--file", "chat-Q4_K_M.gguf", "--dry-run").exit_code == 0
    fails(client("pull", "lab/tiny-GGUF", "--dry-run"), 1, "the server sends whole files only")
