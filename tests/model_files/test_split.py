"""Split models (NAME-00001-of-0000N.gguf): what works with one file works with the first part of several."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from steermoe_local import (
    BiasFile,
    ExpertMap,
    ModelError,
    ModelIdentity,
    RoutingCounts,
    SteeredLlama,
    load_pairs,
    model_info,
    record_counts,
    write_bias,
)
from steermoe_local.cli import main
from steermoe_local.llama import capi
from steermoe_local.model_files.header import read_header
from steermoe_local.models.embedded import behaviours
from tests.support.gguf_copy import copy_model
from tests.support.low_level import Context, identity_of, internals, lib, open_model

TOKENS = list(range(3, 30))


def routers_last(name: str) -> bool:
    return "ffn_gate_inp" in name


SPLITS: dict[str, dict[str, Any]] = {
    "two or three layers a part": {"max_tensors": 25},
    "no tensors in the first part": {"max_tensors": 25, "empty_first": True},
    "routers in the last part": {"max_tensors": 60, "order": routers_last},
    "many parts": {"max_tensors": 6},
}


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module", params=SPLITS)
def parts(request: pytest.FixtureRequest, tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The embedded model, split in several ways."""
    return copy_model(tiny_path, tmp_path_factory.mktemp("split") / "tiny.gguf", **SPLITS[request.param])


