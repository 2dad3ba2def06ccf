"""What kind of file something is, by its content, for messages about a file that stands where another kind belongs.

`require_kind` is called by every reader before it reads: it refuses a file of another kind by its name, and leaves a
file of no known kind, a damaged one included, to the reader. Only the first bytes are looked at, and of TOML, which no
bytes tell, the name.
"""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import dataclass
from typing import Any

from ..errors import FormatError
from .regular_files import open_regular
from .zip_files import zip_archive

StrPath = str | os.PathLike[str]

_HEAD = 1 << 16  # bytes
_TOML_PLAN = ".plan.toml"
_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class FileKind:
    """A kind of file: what it is, and what to do with it, both for messages."""

    what: str
    use: str


MODEL = FileKind("a GGUF model", "a model is given with -m")
BIAS = FileKind("a bias file", "a bias file is given with --bias")
CONTROL_VECTOR = FileKind("a control vector of llama.cpp", "it steers no experts; take an expert map or a bias file")
IMATRIX = FileKind("an importance matrix of llama.cpp", "name the model or file that is meant")
ADAPTER = FileKind("a LoRA adapter", "name the model that is meant, with the adapter merged into it")
PROJECTOR = FileKind("the vision or audio part of a model (mmproj)", "name the model that it belongs to")
MAP = FileKind("an expert map", "a map is given with --map; steermoe bias build makes a bias file of it")
COUNTS = FileKind("a counts file", "steermoe map merge makes an expert map of it")
PAIR_COUNTS = FileKind("a file of per-pair counts", "it is given with --per-pair")
TRACE = FileKind("a trace of routing", "numpy.load reads it, see docs/traces.md")
CHECKPOINT = FileKind(
    "the checkpoint of an interrupted steermoe detect", "finish that run: the same command with --resume"
)
PAIRS = FileKind("a pairs file", "it is given with --pairs")
PROMPTS = FileKind("a file of prompts", "it is given with --n-prompts, or to steermoe eval with --task")
TASK = FileKind("a task file", "it is given to steermoe eval with --task")
ANSWERS = FileKind("a file of answers", "name the prompts or pairs that are meant")
PARTIAL_ANSWERS = FileKind("the answers of an interrupted run", "finish that run: the same command with --resume")
PLAN = FileKind("a steering plan", "a plan is given with --plan")
CHAT = FileKind("a saved chat", "it is opened in steermoe chat with /load")
RANKING = FileKind("a pickle", "steermoe map import makes an expert map of a pickled ranking")
RESULTS = FileKind("results of an evaluation", "name the map, task or pairs that they were measured with")
EXPORTED = FileKind("an exported ranking", "name the expert map that it was exported from")
EASYSTEER = FileKind("a file for EasySteer", "name the expert map that it was exported from")
OTHER = FileKind("another file of this program", "name the file that is meant")
SQUAD = FileKind("data in SQuAD's layout", "steermoe pairs faithfulness --squad makes pairs of it")
SAFETY = FileKind("data in BeaverTails' layout", "steermoe pairs safety --data makes pairs of it")
LFS = FileKind("a Git LFS pointer, not the file itself", "fetch the file with git lfs pull")
PARQUET = FileKind("a Parquet file", "steermoe pairs and steermoe tasks build read such data")
COMPRESSED = FileKind("a compressed file", "decompress it first")
ARCHIVE = FileKind("a zip archive", "unpack it first")
TAR = FileKind("a tar archive", "unpack it first")
WEIGHTS = FileKind("weights of PyTorch", "convert the model to GGUF, or take a GGUF of it")
SAFETENSORS = FileKind("a safetensors file", "convert the model to GGUF, or take a GGUF of it")
WEB_PAGE = FileKind("a web page", "fetch the file itself, not the page that shows it")
UTF16 = FileKind("text that is not UTF-8 but UTF-16", "save it as UTF-8")
PDF = FileKind("a PDF", "name the file that is meant")
PICTURE = FileKind("a picture", "name the file that is meant")

