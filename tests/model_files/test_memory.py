"""What a model takes before it is loaded: the estimate against llama.cpp's own log, and what is said of it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import ResourceError, SteeredLlama
from steermoe_local.cli import main
from steermoe_local.model_files import memory
from steermoe_local.model_files.cache_shape import CacheShape, cache_shape, read_headers
from steermoe_local.model_files.memory import (
    MemoryEstimate,
    check_memory,
    control_group_memory,
    free_memory,
    system_memory,
)
from steermoe_local.model_files.model_info import model_info
from tests.support.announced import besides
from tests.support.low_level import lib
from tests.support.paths import BUILD, ROOT
from tests.support.random_models import DENSE_FIRST, STEERABLE, RandomModel

PAIRS = ROOT / "examples" / "pairs" / "numbers.jsonl"
FOUR_PAIRS = "detect: 4 pairs, 8 texts"  # what `detect` says of them before it starts
F32, F16, Q8_0, Q4_0 = 0, 1, 8, 2
MIB = 1 << 20


#
# against llama.cpp
#


@dataclass(frozen=True)
class Allocated:
    """Bytes that llama.cpp logs for a context."""

    cache: float
    compute: float


Measure = Callable[..., Allocated]


@pytest.fixture
def allocated() -> Iterator[Measure]:
    """Make a context and read the sizes of its buffers from llama.cpp's log."""
    llama, lines = lib(), []  # first: it decides which libraries are loaded
    from llama_cpp import _logger

    @llama.llama_log_callback
    def keep(level: int, text: bytes, data: Any) -> None:
        lines.append(text.decode("utf-8", "replace"))

    def measure(path: Path, n_ctx: int, n_sequences: int, type_k: int, type_v: int, flash_attn: bool) -> Allocated:
        llama.llama_backend_init()
        llama.llama_log_set(keep, ctypes.c_void_p(0))
        model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        assert model
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = n_ctx * n_sequences, n_sequences, False
        params.type_k, params.type_v = type_k, type_v
        params.n_batch = params.n_ubatch = 512
        params.flash_attn_type = int(flash_attn)
        lines.clear()
        context = llama.llama_init_from_model(model, params)
        log = "".join(lines)
        assert context, log
        llama.llama_free(context)
        llama.llama_model_free(model)
        # "RS" are recurrent states; each kind of memory logs its buffers
        cache = re.findall(r"(?:KV|RS) buffer size = +([0-9.]+) MiB", log)
        compute = re.findall(r"compute buffer size = +([0-9.]+) MiB", log)
        assert compute, log
        return Allocated(sum(map(float, cache)) * MIB, sum(map(float, compute)) * MIB)

    yield measure
    llama.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


SETTINGS = {
    "usual": (4096, 1, F16, F16, False),
    "padded": (1000, 1, F32, F16, False),
    "sequences": (2048, 3, F16, F16, True),
    "quantized": (4096, 1, Q8_0, Q4_0, True),
}
MODELS = {**STEERABLE, "dense first": DENSE_FIRST}
CASES = [("tiny", setting) for setting in SETTINGS] + [
    # the heads of the random models are too narrow for the blocks of a quantized cache
    (name, setting)
    for name in MODELS
    for setting in SETTINGS
    if setting != "quantized"
]


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_the_estimate_is_what_llama_cpp_allocates(
    name: str, setting: str, tiny_path: Path, random_model: Callable[[RandomModel], Path], allocated: Measure
) -> None:
    path = tiny_path if name == "tiny" else random_model(MODELS[name])
    n_ctx, n_sequences, type_k, type_v, flash_attn = SETTINGS[setting]
    estimate = check_memory(model_info(path), n_ctx, n_sequences, type_k, type_v, flash_attn=flash_attn, free=1 << 50)
    found = allocated(path, n_ctx, n_sequences, type_k, type_v, flash_attn)
    assert abs(estimate.cache - found.cache) < 0.02 * MIB, (estimate.cache / MIB, found.cache / MIB)
    assert 0.8 * found.compute < estimate.compute < 1.5 * found.compute + 16 * MIB, (estimate.compute, found.compute)


