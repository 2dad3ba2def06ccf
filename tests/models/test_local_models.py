"""What is on this machine: caches and folders, names that lead to models, facts that are kept, maps that fit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from steermoe_local.errors import ModelError
from steermoe_local.model_files.model_info import model_info
from steermoe_local.models.embedded import embedded_model
from steermoe_local.models.local_facts import FactsCache, ModelFacts, facts_cache_path, fitting, maps_in
from steermoe_local.models.local_models import LocalModel, LocalModels, llama_cpp_cache, resolve_model
from steermoe_local.steering.bias_file import BiasFile, write_bias
from tests.support.builders import HEX, write_gguf
from tests.support.gguf_copy import copy_model
from tests.support.hub_client import Client, fails
from tests.support.paths import ROOT
from tests.support.random_models import DENSE_FIRST, OLMOE, write_random_model

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """The program with a home of its own and no network at all."""
    client = Client(None, tmp_path, monkeypatch)
    client.guard(lambda host: False)
    return client


@pytest.fixture
def random_file(tmp_path: Path) -> Path:
    return write_random_model(tmp_path / "random.gguf", OLMOE)


def cached(root: Path, repo: str, commit: str, files: dict[str, Path], revision: str | None = "main") -> list[Path]:
    """Put files into a cache in the hub's layout, as the client does. Returns their paths in the snapshot."""
    folder = root / f"models--{repo.replace('/', '--')}"
    result = []
    for name, source in files.items():
        blob = folder / "blobs" / hashlib.sha256(source.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, blob)
        link = folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        result.append(link)
    if revision:
        reference = folder / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
    return result


def names(local: LocalModels) -> list[str]:
    return [local.name_of(model) for model in local.models()]


def listing(client: Client, *arguments: Any, **variables: str) -> dict[str, dict[str, Any]]:
    done = client("models", "--json", *arguments, **variables)
    assert done.exit_code == 0, done.output
    return {item["name"]: item for item in json.loads(done.stdout)}


#
# where models are
#


def test_nothing_but_the_embedded_model(client: Client, tiny_path: Path) -> None:
    assert names(LocalModels.scan([client.folder / "none"])) == ["tiny"]
    (only,) = listing(client).values()
    assert only["path"] == str(embedded_model())
    assert only["source"] == "embedded"
    assert (only["n_expert"], only["n_expert_used"], only["n_layer"], only["n_moe_layers"]) == (24, 4, 5, 5)
    assert only["router_sha256"] == model_info(tiny_path).require_moe().router_sha256
    assert [item["name"] for item in only["maps"]] == ["digits-words", "document-memory"]
    assert all(Path(item["path"]).is_file() for item in only["maps"])


def test_the_hubs_cache(client: Client, tiny_path: Path, random_file: Path) -> None:
    parts = copy_model(tiny_path, client.folder / "t.gguf", max_tensors=25)
    split = {f"Q8_0/t-Q8_0-{n:05d}-of-00003.gguf": part for n, part in enumerate(parts, 1)}
    cached(client.cache, "lab/tiny-GGUF", NEW, {"t-Q4_K_M.gguf": tiny_path, "mmproj-F16.gguf": random_file, **split})
    cached(client.cache, "lab/r-GGUF", OLD, {"r.gguf": random_file})
    (client.cache / "datasets--lab--d" / "snapshots").mkdir(parents=True)
    (client.cache / "version.txt").write_text("1")
    found = listing(client)
    assert list(found) == ["tiny", "lab/r-GGUF:r", "lab/tiny-GGUF:Q8_0", "lab/tiny-GGUF:Q4_K_M"]
    whole, four = found["lab/tiny-GGUF:Q8_0"], found["lab/tiny-GGUF:Q4_K_M"]
    assert whole["size_bytes"] == sum(part.stat().st_size for part in parts)
    assert whole["router_sha256"] == four["router_sha256"] == found["tiny"]["router_sha256"]
    assert whole["maps"] == four["maps"] == found["tiny"]["maps"]
    assert (four["source"], four["repository"], four["revision"]) == ("hub cache", "lab/tiny-GGUF", "main")
    assert not found["lab/r-GGUF:r"]["maps"]
    for name, item in found.items():
        assert resolve_model(name) == Path(item["path"])
        assert client("info", name).exit_code == 0
    assert resolve_model("lab/r-GGUF") == Path(found["lab/r-GGUF:r"]["path"])
    assert resolve_model("LAB/Tiny-gguf:q8_0") == Path(whole["path"]), "as on the hub, case does not count"


