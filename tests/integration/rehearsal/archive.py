"""The chat templates and vocabularies of the pinned archive."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from tests.support.paths import BUILD
from tests.support.scripts import load_script

FOLDER = "vendor/llama.cpp/models/"


@cache
def models_folder() -> Path:
    """`models/` of the archive, unpacked once a release into the build folder."""
    script = load_script("native/prepare_source.py")
    output = BUILD.parent / "rehearsal" / script.read_pin()[1][:16]
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=output.parent))
        with tarfile.open(script.fetch(script.cache_folder())) as archive:
            for member in archive:
                inner = member.name.partition("/")[2]
                if inner.startswith(FOLDER) and member.isfile():
                    member.name = inner.removeprefix(FOLDER)
                    archive.extract(member, temporary, filter="data")
        try:
            temporary.rename(output)
        except OSError:  # another process was quicker
            shutil.rmtree(temporary)
    return output


@cache
def templates() -> dict[str, str]:
    """Text of every chat template by name (the file's stem)."""
    paths = sorted((models_folder() / "templates").glob("*.jinja"))
    return {path.stem: path.read_text("utf-8") for path in paths}


@cache
def vocabularies() -> dict[str, Path]:
    """File of every vocabulary by name ("llama-spm", ...)."""
    paths = sorted(models_folder().glob("ggml-vocab-*.gguf"))
    return {path.stem.removeprefix("ggml-vocab-"): path for path in paths}


def tokenized(name: str) -> list[tuple[str, list[int]]]:
    """Texts and their tokens as the model's own tokenizer gave them: the archive's .inp and .out; [] without these."""
    path = vocabularies()[name]
    inputs, outputs = (path.with_name(f"{path.name}.{end}") for end in ("inp", "out"))
    if not inputs.exists():
        return []
    # as llama.cpp's tests/test-tokenizer-0.cpp reads them
    texts = inputs.read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = outputs.read_text("utf-8").split("\n")
    return [(text, [int(token) for token in line.split()]) for text, line in zip(texts, lines, strict=False)]