# layers without attention, latent keys, sliding windows, heads that differ by layer, convolutions
@pytest.mark.parametrize(
    "architecture", ["qwen3next", "lfm2moe", "kimi-linear", "deepseek2", "gpt-oss", "laguna", "afmoe", "minimax-01"]
)
def test_unusual_architectures(architecture: str, allocated: Measure, tool: Any, tmp_path: Path) -> None:
    tool("test-llama-archs", "--help")  # skips without it
    from tests.support.architectures import write_upstream

    (path,) = write_upstream(BUILD / "bin" / "test-llama-archs", tmp_path, architecture)
    estimate = check_memory(model_info(path), 4096, free=1 << 50)
    found = allocated(path, 4096, 1, F16, F16, False)
    assert estimate.cache == pytest.approx(found.cache, rel=0.03)
    assert estimate.compute == pytest.approx(found.compute, rel=0.5)


def test_models_that_keep_nothing(tool: Any, tmp_path: Path) -> None:
    tool("test-llama-archs", "--help")
    from tests.support.architectures import write_upstream

    (path,) = write_upstream(BUILD / "bin" / "test-llama-archs", tmp_path, "llada-moe")
    assert check_memory(model_info(path), 4096, free=1 << 50).cache == 0


def test_the_cache_of_the_embedded_model_by_hand(tiny_path: Path) -> None:
    info = model_info(tiny_path)
    shape = cache_shape(info, read_headers(info))
    assert len(shape.rows) == info.n_layer
    by_hand = sum(keys + values for keys, values in shape.rows) * 2 * 512
    assert check_memory(info, 400, free=1 << 50).cache == by_hand
    assert check_memory(info, 0, free=1 << 50).n_ctx == info.context_length


def test_values_of_several_widths() -> None:
    """Without flash attention they lie transposed, each layer as wide as the widest (llama_kv_cache)."""
    shape = CacheShape(rows=((4, 4), (4, 12), (4, 0)), state=5, n_head=1, n_masks=1, n_embd=8, n_ff=8, n_vocab=8)
    assert shape.cache_bytes(10, 2, F16, F16, True) == 10 * 2 * (8 + 16 + 4) + 2 * 4 * 5
    assert shape.cache_bytes(10, 2, F16, F16, False) == 10 * 2 * (16 + 16 + 4) + 2 * 4 * 5


#
# what is free
#


def test_the_system_tells() -> None:
    assert (system_memory() or 0) > 1 << 20
    assert (free_memory() or 0) <= (system_memory() or 0) * 1.5