def test_revisions(client: Client, tiny_path: Path, random_file: Path) -> None:
    """Main goes first; what only an older snapshot has is found all the same."""
    repo = "lab/m-GGUF"
    old, only_old = cached(client.cache, repo, OLD, {"m-Q4_K_M.gguf": random_file, "m-Q2_K.gguf": tiny_path}, None)
    (new,) = cached(client.cache, repo, NEW, {"m-Q4_K_M.gguf": tiny_path})
    (tagged,) = cached(client.cache, repo, "c" * 40, {"m-Q8_0.gguf": random_file}, "refs/pr/1")
    cached(client.cache, repo, "d" * 40, {"m-Q4_K_M.gguf": tiny_path}, "newer-branch")
    local = LocalModels.scan()
    assert f"{repo}:Q4_K_M" in names(local)
    assert resolve_model(repo) == resolve_model(f"{repo}:Q4_K_M") == resolve_model(f"{repo}@main") == new
    assert resolve_model(f"{repo}@{NEW}") == new
    assert resolve_model(f"{repo}:Q2_K") == only_old
    assert resolve_model(f"{repo}@{OLD}:Q4_K_M") == old
    assert resolve_model(f"{repo}:Q8_0") == resolve_model(f"{repo}@refs/pr/1:Q8_0") == tagged
    with pytest.raises(ModelError, match=r"Q8_0\); fetch it: steermoe pull"):
        resolve_model(f"{repo}@refs/pr/1:Q4_K_M")
    # files of one content stand once, under the snapshot that counts first
    assert {os.path.realpath(m.path) for m in local.models()[1:]} == {
        os.path.realpath(p) for p in (new, tagged)
    } | set()


def test_models_folders(client: Client, tiny_path: Path, random_file: Path) -> None:
    folder = client.folder / "models"
    for name in (
        "loose.gguf",
        "sub/deeper/nested.GGUF",
        "lab/tiny-GGUF/t-Q4_K_M.gguf",
        "lab/tiny-GGUF/Q8_0/t-Q8_0.gguf",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny_path, folder / name)
        with open(folder / name, "ab") as file:
            file.write(bytes(len(name)))  # files of their own
    (folder / ".cache" / "x").mkdir(parents=True)
    shutil.copy(tiny_path, folder / ".cache" / "x" / "hidden.gguf")
    (folder / "notes.txt").write_text("x")
    expected = {
        "loose": "loose.gguf",
        "sub/deeper:nested": "sub/deeper/nested.GGUF",
        "lab/tiny-GGUF:Q4_K_M": "lab/tiny-GGUF/t-Q4_K_M.gguf",
        "lab/tiny-GGUF:Q8_0": "lab/tiny-GGUF/Q8_0/t-Q8_0.gguf",
    }
    for arguments, variables in ((["--models-dir", folder], {}), ([], {"STEERMOE_MODELS": str(folder)})):
        found = listing(client, *arguments, **variables)
        assert {name: item["path"] for name, item in found.items() if name != "tiny"} == {
            name: str(folder / path) for name, path in expected.items()
        }
        for name in found:
            assert client("info", name, *arguments, **variables).exit_code == 0
        run = ["-t", 1, "--temp", 0, "-p", "What is three plus four?"]
        assert client("run", "-m", "loose", *arguments, *run, **variables).stdout == "7\n"
    assert client("info", "loose.gguf", "--models-dir", folder).exit_code == 0
    fails(client("info", "loose"), 1, "loose: neither a file nor a model of this name")
    fails(client("info", "lab/tiny-GGUF"), 1, "not on this machine")
    # several folders, the first one counts
    other = client.folder / "other"
    other.mkdir()
    shutil.copy(random_file, other / "loose.gguf")
    both = listing(client, STEERMOE_MODELS=f"{other}{os.pathsep}{folder}")
    assert both["loose"]["path"] == str(other / "loose.gguf")
    assert str(folder / "loose.gguf") in both, "the other one goes by its path"
    config = client.folder / "steermoe.toml"
    config.write_text(f'models-dir = ["{folder}"]\n')
    assert set(listing(client, STEERMOE_CONFIG=str(config))) == {"tiny", *expected}
    assert client("info", "loose", STEERMOE_CONFIG=str(config)).exit_code == 0


