"""Data sets of the hub through the real client: a stand-in hub on the loopback, and a cache without a network."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from steermoe_local.cli import main
from steermoe_local.errors import PairsError, UsageError
from steermoe_local.models.hub import TABLES, HubSource, choose_files
from steermoe_local.pairs.pairs import load_pairs
from tests.pairs.test_pair_builders import COLUMNS, RATED, write_parquet
from tests.support.hub_stand_in import Hub, running


def lines(items: list[Any]) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    more = [{"id": f"x{i}", "context": f"c{i}", "question": f"q{i}"} for i in range(3)]
    hub.datasets = {
        "lab/questions": {
            "main": {
                "README.md": b"# rows",
                "data/train-00000-of-00002.jsonl": lines(COLUMNS),
                "data/train-00001-of-00002.jsonl": lines(more),
                "data/validation-00000-of-00001.jsonl": lines(more[:1]),
            },
            "old/branch": {"train.json": json.dumps(COLUMNS[:1]).encode()},
        },
        "lab/rated": {
            "main": {
                "round0/30k/train.jsonl.gz": gzip.compress(lines(RATED)),
                "round0/30k/test.jsonl.gz": gzip.compress(lines(RATED[3:])),
                "round0/330k/train.jsonl.gz": gzip.compress(lines(RATED * 2)),
                "table.csv": b"p,a,b\nask,yes,no\n",
            }
        },
    }
    with running(hub):
        yield hub


class Client:
    """Runs the program with a cache of its own."""

    def __init__(self, hub: Hub | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.out = folder / "out.jsonl"
        self._patch = monkeypatch
        self.endpoint = hub.endpoint if hub else "http://127.0.0.1:9"  # the discard port: nobody answers

    def __call__(self, *arguments: Any, offline: bool = False, token: str | None = None) -> Result:
        """In this process: what the client read from the environment at its import is set in its constants."""
        cache = self.folder / "home" / "hub"
        values = {"ENDPOINT": self.endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": offline}
        values["HUGGINGFACE_CO_URL_TEMPLATE"] = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        values["HF_TOKEN_PATH"] = str(self.folder / "home" / "token")
        values["HF_HUB_DISABLE_XET"] = True
        with self._patch.context() as patch:
            for name, value in values.items():
                patch.setattr(constants, name, value, raising=False)
            patch.setattr(time, "sleep", lambda _: None)  # the client waits longer and longer before it gives up
            for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
                patch.delenv(name, raising=False)
            if token:
                patch.setenv("HF_TOKEN", token)
            return CliRunner().invoke(main, ["pairs", *map(str, arguments), "-o", str(self.out)])

    def program(self, *arguments: Any, **env: str) -> subprocess.CompletedProcess[str]:
        """In a process of its own, as a user does."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_HOME": str(self.folder / "home"), "HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1"}
        code = "from steermoe_local.cli import main; main()"
        command = [sys.executable, "-c", code, "pairs", *map(str, arguments), "-o", str(self.out)]
        return subprocess.run(
            command,
            env=environment | env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=self.folder,
        )

    def ids(self) -> list[str]:
        return [pair.id for pair in load_pairs(self.out)]


