"""Quantizations as llama-quantize makes them: the same bytes, used again, and nothing left behind by a failure."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

from steermoe_local import NativeError, UsageError, model_info
from steermoe_local._util.children import Child
from steermoe_local.errors import ModelError, ModelMismatchError, ResourceError
from steermoe_local.evaluation.measuring.json_values import from_plain, plain
from steermoe_local.evaluation.studies.transfer import quantize
from steermoe_local.evaluation.studies.transfer.quantize import (
    FILE_TYPES,
    QUANTS,
    ModelFile,
    Quantizer,
    estimate,
    file_type,
)
from steermoe_local.llama import quantizer
from steermoe_local.model_files.model_info import ModelInfo
from tests.support.gguf_copy import copy_model
from tests.support.low_level import lib

MADE = ("Q8_0", "Q4_K_M", "IQ4_XS")


@pytest.fixture(scope="module")
def info(tiny_path: Path) -> ModelInfo:
    return model_info(tiny_path)


@pytest.fixture(scope="module")
def made(info: ModelInfo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Quantizer, dict[str, ModelFile]]:
    """Some quantizations of the embedded model; tests leave them alone."""
    quantizer = Quantizer(info, tmp_path_factory.mktemp("made"), n_threads=1)
    return quantizer, {name: quantizer.make(file_type(name)) for name in MADE}


@pytest.fixture
def no_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantizing anything is a mistake."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("quantized again")

    monkeypatch.setattr(quantize, "quantize_file", refuse)


def copied(made: tuple[Quantizer, dict[str, ModelFile]], folder: Path) -> Quantizer:
    """The same quantizations in a folder of the test's own."""
    shutil.copytree(made[0].folder, folder, dirs_exist_ok=True)
    return Quantizer(made[0].base, folder, n_threads=1)


#
# names
#


def test_the_types_are_llama_cpps() -> None:
    llama = lib().llama_cpp
    numbers = {
        name.removeprefix("LLAMA_FTYPE_MOSTLY_").removeprefix("LLAMA_FTYPE_ALL_"): value
        for name, value in vars(llama).items()
        if name.startswith(("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_"))
    }
    for name, kind in FILE_TYPES.items():
        assert kind.name == name
        assert numbers[name] == kind.number, name
    # the rest: too coarse to be asked for by this name, or without a quantizer
    assert set(numbers) - set(FILE_TYPES) <= {"Q1_0", "Q2_0", "NVFP4"}


def test_blocks_and_bits() -> None:
    """Of the type that the name gives to most weights."""
    others = {"MXFP4_MOE": "MXFP4", "IQ3_M": "IQ3_S", "IQ3_XS": "IQ3_S", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S"}
    for name, kind in FILE_TYPES.items():
        stem = others.get(name) or name.removesuffix("_S" if "_K_" in name else "").removesuffix("_M")
        stem = stem.removesuffix("_L") if "_K_" in name else others.get(name, name if "_K_" not in name else stem)
        block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[stem]]
        assert (kind.block, kind.bits) == (block, 8 * n_bytes / block), name


def test_names() -> None:
    assert [file_type(name).name for name in ("q4_k_m", " Q4_K ", "mxfp4", "F16")] == [
        "Q4_K_M",
        "Q4_K_M",
        "MXFP4_MOE",
        "F16",
    ]
    assert [file_type(name).name for name in QUANTS] == list(QUANTS)
    with pytest.raises(UsageError, match=r"'Q4_K_X'.* F32, F16"):
        file_type("Q4_K_X")
    for name in ("IQ2_XXS", "iq1_s", "Q2_K_S"):
        with pytest.raises(UsageError, match=f"{name.upper()} needs"):
            file_type(name)


#
# what is made
#


def test_the_program_writes_the_same_file(tool: Any, made: Any, tmp_path: Path) -> None:
    quantizer, files = made
    for name, file in files.items():
        done = tool("llama-quantize", quantizer.base.paths[0], tmp_path / "program.gguf", name, 1)
        assert done.returncode == 0, done.stderr[-2000:]
        assert file.path.read_bytes() == (tmp_path / "program.gguf").read_bytes(), name


