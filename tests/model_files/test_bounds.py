"""What a forged header says is refused before anything is built from it, and FIFOs and devices before they are read."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local._util import npz
from steermoe_local._util.file_kinds import COUNTS, kind_of
from steermoe_local._util.regular_files import open_regular
from steermoe_local.errors import FormatError, ModelError
from steermoe_local.model_files.header import read_header, read_header_from
from steermoe_local.model_files.loadable import FULL_ROTATION, MAX_EXPERTS, MAX_LAYERS
from steermoe_local.model_files.memory import check_memory
from steermoe_local.model_files.model_info import check_loadable, info_from, model_info
from steermoe_local.model_files.splits import SplitPaths
from steermoe_local.steering.bias_file import read_bias
from tests.support import fuzz_models, hostile
from tests.support.builders import HEX, model_parts, write_gguf
from tests.support.native_programs import TREE

MAX32 = (1 << 32) - 1


def make(path: Path, changes: dict[str, Any]) -> Path:
    fields, tensors = model_parts()
    fields = {key: value for key, value in (fields | changes).items() if value is not ...}
    return write_gguf(path, "olmoe", fields, tensors)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("olmoe.block_count", MAX32),
        ("olmoe.block_count", 4097),
        ("olmoe.nextn_predict_layers", 4),
        ("olmoe.expert_count", MAX32),
        ("olmoe.expert_used_count", MAX32),
        ("olmoe.expert_group_count", MAX32),
        ("olmoe.expert_shared_count", 1 << 31),
        ("olmoe.context_length", MAX32),
        ("olmoe.context_length", (1 << 30) + 1),
        ("olmoe.embedding_length", 1 << 31),
        ("split.count", MAX32),
        ("split.count", 65535),
    ],
)
def test_numbers_that_no_model_has(tmp_path: Path, field: str, value: int) -> None:
    path = make(tmp_path / "m.gguf", {field: value})
    with pytest.raises(ModelError, match=rf"m\.gguf: {re.escape(field)} is {value}"):
        model_info(path)


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("olmoe.attention.head_count", MAX32, MAX32),
        ("olmoe.attention.head_count_kv", [4, 4], "2 numbers for 3 layers"),
        ("olmoe.attention.head_count", [4, 4], "2 numbers for 3 layers"),
        ("olmoe.attention.key_length", 1 << 31, 1 << 31),
        ("olmoe.feed_forward_length", MAX32, MAX32),
    ],
)
def test_sizes_of_the_cache(tmp_path: Path, field: str, value: Any, shown: Any) -> None:
    info = model_info(make(tmp_path / "m.gguf", {field: value}))
    with pytest.raises(ModelError, match=rf"{re.escape(field)} (is|has) {shown}"):
        check_memory(info, 0, free=1 << 30)


def test_a_vocabulary_of_numbers_for_the_experts_of_layers(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expert_used_count"):
        model_info(make(tmp_path / "m.gguf", {"olmoe.expert_used_count": [float("nan")] * 3}))


@pytest.mark.parametrize(("field", "longest"), [("general.name", 4096), ("tokenizer.chat_template", 1 << 20)])
def test_texts(tmp_path: Path, field: str, longest: int) -> None:
    assert model_info(make(tmp_path / "m.gguf", {field: "n" * longest})).is_moe
    for length in (longest + 1, 3 << 20):
        with pytest.raises(ModelError, match=f"{field} is longer than {longest}"):
            model_info(make(tmp_path / "m.gguf", {field: "n" * length}))
    # a long text that nothing here needs, as of files with a whole tokenizer.json, is stepped over
    header = read_header(make(tmp_path / "m.gguf", {"tokenizer.huggingface.json": "n" * (3 << 20)}))
    assert header.value("tokenizer.huggingface.json") is None


@pytest.mark.parametrize(
    "fields",
    [
        *([(f"k{n}", 9, struct.pack("<IQ", 0, 4096) + bytes(4096)) for n in range(257)],),  # values kept
        *([(f"k{n}", 9, struct.pack("<IQ", 8, 1 << 20) + bytes(8 << 20)) for n in range(5)],),  # empty texts
        *([(f"k{n}", 8, hostile.string(b"x" * (1 << 20))) for n in range(17)],),  # texts kept
    ],
    ids=["values", "empty texts", "texts"],
)
def test_a_header_of_much_that_is_kept(tmp_path: Path, fields: list[tuple[str, int, bytes]]) -> None:
    path = tmp_path / "m.gguf"
    body = b"".join(hostile.string(key.encode()) + struct.pack("<I", kind) + value for key, kind, value in fields)
    path.write_bytes(hostile.header(0, len(fields), body))
    with pytest.raises(FormatError, match="damaged GGUF at byte"):
        read_header(path)


def test_a_header_on_the_hub(tmp_path: Path) -> None:
    """It is read by ranges, and no more of it than a header may have, whatever it says."""
    data = make(tmp_path / "m.gguf", {"olmoe.block_count": MAX32}).read_bytes()
    header = read_header_from(Path("USER/REPO/m.gguf"), len(data), lambda start, stop: data[start:stop])
    with pytest.raises(ModelError, match=f"block_count is {MAX32}"):
        info_from([header], routers=False)
    long = hostile.header(0, 1, hostile.string(b"a") + struct.pack("<I", 8) + hostile.string(b"", 1 << 40))
    asked = []

    def fetch(start: int, stop: int) -> bytes:
        asked.append(stop - start)
        return (long + bytes(stop))[start:stop]

    with pytest.raises(FormatError, match="longer than 1 MiB"):
        read_header_from(Path("m.gguf"), 1 << 41, fetch, first=4096, limit=1 << 20)
    assert sum(asked) <= 1 << 20


def test_layers_are_those_of_the_tensors(tmp_path: Path) -> None:
    """A number of layers without tensors builds nothing, and is named."""
    for n_layer in (2, 4, 512):
        info = model_info(make(tmp_path / "m.gguf", {"olmoe.block_count": n_layer}))
        assert (info.dense_layers, set(info.moe_layers) - {2}) == ((0,), {1})
        assert f"block_count says {n_layer} layers" in info.obstacle
        with pytest.raises(
            ModelError, match=f"block_count says {n_layer} layers, but its tensors are of layers up to 2"
        ):
            check_loadable(info.paths[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"olmoe.block_count": 0}, "block_count is 0"),
        ({"olmoe.block_count": 513}, "block_count is 513"),
        ({"olmoe.nextn_predict_layers": 3}, "nextn_predict_layers is 3 of 3"),
        ({"olmoe.expert_count": 1025}, "expert_count is 1025"),
        ({"olmoe.expert_used_count": 5}, "expert_used_count is 5 of 4"),
        ({"olmoe.expert_used_count": ...}, "expert_used_count is 0 of 4"),
        ({"olmoe.expert_used_count": [2, 2, 0]}, r"expert_used_count is \[0, 2\]"),
        ({"olmoe.expert_used_count": [0, 1, 2]}, r"expert_used_count is \[1, 2\]"),
        ({"olmoe.expert_count": 0}, "expert_used_count is 2 of 0"),
        ({"olmoe.expert_group_count": 4}, "expert_group_count is 4 for 4"),
        ({"olmoe.expert_group_count": 3}, "4 experts are in 3 groups"),
        ({"olmoe.expert_group_count": 2}, "4 experts are in 2 groups, of which 0"),
        ({"olmoe.rope.scaling.type": "bogus"}, "rope.scaling.type is 'bogus'"),
        ({"olmoe.attention.head_count": 4, "olmoe.rope.dimension_count": 3}, "dimension_count is 3, .* 8 dimensions"),
        ({"olmoe.attention.head_count": 4, "olmoe.attention.key_length": 4}, "keys of 4 and values of 8"),
        ({"olmoe.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
        ({"olmoe.attention.layer_norm_rms_epsilon": -1.0}, "epsilon is -1"),
        ({"tokenizer.ggml.unknown_token_id": 5}, "unknown_token_id is 5 of 5"),
    ],
)
def test_refused_before_llama_cpp_tries(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """llama.cpp ends the process over each of these."""
    path = make(tmp_path / "m.gguf", changes)
    with pytest.raises(ModelError, match=rf"m\.gguf: .*{words}"):
        check_loadable(path)
    assert model_info(path).identity is None


def test_types_that_nothing_multiplies_by(tmp_path: Path) -> None:
    for name, data in (("blk.1.ffn_gate_inp.weight", np.int32), ("output_norm.weight", np.float64)):
        fields, tensors = model_parts()
        tensors[name] = np.zeros((4, 32), data)
        path = write_gguf(tmp_path / "m.gguf", "olmoe", fields, tensors)
        with pytest.raises(ModelError, match=f"{name} is of type (I32|F64)"):
            check_loadable(path)


def test_the_rules_are_those_of_this_llama_cpp() -> None:
    hparams = (TREE / "src" / "llama-hparams.h").read_text("utf-8")
    for name, value in (("LLAMA_MAX_LAYERS", MAX_LAYERS), ("LLAMA_MAX_EXPERTS", MAX_EXPERTS)):
        assert re.findall(rf"#define {name} +(\d+)", hparams) == [str(value)]
    for arch in FULL_ROTATION:
        files = [TREE / "src" / "models" / f"{arch.replace('_', dash)}.cpp" for dash in "-_"]
        source = next(file.read_text("utf-8") for file in files if file.exists())
        assert re.search(r"^ *GGML_ASSERT\(n_embd_head == n_rot\)", source, re.MULTILINE), arch


def test_parts_are_not_built_from_a_name(tmp_path: Path) -> None:
    parts = SplitPaths.of(tmp_path / "m-00001-of-99999.gguf")
    assert parts is not None
    assert (parts.count, parts.part(99999).name) == (99999, "m-99999-of-99999.gguf")
    assert next(iter(parts)) == tmp_path / "m-00001-of-99999.gguf"
    make(tmp_path / "m-00001-of-02000.gguf", {"split.count": 2000, "split.no": 0})
    with pytest.raises(ModelError, match=r"m-00002-of-02000\.gguf: missing"):
        model_info(tmp_path / "m-00001-of-02000.gguf")


def test_a_tensor_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "m.gguf", {})
    header, before = read_header(path), model_info(path).require_moe()
    router = header.tensors["blk.1.ffn_gate_inp.weight"]
    whole = header.read(router)
    monkeypatch.setattr("steermoe_local.model_files.header._CHUNK", 200)
    assert [len(part) for part in header.read_parts(router)] == [32] * 4
    assert np.array_equal(header.read(router), whole)
    assert model_info(path).require_moe() == before


def test_a_bias_of_more_experts_than_tables_hold(tmp_path: Path) -> None:
    fields = hostile.FIELDS | {"expertbias.layer_count": 4096, "expertbias.expert_count": 16384}
    with pytest.raises(FormatError, match="4096 layers of 16384 experts"):
        read_bias(write_gguf(tmp_path / "b.gguf", "expertbias", fields, {}))
    assert fields["expertbias.router_sha256"] == HEX


def test_archives(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, a1=np.zeros((16, 1 << 20), np.int64))
    with (
        pytest.raises(FormatError, match=f"takes {128 << 20} bytes"),
        npz.opened(path, "a counts file", "record again", COUNTS) as archive,
    ):
        archive.array("a1", "i", (16, 1 << 20))
    with zipfile.ZipFile(path, "w") as archive_of_many:
        for number in range(60_000):
            archive_of_many.writestr(f"{number:030d}.npy", b"")
    assert kind_of(path) is None
    with pytest.raises(FormatError, match="list of members"), npz.opened(path, "a", "again", COUNTS):
        pass


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_is_no_regular_file(tmp_path: Path) -> None:
    fifo, sock, link = tmp_path / "f.gguf", tmp_path / "s.gguf", tmp_path / "z.gguf"
    os.mkfifo(fifo)
    link.symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(sock))
        for path, what in ((fifo, "a FIFO"), (sock, "a socket"), (link, "a device"), (tmp_path, "Is a directory")):
            for streams in (False, True):
                with pytest.raises(OSError, match=what):
                    open_regular(path, streams=streams)
            assert kind_of(path) is None
            with pytest.raises(ModelError, match=what):
                model_info(path)
    with open_regular(os.devnull, streams=True) as empty:
        assert empty.read() == b""
    read, write = os.pipe()
    os.write(write, b"{}")
    os.close(write)
    with open_regular(f"/dev/fd/{read}", streams=True) as stream:
        assert stream.read() == b"{}"
    os.close(read)
    with pytest.raises(OSError):
        open_regular("/dev/stdin/x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_commands_do_not_wait_for_a_writer(tmp_path: Path) -> None:
    for name in ("m.gguf", "x.json"):
        os.mkfifo(tmp_path / name)
    make(tmp_path / "layers.gguf", {"olmoe.block_count": MAX32})
    commands = [
        "info m.gguf",
        "run -m m.gguf -p x",
        "bias show m.gguf",
        "map show x.json",
        "run -m tiny -p x --bias m.gguf",
    ]
    script = """