def group(folder: Path, **files: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def proc(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cgroup"
    path.write_text(text)
    return path


def test_control_groups_of_version_2(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    group(
        root / "a" / "b",
        memory__max=1000,
        memory__current=900,
        memory__stat="anon 5\ninactive_file 300\nactive_file 100",
    )
    group(root / "a", memory__max="max", memory__current=5000)
    where = proc(tmp_path, "0::/a/b\n")
    assert control_group_memory(where, root) == 1000 - (900 - 400)
    group(root / "a", memory__max=1200, memory__current=1100)  # the nearest limit is not always the tightest
    assert control_group_memory(where, root) == 100
    group(root / "a", memory__current=1500)
    assert control_group_memory(where, root) == 0


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    where = proc(tmp_path, "9:cpu:/x\n4:memory:/host/path\n0::/\n")
    group(root / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=7)
    assert control_group_memory(where, root) is None
    stat = "total_inactive_file 20\ntotal_active_file 30"
    group(root / "memory", memory__limit_in_bytes=500, memory__usage_in_bytes=200, memory__stat=stat)
    # in a container the path is the host's, which is not to be seen here
    assert control_group_memory(where, root) == 500 - 150


@pytest.mark.parametrize("text", ["", "nonsense\n", "0::/a\n", "\n:::\n"])
def test_no_control_groups(text: str, tmp_path: Path) -> None:
    assert control_group_memory(proc(tmp_path, text), tmp_path / "none") is None
    assert control_group_memory(tmp_path / "missing", tmp_path) is None
    group(tmp_path / "fs" / "a", memory__max="much", memory__current="little")
    assert control_group_memory(proc(tmp_path, text), tmp_path / "fs") is None


#
# what is said
#


def gigabytes(**changes: Any) -> MemoryEstimate:
    base = MemoryEstimate("m.gguf", 10 * 10**9, 4 * 10**9, 10**9, 100 * 10**9, 32768, 1)
    return replace(base, **changes)


def test_enough_is_not_mentioned() -> None:
    for estimate in (gigabytes(), gigabytes(free=15 * 10**9), gigabytes(free=None), gigabytes(mapped=False)):
        assert estimate.problem() is None
        assert estimate.warning() is None


def test_a_cache_that_does_not_fit() -> None:
    problem = gigabytes(free=3 * 10**9, smaller=(16384, 32768)).problem()
    assert problem is not None
    assert problem.startswith("m.gguf: ")
    for value in ("32768 tokens", "4.0 GB", "1.0 GB", "3.0 GB", "(-c 16384 fits)", "(-fa on -ctk q8_0 -ctv q8_0 fits)"):
        assert value in problem
    assert gigabytes(free=3 * 10**9, elsewhere=True).problem() is None
    assert "GPU" in (gigabytes(free=3 * 10**9, elsewhere=True).warning() or "")
    assert gigabytes(free=3 * 10**9, bound=True).problem() is None
    assert "upper bound" in (gigabytes(free=3 * 10**9, bound=True).warning() or "")


def test_weights_that_do_not_fit() -> None:
    few = gigabytes(free=14 * 10**9)
    assert few.problem() is None
    assert "smaller quantization" in (few.warning() or "")
    assert "--no-mmap" in (replace(few, mapped=False).problem() or "")
    assert replace(few, mapped=False).warning() is None


@given(st.integers(1, 1 << 20), st.integers(1, 9), st.integers(0, 1 << 34), st.booleans(), st.sampled_from([F16, Q8_0]))
def test_what_is_proposed_fits(n_ctx: int, n_sequences: int, free: int, flash_attn: bool, type_k: int) -> None:
    info = model_info(ROOT / "steermoe_local" / "data" / "tiny-moe.gguf")

    def check(tokens: int, k: int, v: int, fa: bool) -> MemoryEstimate:
        return check_memory(info, tokens, n_sequences, k, v, flash_attn=fa, free=free)

    estimate = check(n_ctx, type_k, F16, flash_attn)
    assert (estimate.problem() is None) == (estimate.buffers <= free)
    if estimate.problem() is not None:
        same, quantized = estimate.smaller
        assert same < n_ctx
        for tokens, arguments in ((same, (type_k, F16, flash_attn)), (quantized, (Q8_0, Q8_0, True))):
            assert not tokens or check(tokens, *arguments).problem() is None
            if tokens < n_ctx:
                assert check(tokens + 256, *arguments).problem() is not None


#
# the command line
#


def detect(tmp_path: Path, *flags: str) -> Any:
    out = tmp_path / "m.json"
    return CliRunner().invoke(main, ["detect", "-m", "tiny", "--pairs", str(PAIRS), "-o", str(out), "-t", "1", *flags])


def test_detect_refuses_before_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 20)
    result = detect(tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "memory are free" in result.stderr
    assert "--no-memory-check" in result.stderr
    assert result.stdout == ""
    assert not any(tmp_path.iterdir())
    assert detect(tmp_path, "--no-memory-check").exit_code == 0


def test_detect_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    needs = check_memory(model_info(tiny_path), 512, free=1 << 50)
    monkeypatch.setattr("steermoe_local.llama.cpu.repacks", lambda: lambda kind, shape: False)  # CPUs differ
    monkeypatch.setattr(memory, "free_memory", lambda: needs.buffers)
    result = detect(tmp_path)
    assert result.exit_code == 0
    assert besides(result.stderr, FOUR_PAIRS).startswith("warning: ")
    assert "smaller quantization" in result.stderr
    assert detect(tmp_path, "--no-mmap").exit_code == 1
    monkeypatch.setattr(memory, "free_memory", lambda: needs.buffers + needs.weights)
    assert besides(detect(tmp_path).stderr, FOUR_PAIRS) == ""


def test_nothing_is_known_of_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    assert detect(tmp_path).exit_code == 0
    assert issubclass(ResourceError, Exception)


#
# repacked copies
#


def copied(**changes: Any) -> MemoryEstimate:
    """A model of 10 GB, of which 9 GB are repacked."""
    return gigabytes(copies=9 * 10**9, replaced=9 * 10**9, **changes)


def test_room_for_copies() -> None:
    needed = 10 * 10**9 + 5 * 10**9  # weights, of which 9 GB as copies, and buffers
    assert copied().total == needed
    assert copied(free=needed + 9 * 10**9 // 4).has_room_for_copies
    assert not copied(free=needed + 9 * 10**9 // 4 - 1).has_room_for_copies
    assert copied(free=1, elsewhere=True).has_room_for_copies
    assert copied(free=None).has_room_for_copies
    assert gigabytes(free=needed).has_room_for_copies  # no copies, nothing besides


def test_copies_that_are_wanted_all_the_same() -> None:
    tight = copied(free=15 * 10**9)
    assert tight.problem() is None
    assert "--no-repack" in (tight.warning() or "")
    assert "--no-repack" in (copied(free=13 * 10**9).problem() or "")
    assert tight.to_dict()["repacked_bytes"] == 9 * 10**9


def test_locked_originals_stay_beside_their_copies(tiny_path: Path) -> None:
    def total(**how: bool) -> int:
        return check_memory(model_info(tiny_path), 512, repacks=lambda kind, shape: True, free=1 << 50, **how).total

    plain = check_memory(model_info(tiny_path), 512, free=1 << 50)
    assert total() == total(mapped=False)
    assert total(locked=True) > total() + plain.weights // 2
    assert total(mapped=False, locked=True) == total()


@pytest.mark.parametrize(
    ("flags", "free", "repacked", "said"),
    [
        ((), "plenty", True, ""),
        ((), "little", False, "--repack"),
        (("--no-repack",), "little", False, ""),
        (("-nr",), "plenty", False, ""),
        (("--repack",), "little", True, "--no-repack"),
        (("--no-memory-check",), "little", True, ""),
        (("--verbose",), "plenty", True, "weights are repacked"),
        (("--verbose", "-nr"), "plenty", False, "weights are not repacked"),
    ],
)
def test_repacking_is_chosen(
    flags: tuple[str, ...],
    free: str,
    repacked: bool,
    said: str,
    tmp_path: Path,
    tiny_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def every_matrix(kind: str, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1

    needs = check_memory(model_info(tiny_path), 512, repacks=every_matrix, free=1 << 50)
    monkeypatch.setattr("steermoe_local.llama.cpu.repacks", lambda: every_matrix)
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 50 if free == "plenty" else needs.total)
    loaded: list[bool] = []
    load = SteeredLlama.__init__

    def remember(self: SteeredLlama, *args: Any, **kwargs: Any) -> None:
        loaded.append(kwargs["repack"])
        load(self, *args, **kwargs)

    monkeypatch.setattr(SteeredLlama, "__init__", remember)
    result = detect(tmp_path, *flags)
    assert result.exit_code == 0, result.stderr
    assert loaded == [repacked]
    if "--verbose" not in flags:  # llama.cpp's log is there, too
        assert besides(result.stderr, FOUR_PAIRS).count("\n") == bool(said)
    assert said in result.stderr


def test_weights_that_cannot_be_repacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steermoe_local.llama.cpu.repacks", lambda: lambda kind, shape: False)
    result = detect(tmp_path, "--verbose")
    assert result.exit_code == 0, result.stderr
    assert "none of its weights" in result.stderr


def test_no_word_of_copies_where_nothing_fits(tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steermoe_local.llama.cpu.repacks", lambda: lambda kind, shape: len(shape) > 1)
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    result = detect(tmp_path)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ")
