"""Models of the hub through the real client: a stand-in hub on the loopback, and no other network."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from steermoe_local.model_files.model_info import model_info
from steermoe_local.models.embedded import behaviours
from tests.support.builders import model_parts, write_gguf
from tests.support.gguf_copy import copy_model
from tests.support.hub_client import Client, fails
from tests.support.hub_stand_in import Hub, running
from tests.support.random_models import OLMOE, write_random_model

SPLIT = [f"Q8_0/tiny-Q8_0-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]


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


def pulled(done: Any) -> Path:
    assert done.exit_code == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return Path(line)


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
    assert "maps that fit: digits-words, document-memory" in done.stderr
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


#
# interruptions
#


def partial_files(client: Client) -> list[Path]:
    return sorted(client.cache.rglob("*.incomplete"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_goes_on(hub: Hub, client: Client, tiny_path: Path, number: int) -> None:
    hub.pause, hub.chunk = 0.01, 1 << 16
    process = client.start("pull", "lab/tiny-GGUF", "--maps", ".")
    status, out, err = client.interrupt(process, client.cache, 1_000_000, number)
    assert out == ""
    (partial,) = partial_files(client)
    kept = partial.stat().st_size
    assert 1_000_000 <= kept < 10_000_000
    assert tiny_path.read_bytes().startswith(partial.read_bytes())
    if number == signal.SIGINT:
        assert status == 130, err
        assert f"{kept / 1e6:.1f} MB of 10.0 MB are kept; the same command goes on from there\n" in err
        assert err.endswith("error: interrupted\n")
        assert "Traceback" not in err
    fails(client("info", "lab/tiny-GGUF"), 1, "not on this machine")
    hub.pause = 0
    hub.ranges.clear()
    sent = hub.sent
    status, out, err = client.program("pull", "lab/tiny-GGUF")
    assert status == 0, err
    assert f"{kept / 1e6:.1f} MB of 10.0 MB are here already" in err
    assert hub.ranges[-1] == (kept, tiny_path.stat().st_size)
    assert hub.sent - sent < 10_015_328 - kept + (4 << 20) + 200_000
    assert Path(out.strip()).read_bytes() == tiny_path.read_bytes()
    assert not partial_files(client)


def test_a_cut_connection_is_taken_up_again(hub: Hub, client: Client, tiny_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.cuts = [3_000_000, 2_000_000]
    path = pulled(client("pull", "lab/tiny-GGUF"))
    assert path.read_bytes() == tiny_path.read_bytes()
    assert not hub.cuts
    resumed = [start for start, stop in hub.ranges if stop == tiny_path.stat().st_size]
    assert len(resumed) == 2
    assert 0 < resumed[0] < resumed[1]


def test_the_connection_is_gone_for_good(hub: Hub, client: Client, monkeypatch: Any) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.cuts = [3_000_000] + [0] * 20
    done = client("pull", "lab/tiny-GGUF")
    fails(done, 1, "cannot be fetched", "check the network")
    (partial,) = partial_files(client)
    assert partial.stat().st_size > 2_000_000
    assert "MB of 10.0 MB are kept; the same command goes on from there\n" in done.stderr
    hub.cuts = []
    pulled(client("pull", "lab/tiny-GGUF"))


def test_a_damaged_rest_is_not_taken(hub: Hub, client: Client, tiny_path: Path) -> None:
    data = tiny_path.read_bytes()
    blobs = client.cache / "models--lab--tiny-GGUF" / "blobs"
    blobs.mkdir(parents=True)
    partial = blobs / f"{hashlib.sha256(data).hexdigest()}.incomplete"
    for rest in (b"x" + data[1:5_000_000], bytes(len(data))):
        partial.write_bytes(rest)
        fails(client("pull", "lab/tiny-GGUF"), 1, "what an earlier run left does not fit", "run it again")
        assert not partial.exists()
    for rest in (data + b"more", b"", data):
        partial.write_bytes(rest)
        assert pulled(client("pull", "lab/tiny-GGUF")).read_bytes() == data
        shutil.rmtree(client.cache / "models--lab--tiny-GGUF" / "snapshots")
        (blobs / partial.stem).unlink()


def test_a_part_of_a_split_model_is_here(hub: Hub, client: Client) -> None:
    path = pulled(client("pull", "lab/tiny-GGUF:Q8_0"))
    second = path.with_name(path.name.replace("00001-of", "00002-of"))
    size = second.stat().st_size
    second.resolve().unlink()  # the link stays, and leads nowhere
    fails(client("info", "lab/tiny-GGUF:Q8_0"), 1, "not on this machine")
    sent, hub.requests[:] = hub.sent, []
    assert pulled(client("pull", "lab/tiny-GGUF:Q8_0")) == path
    heads = [path for method, path in hub.requests if method == "HEAD"]
    assert {Path(path).name for path in heads} == {second.name}
    assert hub.sent - sent < size + 3 * (4 << 20)


def test_two_at_once(hub: Hub, client: Client, tiny_path: Path) -> None:
    """The second waits for the first, and fetches nothing but the header and routers."""
    hub.pause = 0.01
    processes = [client.start("pull", "lab/tiny-GGUF") for _ in range(2)]
    results = [(process.communicate(timeout=120), process.returncode) for process in processes]
    assert [status for _, status in results] == [0, 0], results
    paths = {out.strip() for (out, _), _ in results}
    assert Path(paths.pop()).read_bytes() == tiny_path.read_bytes()
    assert not paths
    assert [start for start, stop in hub.ranges if stop == tiny_path.stat().st_size] == []
    whole = [path for method, path in hub.requests if method == "GET" and path.startswith("/content/")]
    assert len(whole) <= 2 * 6 + 1, "six parts each, and the file once"
    assert not partial_files(client)


def test_without_symbolic_links(hub: Hub, client: Client, tiny_path: Path, monkeypatch: Any) -> None:
    """As on Windows without the right to make them: the file lies in the snapshot, once."""
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_, **__: False)
    path = pulled(client("pull", "lab/tiny-GGUF"))
    assert not path.is_symlink()
    assert path.read_bytes() == tiny_path.read_bytes()
    assert [p for p in client.cache.rglob("*") if p.is_file() and p.stat().st_size > 1_000_000] == [path]
    hub.requests.clear()
    assert client("info", "lab/tiny-GGUF").exit_code == 0
    assert pulled(client("pull", "lab/tiny-GGUF")) == path
    assert len(hub.asked()) == 1


def test_by_the_clients_own_transfer(hub: Hub, client: Client, tiny_path: Path, monkeypatch: Any) -> None:
    """Files that are too large for plain HTTP, or whose user asks for the fast transfer, are the client's."""
    monkeypatch.setattr(constants, "HF_XET_HIGH_PERFORMANCE", True, raising=False)
    assert pulled(client("pull", "lab/tiny-GGUF")).read_bytes() == tiny_path.read_bytes()
    assert client("info", "lab/tiny-GGUF").exit_code == 0


