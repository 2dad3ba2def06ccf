"""Downloads of models that are interrupted, resumed, shared, or go into a folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.support.hub_client import Client, fails
from tests.support.hub_models import SPLIT, pulled
from tests.support.hub_stand_in import Hub

#
# interruptions
#


def partial_files(client: Client) -> list[Path]:
    return sorted(client.cache.rglob("*.incomplete"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_goes_on(hub: Hub, client: Client, tiny_path: Path, number: int) -> None:
    hub.hold, hub.chunk = 3_000_000, 1 << 16
    process = client.start("pull", "lab/tiny-GGUF", "--maps", ".")
    status, out, err = client.interrupt(process, client.cache, 1_000_000, number)
    assert out == ""
    (partial,) = partial_files(client)
    kept = partial.stat().st_size
    assert 1_000_000 <= kept < 10_000_000
    assert tiny_path.read_bytes().startswith(partial.read_bytes())
    if number == signal.SIGINT:
        assert status == 130, err
        assert f"{kept / 1e6:.1f} MB of 10.0 MB are kept" in err
        assert err.endswith("error: interrupted\n")
        assert "Traceback" not in err
    fails(client("info", "lab/tiny-GGUF"), 1, "not on this machine")
    hub.hold = None
    hub.ranges.clear()
    sent = hub.sent
    status, out, err = client.program("pull", "lab/tiny-GGUF")
    assert status == 0, err
    assert f"{kept / 1e6:.1f} MB of 10.0 MB are here" in err
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
    assert "MB of 10.0 MB are kept" in done.stderr
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

    hub.hold = 5_000_000
    process = client.start_in_terminal(columns, "pull", "lab/tiny-GGUF")
    process.expect("olmoe, 24 experts, top-4, 5 layers")
    process.expect(r"tiny-Q4_K_M\.gguf: +[1-9]\d?%")
    hub.hold = None
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
    hub.hold = 3_000_000
    process = client.start("pull", "lab/tiny-GGUF", "--dir", "models")
    status, _, err = client.interrupt(process, tmp_path / "models", 1_000_000)
    assert status == 130, err
    assert "MB of 10.0 MB are kept" in err
    (partial,) = (tmp_path / "models").rglob("*.incomplete")
    hub.hold = None
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