@pytest.fixture
def client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    return Client(hub, tmp_path, monkeypatch)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client without a network."""
    return Client(None, tmp_path, monkeypatch)


def fails(done: Result, *words: str) -> None:
    assert done.exit_code in (1, 2), done.output
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in last, last


def test_a_user_fetches_a_gated_split_once(hub: Hub, client: Client) -> None:
    hub.gated.add("lab/questions")
    arguments = ["faithfulness", "--squad", "hub:lab/questions"]
    done = client.program(*arguments, HF_TOKEN=hub.token)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "5 pairs from 6 rows" in done.stderr
    assert hub.token not in done.stderr
    assert len(done.stderr.splitlines()) < 5, f"no progress bars without a terminal: {done.stderr}"
    assert client.ids() == ["q1", "q3", "x0", "x1", "x2"], "both shards of train, in order"
    hub.requests.clear()
    client.out.unlink()
    done = client.program(*arguments, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert len(client.ids()) == 5
    assert not hub.requests


def test_a_split_is_fetched_once_and_kept(hub: Hub, client: Client) -> None:
    assert client("faithfulness", "--squad", "hub:lab/questions").exit_code == 0
    fetched = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert len(fetched) == 2
    # again: from the cache, with the network and without
    for flags, offline in (([], False), (["--offline"], False), ([], True)):
        hub.requests.clear()
        client.out.unlink()
        done = client("faithfulness", "--squad", "hub:lab/questions", *flags, offline=offline)
        assert done.exit_code == 0, done.output
        assert len(client.ids()) == 5
        assert not [r for r in hub.requests if r[0] == "GET" and "/resolve/" in r[1]]
        assert bool(hub.requests) is not bool(flags or offline), "off means that nothing is asked"


@pytest.mark.parametrize(
    ("source", "ids"),
    [
        ("hub:lab/questions:validation", ["x0"]),
        ("hub:lab/questions@old/branch", ["q1"]),
        ("hub:lab/questions@old/branch:train", ["q1"]),
        ("hub:lab/questions:data/train-00001-of-00002.jsonl", ["x0", "x1", "x2"]),
    ],
)
def test_splits_files_and_revisions(client: Client, source: str, ids: list[str]) -> None:
    done = client("faithfulness", "--squad", source)
    assert done.exit_code == 0, done.output
    assert client.ids() == ids
    client.out.unlink()
    assert client("faithfulness", "--squad", source, "--offline").exit_code == 0
    assert client.ids() == ids


def test_a_commit_is_a_revision(hub: Hub, client: Client) -> None:
    commit = hub.commit("lab/questions", "old/branch")
    for flags in ([], ["--offline"]):
        done = client("faithfulness", "--squad", f"hub:lab/questions@{commit}", *flags)
        assert done.exit_code == 0, done.output
        assert client.ids() == ["q1"]
        client.out.unlink()


def test_beavertails_layout(client: Client) -> None:
    fails(client("safety", "--data", "hub:lab/rated"), "several fit", "hub:lab/rated:round0/30k/train.jsonl.gz")
    done = client("safety", "--data", "hub:lab/rated:30k_train")
    assert done.exit_code == 0, done.output
    assert "3 pairs from 4 rows" in done.stderr
    assert "1 left out: is_safe is true" in done.stderr
    done = client("safety", "--data", "hub:lab/rated:30k_test")
    assert done.exit_code == 0, done.output


def test_a_table_of_the_hub(client: Client) -> None:
    columns = ["--prompt-column", "p", "--positive-column", "a", "--negative-column", "b"]
    done = client("from-csv", "hub:lab/rated", *columns)
    assert done.exit_code == 0, done.output
    assert client.ids() == ["row-1"]


def test_parquet(hub: Hub, client: Client, tmp_path: Path) -> None:
    data = write_parquet(tmp_path / "t.parquet", COLUMNS).read_bytes()
    # as the hub's own conversion names it
    hub.datasets["lab/questions"]["refs/convert/parquet"] = {"default/train/0000.parquet": data}
    done = client("faithfulness", "--squad", "hub:lab/questions@refs/convert/parquet:train")
    assert done.exit_code == 0, done.output
    assert client.ids() == ["q1", "q3"]


def test_gated(hub: Hub, client: Client) -> None:
    hub.gated.add("lab/rated")
    source = "hub:lab/rated:30k_train"
    fails(client("safety", "--data", source), "gated", "HF_TOKEN")
    fails(client("safety", "--data", source, token="hf_wrong"), "gated")
    done = client("safety", "--data", source, token=hub.token)
    assert done.exit_code == 0, done.output
    assert hub.token not in done.stderr
    (client.folder / "home" / "token").write_text(hub.token)  # where `hf auth login` leaves it
    assert client("safety", "--data", "hub:lab/rated:30k_test").exit_code == 0


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hub:lab/none", "no such data set"),
        ("hub:lab/questions@none", "no revision 'none'"),
        ("hub:lab/questions:none", "no such split"),
        ("hub:lab/questions:none.jsonl", "no such file"),
        ("hub:", "not the name of a data set"),
        ("hub:a/b/c", "not the name of a data set"),
        ("hub:lab/../../etc", "not the name of a data set"),
        ("hub:lab/questions@../x", "no name on the hub"),
        ("hub:lab/questions:../x.json", "no name on the hub"),
        ("hub:-lab/-x-", "hub:-lab/-x-"),
    ],
)
def test_what_is_not_there(client: Client, source: str, words: str) -> None:
    fails(client("faithfulness", "--squad", source), words)
    assert not client.out.exists()


def test_a_hub_out_of_order(hub: Hub, client: Client) -> None:
    hub.broken = True
    fails(client("faithfulness", "--squad", "hub:lab/questions"), "status 500")


def test_nobody_answers(alone: Client) -> None:
    fails(alone("faithfulness", "--squad", "hub:lab/questions"), "cannot be fetched", "check the network")


def test_a_cache_from_elsewhere(alone: Client, tmp_path: Path) -> None:
    """A snapshot folder in the documented layout, as another program leaves it, and no network at all."""
    client = alone
    folder = tmp_path / "home" / "hub" / "datasets--lab--questions"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = folder / "snapshots" / commit / "plain_text"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "blobs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    (folder / "blobs" / "aa").write_bytes(lines(COLUMNS))
    (snapshot / "train-00000-of-00001.jsonl").symlink_to("../../../blobs/aa")
    done = client("faithfulness", "--squad", "hub:lab/questions", offline=True)
    assert done.exit_code == 0, done.output
    assert client.ids() == ["q1", "q3"]
    assert client("faithfulness", "--squad", f"hub:lab/questions@{commit}", "--offline").exit_code == 0
    client.out.unlink()

    fails(client("faithfulness", "--squad", "hub:lab/questions@v2", "--offline"), "not in the hub's cache")
    fails(client("faithfulness", "--squad", "hub:lab/other", "--offline"), "not in the hub's cache", "--offline")
    (snapshot / "train-00000-of-00001.jsonl").rename(snapshot / "train-00000-of-00002.jsonl")
    fails(client("faithfulness", "--squad", "hub:lab/questions", "--offline"), "1 of 2 files of the split")
    (folder / "refs" / "main").write_text("../../../..")
    fails(client("faithfulness", "--squad", "hub:lab/questions", "--offline"), "not in the hub's cache")


#
# choosing, without a hub
#

SQUAD = ["README.md", "plain_text/train-00000-of-00001.parquet", "plain_text/validation-00000-of-00001.parquet"]
CONVERTED = ["d/train/0000.parquet", "d/train/0001.parquet"]
CASES = [
    (SQUAD, "", SQUAD[1:2]),
    (SQUAD, "validation", SQUAD[2:]),
    (SQUAD, "plain_text/validation", SQUAD[2:]),
    (["a.jsonl", "dataset_infos.json"], "", ["a.jsonl"]),
    (["train.json", "train.parquet", "test.json"], "", ["train.parquet"]),
    (["train.jsonl.xz", "train.jsonl.gz"], "", ["train.jsonl.gz"]),
    (["train.jsonl", "x.csv"], "", ["train.jsonl"]),
    ([*CONVERTED, "d/test/0000.parquet"], "", CONVERTED),
    (["30k/train.json", "330k/train.json"], "330k_train", ["330k/train.json"]),
    (["x.json"], "x.json", ["x.json"]),
]


@pytest.mark.parametrize(("names", "part", "chosen"), CASES)
def test_choice(names: list[str], part: str, chosen: list[str]) -> None:
    assert choose_files(reversed(names), HubSource("a/b", part=part), "hub:a/b") == chosen


@pytest.mark.parametrize(
    ("names", "part", "words"),
    [
        ([], "", "no data files"),
        (["README.md", "x.csv"], "", "no data files of a known format"),
        (["a.json", "b.json"], "", "no such split"),
        (["a.json", "b.json"], "c", "hub:a/b:a.json"),
        (["1/train.json", "2/train.json"], "train", "several fit"),
        (["train-00000-of-00003.json", "train-00002-of-00003.json"], "", "2 of 3 files"),
    ],
)
def test_no_choice(names: list[str], part: str, words: str) -> None:
    with pytest.raises(PairsError, match=words):
        choose_files(names, HubSource("a/b", part=part), "hub:a/b")
    assert choose_files(["x.csv", "y.json"], HubSource("a/b"), "hub:a/b", TABLES) == ["x.csv"]


def test_sources() -> None:
    converted = HubSource("a/b", "refs/convert/parquet", "x/y.json")
    assert HubSource.parse("hub:a/b@refs/convert/parquet:x/y.json") == converted
    assert HubSource.parse("hub:squad") == HubSource("squad")
    for text in ("hub:a b", "hub:/a", "hub:a/", "hub:a@", "hub:a@b@c", "hub:.", "hub:a\\b", "hub:a:/b"):
        with pytest.raises(UsageError):
            HubSource.parse(text)


def test_damaged_files(hub: Hub, client: Client) -> None:
    """Of a fresh download, and in the cache."""
    hub.damaged = (20,)
    fails(client("faithfulness", "--squad", "hub:lab/questions"), "damaged", "run it again")
    hub.damaged = ()
    assert client("faithfulness", "--squad", "hub:lab/questions").exit_code == 0
    blobs = client.folder / "home" / "hub" / "datasets--lab--questions" / "blobs"
    damaged = max(blobs.iterdir(), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes().replace(b"a", b"b", 1))
    fails(client("faithfulness", "--squad", "hub:lab/questions"), "damaged", "run it again")
    assert client("faithfulness", "--squad", "hub:lab/questions").exit_code == 0
