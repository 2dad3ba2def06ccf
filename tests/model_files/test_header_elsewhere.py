"""Headers of GGUF files that are read by parts: the same facts as from the file, as few bytes as it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local.errors import FormatError, ModelError
from steermoe_local.identity import UNKNOWN_ROUTER
from steermoe_local.model_files.gating import ROUTED, gating
from steermoe_local.model_files.header import read_header, read_header_from
from steermoe_local.model_files.model_info import info_from, model_info, router_bytes
from steermoe_local.models.hub_models import why_not_steerable
from tests.support.architectures import ARCHITECTURES, NOT_WRITTEN, WITHOUT_ROUTERS
from tests.support.builders import model_parts, write_gguf
from tests.support.gguf_copy import copy_model


class Source:
    """A file elsewhere; `asked` are the ranges that were asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked: list[tuple[int, int]] = []

    def __call__(self, start: int, stop: int) -> bytes:
        assert 0 <= start < stop <= len(self.data)
        self.asked.append((start, stop))
        return self.data[start:stop]

    def header(self, **options: Any) -> Any:
        return read_header_from(Path("lab/m/m.gguf"), len(self.data), self, **options)


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    """A model with a header of 180 KB."""
    fields, tensors = model_parts()
    return write_gguf(tmp_path / "m.gguf", "olmoe", fields | {"tokenizer.ggml.merges": ["a bc"] * 15_000}, tensors)


def header_size(path: Path) -> int:
    return min(tensor.offset for tensor in read_header(path).tensors.values())


@pytest.mark.parametrize("first", [1, 100, 5000, 1 << 17, 1 << 30])
def test_the_same_header_in_growing_steps(vocabulary: Path, first: int) -> None:
    source, known = Source(vocabulary.read_bytes()), read_header(vocabulary)
    header = source.header(first=first)
    assert (header.fields, header.tensors, header.size) == (known.fields, known.tensors, known.size)
    assert header.data_end == known.data_end
    assert source.asked[0][0] == 0
    assert all(a[1] == b[0] for a, b in zip(source.asked, source.asked[1:], strict=False)), "nothing twice"
    read = source.asked[-1][1]
    assert read <= max(2 * header_size(vocabulary), first, 64)
    assert len(source.asked) < 24


def test_only_routers_are_read_behind_the_header(vocabulary: Path) -> None:
    source = Source(vocabulary.read_bytes())
    header = source.header(first=4096)
    steps = len(source.asked)
    info = info_from([header], routers=True)
    assert info.identity == model_info(vocabulary).identity
    routers = source.asked[steps:]
    assert [stop - start for start, stop in routers] == [4 * 32 * 4] * 2
    assert router_bytes([header]) == sum(stop - start for start, stop in routers)


def test_without_routers_nothing_is_read_behind_the_header(vocabulary: Path) -> None:
    source = Source(vocabulary.read_bytes())
    header = source.header()
    steps = len(source.asked)
    info = info_from([header], routers=False)
    assert len(source.asked) == steps
    assert info.identity is not None
    assert info.identity.router_sha256 == UNKNOWN_ROUTER
    whole = model_info(vocabulary).to_dict()
    facts = info.to_dict()
    for data in (whole, facts):
        del data["paths"], data["identity"]
    assert facts == whole
    assert model_info(vocabulary, routers=False).identity == info.identity


def test_split_models(tiny_path: Path, tmp_path: Path) -> None:
    parts = copy_model(tiny_path, tmp_path / "t.gguf", max_tensors=25)
    headers = [read_header_from(path, path.stat().st_size, Source(path.read_bytes())) for path in parts]
    assert info_from(headers, routers=True).identity == model_info(tiny_path).identity
    for wrong in (headers[:2], headers[::-1], headers[:1]):
        with pytest.raises(ModelError, match=r"not part \d of \d"):
            info_from(wrong, routers=False)