def test_llama_cpps_cache(client: Client, tiny_path: Path, random_file: Path) -> None:
    """What llama.cpp fetched: in its cache of former versions, flat, and in the hub's layout under LLAMA_CACHE."""
    cache = client.folder / "llama"
    cached(cache, "lab/tiny-GGUF", NEW, {"t-Q4_K_M.gguf": tiny_path})
    shutil.copy(random_file, cache / "lab_r-GGUF_r-Q8_0.gguf")
    found = listing(client, LLAMA_CACHE=str(cache))
    flat = str(cache / "lab_r-GGUF_r-Q8_0.gguf")
    assert list(found) == ["tiny", "lab/tiny-GGUF:Q4_K_M", flat], "a loose file goes by its path"
    assert {item["source"] for item in found.values()} == {"embedded", "llama.cpp cache"}
    assert client("info", "lab/tiny-GGUF", LLAMA_CACHE=str(cache)).exit_code == 0
    for name in found:
        assert client("info", name, LLAMA_CACHE=str(cache)).exit_code == 0
    usual = llama_cpp_cache()
    assert usual.name == "llama.cpp"
    if usual.is_relative_to(client.folder):  # where XDG_CACHE_HOME counts
        usual.mkdir(parents=True)
        shutil.copy(random_file, usual / "flat.gguf")
        assert set(listing(client)) == {"tiny", str(usual / "flat.gguf")}