@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals")
@pytest.mark.parametrize("columns", [40, 100])
def test_progress_on_a_terminal(hub: Hub, client: Client, columns: int) -> None:
    import pexpect

    hub.pause = 0.01
    process = client.start_in_terminal(columns, "pull", "lab/tiny-GGUF")
    process.expect("olmoe, 24 experts, top-4, 5 layers")
    process.expect(r"tiny-Q4_K_M\.gguf: +[1-9]\d?%")
    process.expect(r"tiny-Q4_K_M\.gguf: 100%")
    process.expect("models--lab--tiny-GGUF")
    process.expect(pexpect.EOF)
    process.close()
    assert process.exitstatus == 0


#
# into a folder
#


def test_into_a_models_folder(hub: Hub, client: Client, tiny_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    done = client("pull", "lab/tiny-GGUF", "--dir", folder)
    path = pulled(done)
    assert path == folder / "lab" / "tiny-GGUF" / "tiny-Q4_K_M.gguf"
    assert f'steermoe run -m lab/tiny-GGUF:Q4_K_M --models-dir {folder} -p "..."' in done.stderr
    assert [p for p in folder.rglob("*") if p.is_file()] == [path]
    assert not client.cache.exists()
    sent = hub.sent
    assert pulled(client("pull", "lab/tiny-GGUF", "--dir", folder)) == path
    assert hub.sent == sent
    split = pulled(client("pull", "lab/tiny-GGUF:Q8_0", "--dir", folder))
    assert split == folder / "lab" / "tiny-GGUF" / SPLIT[0]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    fails(client("pull", "lab/tiny-GGUF", "--dir", folder), 1, "is another file than lab/tiny-GGUF/tiny-Q4_K_M.gguf")
    for name in ("lab/tiny-GGUF:Q8_0", "lab/tiny-GGUF:q4_k_m"):
        assert client("info", name, "--models-dir", folder).exit_code == 0
        assert client("info", name, STEERMOE_MODELS=str(folder)).exit_code == 0
        assert client("info", name).exit_code == 1


def test_an_interrupted_download_into_a_folder(hub: Hub, client: Client, tiny_path: Path, tmp_path: Path) -> None:
    hub.pause = 0.01
    process = client.start("pull", "lab/tiny-GGUF", "--dir", "models")
    status, _, err = client.interrupt(process, tmp_path / "models", 1_000_000)
    assert status == 130, err
    assert "MB of 10.0 MB are kept" in err
    (partial,) = (tmp_path / "models").rglob("*.incomplete")
    hub.pause = 0
    status, out, err = client.program("pull", "lab/tiny-GGUF", "--dir", "models")
    assert status == 0, err
    assert (tmp_path / out.strip()).read_bytes() == tiny_path.read_bytes()
    assert not partial.exists()


def test_a_folder_that_cannot_be_written_to(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fails(client("pull", "lab/tiny-GGUF", "--dir", tmp_path / "file"), 2, "is a file")
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o500)
    if not list_writable(folder):
        fails(client("pull", "lab/tiny-GGUF", "--dir", folder), 1, "cannot be kept", "Permission denied")


def list_writable(folder: Path) -> bool:
    """Root may write everywhere."""
    try:
        (folder / "x").touch()
    except OSError:
        return False
    return True


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
    assert "the hub is off" in err
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