def test_what_is_said_of_a_file(made: Any) -> None:
    """Against gguf-py's reader."""
    quantizer, files = made
    for name, file in files.items():
        assert file.path == quantizer.folder / f"tiny-moe-{name}.gguf"
        tensors = GGUFReader(file.path).tensors
        weights = sum(tensor.n_elements for tensor in tensors)
        assert file.size_bytes == file.path.stat().st_size
        assert file.bits_per_weight == pytest.approx(8 * file.size_bytes / weights)
        for kind, share in file.types.items():
            ours = [tensor for tensor in tensors if tensor.tensor_type.name == kind]
            assert share.tensors == len(ours)
            assert share.share == pytest.approx(sum(tensor.n_elements for tensor in ours) / weights)
        assert sum(share.share for share in file.types.values()) == pytest.approx(1)
        assert list(file.types.values()) == sorted(file.types.values(), key=lambda share: -share.share)
        assert model_info(file.path).file_type == file.file_type == name
        assert model_info(file.path).require_moe() == quantizer.identity
        assert file.seconds is not None
        assert file.seconds > 0


def test_fallbacks_are_said(made: Any) -> None:
    """The embedded model's experts are 32 wide: their second matrix fits no block of 256."""
    files = made[1]
    assert (files["Q8_0"].n_fallback, files["Q8_0"].fallback_share) == (0, 0)
    for name, types in {"Q4_K_M": {"Q5_0", "Q8_0"}, "IQ4_XS": {"IQ4_NL", "Q5_1"}}.items():
        file = files[name]
        tensors = GGUFReader(file.path).tensors
        narrow = [t for t in tensors if t.shape[0] == 32]
        assert {t.tensor_type.name for t in narrow} <= types
        assert all("ffn_down_exps" in t.name for t in narrow)
        assert file.n_fallback == len(narrow) == 5
        assert file.fallback_share == pytest.approx(
            sum(t.n_elements for t in narrow) / sum(t.n_elements for t in tensors)
        )


def test_the_estimate_is_rather_high(made: Any, info: ModelInfo) -> None:
    for name, file in made[1].items():
        assert 0.99 * file.size_bytes <= estimate(info, file_type(name)) <= 1.4 * file.size_bytes, name
    assert estimate(info, file_type("F16")) == pytest.approx(info.size_bytes, rel=0.01)


def test_a_copy_as_json(made: Any) -> None:
    for file in made[1].values():
        data = json.loads(json.dumps(plain(file)))
        assert data["path"] == file.path.name, "no folders of this machine"
        assert from_plain(ModelFile, data) == replace(file, path=Path(file.path.name))


def test_a_split_model(info: ModelInfo, made: Any, tmp_path: Path) -> None:
    parts = copy_model(info.paths[0], tmp_path / "tiny.gguf", max_tensors=25)
    quantizer = Quantizer(model_info(parts[1]), tmp_path / "out", n_threads=1)
    file = quantizer.make(file_type("Q8_0"))
    assert file.path.name == "tiny-Q8_0.gguf"
    whole, single = (
        {t.name: t.data.tobytes() for t in GGUFReader(path).tensors} for path in (file.path, made[1]["Q8_0"].path)
    )
    assert whole == single
    assert quantizer.find(file_type("Q8_0")) is not None
    assert quantizer.sha256 != made[0].sha256


def test_a_quantized_base(made: Any, tmp_path: Path) -> None:
    assert made[0].warning is None
    base = model_info(made[1]["Q4_K_M"].path)
    quantizer = Quantizer(base, tmp_path, n_threads=1)
    assert quantizer.warning is not None
    assert "quantized already (Q4_K_M)" in quantizer.warning
    assert "take an F16 or BF16" in quantizer.warning
    assert quantizer.make(file_type("Q8_0")).types["Q8_0"].share > 0.9


def test_a_model_without_experts(info: ModelInfo, tmp_path: Path) -> None:
    dense = replace(info, identity=None, obstacle="no layer has experts")
    with pytest.raises(ModelError, match="no layer has"):
        Quantizer(dense, tmp_path)


#
# used again
#


