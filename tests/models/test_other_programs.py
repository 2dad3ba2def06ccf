"""Models of LM Studio and Ollama on this machine; hostile manifests and settings are left out, and lead nowhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local.errors import ModelError
from steermoe_local.models import ollama
from steermoe_local.models.lm_studio import lm_studio_folders
from steermoe_local.models.local_models import LocalModels, llama_cpp_cache, resolve_model
from steermoe_local.models.ollama import ollama_folders, ollama_models
from tests.models.test_local_models import NEW, cached, listing, names
from tests.support.builders import write_gguf
from tests.support.hub_client import Client, fails
from tests.support.random_models import OLMOE, write_random_model

MODEL = "application/vnd.ollama.image.model"


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """The program with a home of its own and no network at all."""
    client = Client(None, tmp_path, monkeypatch)
    client.home.mkdir(exist_ok=True)
    client.guard(lambda host: False)
    return client


@pytest.fixture
def random_file(tmp_path: Path) -> Path:
    return write_random_model(tmp_path / "random.gguf", OLMOE)


def manifest(root: Path, name: str, layers: Any) -> Path:
    """A manifest of Ollama at HOST/NAMESPACE/NAME/TAG, with these layers."""
    path = root / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schemaVersion": 2, "config": {"digest": f"sha256:{'c' * 64}"}, "layers": layers}))
    return path


def layer(digest: str, media: str = MODEL) -> dict[str, Any]:
    return {"mediaType": media, "digest": digest, "size": 1}


def stored(root: Path, source: Path) -> str:
    """Put a file among the blobs, as Ollama does; returns its digest."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    blobs = root / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, blobs / f"sha256-{digest}")
    return f"sha256:{digest}"


#
# Ollama
#


def test_ollamas_models(client: Client, tiny_path: Path, random_file: Path) -> None:
    root = client.folder / "ollama"
    tiny, other = stored(root, tiny_path), stored(root, random_file)
    manifest(
        root, "registry.ollama.ai/library/moe/8b", [layer(other), layer(tiny, "application/vnd.ollama.image.template")]
    )
    manifest(root, "registry.ollama.ai/library/moe/latest", [layer(other)])
    manifest(root, "registry.ollama.ai/someone/moe/q4", [layer(tiny)])
    manifest(root, "hf.co/lab/t-GGUF/Q4_K_M", [layer(tiny)])
    found = listing(client)
    # a file stands once, under the first of its names
    assert list(found) == ["tiny", "ollama/hf.co/lab/t-GGUF:Q4_K_M", "ollama/moe:8b"]
    item = found["ollama/moe:8b"]
    assert (item["source"], item["steerable"], item["repository"]) == ("Ollama", True, None)
    assert item["size_bytes"] == random_file.stat().st_size
    assert found["ollama/hf.co/lab/t-GGUF:Q4_K_M"]["maps"] == found["tiny"]["maps"]
    blob = root / "blobs" / other.replace(":", "-")
    for name in ("ollama/moe:8b", "moe:8b", "MOE:8B", "ollama/moe", "moe", "ollama/moe:latest"):
        assert resolve_model(name) == blob, name
    for name in ("ollama/someone/moe:q4", "ollama/hf.co/lab/t-GGUF:Q4_K_M", "hf.co/lab/t-GGUF:Q4_K_M"):
        assert resolve_model(name) == root / "blobs" / tiny.replace(":", "-"), name
    done = client("info", "ollama/moe:8b")
    assert done.exit_code == 0, done.output
    with pytest.raises(ModelError, match="not on this machine"):
        resolve_model("someone/moe:q4")  # a name of the hub
    line = fails(client("info", "ollama/moe:70b"), 1, "not among the models of Ollama", "ollama pull moe:70b")
    assert "ollama/moe:8b" in line
    fails(client("info", "moe:70b"), 1, "neither a file nor a model")


def test_names_of_the_hub_and_short_names_go_first(client: Client, tiny_path: Path, random_file: Path) -> None:
    root = client.folder / "ollama"
    manifest(root, "registry.ollama.ai/lab/m-GGUF/Q8_0", [layer(stored(root, random_file))])
    manifest(root, "registry.ollama.ai/library/qwen3-30b-a3b/q4", [layer(stored(root, random_file))])
    (hub,) = cached(client.cache, "lab/m-GGUF", NEW, {"m-Q8_0.gguf": tiny_path})
    assert resolve_model("lab/m-GGUF:Q8_0") == hub
    assert resolve_model("ollama/lab/m-GGUF:Q8_0").parent == root / "blobs"
    assert resolve_model("ollama/qwen3-30b-a3b:q4").parent == root / "blobs"
    with pytest.raises(ModelError, match="fetch it: steermoe pull"):
        resolve_model("qwen3-30b-a3b:q4")


