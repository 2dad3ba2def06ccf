"""Files of data sets on the Hugging Face hub, and what data sets and models both need of the huggingface-hub client.

The latter is the offline switch, the folders of the cache, and messages for the client's errors.

A source is `hub:USER/NAME` or `hub:USER/NAME@REVISION`, optionally with a file or a split: `hub:USER/NAME:train`,
`hub:USER/NAME:data/train-00000-of-00001.parquet`. The client reads HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .._util.files import listed
from ..errors import PairsError, SteerMoEError, UsageError
from .hub_checks import require_match
from .names import is_safe

_PREFIX = "hub:"
ROWS = (".parquet", ".jsonl", ".ndjson", ".json")
"""Formats of data files; of a split in several formats the first is taken."""
TABLES = (".csv", ".tsv")
_FORMATS = ROWS + TABLES
_NO_DATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
_PACKED = (".gz", ".xz", ".bz2")
_SOURCE = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:@]+))?(?::(?P<part>.+))?")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}
_HOW = "write hub:USER/NAME, hub:USER/NAME@REVISION or hub:USER/NAME:SPLIT"


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub: its name, a revision, and a file or split ("" for the only one, or `train`)."""

    name: str
    revision: str = "main"
    part: str = ""

    @classmethod
    def parse(cls, text: str) -> HubSource:
        """Read `hub:...`. Raises UsageError."""
        match = _SOURCE.fullmatch(text.removeprefix(_PREFIX))
        if not match:
            raise UsageError(f"{text}: not the name of a data set; {_HOW}")
        name, revision, part = match["name"], match["revision"] or "main", match["part"] or ""
        for path in (name, revision, part):
            # they become paths in the cache
            if path and not is_safe(path):
                raise UsageError(f"{text}: {path!r} is no name on the hub; {_HOW}")
        return cls(name, revision, part)


def local_files(source: str, *, offline: bool = False, formats: Sequence[str] = ROWS) -> list[Path]:
    """The files of a source: the path itself, or the files of `hub:...`, downloaded to the cache if missing.

    What the hub names is verified by its hash, unless the hub is off; a damaged copy is removed.
    `offline` uses the cache alone, as HF_HUB_OFFLINE=1 does. Raises UsageError for a malformed name, PairsError.
    """
    if not source.startswith(_PREFIX):
        return [Path(os.path.expanduser(source))]
    wanted = HubSource.parse(source)
    if is_offline(offline):
        folder = _snapshot(wanted)
        if folder is None:
            raise PairsError(
                f"{source}: not in the hub's cache, and the hub is off (--offline, HF_HUB_OFFLINE); "
                "run once with the network, or set HF_HOME to the cache that has it"
            )
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return [folder / name for name in choose_files(names, wanted, source, formats)]
    return _download(wanted, source, formats)


def choose_files(names: Iterable[str], wanted: HubSource, source: str, formats: Sequence[str] = ROWS) -> list[str]:
    """The files of the wanted part, shards in order.

    A part with the ending of a data file is a file. Otherwise it is a split: each of its words (between "_", "-", "/")
    has to be a word of the file's path, as in `30k_train` for round0/30k/train.jsonl.gz. Without a part it is the only
    split, or `train`. Raises PairsError unless exactly one fits.
    """
    names = sorted(names)
    if _format(wanted.part):
        if wanted.part not in names:
            raise PairsError(f"{source}: no such file; {_there(names)}")
        return [wanted.part]
    groups: dict[str, list[str]] = {}
    for name in names:
        if _format(name) in formats and PurePosixPath(name).name not in _NO_DATA:
            groups.setdefault(_group(name), []).append(name)
    if not groups:
        raise PairsError(f"{source}: no data files of a known format ({', '.join(formats)}); {_there(names)}")
    chosen = list(groups)
    if wanted.part or len(groups) > 1:
        split = wanted.part or "train"
        chosen = [key for key in groups if _words(split) <= _words(key)]
    chosen = _best_formats(chosen)
    if len(chosen) != 1:
        what = "several fit" if chosen else "no such split"
        shown = sorted({groups[key][0] for key in (chosen or groups)})
        instead = f"as in hub:{wanted.name}:{shown[0]} (there are: {listed(shown, 12)})"
        raise PairsError(f"{source}: {what}; name a file or a split, {instead}")
    shards = groups[chosen[0]]
    # a cache may have only some of the shards
    totals = [match for name in shards if (match := _SHARD.search(_stem(name)))]
    if totals and len(shards) != int(totals[0][2]):
        raise PairsError(f"{source}: {len(shards)} of {int(totals[0][2])} files of the split are there; fetch the rest")
    return shards


def _best_formats(groups: list[str]) -> list[str]:
    """Of groups that differ only in their format, the one that comes first in _FORMATS."""
    best: dict[str, str] = {}
    for key in sorted(groups, key=lambda key: (_FORMATS.index(_format(key)), key)):
        best.setdefault(_stem(key), key)
    return list(best.values())


