"""Models on the Hugging Face hub: the files that a name stands for, whether they can be steered, and fetching them.

Uses huggingface-hub with its cache, token and settings (HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
The header of a GGUF file is read by range requests before the file is fetched.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from .._util.files import StrPath, human_size, replacing
from ..errors import FormatError, ModelError, ResourceError
from ..model_files.gating import ROUTED
from ..model_files.header import GGUFHeader, read_header_from
from ..model_files.model_info import ModelInfo, info_from, router_bytes
from .hub import cache_folder, hub_errors, is_offline
from .hub_files import download, download_into, partial_bytes, read_range
from .names import ModelName, RepoModel, choose, repo_models

_FIRST = 4 << 20  # of a header: holds a vocabulary of 50,000 tokens
_FIRST_OF_PARTS = 1 << 18  # the further parts of a split model have none
_MAX_PARTS = 1000
_SPARE = 64 << 20  # what a download leaves on the disk


def find_on_hub(name: ModelName, *, file: str | None = None, token: str | None = None) -> HubModel:
    """Ask the hub for the files that a name stands for; `file` selects a model instead of the tag.

    Raises ModelError without such a repository, revision or model, for several that fit, without access or network.
    """
    import huggingface_hub as hub

    if is_offline():
        raise ModelError(f"{name}: the hub is off (HF_HUB_OFFLINE); unset it to fetch models")
    with hub_errors(str(name), "model", ModelError, name.revision):
        found = hub.HfApi().model_info(name.repo, revision=name.revision, files_metadata=True, token=token)
        siblings = found.siblings or []
        sizes = {str(item.rfilename): _size(item) for item in siblings}
        etags = {str(item.rfilename): _etag(item) for item in siblings}
    model = choose(repo_models(sizes), name, file)
    if len(model.paths) > _MAX_PARTS:  # the header of each is asked for
        raise ModelError(f"{name}: {len(model.paths)} parts, above {_MAX_PARTS}; take another repository")
    commit = str(found.sha or "")
    if len(commit) != 40 or not commit.isalnum():  # it becomes a folder's name
        raise ModelError(f"{name}: the server does not say which commit {name.revision} is; check HF_ENDPOINT")
    return HubModel(name, commit, model, tuple(etags[path] for path in model.paths), token)


@dataclass(frozen=True)
class HubModel:
    """A model on the hub: its files at one commit, before they are fetched.

    `etags` are the hub's hashes of the files, for large files their SHA-256.
    """

    name: ModelName
    commit: str
    model: RepoModel
    etags: tuple[str, ...]
    token: str | None = field(default=None, repr=False)

    @property
    def full_name(self) -> str:
        """The name that -m accepts once the model is fetched, with the tag that was chosen."""
        return str(ModelName(self.name.repo, self.name.revision, self.model.tag))

    def info(self, *, routers: bool = False, progress: Callable[[str, int, int], None] | None = None) -> ModelInfo:
        """Facts by the headers, read by range requests; with `routers` the routers are read and hashed, too.

        `progress` is called with (what, bytes done, bytes in all) while the routers are read. Raises ModelError.
        """
        with self._errors():
            try:
                headers = self._headers
                if routers and progress:
                    headers = _watched(headers, router_bytes(headers), partial(progress, "routers"))
                return info_from(headers, routers=routers)
            except FormatError as error:
                raise ModelError(str(error)) from error

    @cached_property
    def _headers(self) -> list[GGUFHeader]:
        headers: list[GGUFHeader] = []
        for path, size in zip(self.model.paths, self.model.sizes, strict=True):
            fetch = partial(self._read, path)
            first = _FIRST_OF_PARTS if headers else _FIRST
            headers.append(read_header_from(Path(self.name.repo) / path, size, fetch, first=first))
        return headers

    def _read(self, path: str, start: int, stop: int) -> bytes:
        return read_range(self.name.repo, path, self.commit, start, stop, self.token)

    def bytes_here(self, folder: Path | None = None) -> int:
        """Bytes of its files on this machine, in the cache or under `folder`, with those of interrupted downloads."""
        own = self._folder(folder)
        files = zip(self.model.paths, self.model.sizes, self.etags, strict=True)
        return sum(min(size, partial_bytes(self.name.repo, path, self.commit, etag, own)) for path, size, etag in files)

    def local_path(self, folder: Path | None = None) -> Path | None:
        """Path of its first file if all files of this commit are in the cache or under `folder`, else None."""
        root = self._folder(folder) or cache_folder("models", self.name.repo) / "snapshots" / self.commit
        paths = [root / path for path in self.model.paths]
        complete = all(path.is_file() for path in paths) and self.bytes_here(folder) == self.model.size
        return paths[0] if complete else None

    def check_space(self, folder: Path | None = None) -> int:
        """Check that the disk has room for the missing bytes. Returns its free bytes. Raises ResourceError."""
        missing = self.model.size - self.bytes_here(folder)
        target = self._folder(folder) or cache_folder("models", self.name.repo)
        free = shutil.disk_usage(next(parent for parent in (target, *target.parents) if parent.exists())).free
        if missing and missing + _SPARE > free:
            raise ResourceError(
                f"{self.name}: {human_size(missing)} are to be fetched, but {human_size(free)} are free in {target}; "
                "free some, take a smaller quantization, or another place (--dir, HF_HOME)"
            )
        return free

    def fetch(self, folder: StrPath | None = None) -> list[Path]:
        """Fetch its files into the hub's cache, or to `folder`/USER/REPO, unless they are there. Returns their paths.

        An interrupted download is resumed. Every file is verified by the hub's hash, those that are there as well: they
        are read for it. The client shows progress bars on stderr if that is a terminal.

        Raises ModelError (also for a file with another hash), ResourceError (no room).
        """
        own = self._folder(Path(folder)) if folder is not None else None
        self.check_space(Path(folder) if folder is not None else None)
        get = partial(download_into, own) if own else download
        with self._errors():
            files = zip(self.model.paths, self.model.sizes, self.etags, strict=True)
            paths = [get(self.name.repo, path, self.commit, size, etag, self.token) for path, size, etag in files]
        if own is None:
            self._write_reference()
        return paths

    def _folder(self, folder: Path | None) -> Path | None:
        return folder / self.name.repo if folder else None

    def _write_reference(self) -> None:
        """Write the commit of the revision to the cache (refs/<revision>)."""
        if self.name.revision == self.commit:
            return
        reference = cache_folder("models", self.name.repo) / "refs" / self.name.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        with replacing(reference) as temporary:
            temporary.write_bytes(self.commit.encode("ascii"))

    def _errors(self) -> Any:
        return hub_errors(str(self.name), "model", ModelError, self.name.revision)


def why_not_steerable(info: ModelInfo) -> str:
    """Why a model with these facts cannot be steered under llama.cpp, "" if it can."""
    if info.obstacle:
        return info.obstacle
    if info.architecture not in ROUTED:
        return f"this llama.cpp knows no Mixture-of-Experts architecture {info.architecture!r}"
    if not info.steerable_layers:
        return "all its experts are chosen by token, which steering cannot reach"
    return ""


def _watched(headers: list[GGUFHeader], total: int, show: Callable[[int, int], None]) -> list[GGUFHeader]:
    """The headers with a `fetch` that reports progress."""
    done = 0

    def reported(header: GGUFHeader, start: int, stop: int) -> bytes:
        nonlocal done
        assert header.fetch
        data = header.fetch(start, stop)
        done += len(data)
        show(done, total)
        return data

    return [replace(header, fetch=partial(reported, header)) for header in headers]


def _size(item: Any) -> int:
    return int(item.size or (item.lfs.size if item.lfs else 0))


def _etag(item: Any) -> str:
    return str(item.lfs.sha256 if item.lfs else item.blob_id or "")