NO_MODELS = (BIAS, CONTROL_VECTOR, IMATRIX, ADAPTER, PROJECTOR)
"""Kinds of GGUF files that are no models."""
DATA = (PAIRS, PROMPTS, TASK, ANSWERS, RESULTS, SQUAD, SAFETY, EXPORTED, PARQUET, COMPRESSED)
"""Kinds of files that are rows of data for those who read rows."""

_STARTS = (
    (b"PAR1", PARQUET),
    (b"\x1f\x8b", COMPRESSED),
    (b"\xfd7zXZ\x00", COMPRESSED),
    (b"BZh", COMPRESSED),
    (b"\x28\xb5\x2f\xfd", COMPRESSED),
    (b"%PDF-", PDF),
    (b"\x89PNG\r\n", PICTURE),
    (b"\xff\xd8\xff", PICTURE),
)
_FORMATS = {
    "steermoe-expert-map": MAP,
    "steermoe-chat": CHAT,
    "steermoe-counts": COUNTS,
    "steermoe-pair-counts": PAIR_COUNTS,
    "steermoe-partial-counts": CHECKPOINT,
    "steermoe-partial-answers": PARTIAL_ANSWERS,
}
# protocol 2 or later; a class by name, as with 0 and 1
_PICKLE = re.compile(rb"\x80[\x02-\x05]|c[a-z_][a-z_0-9.]*\n[A-Za-z_]+\n")
_FORMAT = re.compile(rb'\A\s*\{\s*"format"\s*:\s*"(steermoe-[a-z-]+)"')
_MARGIN = re.compile(rb'^ "([a-z_]{1,40})":', re.MULTILINE)
_FIELD = re.compile(rb'\A\s*(?:\[\s*)?\{\s*"([^"\\]{1,40})"\s*:')
_ARCHITECTURES = {"expertbias": BIAS, "controlvector": CONTROL_VECTOR, "clip": PROJECTOR, "imatrix": IMATRIX}
_TYPES = {"imatrix": IMATRIX, "adapter": ADAPTER, "mmproj": PROJECTOR}
_RESULT_FIELDS = (
    {"task", "sides"},
    {"about", "command"},
    {"about", "grid"},
    {"experiment", "question"},
    {"id", "bias", "kind"},
)
_PAIR_FIELDS = {"positive", "negative", "positive_target", "negative_target", "messages_0", "messages_1"}


def kind_of(path: StrPath) -> FileKind | None:
    """The kind of a file; None for one that is of no known kind or cannot be read, and for what is not a file."""
    try:
        with open_regular(path) as file:  # what is read from a pipe would be lost
            head = file.read(_HEAD)
    except (OSError, ValueError):
        return None
    if head.startswith(b"PK\x03\x04"):
        return _of_archive(path)
    return _of_start(head) or (PLAN if os.fspath(path).endswith(_TOML_PLAN) else None)


def require_kind(path: StrPath, what: str, *own: FileKind, error: type[Exception] = FormatError) -> None:
    """Raise `error` for a file that is known to be of another kind than `own`; `what` names the wanted kind."""
    found = kind_of(path)
    if found is not None and found not in own:
        raise error(not_but(path, what, found))


def not_but(path: StrPath, what: str, found: FileKind) -> str:
    """The message for a file of another kind."""
    return f"{path}: not {what}: this is {found.what}; {found.use}"


def refuse_pointer(start: bytes, path: StrPath, error: type[Exception] = FormatError) -> None:
    """Raise `error` if a file begins as a Git LFS pointer, the small text that stands where a file was not fetched."""
    if _is_pointer(start):
        raise error(f"{path}: {LFS.what}; {LFS.use}")


def _is_pointer(start: bytes) -> bool:
    return start.removeprefix(b"\xef\xbb\xbf").startswith(_POINTER)


