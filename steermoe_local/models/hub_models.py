"""Models on the Hugging Face hub: which files a name means, whether they can be steered, and fetching them.

All through huggingface-hub, with its cache, token and settings (HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE). The header of a GGUF file is read by range requests before the file is fetched.
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

__all__ = ["HubModel", "find_on_hub", "why_not_steerable"]

_FIRST = 4 << 20  # of a header: holds a vocabulary of 50,000 tokens
_FIRST_OF_PARTS = 1 << 18  # the further parts of a split model have none
_SPARE = 64 << 20  # what a download leaves on the disk


def find_on_hub(name: ModelName, *, file: str | None = None, token: str | None = None) -> HubModel:
    """Ask the hub which files a name means; `file` names one instead of the tag.

    Raises ModelError: no such repository or revision, no model in it, several that fit, no access, no network.
    """
    import huggingface_hub as hub

    if is_offline():
        raise ModelError(f"{name}: the hub is off (HF_HUB_OFFLINE); unset it to fetch models")
    with hub_errors(str(name), "model", ModelError, name.revision):
        found = hub.HfApi().model_info(name.repo, revision=name.revision, files_metadata=True, token=token)
    siblings = found.siblings or []
    model = choose(repo_models({item.rfilename: _size(item) for item in siblings}), name, file)
    etags = {item.rfilename: _etag(item) for item in siblings}
    commit = found.sha or ""
    if len(commit) != 40 or not commit.isalnum():  # it becomes a folder's name
        raise ModelError(f"{name}: the server does not say which commit {name.revision} is; check HF_ENDPOINT")
    return HubModel(name, commit, model, tuple(etags[path] for path in model.paths), token)


@dataclass(frozen=True)
class HubModel:
    """A model on the hub: the files behind a name at one commit. Nothing of it is fetched yet.

    `etags` are what the hub says the files' contents are: for large files their SHA-256.
    """

    name: ModelName
    commit: str
    model: RepoModel
    etags: tuple[str, ...]
    token: str | None = field(default=None, repr=False)

    @property
    def full_name(self) -> str:
        """What to give to -m once it is fetched: with the tag that was chosen."""
        return str(ModelName(self.name.repo, self.name.revision, self.model.tag))

    def info(self, *, routers: bool = False, progress: Callable[[str, int, int], None] | None = None) -> ModelInfo:
        """Facts by the headers alone, read by range requests; with `routers` these tensors, too, for their hash.

        `progress` is called with (what, bytes done, bytes in all) while the routers are read.
        Raises ModelError.
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
        """Bytes of it that are on this machine, in the cache or under `folder`, those of an earlier run included."""
        place = self._place(folder)
        files = zip(self.model.paths, self.model.sizes, self.etags, strict=True)
        return sum(
            min(size, partial_bytes(self.name.repo, path, self.commit, etag, place)) for path, size, etag in files
        )

    def local_path(self, folder: Path | None = None) -> Path | None:
        """Path of its first file if all of them are here, in the cache or under `folder`, at this commit."""
        root = self._place(folder) or cache_folder("models", self.name.repo) / "snapshots" / self.commit
        paths = [root / path for path in self.model.paths]
        complete = all(path.is_file() for path in paths) and self.bytes_here(folder) == self.model.size
        return paths[0] if complete else None

    def check_space(self, folder: Path | None = None) -> int:
        """Check that the disk has room for what is missing. Returns its free bytes. Raises ResourceError."""
        missing = self.model.size - self.bytes_here(folder)
        place = self._place(folder) or cache_folder("models", self.name.repo)
        free = shutil.disk_usage(next(parent for parent in (place, *place.parents) if parent.exists())).free
        if missing and missing + _SPARE > free:
            raise ResourceError(
                f"{self.name}: {human_size(missing)} are to be fetched, but {human_size(free)} are free in {place}; "
                "free some, take a smaller quantization, or another place (--dir, HF_HOME)"
            )
        return free

    def fetch(self, folder: StrPath | None = None) -> list[Path]:
        """Fetch its files into the hub's cache, or to `folder`/USER/REPO; what is there is not fetched again.

        An interrupted run leaves what it has, and the next one goes on from there. The client shows its progress
        bars on stderr if that is a terminal. Returns the paths, in order.

        Raises ModelError, ResourceError (no room).
        """
        target = Path(folder) if folder is not None else None
        self.check_space(target)
        paths = []
        with self._errors():
            for path, size in zip(self.model.paths, self.model.sizes, strict=True):
                if place := self._place(target):
                    paths.append(download_into(place, self.name.repo, path, self.commit, size, self.token))
                else:
                    paths.append(download(self.name.repo, path, self.commit, size, self.token))
        if target is None:
            self._write_reference()
        return paths

    def _place(self, folder: Path | None) -> Path | None:
        return folder / self.name.repo if folder else None

    def _write_reference(self) -> None:
        """Say in the cache which commit the revision is, when its files are all there (refs/<revision>)."""
        if self.name.revision == self.commit:
            return
        reference = cache_folder("models", self.name.repo) / "refs" / self.name.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        with replacing(reference) as temporary:
            temporary.write_text(self.commit, "utf-8")

    def _errors(self) -> Any:
        return hub_errors(str(self.name), "model", ModelError, self.name.revision)


def why_not_steerable(info: ModelInfo) -> str:
    """Why llama.cpp cannot steer a model with these facts, as far as its header tells; "" if it can."""
    if info.obstacle:
        return info.obstacle
    if info.architecture not in ROUTED:
        return f"this llama.cpp knows no Mixture-of-Experts architecture {info.architecture!r}"
    if not info.steerable_layers:
        return "all its experts are chosen by token, which steering cannot reach"
    return ""


def _watched(headers: list[GGUFHeader], total: int, show: Callable[[int, int], None]) -> list[GGUFHeader]:
    """The headers with a `fetch` that reports what it has read."""
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