@pytest.fixture(scope="module")
def three(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The embedded model in three parts."""
    return copy_model(tiny_path, tmp_path_factory.mktemp("three") / "tiny.gguf", max_tensors=25)


@pytest.fixture
def copied(three: list[Path], tmp_path: Path) -> list[Path]:
    """The three parts, to be damaged."""
    return [Path(shutil.copy(part, tmp_path)) for part in three]


@pytest.fixture(scope="module")
def bias(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bias file made for the unsplit model."""
    identity = identity_of(tiny_path)
    path = tmp_path_factory.mktemp("bias") / "b.gguf"
    write_bias(BiasFile.from_signs(np.eye(*identity.shape, 3) - np.eye(*identity.shape), identity), path)
    return path


#
# it works
#


def test_facts(parts: list[Path], tiny_path: Path) -> None:
    whole = model_info(tiny_path).to_dict()
    for part in parts:
        facts = model_info(part).to_dict()
        assert facts.pop("paths") == [str(path) for path in parts]
        assert facts.pop("size_bytes") == sum(path.stat().st_size for path in parts)
        assert facts == {key: value for key, value in whole.items() if key not in ("paths", "size_bytes")}


def test_info_counts_the_parts(three: list[Path]) -> None:
    megabytes = sum(part.stat().st_size for part in three) / 1e6
    assert f"{megabytes:.1f} MB in 3 parts" in run("info", three[0]).stdout
    assert json.loads(run("info", three[0], "--json").stdout)["paths"] == [str(part) for part in three]


def test_llama_cpp_computes_the_same(parts: list[Path], tiny_model: Any, tiny_path: Path, bias: Path) -> None:
    split = open_model(parts[0])
    assert capi.router_sha256(split.model) == identity_of(tiny_path).router_sha256
    logits = []
    for model in (split, tiny_model):
        with Context(model) as context:
            logits.append(context.decode(TOKENS))
            capi.attach(context.ctx, capi.NativeBias.load(bias))
            logits.append(context.fresh(TOKENS))
    assert logits[0].tobytes() == logits[2].tobytes()
    assert logits[1].tobytes() == logits[3].tobytes()
    assert logits[0].tobytes() != logits[1].tobytes()
    split.close()


def test_python(three: list[Path], tiny_path: Path, bias: Path) -> None:
    pairs = load_pairs(behaviours()[0].pairs)[:3]
    counts = [record_counts(path, pairs, n_threads=1) for path in (tiny_path, three[0])]
    assert counts[0].identity == counts[1].identity
    assert (counts[0].a1 == counts[1].a1).all()
    assert (counts[0].a2 == counts[1].a2).all()
    texts = []
    for path in (tiny_path, three[0]):
        llama = SteeredLlama(path, bias=bias, n_ctx=64, n_threads=1)
        texts.append(llama.create_completion("one two", max_tokens=8, temperature=0)["choices"][0]["text"])
        llama.close()
    assert texts[0] == texts[1]


def test_command_line(three: list[Path], tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of the README, by the name of the first part in the working folder."""
    monkeypatch.chdir(three[0].parent)
    first = three[0].name
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(behaviours()[0].pairs.read_text().splitlines(keepends=True)[:8]))
    maps, answers = {}, {}
    for name, model in (("split", first), ("whole", tiny_path)):
        out, counts, bias = (tmp_path / f"{name}.{suffix}" for suffix in ("json", "npz", "gguf"))
        done = run("detect", "-m", model, "--pairs", pairs, "-o", out, "--counts", counts, "-t", 1)
        assert done.exit_code == 0, done.stderr
        maps[name] = (ExpertMap.load(out).identity, ExpertMap.load(out).rd.tolist(), RoutingCounts.load(counts).n1)
        done = run("bias", "build", out, "-o", bias, "-m", first, "--activate", 4, "--deactivate", 4)
        assert done.exit_code == 0, done.stderr
        assert f"made for {first}: yes" in run("bias", "show", bias, "-m", first).stdout
        done = run("run", "-m", model, "--bias", bias, "-t", 1, "--temp", 0, "-n", 8, "-p", "What comes after three?")
        assert done.exit_code == 0, done.stderr
        answers[name] = done.stdout
    assert maps["split"] == maps["whole"]
    assert answers["split"] == answers["whole"]


def test_links_to_blobs(three: list[Path], tiny_path: Path, tmp_path: Path) -> None:
    """The cache of huggingface_hub: links with the parts' names to files that are named by their hash."""
    links = []
    for number, part in enumerate(three):
        blob = Path(shutil.copy(part, tmp_path / f"{number:064x}"))
        links.append(tmp_path / "snapshot" / part.name)
        links[-1].parent.mkdir(exist_ok=True)
        links[-1].symlink_to(blob)
    assert identity_of(links[0]) == identity_of(tiny_path)
    open_model(links[0]).close()


def test_parts_that_llama_cpp_wrote(three: list[Path], tiny_path: Path, tmp_path: Path) -> None:
    """llama-quantize --keep-split."""
    internals()  # llama.cpp's log off
    params = lib().llama_model_quantize_default_params()
    params.nthread, params.ftype, params.keep_split = 1, 7, True
    assert lib().llama_model_quantize(str(three[0]).encode(), str(tmp_path / "q8").encode(), params) == 0
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [f"q8-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    info = model_info(parts[0])
    assert (info.file_type, info.paths) == ("Q8_0", tuple(parts))
    assert info.require_moe() == identity_of(tiny_path)


def test_llama_cpp_programs(three: list[Path], tool: Any, bias: Path, tmp_path: Path) -> None:
    arguments = ("llama-bench", "-m", three[0], "-p", 8, "-n", 2, "-r", 1, "-t", 1, "-o", "json")
    assert tool(*arguments, env={"STEERMOE_BIAS": str(bias)}).returncode == 0
    identity = identity_of(three[0])
    other = ModelIdentity(**(identity.to_dict() | {"router_sha256": "0" * 64}))
    write_bias(BiasFile.from_signs(np.eye(*identity.shape), other), tmp_path / "b.gguf")
    done = tool(*arguments, env={"STEERMOE_BIAS": str(tmp_path / "b.gguf")})
    assert done.returncode != 0
    assert "b.gguf: made for olmoe" in done.stderr


#
# it says what is wrong
#


def later_part(parts: list[Path]) -> tuple[Path, str]:
    return parts[1], f"{parts[1]}: part 2 of 3 of a split model; give the first, {parts[0]}"


def missing(parts: list[Path]) -> tuple[Path, str]:
    parts[2].unlink()
    return parts[0], f"{parts[2]}: missing; fetch all 3 parts into one folder"


def missing_first(parts: list[Path]) -> tuple[Path, str]:
    parts[0].unlink()
    return parts[0], f"{parts[0]}: "


@pytest.mark.parametrize("damage", [later_part, missing, missing_first])
def test_loading(
    copied: list[Path], damage: Callable[[list[Path]], tuple[Path, str]], bias: Path, tmp_path: Path
) -> None:
    given, words = damage(copied)
    pairs = behaviours()[0].pairs
    with pytest.raises(ModelError) as caught:
        SteeredLlama(given)
    assert str(caught.value).startswith(words)
    with pytest.raises(ModelError) as caught:
        record_counts(given, load_pairs(pairs)[:1])
    assert str(caught.value).startswith(words)
    for command in (
        ["run", "-m", given, "-p", "x"],
        ["detect", "-m", given, "--pairs", pairs, "-o", tmp_path / "m.json"],
    ):
        done = run(*command)
        assert done.exit_code == 1
        assert done.stderr.startswith(f"error: {words}")
        assert done.stderr.count("\n") == 1


def set_number(path: Path, key: str, value: int) -> None:
    """Write another value of a split.* key into a file."""
    data = bytearray(path.read_bytes())
    at = data.index(key.encode()) + len(key)
    kind = struct.unpack_from("<I", data, at)[0]
    struct.pack_into({2: "<H", 5: "<i"}[kind], data, at + 4, value)
    path.write_bytes(data)


def another_name(parts: list[Path]) -> tuple[Path, str]:
    other = parts[0].with_name("model.gguf")
    return parts[0].rename(other), f"{other}: one of 3 parts under another name; give the parts llama.cpp's names back"


def another_count_in_the_name(parts: list[Path]) -> tuple[Path, str]:
    other = parts[0].with_name("tiny-00001-of-00004.gguf")
    return parts[0].rename(other), f"{other}: one of 3 parts under another name"


def another_number(parts: list[Path]) -> tuple[Path, str]:
    set_number(parts[1], "split.no", 2)
    return parts[0], f"{parts[1]}: not part 2 of 3; fetch it again"


def another_count(parts: list[Path]) -> tuple[Path, str]:
    set_number(parts[2], "split.count", 4)
    return parts[0], f"{parts[2]}: not part 3 of 3; fetch it again"


def exchanged(parts: list[Path]) -> tuple[Path, str]:
    parts[1].write_bytes(parts[2].read_bytes())
    return parts[0], f"{parts[1]}: not part 2 of 3; fetch it again"


def another_total(parts: list[Path]) -> tuple[Path, str]:
    total = sum(len(read_header(part).tensors) for part in parts)
    set_number(parts[0], "split.tensors.count", total + 1)
    return parts[0], f"{parts[0]}: its 3 parts have {total} tensors, not {total + 1}; fetch all parts of one model"


def a_tensor_twice(parts: list[Path]) -> tuple[Path, str]:
    parts[1].write_bytes(parts[0].read_bytes())
    set_number(parts[1], "split.no", 1)
    first, second, third = (len(read_header(part).tensors) for part in parts)
    set_number(parts[0], "split.tensors.count", first + second + third)
    return parts[0], f"{parts[1]}: has the tensor token_embd.weight of another part again"


def cut_off(parts: list[Path]) -> tuple[Path, str]:
    parts[1].write_bytes(parts[1].read_bytes()[:-500])
    return parts[0], f"{parts[1]}: damaged GGUF at byte "


@pytest.mark.parametrize(
    "damage",
    [
        missing,
        another_name,
        another_count_in_the_name,
        another_number,
        another_count,
        exchanged,
        another_total,
        a_tensor_twice,
        cut_off,
    ],
)
def test_info(copied: list[Path], damage: Callable[[list[Path]], tuple[Path, str]]) -> None:
    given, words = damage(copied)
    done = run("info", given)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {words}")
    assert done.stderr.count("\n") == 1


def test_a_part_of_another_model(copied: list[Path], tiny_path: Path, tmp_path: Path) -> None:
    """Same names and numbers, other weights: another router hash, so that files of the first model are refused."""
    name = f"blk.{model_info(tiny_path).moe_layers[-1]}.ffn_gate_inp.weight"
    part = next(part for part in copied if name in read_header(part).tensors)
    data = bytearray(part.read_bytes())
    data[read_header(part).tensors[name].offset] ^= 1
    part.write_bytes(data)
    assert identity_of(copied[0]) != identity_of(tiny_path)


def test_a_whole_model_with_the_name_of_a_part(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny-00002-of-00003.gguf"
    path.symlink_to(tiny_path)
    assert identity_of(path) == identity_of(tiny_path)
    SteeredLlama(path, n_ctx=64, n_threads=1).close()
