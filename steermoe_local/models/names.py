"""Names of models on the hub, USER/REPO[@REVISION][:QUANT], short names, and the files of a repository that they name.

No network, and no file but the table of short names. The choice follows llama.cpp's -hf (common/download.cpp), but
where llama.cpp takes the first of several files that fit, this raises an error that lists them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import PurePosixPath

from .._util.files import human_size, listed
from ..errors import FormatError, ModelError, UsageError
from ..model_files.splits import split_name

MAIN = "main"
_LONGEST = 1024  # characters of a path in a repository
PREFERRED = ("Q4_K_M", "Q8_0")
"""Quantizations that llama.cpp takes when none is named; then SENSIBLE, where llama.cpp takes the first file."""
SENSIBLE = ("MXFP4", "MXFP4_MOE", "UD-Q4_K_XL", "Q4_K_S", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q5_K_M", "Q6_K")
_HOW = "write USER/REPO, USER/REPO:QUANT or one of the short names (steermoe models --short-names)"
_WORD = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_NAME = re.compile(rf"(?P<repo>{_WORD}/{_WORD})(?:@(?P<revision>[^:@\s]+))?(?::(?P<tag>[A-Za-z0-9_.+-]+))?")
_SHORT = re.compile(r"(?P<short>[A-Za-z0-9_.-]+)(?::(?P<tag>[A-Za-z0-9_.+-]+))?")
_QUANT = r"(?:UD-)?(?:I?Q\d\w*|TQ\d_\d|B?F16|FP16|F32|MXFP4\w*|NVFP4)"
_TAG = re.compile(rf"(?:^|[-._])(?P<tag>{_QUANT})$", re.IGNORECASE | re.ASCII)
# GGUF files that are not models: vision and audio parts, importance matrices, draft heads (as llama.cpp), vocabularies
_NO_MODEL = re.compile(r"mmproj|imatrix|mtp-|eagle3-|dflash-|dspark-|(^|[-_.])vocab([-_.]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class ModelName:
    """A repository of models, its revision, and the tag of one of its models ("" for the default choice)."""

    repo: str
    revision: str = MAIN
    tag: str = ""

    @classmethod
    def parse(cls, text: str, revision: str | None = None) -> ModelName:
        """Parse a name of the command line; `revision` is the value of --revision. Raises UsageError."""
        match = _NAME.fullmatch(text)
        if match is None:
            short = _SHORT.fullmatch(text)
            target = short_names().get(short["short"].lower()) if short else None
            if short is None or target is None:
                raise UsageError(f"{text}: not the name of a model; {_HOW}")
            name = cls.parse(target, revision)
            return replace(name, tag=short["tag"]) if short["tag"] else name
        given = match["revision"]
        if revision and given and revision != given:
            raise UsageError(f"{text}: names the revision {given}, and --revision is {revision}; give one of them")
        found = revision or given or MAIN
        for part in (*match["repo"].split("/"), *found.split("/")):
            # they become paths in the cache
            if not is_safe(part):
                raise UsageError(f"{text}: {part!r} is no name on the hub; {_HOW}")
        return cls(match["repo"], found, match["tag"] or "")

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision != MAIN else ""
        return self.repo + revision + (f":{self.tag}" if self.tag else "")


@dataclass(frozen=True)
class RepoModel:
    """One model of a repository: its files in order (the parts of a split model), their sizes in bytes, and its tag."""

    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    tag: str
    n_parts: int

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(self.sizes)

    @property
    def missing(self) -> int:
        """Number of the first missing part, from 1; 0 if there is none."""
        there = {part[1] for path in self.paths if (part := split_name(_stem(path)))}
        return next((n for n in range(1, self.n_parts + 1) if n not in there), 0) if self.n_parts > 1 else 0

    @property
    def is_whole(self) -> bool:
        """Whether all its files exist and none is empty (as a dangling link is)."""
        return not self.missing and all(self.sizes)


@cache
def short_names() -> Mapping[str, str]:
    """The table short_names.toml: short name, in lower case, to USER/REPO[:QUANT]. Raises FormatError if damaged."""
    table = tomllib.loads((resources.files(__package__) / "short_names.toml").read_text("utf-8"))
    for name, target in table.items():
        if not isinstance(target, str) or not _NAME.fullmatch(target) or name != name.lower():
            raise FormatError(f'short_names.toml: {name}: write "name" = "USER/REPO" in lower case')
    return table


def looks_like_name(text: str) -> bool:
    """Whether a text that is no file names a model: a short name, or USER/REPO that does not end in .gguf."""
    if text.lower().endswith(".gguf"):
        return False
    short = _SHORT.fullmatch(text)
    return bool(_NAME.fullmatch(text)) or bool(short and short["short"].lower() in short_names())


def repo_models(files: Mapping[str, int]) -> list[RepoModel]:
    """The models among a repository's files (path to size in bytes), by path; the parts of a split model are one."""
    groups: dict[tuple[str, int], list[str]] = {}
    for path in sorted(files):
        name = PurePosixPath(path).name
        if not path.lower().endswith(".gguf") or _NO_MODEL.search(name) or not is_safe(path):
            continue
        part = split_name(_stem(path))
        groups.setdefault((part[0], part[2]) if part else (_stem(path), 1), []).append(path)
    return [
        RepoModel(tuple(paths), tuple(files[path] for path in paths), _tag(prefix), count)
        for (prefix, count), paths in groups.items()
    ]


