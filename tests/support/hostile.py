"""Bias files that are wrong in every way we can think of: {name: bytes}. Read by Python, by the library, and under
AddressSanitizer."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.builders import HEX, write_gguf
from tests.support.paths import GOLDEN

HUGE = (1 << 64) - 1
FIELDS: dict[str, Any] = {
    "expertbias.version": 1,
    "expertbias.model_hint": "olmoe",
    "expertbias.layer_count": 3,
    "expertbias.expert_count": 4,
    "expertbias.expert_used_count": 2,
    "expertbias.mode": "hard",
    "expertbias.epsilon": 0.01,
    "expertbias.router_sha256": HEX,
}
ROW = np.zeros(4, np.float32)
SOFT = {"expertbias.mode": "soft"}
CAPPED = {"expertbias.version": 2, "expertbias.mode": "capped", "expertbias.cap": 1.5}
MAX_LAYERS, MAX_EXPERTS = 4096, 16384

# name: (changed fields, tensors); `...` leaves a field out
FORGED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "version-0": ({"expertbias.version": 0}, {}),
    "version-3": ({"expertbias.version": 3}, {}),
    # the versions of the rules: what reads version 1 alone must not take a capped file for another
    "version-2-hard": ({"expertbias.version": 2}, {}),
    "version-2-hard-with-cap": (CAPPED | {"expertbias.mode": "hard"}, {}),
    "version-2-soft-with-cap": (CAPPED | SOFT, {}),
    "version-1-capped": (CAPPED | {"expertbias.version": 1}, {}),
    "version-1-capped-without-cap": ({"expertbias.mode": "capped"}, {}),
    "version-1-hard-with-cap": ({"expertbias.cap": 1.5}, {}),
    "version-1-soft-with-a-text-as-cap": (SOFT | {"expertbias.cap": "1.5"}, {}),
    "no-cap": (CAPPED | {"expertbias.cap": ...}, {}),
    "cap-whole": (CAPPED | {"expertbias.cap": 1}, {}),
    "cap-text": (CAPPED | {"expertbias.cap": "1.5"}, {}),
    "cap-nan": (CAPPED | {"expertbias.cap": float("nan")}, {}),
    "cap-negative": (CAPPED | {"expertbias.cap": -0.5}, {}),
    "cap-negative-infinity": (CAPPED | {"expertbias.cap": float("-inf")}, {}),
    "cap-large": (CAPPED | {"expertbias.cap": 1000001.0}, {}),
    "capped-half-a-sign": (CAPPED, {"bias.0": ROW + 0.5}),
    "capped-three-on": (CAPPED, {"bias.0": np.array([1, 1, 1, 0], np.float32)}),
    "capped-three-off": (CAPPED, {"bias.0": np.array([-1, -1, -1, 0], np.float32)}),
    "capped-epsilon-0": (CAPPED | {"expertbias.epsilon": 0.0}, {}),
    "version-text": ({"expertbias.version": "1"}, {}),
    "version-float": ({"expertbias.version": 1.0}, {}),
    "mode-number": ({"expertbias.mode": 1}, {}),
    "mode-firm": ({"expertbias.mode": "firm"}, {}),
    # texts of the file that get into the message must not forge a second line, nor send commands to a terminal
    "mode-two-lines": ({"expertbias.mode": "hard\nerror: no such file"}, {}),
    "mode-nul": ({"expertbias.mode": "hard\0soft"}, {}),
    "mode-nul-at-its-end": ({"expertbias.mode": "soft\0"}, {}),
    "architecture-nul": ({"expertbias.model_hint": "olmoe\0x"}, {}),
    "hash-nul": ({"expertbias.router_sha256": HEX + "\0"}, {}),
    "key-nul-beside-the-key": ({"expertbias.mode\0": "soft"}, {"bias.0": ROW}),
    "key-nul-instead-of-the-key": ({"expertbias.mode": ..., "expertbias.mode\0x": "hard"}, {"bias.0": ROW}),
    "key-nul-of-provenance": ({"expertbias.behaviour\0": "x"}, {}),
    "provenance-nul": ({"expertbias.behaviour": "a\0b"}, {}),
    "layer-nul": ({}, {"bias.0\0x": ROW}),
    "layer-escape": ({}, {"bias.\x1b[2J": ROW}),
    "epsilon-whole": ({"expertbias.epsilon": 1}, {}),
    "epsilon-nan": ({"expertbias.epsilon": float("nan")}, {}),
    "epsilon-inf": ({"expertbias.epsilon": float("inf")}, {}),
    "epsilon-0": ({"expertbias.epsilon": 0.0}, {}),
    "epsilon-negative": ({"expertbias.epsilon": -0.01}, {}),
    "epsilon-large": ({"expertbias.epsilon": 20.01}, {}),
    "no-layer-count": ({"expertbias.layer_count": ...}, {}),
    "no-expert-count": ({"expertbias.expert_count": ...}, {}),
    "no-top-k": ({"expertbias.expert_used_count": ...}, {}),
    "no-router": ({"expertbias.router_sha256": ...}, {}),
    "no-mode": ({"expertbias.mode": ...}, {}),
    "no-epsilon": ({"expertbias.epsilon": ...}, {}),
    "no-architecture": ({"expertbias.model_hint": ...}, {}),
    "empty-architecture": ({"expertbias.model_hint": ""}, {}),
    "layers-0": ({"expertbias.layer_count": 0}, {}),
    "layers-above-the-bound": ({"expertbias.layer_count": MAX_LAYERS + 1}, {}),
    "layers-2^32": ({"expertbias.layer_count": (1 << 32) - 1}, {}),
    "experts-above-the-bound": ({"expertbias.expert_count": MAX_EXPERTS + 1}, {}),
    "experts-2^31": ({"expertbias.expert_count": 1 << 31}, {}),
    "top-0": ({"expertbias.expert_used_count": 0}, {}),
    "top-5-of-4": ({"expertbias.expert_used_count": 5}, {}),
    "hash-upper-case": ({"expertbias.router_sha256": HEX.upper()}, {}),
    "hash-short": ({"expertbias.router_sha256": HEX[:63]}, {}),
    "hash-empty": ({"expertbias.router_sha256": ""}, {}),
    "layer-3-of-3": ({}, {"bias.3": ROW}),
    "layer-01": ({}, {"bias.01": ROW}),
    "layer-plus": ({}, {"bias.+1": ROW}),
    "layer-negative": ({}, {"bias.-1": ROW}),
    "layer-empty": ({}, {"bias.": ROW}),
    "layer-huge": ({}, {"bias.99999999999999999999": ROW}),
    "other-tensor": ({}, {"blk.0.x": ROW}),
    "five-values": ({}, {"bias.0": np.zeros(5, np.float32)}),
    "three-values": ({}, {"bias.0": np.zeros(3, np.float32)}),
    "two-by-two": ({}, {"bias.0": np.zeros((2, 2), np.float32)}),
    "a-column": ({}, {"bias.0": np.zeros((4, 1), np.float32)}),
    "half-precision": ({}, {"bias.0": np.zeros(4, np.float16)}),
    "half-precision-8": ({}, {"bias.0": np.zeros(8, np.float16)}),
    "whole-numbers": ({}, {"bias.0": np.zeros(4, np.int32)}),
    "nan": ({}, {"bias.0": ROW + np.float32("nan")}),
    "infinity": (SOFT, {"bias.0": ROW - np.float32("inf")}),
    "half-a-sign": ({}, {"bias.0": ROW + 0.5}),
    "three-on": ({}, {"bias.0": np.array([1, 1, 1, 0], np.float32)}),
    "three-off": ({}, {"bias.0": np.array([-1, -1, -1, 0], np.float32)}),
    "soft-too-large": (SOFT, {"bias.0": ROW - 1000001}),
}
# what stands at a bound, and is legal
LEGAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no-tensors": ({}, {}),
    "zeros": ({}, {"bias.0": ROW}),
    "epsilon-20": ({"expertbias.epsilon": 20.0}, {}),
    "epsilon-tiny": ({"expertbias.epsilon": 1e-40}, {}),
    "most-layers": ({"expertbias.layer_count": MAX_LAYERS}, {f"bias.{MAX_LAYERS - 1}": ROW}),
    "most-experts": (
        {"expertbias.expert_count": MAX_EXPERTS, "expertbias.expert_used_count": MAX_EXPERTS},
        {"bias.0": np.ones(MAX_EXPERTS, np.float32)},
    ),
    "soft-largest": (SOFT, {"bias.2": np.array([1e6, -1e6, 0, 0], np.float32)}),
    "soft-all-off": (SOFT, {"bias.2": ROW - 5}),
    "two-on-two-off": ({}, {"bias.0": np.array([1, 1, -1, -1], np.float32)}),
    "minus-zero": ({}, {"bias.0": -ROW}),
    "cap-0": (CAPPED | {"expertbias.cap": 0.0}, {"bias.0": np.array([1, 1, -1, -1], np.float32)}),
    "cap-minus-0": (CAPPED | {"expertbias.cap": -0.0}, {"bias.0": np.array([1, 0, 0, -1], np.float32)}),
    "cap-tiny": (CAPPED | {"expertbias.cap": 1e-40}, {"bias.0": np.array([1, 0, 0, -1], np.float32)}),
    "cap-largest": (CAPPED | {"expertbias.cap": 1e6}, {"bias.1": np.array([1, 1, -1, -1], np.float32)}),
    "cap-infinite": (CAPPED | {"expertbias.cap": float("inf")}, {"bias.2": np.array([1, 1, -1, -1], np.float32)}),
    "provenance": ({"expertbias.behaviour": "digits"}, {}),
}
# Where the library is more patient than Python, on purpose: it reads what it needs and leaves the rest to the writer.
# None of this reaches a router.
LENIENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unknown-field": ({"expertbias.colour": 1}, {}),
    "foreign-field": ({"general.name": "x"}, {}),
    "list-field": ({"expertbias.list": [1, 2]}, {}),
    "own-alignment": ({"general.alignment": 64}, {"bias.0": ROW}),
    "a-row-of-rows": ({}, {"bias.0": np.zeros((1, 4), np.float32)}),
}


def header(n_tensors: int, n_fields: int, rest: bytes = b"", version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, n_tensors, n_fields) + rest


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


TENSOR = string(b"bias.0")
RAW: dict[str, bytes] = {
    "empty": b"",
    "magic": b"GGUF",
    "other-magic": b"GGML" + bytes(60),
    "zeros": bytes(64),
    "version-0": header(0, 0, version=0),
    "version-1": header(0, 0, version=1),
    "version-4": header(0, 0, version=4),
    "big-endian": b"GGUF" + struct.pack(">I", 3) + bytes(40),
    "no-fields": header(0, 0),
    "huge-tensor-count": header(HUGE, 0),
    "many-tensors": header((1 << 63) - 1, 0),
    "huge-field-count": header(0, HUGE),
    "million-tensors": header(1 << 20, 0),
    "huge-key": header(0, 1, string(b"a", HUGE)),
    "key-beyond-the-end": header(0, 1, string(b"a", 1 << 15)),
    "empty-key": header(0, 1, string(b"") + struct.pack("<IB", 0, 1)),
    "unknown-type": header(0, 1, string(b"a") + struct.pack("<I", 99)),
    "huge-array": header(0, 1, string(b"a") + struct.pack("<IIQ", 9, 0, 1 << 60)),
    "array-of-arrays": header(0, 1, string(b"a") + struct.pack("<IIQ", 9, 9, 1) * 50),
    "huge-strings": header(0, 1, string(b"a") + struct.pack("<IIQ", 9, 8, 1 << 40)),
    "key-twice": header(0, 2, (string(b"a") + struct.pack("<IB", 0, 1)) * 2),
    "alignment-3": header(0, 1, string(b"general.alignment") + struct.pack("<II", 4, 3)),
    "alignment-0": header(0, 1, string(b"general.alignment") + struct.pack("<II", 4, 0)),
    "alignment-2^31": header(1, 1, string(b"general.alignment") + struct.pack("<II", 4, 1 << 31) + TENSOR),
    "alignment-text": header(0, 1, string(b"general.alignment") + struct.pack("<I", 8) + string(b"32")),
    "dims-2^31": header(1, 0, TENSOR + struct.pack("<I", 1 << 31)),
    "product-overflows": header(1, 0, TENSOR + struct.pack("<IQQIQ", 2, 1 << 32, 1 << 32, 0, 0)),
    "negative-size": header(1, 0, TENSOR + struct.pack("<IQIQ", 1, HUGE, 0, 0)),
    "tensor-type-77": header(1, 0, TENSOR + struct.pack("<IQIQ", 1, 4, 77, 0)),
    "offset-wraps": header(1, 0, TENSOR + struct.pack("<IQIQ", 1, 4, 0, HUGE - 31)),
    # NUL ends a text for C: what stands before it would be another key, mode or layer
    "nul-key": header(0, 1, string(b"a\0") + struct.pack("<IB", 0, 1)),
    "nul-key-after-the-key": header(0, 2, b"".join(string(k) + struct.pack("<IB", 0, 1) for k in (b"a", b"a\0b"))),
    "nul-tensor": header(1, 0, string(b"bias.0\0") + struct.pack("<IQIQ", 1, 4, 0, 0)),
    "no-data": header(1, 0, TENSOR + struct.pack("<IQIQ", 1, 4, 0, 0)),
    "tensor-name-64": header(1, 0, string(b"b" * 64)),
    "random": np.random.default_rng(0).bytes(500),
    "random-after-magic": b"GGUF\x03\0\0\0" + np.random.default_rng(1).bytes(500),
}


def forge(folder: Path, table: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, bytes]:
    """The bytes of a table's files."""
    files = {}
    for name, (fields, tensors) in table.items():
        merged = {key: value for key, value in (FIELDS | fields).items() if value is not ...}
        files[name] = write_gguf(folder / "forged.gguf", "expertbias", merged, tensors).read_bytes()
    return files