@pytest.mark.parametrize("change", ["short", "cut", "length", "no gguf", "tensors"])
def test_hostile_files(vocabulary: Path, change: str) -> None:
    data = bytearray(vocabulary.read_bytes())
    words = {
        "short": "only 10 bytes",
        "cut": "ends too early|is cut off",
        "length": "header is longer than 1 MiB|ends too early",
        "no gguf": "no GGUF magic",
        "tensors": "are too many",
    }
    if change == "short":
        del data[10:]
    elif change == "cut":
        del data[-600:]
    elif change == "length":
        at = data.index(b"tokenizer.chat_template") + len("tokenizer.chat_template") + 4
        data[at : at + 8] = (3 << 20).to_bytes(8, "little")
        data += bytes(4 << 20)
    elif change == "no gguf":
        data[:4] = b"<htm"
    else:
        data[8:16] = (1 << 40).to_bytes(8, "little")
    source = Source(bytes(data))
    with pytest.raises(FormatError, match=words[change]):
        source.header(first=1000, limit=1 << 20)
    assert sum(stop - start for start, stop in source.asked) <= 1 << 20


def test_no_more_is_read_than_the_limit(vocabulary: Path) -> None:
    """Twice as much would be more."""
    data = vocabulary.read_bytes()
    at = data.index(b"tokenizer.chat_template") + len("tokenizer.chat_template") + 4
    source = Source(data[:at] + (900_000).to_bytes(8, "little") + bytes(4 << 20))
    with pytest.raises(FormatError):
        source.header(first=700_000, limit=1 << 20)
    assert source.asked == [(0, 700_000), (700_000, 1 << 20)]


def test_every_cut_is_an_error(tmp_path: Path) -> None:
    fields, tensors = model_parts()
    data = write_gguf(tmp_path / "m.gguf", "olmoe", fields, tensors).read_bytes()
    for length in range(0, len(data), 37):
        with pytest.raises(FormatError):
            Source(data[:length]).header(first=64)


def test_errors_of_the_source_pass(vocabulary: Path) -> None:
    def broken(start: int, stop: int) -> bytes:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        read_header_from(Path("m"), 10_000, broken)


#
# what can be steered
#


def test_the_architectures_that_route() -> None:
    """The list that a model on the hub is compared with is that of the documented, tested architectures."""
    assert {*ARCHITECTURES, *NOT_WRITTEN} - set(WITHOUT_ROUTERS) == ROUTED
    for arch in ROUTED:
        assert gating(arch, 1, 10, 1000) != "none"


@pytest.mark.parametrize(
    ("arch", "change", "words"),
    [
        ("olmoe", lambda f, t: None, ""),
        ("newmoe", lambda f, t: None, "this llama.cpp knows no Mixture-of-Experts architecture 'newmoe'"),
        ("refact", lambda f, t: None, "llama.cpp's refact graph does not use its experts"),
        ("olmoe", lambda f, t: [t.pop(f"blk.{n}.ffn_gate_inp.weight") for n in (1, 2)], "no layer has experts"),
        ("olmoe", lambda f, t: f.update({"olmoe.expert_used_count": 9}), "top-9 of 4 experts"),
        (
            "olmoe",
            lambda f, t: t.update({f"blk.{n}.ffn_gate_tid2eid.weight": np.zeros((5, 4), np.int32) for n in (1, 2)}),
            "all its experts are chosen by token",
        ),
    ],
)
def test_what_cannot_be_steered(tmp_path: Path, arch: str, change: Callable[[Any, Any], Any], words: str) -> None:
    fields, tensors = model_parts()
    change(fields, tensors)
    fields = {key.replace("olmoe.", f"{arch}."): value for key, value in fields.items()}
    problem = why_not_steerable(model_info(write_gguf(tmp_path / "m.gguf", arch, fields, tensors), routers=False))
    assert words in problem
    assert bool(problem) == bool(words)