def test_a_model_that_is_no_moe_is_marked(client: Client, tmp_path: Path) -> None:
    root = client.folder / "ollama"
    dense = tmp_path / "dense.gguf"
    tensors = {"blk.0.ffn_up.weight": np.zeros((4, 32), np.float32)}
    write_gguf(dense, "llama", {"llama.block_count": 1, "general.file_type": 7}, tensors)
    manifest(root, "registry.ollama.ai/library/dense/1b", [layer(stored(root, dense))])
    item = listing(client)["ollama/dense:1b"]
    assert (item["steerable"], item["readable"]) == (False, True)
    assert "cannot be steered" in client("models").stdout


def test_where_ollama_keeps_models(client: Client, monkeypatch: pytest.MonkeyPatch, random_file: Path) -> None:
    system = client.folder / "system"
    monkeypatch.setattr(ollama, "_SYSTEM", system)
    monkeypatch.setenv("OLLAMA_MODELS", "~/elsewhere")
    assert ollama_folders() == [client.home / "elsewhere"]
    monkeypatch.delenv("OLLAMA_MODELS")
    assert ollama_folders()[0] == client.home / ".ollama" / "models"
    if os.name != "nt":
        manifest(system, "registry.ollama.ai/library/moe/8b", [layer(stored(system, random_file))])
        assert "ollama/moe:8b" in listing(client)


@pytest.mark.parametrize(
    "digest",
    [
        "sha256:../../../secret",
        "sha256-../secret",
        "../secret",
        "/etc/passwd",
        f"sha256:{'a' * 63}/",
        f"sha256:{'A' * 64}",
        f"sha256:{'a' * 64}\n",
        f"sha256:{'a' * 65}",
        "sha512:" + "a" * 64,
        "",
        7,
        None,
        {"a": 1},
    ],
)
def test_a_digest_that_is_none(client: Client, tiny_path: Path, digest: Any) -> None:
    root = client.folder / "ollama"
    (root / "blobs").mkdir(parents=True)
    shutil.copy(tiny_path, client.folder / "secret")
    manifest(root, "registry.ollama.ai/library/bad/1b", [{"mediaType": MODEL, "digest": digest}])
    assert ollama_models(root) == []
    assert names(LocalModels.scan()) == ["tiny"]


def test_hostile_manifests(client: Client, tiny_path: Path, random_file: Path) -> None:
    root = client.folder / "ollama"
    good = stored(root, random_file)
    at = "registry.ollama.ai/library"
    manifest(root, f"{at}/good/1b", [layer(good)])
    manifest(root, f"{at}/two/1b", [layer(good), layer(good)])
    manifest(root, f"{at}/none/1b", [])
    manifest(root, f"{at}/odd/1b", "layers")
    manifest(root, f"{at}/odd/2b", [7, None, "x", {"mediaType": MODEL}])
    manifest(root, f"{at}/huge/1b", [layer(good), "x" * (1 << 19)])
    manifest(root, f"{at}/spaces/1 b", [layer(good)])
    manifest(root, f"{at}/control/1\x1b[31mb", [layer(good)])
    manifest(root, f"{at}/deep/er/1b", [layer(good)])
    for name, content in {
        "text": b"not JSON",
        "empty": b"",
        "bytes": b"\xff\xfe",
        "list": b"[]",
        "nested": b"[" * 100_000,
        "long": b'{"layers": ' + b"9" * 5000 + b"}",
    }.items():
        manifest(root, f"{at}/{name}/1b", []).write_bytes(content)
    folders = root / "manifests" / at
    (folders / "folder" / "1b").mkdir(parents=True)
    (folders / "loop").symlink_to(folders)
    if hasattr(os, "mkfifo"):
        (folders / "pipe").mkdir()
        os.mkfifo(folders / "pipe" / "1b")
    gone = manifest(root, f"{at}/gone/1b", [layer(f"sha256:{'d' * 64}")])
    (root / "blobs" / f"sha256-{'e' * 64}").mkdir()
    manifest(root, f"{at}/dir/1b", [layer(f"sha256:{'e' * 64}")])
    assert {model.full_name: bool(model.size) for model in ollama_models(root)} == {
        "ollama/good:1b": True,
        "ollama/gone:1b": False,
        "ollama/dir:1b": False,
    }
    found = listing(client)
    assert {item["path"] for item in found.values() if item["readable"]} == {
        found["tiny"]["path"],
        str(root / "blobs" / good.replace(":", "-")),
    }
    with pytest.raises(ModelError, match="not among the models of Ollama"):
        resolve_model("ollama/gone:1b")
    gone.unlink()