def test_what_is_there_is_used_again(made: Any, no_quantizer: None) -> None:
    quantizer, files = made
    for name, file in files.items():
        again = quantizer.make(file_type(name))
        assert again == replace(file, seconds=None)
    quantizer.check_room([file_type(name) for name in MADE], keep=True)


DAMAGE: dict[str, Callable[[Path, Path], Any]] = {
    "the file is cut": lambda file, _: os.truncate(file, file.stat().st_size - 64),
    "the file is gone": lambda file, _: file.unlink(),
    "the file is another": lambda file, _: file.write_bytes(bytes(file.stat().st_size)),
    "the note is gone": lambda _, note: note.unlink(),
    "the note is no JSON": lambda _, note: note.write_bytes(b"\xff{"),
    "the note is a list": lambda _, note: note.write_text("[]"),
    "of another base": lambda _, note: note.write_text(note.read_text().replace('"sha256": "', '"sha256": "0')),
    "of another type": lambda _, note: note.write_text(note.read_text().replace("Q8_0", "Q6_K")),
    "of another tool": lambda _, note: note.write_text(note.read_text().replace("steermoe-local ", "other ")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_certain_is_not_used(made: Any, tmp_path: Path, damage: str) -> None:
    quantizer = copied(made, tmp_path)
    kind = file_type("Q8_0")
    path = quantizer.path(kind)
    assert quantizer.find(kind) is not None
    DAMAGE[damage](path, path.with_name(path.name + ".json"))
    assert quantizer.find(kind) is None


def test_another_base_of_the_same_name(made: Any, tmp_path: Path) -> None:
    """One bit of one weight differs; its size and routers do not."""
    quantizer = copied(made, tmp_path / "out")
    other = tmp_path / "tiny-moe.gguf"
    data = bytearray(quantizer.base.paths[0].read_bytes())
    tensor = next(t for t in GGUFReader(quantizer.base.paths[0]).tensors if t.name == "output.weight")
    data[tensor.data_offset] ^= 1
    other.write_bytes(data)
    changed = Quantizer(model_info(other), quantizer.folder)
    assert changed.identity == quantizer.identity
    assert changed.find(file_type("Q8_0")) is None
    assert quantizer.find(file_type("Q8_0")) is not None


def test_removing(made: Any, tmp_path: Path) -> None:
    quantizer = copied(made, tmp_path / "out")
    for name in MADE:
        assert quantizer.folder.exists()
        quantizer.remove(file_type(name))
    assert not quantizer.folder.exists(), "an empty folder stays behind"


#
# failures
#


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_no_room(info: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [file_type(name) for name in ("Q8_0", "Q4_0")]
    sizes = [estimate(info, kind) for kind in kinds]
    quantizer = Quantizer(info, tmp_path / "not" / "there")
    free = sizes[0] + 1
    monkeypatch.setattr(quantize.shutil, "disk_usage", lambda _: Usage(0, 0, free))
    quantizer.check_room(kinds, keep=False)
    with pytest.raises(ResourceError, match=r"2 quantizations .* MB, .* MB .*keep"):
        quantizer.check_room(kinds, keep=True)
    quantizer.check_room(kinds[:1], keep=True)
    free = sizes[0] - 1
    with pytest.raises(ResourceError, match=r"Q8_0 .* 5\.\d MB"):
        quantizer.check_room(kinds, keep=False)
    assert not (tmp_path / "not").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX's")
def test_a_disk_that_fills_up(info: ModelInfo, tmp_path: Path) -> None:
    """The child may write no more than a megabyte to a file: to llama.cpp the same as a full disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(ResourceError, match=r"Q8_0 \(about 5\.\d MB\) .*iostream"):
            Quantizer(info, tmp_path, n_threads=1).make(file_type("Q8_0"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_the_child(info: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[Child] = []

    class Endless(Child):
        """Has begun its file, and does not come to the end of it before the interrupt, however fast it is."""

        def __init__(self, _function: Any, arguments: Any, **kwargs: Any) -> None:
            Path(arguments[1]).write_bytes(b"begun")
            super().__init__(time.sleep, [3600], **kwargs)
            children.append(self)

    monkeypatch.setattr(quantizer, "Child", Endless)
    monkeypatch.setattr(quantizer, "_POLL", 0.005)
    seen: list[list[str]] = []

    def progress(what: str, done: int, total: int) -> None:
        assert (what, total) == ("quantize Q8_0", estimate(info, file_type("Q8_0")) >> 20)
        if children:  # something is written
            seen.append([path.name for path in tmp_path.iterdir()])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Quantizer(info, tmp_path, n_threads=1, progress=progress).make(file_type("Q8_0"))
    written = [name for name in seen[0] if name != ".tiny-moe-Q8_0.gguf.lock"]
    assert len(written) == 1
    assert written[0].startswith(".tiny-moe-Q8_0.gguf."), "written under its own name before it is whole"
    assert [child.returncode for child in children] == [1 if sys.platform == "win32" else -9]
    assert list(tmp_path.iterdir()) == []


def test_a_child_does_not_outlive_its_parent(tiny_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    target.write_bytes(b"begun")
    arguments = [str(tiny_path), str(target), 15, 1, False]
    with Child(quantizer._quantize, arguments, leftover=target) as child:
        child.let_go()  # as when this process ends
        assert child.wait(60) == 1
    assert not target.exists()


def test_what_llama_cpp_refuses(info: ModelInfo, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone.gguf"
    shutil.copy(info.paths[0], gone)
    quantizer = Quantizer(model_info(gone), tmp_path / "out", n_threads=1)
    _ = quantizer.sha256
    gone.write_bytes(gone.read_bytes()[:1000])
    monkeypatch.setattr(quantize, "estimate", lambda *_: 1)
    monkeypatch.setattr(Quantizer, "warning", None)
    with pytest.raises(NativeError, match=r"gone\.gguf: .*Q8_0: ") as error:
        quantizer.make(file_type("Q8_0"))
    assert "\n" not in str(error.value)
    assert error.value.code == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_reasons_of_the_child(tiny_path: Path, made: Any, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    with pytest.raises(NativeError, match=r"importance matrix.*blk\.0"):
        quantizer.quantize_file(tiny_path, target, FILE_TYPES["IQ2_XXS"].number, n_threads=1)
    with pytest.raises(NativeError, match="requantizing from type q4_K"):
        quantizer.quantize_file(made[1]["Q4_K_M"].path, target, FILE_TYPES["Q2_K"].number, n_threads=1)


def test_a_type_that_needs_a_matrix_after_all(info: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NativeError("ERROR: this quantization requires an importance matrix!", 1)

    monkeypatch.setattr(quantize, "quantize_file", refuse)
    with pytest.raises(UsageError, match=r"Q8_0 .*importance matrix"):
        Quantizer(info, tmp_path).make(file_type("Q8_0"))


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script and signals")
def test_a_child_that_dies(info: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an abort in llama.cpp, or because there was no memory left."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'GGML_ASSERT(x) failed' >&2\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(quantizer.sys, "executable", str(program))
    with pytest.raises(NativeError, match=r"signal 9; GGML_ASSERT\(x\) failed$"):
        quantizer.quantize_file(info.paths[0], tmp_path / "q.gguf", 7)
    monkeypatch.setattr(quantizer.sys, "executable", "")
    with pytest.raises(NativeError, match="no Python"):
        quantizer.quantize_file(info.paths[0], tmp_path / "q.gguf", 7)


def test_other_routers(info: ModelInfo, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the quantizer ever touch them, no file is kept."""

    def forge(_: Path, target: Path, *__: Any, **___: Any) -> None:
        data = bytearray(made[1]["Q8_0"].path.read_bytes())
        router = next(t for t in GGUFReader(made[1]["Q8_0"].path).tensors if "ffn_gate_inp" in t.name)
        data[router.data_offset] ^= 1
        target.write_bytes(data)

    monkeypatch.setattr(quantize, "quantize_file", forge)
    with pytest.raises(ModelMismatchError, match=r"routers .*tiny-moe\.gguf"):
        Quantizer(info, tmp_path).make(file_type("Q8_0"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(info: ModelInfo, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / "file" / "models"))):
        Quantizer(info, tmp_path / "file" / "models").make(file_type("Q8_0"))
