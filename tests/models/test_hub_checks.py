"""Files of the hub are what it names: fresh, resumed, in parts, small, cached, data sets; and what it does not name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from steermoe_local.errors import ModelError
from steermoe_local.models import hub_checks
from steermoe_local.models.hub_checks import Check, CheckedFile
from tests.support.hub_client import Client, fails
from tests.support.hub_models import SPLIT, pulled
from tests.support.hub_stand_in import Hub, sha1, sha256

DAMAGED = (5_000_000, 9_000_000)


def large_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 1000]


@pytest.mark.parametrize("into", ["cache", "folder"])
def test_two_changed_bytes(hub: Hub, client: Client, tiny_path: Path, tmp_path: Path, into: str) -> None:
    folder = tmp_path / "models"
    where: tuple[Any, ...] = ("--dir", folder) if into == "folder" else ()
    hub.damaged = DAMAGED
    fails(client("pull", "lab/tiny-GGUF", *where), 1, "lab/tiny-GGUF/tiny-Q4_K_M.gguf", "SHA-256", "run it again")
    assert not large_files(folder if where else client.cache)
    hub.damaged = ()
    assert pulled(client("pull", "lab/tiny-GGUF", *where)).read_bytes() == tiny_path.read_bytes()


def test_a_damaged_rest(hub: Hub, client: Client, tiny_path: Path) -> None:
    """The beginning of an earlier run is right, what is fetched now is not."""
    data = tiny_path.read_bytes()
    blobs = client.cache / "models--lab--tiny-GGUF" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{sha256(data)}.incomplete").write_bytes(data[:4_000_000])
    hub.damaged = DAMAGED
    fails(client("pull", "lab/tiny-GGUF"), 1, "run it again")
    assert not large_files(client.cache)


def test_a_damaged_part(hub: Hub, client: Client, tmp_path: Path) -> None:
    sizes = {name: len(hub.models["lab/tiny-GGUF"]["main"][name]) for name in SPLIT}
    longest = max(SPLIT, key=lambda name: sizes[name])
    hub.damaged = (sizes[longest] - 1,)  # no other part is as long
    fails(client("pull", "lab/tiny-GGUF:Q8_0", "--dir", tmp_path / "models"), 1, longest, "SHA-256", "run it again")
    left = {path.name for path in large_files(tmp_path / "models")}
    assert left == {Path(name).name for name in SPLIT[: SPLIT.index(longest)]}, "the right parts before it stay"
    hub.damaged = ()
    assert pulled(client("pull", "lab/tiny-GGUF:Q8_0", "--dir", tmp_path / "models")).exists()


def test_a_server_that_sends_the_whole_file_instead_of_the_rest(hub: Hub, client: Client, tiny_path: Path) -> None:
    """The hash starts again with the file."""
    data = tiny_path.read_bytes()
    pulled(client("pull", "lab/random-GGUF", "--file", "base-Q4_K_M.gguf"))
    content = hub.models["lab/random-GGUF"]["main"]["base-Q4_K_M.gguf"]
    blobs = client.cache / "models--lab--random-GGUF" / "blobs"
    for path in large_files(client.cache):
        path.unlink()
    hub.whole_files_only = True
    (blobs / f"{sha256(content)}.incomplete").write_bytes(b"x" * 100)
    assert pulled(client("pull", "lab/random-GGUF", "--file", "base-Q4_K_M.gguf")).read_bytes() == content != data


@pytest.mark.parametrize("kept", [0, 4_000_000])
def test_a_server_that_does_not_end(hub: Hub, client: Client, tiny_path: Path, kept: int) -> None:
    """The disk is not filled with it: what goes beyond the file ends the transfer."""
    data = tiny_path.read_bytes()
    if kept:
        blobs = client.cache / "models--lab--tiny-GGUF" / "blobs"
        blobs.mkdir(parents=True)
        (blobs / f"{sha256(data)}.incomplete").write_bytes(data[:kept])
    hub.surplus = 256 << 20
    fails(client("pull", "lab/tiny-GGUF"), 1, "lab/tiny-GGUF/tiny-Q4_K_M.gguf", "removed; run it again")
    assert hub.sent < 128 << 20, "the client takes pieces of 10 MB, the system keeps some MB"
    assert not large_files(client.cache)


def test_a_link_in_place_of_a_partial_file(hub: Hub, client: Client, tiny_path: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    folder = tmp_path / "models" / "lab" / "tiny-GGUF"
    folder.mkdir(parents=True)
    name = f"tiny-Q4_K_M.gguf.{sha256(tiny_path.read_bytes())[:16]}.incomplete"
    (folder / name).symlink_to(elsewhere)
    fails(client("pull", "lab/tiny-GGUF", "--dir", tmp_path / "models"), 2, f"{name}: a symbolic link")
    assert elsewhere.read_text() == "precious"


def test_small_files_are_named_by_git(hub: Hub, client: Client, monkeypatch: Any) -> None:
    monkeypatch.setattr("tests.support.hub_stand_in.LFS_FROM", 1 << 40)
    hub.damaged = (300_000,)
    fails(client("pull", "lab/random-GGUF", "--file", "base-Q4_K_M.gguf"), 1, "SHA-256 or size")
    assert not large_files(client.cache)
    hub.damaged = ()
    path = pulled(client("pull", "lab/random-GGUF", "--file", "base-Q4_K_M.gguf"))
    assert path.resolve().name == sha1(path.read_bytes())


@pytest.mark.parametrize("place", [100, 7_000_000])
def test_a_damaged_copy_in_the_cache(hub: Hub, client: Client, tiny_path: Path, place: int) -> None:
    """In the header as well, which is read from the copy."""
    path = pulled(client("pull", "lab/tiny-GGUF"))
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.resolve().write_bytes(data)
    assert client("pull", "lab/tiny-GGUF", "--dry-run").exit_code in (0, 1)
    assert path.exists(), "a dry run removes nothing"
    fails(client("pull", "lab/tiny-GGUF"), 1, "damaged", "removed; run it again")
    assert not large_files(client.cache)
    assert pulled(client("pull", "lab/tiny-GGUF")).read_bytes() == tiny_path.read_bytes()


def test_what_the_client_fetched_itself(hub: Hub, client: Client, monkeypatch: Any) -> None:
    monkeypatch.setattr(constants, "HF_XET_HIGH_PERFORMANCE", True, raising=False)
    hub.damaged = DAMAGED
    fails(client("pull", "lab/tiny-GGUF"), 1, "SHA-256", "run it again")
    assert not large_files(client.cache)


def test_a_hub_that_gives_no_hash(hub: Hub, client: Client, tiny_path: Path, tmp_path: Path) -> None:
    hub.without_hashes = True
    for where in ((), ("--dir", tmp_path / "models")):
        for _ in range(2):  # fetched, and here already
            done = client("pull", "lab/tiny-GGUF", *where)
            assert pulled(done).read_bytes() == tiny_path.read_bytes()
            assert "lab/tiny-GGUF/tiny-Q4_K_M.gguf: not verified, the hub gives no SHA-256 of it" in done.stderr
    hub.without_hashes = False
    assert "not verified" not in client("pull", "lab/tiny-GGUF", "--dir", tmp_path / "models").stderr


def test_a_file_is_not_read_again(hub: Hub, client: Client, monkeypatch: Any) -> None:
    """A fresh one is hashed while it arrives; one that is here is read once."""
    read: list[Path] = []
    original = Check.read

    def counted(self: Check, path: Path) -> Check:
        read.append(path)
        return original(self, path)

    monkeypatch.setattr(Check, "read", counted)
    path = pulled(client("pull", "lab/tiny-GGUF"))
    assert read == []
    assert pulled(client("pull", "lab/tiny-GGUF")) == path
    assert read == [path]


def test_check(tmp_path: Path) -> None:
    data = b"0123456789"
    large, small = hashlib.sha256(data).hexdigest(), sha1(data)
    path = tmp_path / "file"
    path.write_bytes(data)
    for names in ((large,), (small,), ("x", large), (small, large), ("0" * 40, large)):
        assert Check(names, 10).read(path).matches(), names
    for names in (("0" * 64,), ("0" * 40,), (large, "0" * 64), (small, "0" * 64)):
        assert not Check(names, 10).read(path).matches(), names
    assert not Check((large,), 9).read(path).matches()
    assert not Check(("x",), 9).read(path).matches(), "the size counts without a hash, too"
    assert Check(("x",), 10).read(path).matches()
    with pytest.raises(ModelError, match="removed; run it again"):
        hub_checks.require_match(path, ("0" * 64,), 10, "lab/file", ModelError)
    assert not path.exists()


def test_a_file_that_is_started_again(tmp_path: Path) -> None:
    data = b"0123456789"
    for kept, known in ((0, True), (3, False)):
        check = Check((hashlib.sha256(data).hexdigest(),), 10)
        with open(tmp_path / "file", "w+b") as file:
            checked = CheckedFile(file, check)
            checked.write(data[:3] + b"wrong")
            checked.seek(kept)
            checked.truncate()
            checked.write(data[kept:])
        assert (check.n_bytes == 10) is known
        assert check.matches() is known
        assert check.read(tmp_path / "file").matches()