def truncations(name: str) -> dict[str, bytes]:
    """A golden file cut at every length."""
    data = (GOLDEN / f"{name}.gguf").read_bytes()
    return {f"{name}-{length}": data[:length] for length in range(len(data))}


def flips(name: str, n: int, seed: int = 0) -> dict[str, bytes]:
    """A golden file with one to four bytes changed."""
    original = (GOLDEN / f"{name}.gguf").read_bytes()
    rng = np.random.default_rng(seed)
    files = {}
    for i in range(n):
        data = bytearray(original)
        for place in rng.integers(len(data), size=rng.integers(1, 5)):
            data[place] = int(rng.choice([0, 1, 127, 128, 255, data[place] ^ (1 << rng.integers(8))]))
        files[f"{name}-flip-{i}"] = bytes(data)
    return files


def nuls(name: str) -> dict[str, bytes]:
    """A golden file with each of its letters and digits in turn a NUL byte."""
    data = (GOLDEN / f"{name}.gguf").read_bytes()
    places = (place for place, byte in enumerate(data) if chr(byte).isalnum())
    return {f"{name}-nul-{place}": data[:place] + b"\0" + data[place + 1 :] for place in places}


def corpus(folder: Path, n_flips: int = 400) -> dict[str, bytes]:
    """Everything, by a name that is unique; `folder` is for scratch."""
    tables = {"forged": FORGED, "legal": LEGAL, "lenient": LENIENT}
    files = {f"{kind}-{name}": data for kind, table in tables.items() for name, data in forge(folder, table).items()}
    files |= {f"raw-{name}": data for name, data in RAW.items()}
    for name in ("hard", "soft", "empty", "capped"):
        files |= flips(name, n_flips) | nuls(name)
    files |= truncations("hard") | truncations("capped")
    files["trailing"] = (GOLDEN / "hard.gguf").read_bytes() + bytes(1)
    return files


# What a terminal obeys, and what nobody sees; none of it may come out of a file's text.
OBEYED = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
ESCAPES = (
    "\x1b[2J\x1b[31m",  # erases the screen, colours
    "\x1b]0;title\x07",
    "\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\",
    "\x1b]52;c;ZXZpbA==\x07",  # the clipboard
    "\x1bP$q m\x1b\\",  # a question, which the terminal answers by typing
    "\x1bc\x1b[6n",
    "\x9b2J\x9d0;t\x9c\x90x\x85",  # the same in C1
    "a\x7f\x08\x07\x0b\x0c",
    "kept\roverwritten",
    "\nerror: a forged line",
    "\u202ereversed\u202c\u2066\u2069\u200e\u200f\u061c",
    "\u2028\u2029\u200b\u2060\ufeff",
    "\U000e0041\U000e007f",
    "\udc9b\ud800",
)


def obeyed(text: str) -> list[str]:
    """The characters of a text that a terminal would obey, or that nobody sees."""
    return OBEYED.findall(text)