import sys
from click.testing import CliRunner
from steermoe_local.cli import main
for line in sys.argv[1:]:
    done = CliRunner().invoke(main, line.split())
    assert done.exit_code == 1 and "it is a FIFO" in done.stderr, (line, done.output, done.exception)
    assert len(done.stderr.splitlines()) == 1, done.stderr
done = CliRunner().invoke(main, ["models", "--models-dir", ".", "--maps", ".", "--json"])
assert done.exit_code == 0, done.output
print(done.stdout)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", script, *commands]
    done = subprocess.run(  # minutes, where a wait would be for ever
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "it is a FIFO" in done.stdout
    assert f"block_count is {MAX32}" in done.stdout
    assert '"name": "tiny"' in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of memory and time are POSIX's")
def test_damaged_models_raise_nothing_else() -> None:
    outcomes, finding = fuzz_models.fuzz(600, seed=15, batch=600)
    assert not finding
    assert sum(outcomes.values()) == 600
    assert set(outcomes) == {"refused", "not loadable or steerable", "steerable"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of memory and time are POSIX's")
def test_the_fuzzer_finds_faults(tmp_path: Path) -> None:
    """Another error, much memory and an endless loop are findings."""
    script = """
import sys
from pathlib import Path
from tests.support import fuzz_models
fuzz_models.SECONDS = 1
def faulty(path, scratch):
    if sys.argv[1] == "error":
        raise OverflowError(path)
    while True:
        if sys.argv[1] == "memory":
            tuple(range(1 << 32))
fuzz_models.examine = faulty
fuzz_models.run(0, 1, 1, Path(sys.argv[2]))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for fault, error in (("error", "OverflowError"), ("memory", "MemoryError"), ("time", "TimeoutError")):
        (folder := tmp_path / fault).mkdir()
        command = [sys.executable, "-c", script, fault, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "FINDING: --seed 1 --first 0 --runs 1" in done.stdout
        assert error in done.stderr.splitlines()[-1]
