"""The models on this machine: the embedded one, folders of models, caches of the hub and llama.cpp, other programs'.

`LocalModels.scan` looks at names and sizes only (and into the manifests of Ollama). `resolve_model` finds the file that
a name stands for, without the network: `tiny`, a path, the name of a file in a models folder, a short name,
USER/REPO[@REVISION][:QUANT], or a model of Ollama, ollama/NAME:TAG.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .._util.closest import did_you_mean
from .._util.files import listed
from .._util.regular_files import open_regular
from ..errors import ModelError, UsageError
from .embedded import embedded_models
from .hub import hub_cache
from .lm_studio import lm_studio_folders
from .names import MAIN, ModelName, RepoModel, choose, looks_like_name, matching, repo_models, short_names
from .ollama import PREFIX as OLLAMA_PREFIX
from .ollama import OllamaModel, ollama_folders, ollama_models

EMBEDDED, HUB, FOLDER, LLAMA_CPP = "embedded", "hub cache", "folder", "llama.cpp cache"
LM_STUDIO, OLLAMA = "LM Studio", "Ollama"
_DEPTH = 8  # of a models folder
_MAX_REFERENCE = 256  # bytes: it holds a commit


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine: its first file that exists, its size in bytes, and where it was found.

    `missing` is the number of the first missing part, 0 if all exist. `repo` and `revision` are those of the hub, ""
    elsewhere. `stem` is the name of a loose file of a models folder: its path in it, without ".gguf"; of a model of
    Ollama it is its full name.
    """

    path: Path
    size: int
    source: str
    tag: str
    repo: str = ""
    revision: str = ""
    missing: int = 0
    stem: str = ""


@dataclass(frozen=True)
class _Folder:
    """Files of one repository at one commit, or of one models folder."""

    root: Path
    source: str
    repo: str
    revision: str
    models: tuple[RepoModel, ...]

    def local(self, model: RepoModel) -> LocalModel:
        stem = model.paths[0][: -len(".gguf")] if self.source == FOLDER and not self.repo else ""
        path = self.root / model.paths[0]
        return LocalModel(path, model.size, self.source, model.tag, self.repo, self.revision, model.missing, stem)


@dataclass(frozen=True)
class LocalModels:
    """The models found on this machine. If two folders have a model of the same name, the earlier folder wins."""

    folders: tuple[_Folder, ...]
    ollama: tuple[OllamaModel, ...] = ()

    @classmethod
    def scan(cls, models_dirs: Iterable[Path] = ()) -> LocalModels:
        """Read the models folders, the caches of the hub and llama.cpp, the folders of LM Studio and Ollama.

        A missing folder counts as empty.
        """
        found = [part for folder in models_dirs for part in _models_folder(folder, FOLDER)]
        found += _hub_layout(hub_cache(), HUB)
        cache = llama_cpp_cache()
        if cache != hub_cache():
            found += _hub_layout(cache, LLAMA_CPP)
            found += _models_folder(cache, LLAMA_CPP, depth=1)
        found += [part for folder in lm_studio_folders() for part in _models_folder(folder, LM_STUDIO)]
        return cls(tuple(found), tuple(model for folder in ollama_folders() for model in ollama_models(folder)))

    def models(self) -> list[LocalModel]:
        """All models, the embedded ones first; a file that two snapshots of a repository share is listed once."""
        result = [
            LocalModel(path, path.stat().st_size, EMBEDDED, "", stem=name) for name, path in embedded_models().items()
        ]
        seen: set[str] = set()
        files = [folder.local(model) for folder in self.folders for model in folder.models]
        for model in (*files, *map(_of_ollama, self.ollama)):
            real = os.path.realpath(model.path)
            if real not in seen:
                seen.add(real)
                result.append(model)
        return result

    def name_of(self, model: LocalModel) -> str:
        """The shortest name that -m accepts for the model, else its path."""
        if model.source == EMBEDDED:
            return model.stem
        name = str(ModelName(model.repo, model.revision, model.tag)) if model.repo else model.stem
        try:
            found = self.find(name) if name else None
        except (ModelError, UsageError):
            found = None
        return name if found == model else str(model.path)

    def names(self) -> list[str]:
        """The names that -m accepts: of the models here, then the short names of others."""
        return [*(self.name_of(model) for model in self.models() if not model.missing), *short_names()]

    def loose(self, text: str) -> LocalModel | None:
        """The complete model of a models folder, or of Ollama, with this name.

        A model of Ollama goes without its prefix only by a name that can be none of the hub, nor a short name.
        """
        folders = (folder for folder in self.folders if not folder.repo)
        found = (folder.local(model) for folder in folders for model in folder.models if model.is_whole)
        first = next((model for model in found if model.stem and text in (model.stem, f"{model.stem}.gguf")), None)
        if first is not None or (looks_like_name(text) and not text.startswith(OLLAMA_PREFIX)):
            return first
        return next((_of_ollama(model) for model in self.ollama if model.size and model.is_called(text)), None)

    def find(self, text: str, file: str | None = None) -> LocalModel | None:
        """The complete model that a name stands for, or None.

        Raises UsageError for a text that is not a name, ModelError when several models fit.
        """
        if file is None and (found := self.loose(text)):
            return found
        name = ModelName.parse(text)
        for folder in self._of(name):
            models = list(folder.models)
            fit = matching(models, name, file)
            if len(fit) > 1:
                choose(models, name, file)  # raises, with the list
            if len(fit) == 1 and fit[0].is_whole:
                return folder.local(fit[0])
        return None

    def not_here(self, text: str, why: str = "") -> ModelError:
        """The error for a name whose model is not on this machine; `why` says why it is not fetched now."""
        if text.startswith(OLLAMA_PREFIX):
            have = listed((model.full_name for model in self.ollama if model.size), 12) or "none"
            cure = f"ollama pull {text.removeprefix(OLLAMA_PREFIX)}"
            return ModelError(f"{text}: not among the models of Ollama here (there is {have}); fetch it: {cure}")
        folders = self._of(ModelName.parse(text))
        tags = sorted({model.tag for folder in folders for model in folder.models if model.is_whole})
        have = f" (there is {', '.join(tags)})" if tags else ""
        cure = "fetch it with a network" if why else "fetch it"
        meant = "" if have or text.lower() in short_names() else did_you_mean(text, self.names())
        return ModelError(f"{text}: not on this machine{have}{why}; {cure}: steermoe pull {text}{meant}")

    def _of(self, name: ModelName) -> list[_Folder]:
        """Folders of the repository at the revision; without a revision, main first and then the others."""
        own = [folder for folder in self.folders if folder.repo.lower() == name.repo.lower()]
        first = [folder for folder in own if name.revision in (folder.revision, folder.root.name)]
        return first if name.revision != MAIN else first + [folder for folder in own if folder not in first]