def test_at_most_so_many_manifests_are_read(client: Client, random_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama, "_MOST", 3)
    root = client.folder / "ollama"
    good = stored(root, random_file)
    for n in range(9):
        manifest(root, f"registry.ollama.ai/library/m/{n}b", [layer(good)])
    assert len(ollama_models(root)) == 3


#
# LM Studio
#


def test_lm_studios_models(client: Client, tiny_path: Path, random_file: Path) -> None:
    usual = client.home / ".lmstudio" / "models" / "lab" / "tiny-GGUF"
    usual.mkdir(parents=True)
    shutil.copy(tiny_path, usual / "t-Q4_K_M.gguf")
    shutil.copy(random_file, usual / "mmproj-F16.gguf")
    old = client.home / ".cache" / "lm-studio" / "models" / "lab" / "r-GGUF"
    old.mkdir(parents=True)
    shutil.copy(random_file, old / "r.gguf")
    found = listing(client)
    assert list(found) == ["tiny", "lab/tiny-GGUF:Q4_K_M", "lab/r-GGUF:r"]
    assert {item["source"] for item in found.values()} == {"embedded", "LM Studio"}
    assert resolve_model("lab/tiny-GGUF") == usual / "t-Q4_K_M.gguf"
    assert client("info", "lab/r-GGUF").exit_code == 0


def test_the_folder_that_lm_studios_settings_name(client: Client, random_file: Path) -> None:
    home = client.home / ".lmstudio"
    home.mkdir()
    (home / "settings.json").write_text(json.dumps({"downloadsFolder": "~/big/models", "developer": {}}))
    at = client.home / "big" / "models" / "lab" / "r-GGUF"
    at.mkdir(parents=True)
    shutil.copy(random_file, at / "r.gguf")
    assert resolve_model("lab/r-GGUF") == at / "r.gguf"
    moved = client.folder / "moved"
    (client.home / ".lmstudio-home-pointer").write_text(f"{moved}\n")
    assert lm_studio_folders() == [
        client.home / "big" / "models",
        moved / "models",
        home / "models",
        client.home / ".cache" / "lm-studio" / "models",
    ]


@pytest.mark.parametrize(
    "settings",
    [
        b"not JSON",
        b"[]",
        b'{"downloadsFolder": 7}',
        b'{"downloadsFolder": ""}',
        b'{"downloadsFolder": "relative/folder"}',
        b'{"downloadsFolder": "/a\\u0000b"}',
        b"\xff",
        b"[" * 100_000,
        b'{"downloadsFolder": "/x", "a": "' + b"x" * (1 << 20) + b'"}',
    ],
)
def test_settings_that_name_no_folder(client: Client, settings: bytes) -> None:
    home = client.home / ".lmstudio"
    home.mkdir()
    (home / "settings.json").write_bytes(settings)
    (client.home / ".lmstudio-home-pointer").write_bytes(settings)
    assert lm_studio_folders() == [home / "models", client.home / ".cache" / "lm-studio" / "models"]
    assert names(LocalModels.scan()) == ["tiny"]


#
# the hub's cache
#


def test_a_repository_without_a_user(client: Client, random_file: Path) -> None:
    """The hub's oldest repositories are named without one; no name of -m is theirs, so they are listed by path."""
    (path,) = cached(client.cache, "old", NEW, {"deep/er/still/m-Q4_K_M.gguf": random_file})
    assert path.relative_to(client.cache).parts[0] == "models--old"
    found = listing(client)
    assert list(found) == ["tiny", str(path)]
    assert found[str(path)]["source"] == "hub cache"


#
# ~ in variables
#


def test_home_in_variables(client: Client, random_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CACHE", "~/llama")
    assert llama_cpp_cache() == client.home / "llama"
    (client.home / "models").mkdir()
    shutil.copy(random_file, client.home / "models" / "r.gguf")
    assert "r" in listing(client, STEERMOE_MODELS=os.pathsep.join(["~/none", "~/models"]))


def test_home_in_names_that_may_be_paths(
    client: Client, monkeypatch: pytest.MonkeyPatch, tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options that take a name or a file: no shell expands what a variable or the configuration file says."""
    (client.home / "mine.jsonl").write_text('{"id": "1", "prompt": "What comes after three?"}\n')
    for variable in ("STEERMOE_TASK", "STEERMOE_NEUTRAL"):
        line = fails(
            client("eval", "-m", "tiny", "--map", "digits-words", "-o", client.folder / "o", **{variable: "~/gone"}),
            1,
            str(client.home / "gone"),
        )
        assert "~" not in line
    config = client.folder / "c.toml"
    config.write_text('[eval]\ntask = "~/away.jsonl"\n')
    done = client("eval", "-m", "tiny", "--map", "digits-words", "-o", client.folder / "o", STEERMOE_CONFIG=str(config))
    fails(done, 1, str(client.home / "away.jsonl"))