def _of_start(head: bytes) -> FileKind | None:
    if _is_pointer(head):
        return LFS
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    if head.startswith(b"GGUF"):
        return _of_gguf(head)
    if _PICKLE.match(head):
        return RANKING
    if head[257:262] == b"ustar":
        return TAR
    if head[8:9] == b"{" and head[:8] == head[:4] + b"\0\0\0\0":
        return SAFETENSORS
    if len(head) > 3 and (head[:2] in (b"\xff\xfe", b"\xfe\xff") or _halves(head[:64])):
        return UTF16
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"<(!doctype html|html)\b", text, re.IGNORECASE):
        return WEB_PAGE
    return EXPORTED if text.startswith(b"layer,expert,") else _of_json(text)


def _halves(head: bytes) -> bool:
    """Whether every other byte is NUL and the rest are not: UTF-16 without a byte order mark."""
    halves = [head[0::2], head[1::2]]
    return len(head) >= 8 and any(not any(zeros) and all(other) for zeros, other in (halves, halves[::-1]))


def _of_archive(path: StrPath) -> FileKind | None:
    """The kind of a zip archive, which `.npz` files are."""
    try:
        with open_regular(path) as file, zip_archive(file) as archive:
            files = archive.namelist()
    except Exception:  # damaged in any of a dozen ways
        return None
    if any(name.endswith("/data.pkl") for name in files):
        return WEIGHTS
    names = {name.removesuffix(".npy") for name in files if name.endswith(".npy")}
    if "meta" not in names:
        return None if names else ARCHIVE
    if {"experts", "weights", "texts"} <= names:
        return TRACE
    if {"a1", "a2"} & names:
        return COUNTS
    return CHECKPOINT if {"a", "n"} <= names else PAIR_COUNTS if "moe_layers" in names else None


def _of_gguf(head: bytes) -> FileKind:
    """The kind of a GGUF by its first text fields, which writers put at the beginning."""
    architecture = _gguf_text(head, b"general.architecture")
    return _ARCHITECTURES.get(architecture) or _TYPES.get(_gguf_text(head, b"general.type")) or MODEL


def _gguf_text(head: bytes, key: bytes) -> str:
    start = head.find(struct.pack("<Q", len(key)) + key + struct.pack("<I", 8))  # 8: a text
    if start < 0:
        return ""
    start += 8 + len(key) + 4
    length = int.from_bytes(head[start : start + 8], "little")
    return head[start + 8 : start + 8 + min(length, 64)].decode("utf-8", "replace")


def _of_json(text: bytes) -> FileKind | None:
    """The kind of JSON or JSON Lines, by `format`, else by the fields of the first object."""
    if found := _FORMAT.match(text):
        return _FORMATS.get(found[1].decode("ascii"), OTHER)
    if not (first := _FIELD.match(text)):
        return None
    fields = {first[1].decode("utf-8", "replace")}
    row: Any = None
    for part in (text.split(b"\n", 1)[0], text):
        try:
            row = json.loads(part)
            break
        except (ValueError, RecursionError):
            continue
    else:  # longer than what is read: the fields at the margin, as this program indents
        fields |= {name.decode("ascii") for name in _MARGIN.findall(text)}
    if isinstance(row, list) and row:
        row = row[0]
    if isinstance(row, dict):
        fields = set(map(str, row))
        if isinstance(row.get("format"), str) and row["format"].startswith("steermoe-"):
            return _FORMATS.get(row["format"], OTHER)
    return _of_fields(fields)


def _of_fields(fields: set[str]) -> FileKind | None:
    if "rules" in fields and fields <= {"rules", "made_of"}:
        return PLAN
    if "layer_configs" in fields or "vectors" in fields:
        return EASYSTEER
    if {"experts", "map_sha256"} <= fields or {"model", "experts"} <= fields:
        return EXPORTED
    if {"finish_reason", "usage"} <= fields or {"unsteered", "steered"} <= fields:
        return ANSWERS
    if {"prompt", "response", "is_safe"} <= fields:
        return SAFETY
    if {"prompt", "messages"} & fields:  # its other fields may have any names
        return PROMPTS
    if any(some <= fields for some in _RESULT_FIELDS):
        return RESULTS
    if fields & _PAIR_FIELDS:
        return PAIRS
    if {"context", "question"} <= fields or {"data", "version"} == fields:
        return SQUAD
    return TASK if fields == {"task"} else None