def resolve_model(text: str | os.PathLike[str], models_dirs: Iterable[Path] = ()) -> Path:
    """Path of the model that the command line names; a path that does not exist is returned as it is.

    Raises ModelError for a name whose model is not on this machine, with the command that fetches it.
    """
    name = os.path.expanduser(text)
    path = Path(name)
    if path.exists():
        return path
    if name in embedded_models():
        return embedded_models()[name]
    if looks_like_name(name):
        local = LocalModels.scan(models_dirs)
        if found := local.find(name):
            return found.path
        raise local.not_here(name)
    folders, is_file = tuple(models_dirs), path.suffix.lower() == ".gguf"
    if folders or not is_file:
        local = LocalModels.scan(folders)
        if found := local.loose(name):
            return found.path
        if name.startswith(OLLAMA_PREFIX):
            raise local.not_here(name)
    if path.name == name and (not path.suffix[1:].isalpha() or (":" in name and not is_file)):
        raise ModelError(
            f"{name}: neither a file nor a model of this name; steermoe models lists those here"
            f"{did_you_mean(name, local.names())}"
        )
    return path


def _of_ollama(model: OllamaModel) -> LocalModel:
    return LocalModel(model.path, model.size, OLLAMA, "", stem=model.full_name)


def llama_cpp_cache() -> Path:
    """Where llama.cpp keeps what it fetched: LLAMA_CACHE, else its folder in the platform's cache."""
    if named := os.environ.get("LLAMA_CACHE"):
        return Path(os.path.expanduser(named))
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "")) / "llama.cpp"
    from platformdirs import user_cache_path

    return user_cache_path("llama.cpp")


def _hub_layout(root: Path, source: str) -> list[_Folder]:
    """Snapshots of a cache in the hub's layout (models--USER--REPO/{refs,snapshots}): main first, then other refs."""
    result = []
    for repository in _listed(root):
        parts = repository.name.split("--")
        if parts[0] != "models" or len(parts) not in (2, 3):
            continue
        repo = "/".join(parts[1:]) if len(parts) == 3 else ""  # the hub's oldest have no user: those go by their paths
        revisions: dict[str, str] = {}
        for reference in sorted(_files(repository / "refs")):
            name = reference.relative_to(repository / "refs").as_posix()
            try:
                with open_regular(reference) as file:
                    commit = file.read(_MAX_REFERENCE).decode("utf-8").strip()
            except (OSError, UnicodeDecodeError):
                continue
            if name == MAIN or commit not in revisions:
                revisions[commit] = name
        snapshots = [folder for folder in _listed(repository / "snapshots") if folder.is_dir()]
        snapshots.sort(key=lambda f: (revisions.get(f.name) != MAIN, f.name not in revisions, -_changed(f), f.name))
        for snapshot in snapshots:
            models = repo_models(_sizes(snapshot, _files(snapshot)))
            revision = revisions.get(snapshot.name, snapshot.name)
            if models:
                result.append(_Folder(snapshot, source, repo, revision, tuple(models)))
    return result


def _models_folder(root: Path, source: str, depth: int = _DEPTH) -> list[_Folder]:
    """Models of a models folder: loose files, and USER/REPO/... as `steermoe pull --dir` writes them."""
    sizes = _sizes(root, _files(root, depth))
    repositories: dict[str, dict[str, int]] = {}
    for path, size in sizes.items():
        parts = PurePosixPath(path).parts
        inside = len(parts) > 2 and looks_like_name("/".join(parts[:2]))
        repo = "/".join(parts[:2]) if inside else ""
        repositories.setdefault(repo, {})["/".join(parts[2:]) if repo else path] = size
    return [
        _Folder(root / repo, source, repo, MAIN if repo else "", tuple(models))
        for repo, files in sorted(repositories.items())
        if (models := repo_models(files))
    ]


def _sizes(root: Path, paths: Iterable[Path]) -> dict[str, int]:
    """Size of each GGUF file, 0 where a link leads nowhere."""
    sizes = {}
    for path in paths:
        if path.suffix.lower() == ".gguf":
            try:
                size = path.stat().st_size
            except OSError:
                size = 0
            sizes[path.relative_to(root).as_posix()] = size
    return sizes


def _files(root: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """Files below a folder, at most `depth` folders deep, without those in hidden or unreadable folders."""
    for folder, folders, names in os.walk(root):
        level = len(Path(folder).relative_to(root).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if level + 1 < depth else []
        yield from (Path(folder) / name for name in sorted(names))


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _changed(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0