def matching(models: list[RepoModel], name: ModelName, file: str | None = None) -> list[RepoModel]:
    """The models that a name can stand for, by the rules of `choose`."""
    if file is not None:
        return [model for model in models if file in model.paths]
    if name.tag:
        return _with_tag(models, name.tag)
    for tag in PREFERRED:
        if found := _with_tag(models, tag):
            return found
    if len(models) == 1:
        return models
    return next((found for tag in SENSIBLE if (found := _with_tag(models, tag))), [])


def choose(models: list[RepoModel], name: ModelName, file: str | None = None) -> RepoModel:
    """The model that a name stands for.

    With `file` it is the model with that file. With a tag it is the model of that quantization, else the one whose path
    contains the tag as llama.cpp searches for it. Without, it is Q4_K_M, Q8_0, the only model, or a common 4- to 6-bit
    one.

    Raises ModelError when none or several fit, or a part is missing.
    """
    if not models:
        raise ModelError(f"{name.repo}: no GGUF models in it; take a repository of GGUF files, often named ...-GGUF")
    found = matching(models, name, file)
    if len(found) > 1:
        what = f" {name.tag}" if name.tag else ""
        shown = listed((f"{model.paths[0]} ({human_size(model.size)})" for model in found), 40)
        raise ModelError(f"{name.repo}: several files fit{what}: {shown}; name one with --file (-hff)")
    if not found:
        what = "name the quantization, as in REPO:QUANT"
        if file is not None:
            what = f"no model file {file}"
        elif name.tag:
            what = f"no quantization {name.tag}"
        shown = listed((f"{model.paths[0] if file else model.tag} ({human_size(model.size)})" for model in models), 40)
        raise ModelError(f"{name.repo}: {what}; it has {shown}")
    if missing := found[0].missing:
        raise ModelError(f"{found[0].paths[0]}: part {missing} of {found[0].n_parts} is not there; take another file")
    return found[0]


def _with_tag(models: list[RepoModel], tag: str) -> list[RepoModel]:
    exact = [model for model in models if model.tag.upper() == tag.upper()]
    # llama.cpp: the tag followed by "." or "-"; folders are often named by the tag, too
    pattern = re.compile(rf"(^|[^A-Za-z0-9]){re.escape(tag)}[.\-/]", re.IGNORECASE)
    return exact or [model for model in models if pattern.search(model.paths[0])]


def _tag(prefix: str) -> str:
    """The quantization in the name of a file (without its ending) or of its folder, else the file's name."""
    path = PurePosixPath(prefix)
    for text in (path.name, path.parent.name):
        if match := _TAG.search(text):
            return match["tag"].upper()
    return path.name


def is_safe(path: str) -> bool:
    """Whether a path stays in its folder, is printable and no longer than systems have them."""
    return (
        len(path) <= _LONGEST and path.isprintable() and "\\" not in path and not {"", ".", ".."} & set(path.split("/"))
    )


def _stem(path: str) -> str:
    return path[: -len(".gguf")] if path.lower().endswith(".gguf") else path