def test_paths_go_before_names(client: Client, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(client.folder)
    cached(client.cache, "lab/tiny-GGUF", NEW, {"t-Q4_K_M.gguf": tiny_path})
    assert resolve_model("lab/m.gguf") == Path("lab/m.gguf")
    assert resolve_model("./lab/m") == Path("lab/m")
    assert resolve_model("missing.gguf") == Path("missing.gguf")
    with pytest.raises(ModelError, match="missing: neither a file nor"):
        resolve_model("missing")
    (client.folder / "lab").mkdir()
    shutil.copy(tiny_path, client.folder / "lab" / "tiny-GGUF")
    assert resolve_model("lab/tiny-GGUF") == Path("lab/tiny-GGUF")
    assert resolve_model("tiny") == embedded_model()
    shutil.copy(tiny_path, client.folder / "tiny")
    assert resolve_model("tiny") == Path("tiny")


def test_several_fit(client: Client, tiny_path: Path, random_file: Path) -> None:
    files = {"base-Q4_K_M.gguf": tiny_path, "chat-Q4_K_M.gguf": random_file}
    base, chat = cached(client.cache, "lab/two-GGUF", NEW, files)
    line = fails(client("info", "lab/two-GGUF"), 1, "several files fit", "base-Q4_K_M.gguf (10.0 MB)")
    assert "chat-Q4_K_M.gguf" in line
    assert set(listing(client)) == {"tiny", str(base), str(chat)}, "then their paths are their names"
    found = client("pull", "lab/two-GGUF", "--offline", "--file", "chat-Q4_K_M.gguf")
    assert found.stdout == f"{chat}\n"


#
# what is damaged
#


def test_damaged_and_other_files_are_listed_as_such(client: Client, tiny_path: Path) -> None:
    folder = client.folder / "models"
    folder.mkdir()
    (folder / "page.gguf").write_bytes(b"<html>" * 99)
    (folder / "empty.gguf").write_bytes(b"")
    (folder / "cut.gguf").write_bytes(tiny_path.read_bytes()[:1_000_000])
    (folder / "folder.gguf").mkdir()
    (folder / "gone.gguf").symlink_to("nowhere")
    (folder / "loop.gguf").symlink_to("loop.gguf")
    (folder / "mmproj-x.gguf").write_bytes(b"x")
    parts = copy_model(tiny_path, client.folder / "t.gguf", max_tensors=25)
    for part in parts[::2]:
        shutil.copy(part, folder)
    dense = {"blk.0.ffn_up.weight": np.zeros((4, 32), np.float32)}
    write_gguf(folder / "dense.gguf", "llama", {"llama.block_count": 1, "general.file_type": 7}, dense)
    identity = model_info(tiny_path).require_moe()
    write_bias(BiasFile.from_signs(np.eye(*identity.shape), identity), folder / "bias.gguf")
    write_random_model(folder / "first-dense.gguf", DENSE_FIRST)
    found = listing(client, "--models-dir", folder)
    problems = {Path(name).name: item["problem"] for name, item in found.items() if not item["readable"]}
    assert set(problems) == {"page", "empty.gguf", "cut", "gone.gguf", "loop.gguf", "t-00001-of-00003.gguf"}
    assert "not a GGUF file" in problems["page"]
    assert "cut off" in problems["cut"]
    assert "2 of 3 is missing" in problems["t-00001-of-00003.gguf"]
    assert not any("\n" in text for text in problems.values())
    assert (found["dense"]["steerable"], found["dense"]["readable"]) == (False, True)
    assert "no layer has" in found["dense"]["problem"]
    assert found["dense"]["quantization"] == "Q8_0"
    assert "bias" not in found
    assert "mmproj-x" not in found
    text = client("models", "--models-dir", folder).stdout
    assert "damaged: not a GGUF file" in text
    assert "cannot be steered: no layer has experts" in text
    assert "8, top-2, 3 layers (2 with experts)" in text


def test_folders_that_cannot_be_read(client: Client, tiny_path: Path) -> None:
    folder = client.folder / "models"
    (folder / "closed").mkdir(parents=True)
    shutil.copy(tiny_path, folder / "closed" / "m.gguf")
    shutil.copy(tiny_path, folder / "open.gguf")
    (folder / "closed").chmod(0)
    try:
        assert "open" in listing(client, "--models-dir", folder)
    finally:
        (folder / "closed").chmod(0o700)
    root = client.cache / "models--lab--m"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_bytes(b"\xff\xfe")
    (root / "snapshots").write_text("a file")
    (client.cache / "models--a--b--c").mkdir()
    assert "tiny" in listing(client)


def test_a_name_is_never_printed_as_control_characters(client: Client, tiny_path: Path) -> None:
    folder = client.folder / "models"
    folder.mkdir()
    shutil.copy(tiny_path, folder / "a\x1b[31mred.gguf")
    done = client("models", "--models-dir", folder)
    assert "\x1b[31m" not in done.output


#
# facts that are kept
#


def entry(path: Path) -> LocalModel:
    return LocalModel(path, path.stat().st_size, "folder", "")


def test_routers_are_hashed_once(client: Client, random_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = listing(client, "--models-dir", client.folder)
    assert facts_cache_path().is_file()

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("read again")

    monkeypatch.setattr(sys.modules["steermoe_local.model_files.model_info"], "read_header", fail)
    assert listing(client, "--models-dir", client.folder) == first


def test_a_changed_file_is_read_again(tmp_path: Path, random_file: Path) -> None:
    path = tmp_path / "facts.json"
    cache = FactsCache(path)
    assert not cache.is_kept(entry(random_file))
    facts = cache.facts(entry(random_file))
    assert facts == ModelFacts.read(random_file)
    cache.save()
    again = FactsCache(path)
    assert again.is_kept(entry(random_file))
    assert again.facts(entry(random_file)) == facts
    stat = random_file.stat()
    write_random_model(random_file, DENSE_FIRST)
    assert again.facts(entry(random_file)).architecture == "dots1"
    os.utime(random_file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert not FactsCache(path).is_kept(entry(random_file))


def test_a_part_of_a_split_model_that_changed(tmp_path: Path, tiny_path: Path) -> None:
    parts = copy_model(tiny_path, tmp_path / "t.gguf", max_tensors=25)
    cache = FactsCache(tmp_path / "facts.json")
    model = LocalModel(parts[0], 1, "folder", "")
    assert cache.facts(model).identity == model_info(tiny_path).identity
    assert cache.is_kept(model)
    parts[2].write_bytes(b"")
    assert not cache.is_kept(model)
    assert "not a GGUF file" in cache.facts(model).problem
    parts[2].unlink()
    assert "missing" in cache.facts(model).problem


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b'{"format": "steermoe-model-facts"}',
        b'{"format": "steermoe-model-facts", "tool": "TOOL", "models": []}',
        b'{"format": "steermoe-model-facts", "tool": "TOOL", "models": {"PATH": 3}}',
        b'{"format": "steermoe-model-facts", "tool": "TOOL", "models": {"PATH": {"parts": STAMP}}}',
        b'{"format": "steermoe-model-facts", "tool": "TOOL", "models": {"PATH": {"parts": STAMP, "facts": {}}}}',
        b'{"format": "steermoe-model-facts", "tool": "TOOL", "models": {"PATH": {"parts": STAMP, "facts": {"x": 1,'
        b' "identity": null}}}}',
        b'{"format": "steermoe-model-facts", "tool": "TOOL", "models": {"PATH": {"parts": STAMP, "facts": {'
        b'"identity": 1}}}}',
    ],
)
def test_a_damaged_cache_is_made_again(tmp_path: Path, random_file: Path, content: bytes) -> None:
    from steermoe_local._util.files import tool_name

    path = tmp_path / "facts.json"
    stat = random_file.stat()
    stamp = json.dumps([[stat.st_size, stat.st_mtime_ns]])
    text = content.replace(b"TOOL", tool_name().encode()).replace(b"STAMP", stamp.encode())
    path.write_bytes(text.replace(b"PATH", str(random_file).encode()))
    cache = FactsCache(path)
    assert cache.facts(entry(random_file)) == ModelFacts.read(random_file)
    cache.save()
    assert FactsCache(path).is_kept(entry(random_file))


def test_a_cache_that_cannot_be_written(tmp_path: Path, random_file: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = FactsCache(tmp_path / "file" / "facts.json")
    cache.facts(entry(random_file))
    cache.save()


def test_paths_that_are_gone_are_not_kept(tmp_path: Path, random_file: Path) -> None:
    other = Path(shutil.copy(random_file, tmp_path / "other.gguf"))
    path = tmp_path / "facts.json"
    cache = FactsCache(path)
    for file in (random_file, other):
        cache.facts(entry(file))
    other.unlink()
    cache.save()
    assert set(json.loads(path.read_text())["models"]) == {str(random_file)}


#
# maps that fit
#


def test_maps_fit_by_router_hash(client: Client, tiny_path: Path) -> None:
    maps = client.folder / "maps"
    (maps / "sub").mkdir(parents=True)
    source = ROOT / "expert_maps" / "tiny" / "digits-words.json"
    shutil.copy(source, maps / "sub" / "fits.json")
    data = json.loads(source.read_text())
    data["model"]["router_sha256"] = HEX
    (maps / "other.json").write_text(json.dumps(data))
    (maps / "card.json").write_text('{"format": "something else"}')
    (maps / "bad.json").write_text('{"format": "steermoe-expert-map", "version": 99}')
    (maps / "binary.json").write_bytes(b"\xff\xfe\x00")
    done = client("models", "--json", "--maps", maps)
    assert [item["name"] for item in json.loads(done.stdout)[0]["maps"]] == [
        "digits-words",
        "document-memory",
        str(maps / "sub" / "fits.json"),
    ]
    (warning,) = done.stderr.strip().splitlines()
    assert warning.startswith(f"warning: {maps / 'bad.json'}: ")
    assert str(maps / "sub" / "fits.json") in client("models", STEERMOE_MAPS=str(maps)).stdout.replace("\n", "")
    fails(client("models", "--maps", client.folder / "none"), 2, "does not exist")
    user = client.folder / "user"  # the user's maps have names, with --maps of their folder, too
    (user / "numbers").mkdir(parents=True)
    shutil.copy(source, user / "numbers" / "map.json")
    for arguments in ((), ("--maps", user)):
        done = client("models", "--json", *arguments, STEERMOE_MAPS=str(user))
        named = [item["name"] for item in json.loads(done.stdout)[0]["maps"]]
        assert named == ["digits-words", "document-memory", "numbers"]
    assert fitting(None, maps_in([maps])) == []


#
# how it looks
#


def test_the_table(client: Client, random_file: Path) -> None:
    text = client("models", "--models-dir", client.folder).stdout
    head, tiny, other = [line.rstrip() for line in text.splitlines()]
    assert head.split() == ["name", "size", "quant", "experts", "maps", "that", "fit"]
    assert tiny.split("  ")[0] == "tiny"
    assert tiny.endswith("digits-words, document-memory")
    assert "24, top-4, 5 layers" in tiny
    assert other.startswith("random")
    assert other.endswith("16, top-4, 4 layers  -")


def test_names_with_brackets(client: Client, tiny_path: Path) -> None:
    folder = client.folder / "[red]models"
    folder.mkdir()
    shutil.copy(tiny_path, folder / "[bold]m.gguf")
    done = client("models", "--models-dir", folder)
    assert "[bold]m " in done.stdout
    assert client("info", "[bold]m", "--models-dir", folder).exit_code == 0


def test_starting_the_program_loads_no_client() -> None:
    code = """
import sys, steermoe_local.cli
ours = {"steermoe_local.models.hub_models", "steermoe_local.models.local_models"}
slow = {"huggingface_hub", "platformdirs", "llama_cpp"} | ours
assert not slow & set(sys.modules), slow & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_short_names(client: Client) -> None:
    text = client("models", "--short-names").stdout
    assert "gpt-oss-20b " in text
    assert "ggml-org/gpt-oss-20b-GGUF\n" in text
    assert json.loads(client("models", "--short-names", "--json").stdout)["gpt-oss-20b"] == "ggml-org/gpt-oss-20b-GGUF"


def test_a_cache_elsewhere(client: Client, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = client.folder / "elsewhere"
    cached(elsewhere, "lab/tiny-GGUF", NEW, {"t-Q4_K_M.gguf": tiny_path})
    assert "lab/tiny-GGUF:Q4_K_M" not in listing(client)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(elsewhere))
    assert "lab/tiny-GGUF:Q4_K_M" in listing(client)


def test_a_misspelt_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "own-model.gguf").write_bytes(b"GGUF")
    (tmp_path / "user" / "repo-GGUF").mkdir(parents=True)
    (tmp_path / "user" / "repo-GGUF" / "m-Q8_0.gguf").write_bytes(b"GGUF")
    for name, meant in (
        ("own-modl", "own-model"),
        ("timy", "tiny"),
        ("granit-1b-a400", "granite-1b-a400m"),  # a short name, of a model that need not be here
        ("granite-4.0-h-tin", "granite-4.0-h-tiny"),
        ("user/repo-GUF", "user/repo-GGUF:Q8_0"),
    ):
        with pytest.raises(ModelError, match=rf"; did you mean {meant}\?$"):
            resolve_model(name, [tmp_path])
    for name in ("zzzz", "granite-1b-a400m"):
        with pytest.raises(ModelError) as raised:
            resolve_model(name, [tmp_path])
        assert "did you mean" not in str(raised.value)
