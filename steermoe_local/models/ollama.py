"""Ollama's models on this machine: the blobs that its manifests name.

A manifest is a small JSON file, manifests/HOST/NAMESPACE/NAME/TAG; the layer of the media type
`application/vnd.ollama.image.model` has the digest of the GGUF file, which stands under blobs/. A manifest may come
from anyone who publishes a model: nothing of it becomes a path but a digest in hexadecimal digits.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._util.json_text import JsonLimits, parse_json
from .._util.regular_files import open_regular
from .names import is_safe

PREFIX = "ollama/"
"""Begins the full name of a model of Ollama, as -m takes it."""
LATEST = "latest"
_MODEL = "application/vnd.ollama.image.model"
_HOST, _NAMESPACE = "registry.ollama.ai", "library"  # those of a name that has none
_SYSTEM = Path("/usr/share/ollama/.ollama/models")  # of Ollama's service on Linux
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_MAX_MANIFEST = 1 << 18  # bytes: a manifest has some layers
_LIMITS = JsonLimits(values=10_000, containers=2_000, keys=100, depth=16)
_MOST = 10_000  # manifests that are read of one folder


@dataclass(frozen=True)
class OllamaModel:
    """A model of Ollama: its file, size in bytes (0 if it is missing), its name and tag.

    `name` has no host and namespace where they are Ollama's own: "llama3", "someone/model", "hf.co/someone/repo".
    """

    path: Path
    size: int
    name: str
    tag: str

    @property
    def full_name(self) -> str:
        """What -m takes: "ollama/llama3:8b"."""
        return f"{PREFIX}{self.name}:{self.tag}"

    def is_called(self, text: str) -> bool:
        """Whether a text is this model's name; without a tag it is that of `latest`. Case counts for nothing."""
        text = text.lower().removeprefix(PREFIX)
        return text == f"{self.name}:{self.tag}".lower() or (self.tag == LATEST and text == self.name.lower())


def ollama_folders() -> list[Path]:
    """Where Ollama keeps models: OLLAMA_MODELS alone if it is set, else its folder of the user and of the system."""
    if named := os.environ.get("OLLAMA_MODELS", "").strip():
        return [Path(os.path.expanduser(named))]
    return [Path.home() / ".ollama" / "models", *([] if sys.platform == "win32" else [_SYSTEM])]


def ollama_models(folder: Path) -> list[OllamaModel]:
    """The models whose manifests stand in a folder; a manifest that is damaged, or names no model file, is left out."""
    return [found for manifest in _manifests(folder / "manifests") if (found := _read(folder, manifest)) is not None]


def _manifests(root: Path) -> Iterator[Path]:
    """Files at HOST/NAMESPACE/NAME/TAG, at most `_MOST`; links to folders are not followed."""
    n = 0
    for at, folders, names in os.walk(root):
        level = len(Path(at).relative_to(root).parts)
        folders[:] = sorted(folders) if level < 3 else []
        if level != 3:
            continue
        for name in sorted(names):
            if n == _MOST:
                return
            n += 1
            yield Path(at) / name


def _read(folder: Path, manifest: Path) -> OllamaModel | None:
    parts = manifest.relative_to(folder / "manifests").parts
    if not all(map(is_safe, parts)) or ":" in "".join(parts[:3]) or any(" " in part for part in parts):
        return None
    try:
        with open_regular(manifest) as file:
            data = file.read(_MAX_MANIFEST + 1)
        layers = _layers(parse_json(data.decode("utf-8"), _LIMITS)) if len(data) <= _MAX_MANIFEST else []
    except (OSError, ValueError):  # no UTF-8 is a ValueError, too
        return None
    if len(layers) != 1:  # an adapter or a template alone, a model of a cloud; a model in several parts Ollama joins
        return None
    path = folder / "blobs" / f"sha256-{layers[0]}"
    try:
        found = path.stat()
    except OSError:
        return OllamaModel(path, 0, _name(parts), parts[3])
    size = found.st_size if stat.S_ISREG(found.st_mode) else 0
    return OllamaModel(path, size, _name(parts), parts[3])


def _layers(data: Any) -> list[str]:
    """Digests, as hexadecimal digits, of the model layers of a manifest."""
    layers = data.get("layers") if isinstance(data, dict) else None
    found = []
    for layer in layers if isinstance(layers, list) else []:
        if isinstance(layer, dict) and layer.get("mediaType") == _MODEL and isinstance(layer.get("digest"), str):
            match = _DIGEST.fullmatch(layer["digest"])
            found += [match[1]] if match else []
    return found


def _name(parts: tuple[str, ...]) -> str:
    host, namespace, name, _ = parts
    if host != _HOST:
        return f"{host}/{namespace}/{name}"
    return name if namespace == _NAMESPACE else f"{namespace}/{name}"