def _format(name: str) -> str:
    path = PurePosixPath(name)
    suffix = PurePosixPath(path.stem).suffix if path.suffix in _PACKED else path.suffix
    return suffix if suffix in _FORMATS else ""


def _stem(name: str) -> str:
    for suffix in (*_PACKED, *_FORMATS):
        name = name.removesuffix(suffix)
    return name


def _group(name: str) -> str:
    """The name that all shards of a split share: train of train-00000-of-00002.parquet, default/train/0000.parquet."""
    stem = _stem(name)
    shared = re.sub(r"/\d{4,5}$", "", _SHARD.sub("", stem))
    return shared + name[len(stem) :]


def _words(text: str) -> set[str]:
    return set(re.split(r"[-_/.]", _stem(text).lower()))


def _there(names: list[str]) -> str:
    return f"there are: {listed(names, 12)}" if names else "it is empty"


def is_offline(offline: bool = False) -> bool:
    """Whether the network must not be used, by the argument or by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return offline or bool(constants.HF_HUB_OFFLINE)


def hub_cache() -> Path:
    """Folder of the client's cache (HF_HUB_CACHE, else hub/ in HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cache_folder(kind: str, name: str) -> Path:
    """Folder of a repository in the cache; `kind` is "datasets" or "models"."""
    return hub_cache() / "--".join([kind, *name.split("/")])


def _snapshot(wanted: HubSource) -> Path | None:
    """The cached files of a revision (the cache's documented layout: refs/<revision>, snapshots/<commit>)."""
    folder = cache_folder("datasets", wanted.name)
    commit = wanted.revision
    reference = folder / "refs" / wanted.revision
    if reference.is_file():
        commit = reference.read_text("utf-8").strip()
    snapshot = folder / "snapshots" / commit
    return snapshot if "/" not in commit and snapshot.is_dir() else None


def _download(wanted: HubSource, source: str, formats: Sequence[str]) -> list[Path]:
    import huggingface_hub as hub
    from huggingface_hub.hf_api import RepoFile

    where: dict[str, Any] = {"repo_type": "dataset", "revision": wanted.revision}
    with hub_errors(source, "data set", PairsError, wanted.revision):
        tree = hub.HfApi().list_repo_tree(wanted.name, recursive=True, **where)
        files = {item.path: item for item in tree if isinstance(item, RepoFile)}
        chosen = choose_files(files, wanted, source, formats)
        paths = []
        for name in chosen:
            path = Path(hub.hf_hub_download(wanted.name, name, **where))
            large = files[name].lfs
            hash_of_it = large.sha256 if large else files[name].blob_id
            require_match(path, (hash_of_it,), files[name].size, f"{source}: {name}", PairsError)
            paths.append(path)
    commits = {path.parents[len(PurePosixPath(name).parts) - 1] for path, name in zip(paths, chosen, strict=True)}
    if len(commits) != 1:
        raise PairsError(f"{source}: the data set changed while it was fetched; run it again")
    return paths


@contextmanager
def hub_errors(source: str, what: str, error_class: type[SteerMoEError], revision: str) -> Iterator[None]:
    """Turn the client's errors into an `error_class` of one line; `what` is "data set" or "model".

    Raises UsageError for a name that is not valid on the hub.
    """
    from huggingface_hub import errors

    try:
        yield
    except SteerMoEError:
        raise
    except errors.GatedRepoError:
        cure = "accept its terms on its page and log in (hf auth login, or HF_TOKEN)"
        raise error_class(f"{source}: the {what} is gated; {cure}") from None
    except errors.RepositoryNotFoundError:
        cure = "check the name; for a private one log in (hf auth login, or HF_TOKEN)"
        raise error_class(f"{source}: the hub knows no such {what}; {cure}") from None
    except errors.RevisionNotFoundError:
        raise error_class(f"{source}: no revision {revision!r}; check the branch, tag or commit") from None
    except errors.HFValidationError as error:
        raise UsageError(f"{source}: not the name of a {what} ({_line(error)}); write it as on its page") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        if status in (401, 403):
            cure = "log in again (hf auth login), or check HF_TOKEN"
            raise error_class(f"{source}: the hub refuses access with status {status}; {cure}") from None
        raise error_class(f"{source}: the hub answers with status {status}; try again later ({_line(error)})") from None
    except Exception as error:
        # versions of the client use different HTTP libraries, with exceptions of their own
        if isinstance(error, OSError) and error.errno in _DISK:
            cure = "free some room there, or set HF_HOME to another place"
            raise error_class(
                f"{source}: cannot be kept: {error.filename or 'disk'}: {error.strerror}; {cure}"
            ) from None
        raise error_class(
            f"{source}: cannot be fetched ({_line(error)}); check the network, or use --offline with a filled cache"
        ) from error


def _line(error: Exception) -> str:
    """First line of an error without control characters, as it may quote a server."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in line)
