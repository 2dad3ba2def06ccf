"""A process that runs a model on request, so that builds which cannot share a process can be timed alternately.

    python worker.py MODEL --threads N [--stock] [--variants plain,hard,...] [--no-mmap] [--no-repack] [--whole]
                     [--gpu-layers N]

Requests and answers are lines of JSON on stdin and stdout (`Worker` in workers.py is the other end). With --stock the
libraries are those named by LLAMA_CPP_LIB_PATH, otherwise the installed package's.

Variants, one context each: `plain` (no bias; the prompt's last token is an output, as in llama-bench), `all` (every
token is an output), `hard` and `soft` (steered in every layer), `rows` (the tokens of prompts and answers in turns
unsteered and under two biases), `trace` (the experts of every token are kept), `recorder` (every token is counted in
every layer), `detect` (steermoe_local.record_counts as a user calls it).

llama.cpp computes the last layer's experts only for tokens whose logits are wanted, and recording ends behind the last
router. In a large model this is a small part; a model of one layer would hardly use its experts. With --whole every
token of a prompt is an output, and recording computes the whole graph.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import random
import string
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steermoe_local import record_counts
from steermoe_local.detection.recording_options import RecordingOptions, RecordingProgress
from steermoe_local.llama import capi
from steermoe_local.pairs.pairs import Pair

N_BATCH = 512
LETTERS = string.ascii_letters + string.digits  # a token each in the random models
STATUS = Path("/proc/self/status")


def steering_rows(n_layer: int, n_expert: int, mode: str, seed: int = 1) -> dict[int, list[float]]:
    """A row of every layer: one expert promoted and one suppressed (hard), or small random logits (soft).

    Few signs, so that the experts' work stays the same and only the edit is timed.
    """
    rng = random.Random(seed)  # not NumPy's: importing that costs more memory than a bias
    rows: dict[int, list[float]] = {}
    for layer in range(n_layer):
        if mode == "soft":
            rows[layer] = [rng.gauss(0, 0.1) for _ in range(n_expert)]
        else:
            plus, minus = rng.sample(range(n_expert), 2)
            rows[layer] = [float((expert == plus) - (expert == minus)) for expert in range(n_expert)]
    return rows


def memory_use() -> dict[str, float | None]:
    """Peak of resident memory, and of what is resident now private memory and pages of mapped files, in MB.

    None where the system has no /proc.
    """
    figures = (("peak", "VmHWM"), ("anonymous", "RssAnon"), ("mapped", "RssFile"))
    if not STATUS.exists():
        return {name: None for name, _ in figures}
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return {name: int(fields[field].split()[0]) * 1024 / 1e6 for name, field in figures}


class Runner:
    """A loaded model and a context for each variant."""

    def __init__(
        self,
        path: Path,
        *,
        stock: bool,
        variants: Sequence[str],
        n_threads: int,
        mmap: bool,
        n_ctx: int,
        repack: bool,
        whole: bool,
        n_gpu_layers: int = 0,
    ) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        self.path = path
        self.whole = whole
        if whole:  # record_counts has no option for it, because nobody needs it
            capi.NativeRecorder.set_stop = lambda *_: None
        self.n_ctx = n_ctx
        self.cpu = 0.0  # seconds of all cores in llama_decode, since the last request
        self.n_threads = n_threads
        self.lib = _stock_llama_cpp() if stock else capi.llama_cpp()
        _quiet(self.lib if stock else None)
        self.lib.llama_backend_init()
        if "detect" in variants:  # record_counts shares the weights of a Llama
            where = {"n_threads": n_threads, "n_threads_batch": n_threads, "n_gpu_layers": n_gpu_layers}
            self.llama = self.lib.Llama(str(path), n_ctx=64, n_batch=64, use_mmap=mmap, verbose=False, **where)
            self.model = self.llama._model.model
        else:
            params = self.lib.llama_model_default_params()
            params.n_gpu_layers = n_gpu_layers
            params.use_extra_bufts = repack
            params.load_mode = self.lib.LLAMA_LOAD_MODE_MMAP if mmap else self.lib.LLAMA_LOAD_MODE_NONE
            self.model = self.lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise SystemExit(f"{path}: cannot be loaded")
        self.n_vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        self.n_layer = self.lib.llama_model_n_layer(self.model)
        self.batch = self.lib.llama_batch_init(N_BATCH, 0, 1)
        self.recorder: capi.NativeRecorder | None = None
        self.tracer: capi.NativeRecorder | None = None
        self.contexts = {name: self._context(name) for name in variants if name != "detect"}
        self.loaded = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}

    def metadata(self, key: str) -> str:
        """A value of the model's metadata; `{arch}` in the key is its architecture."""
        buffer = ctypes.create_string_buffer(256)
        if "{arch}" in key:
            key = key.format(arch=self.metadata("general.architecture"))
        if self.lib.llama_model_meta_val_str(self.model, key.encode(), buffer, len(buffer)) < 0:
            raise SystemExit(f"{self.path}: has no {key}")
        return buffer.value.decode()

    def bias(self, mode: str, seed: int = 1, layers: range | None = None) -> capi.NativeBias:
        """A bias for every layer, or for some."""
        n_expert = int(self.metadata("{arch}.expert_count"))
        rows = steering_rows(self.n_layer, n_expert, mode, seed)
        return capi.NativeBias.from_values(
            architecture=self.metadata("general.architecture"),
            router_sha256=capi.router_sha256(self.model),
            mode=mode,
            epsilon=0.01,
            n_layer=self.n_layer,
            n_expert=n_expert,
            n_expert_used=int(self.metadata("{arch}.expert_used_count")),
            layers={layer: row for layer, row in rows.items() if layers is None or layer in layers},
        )

    def _context(self, variant: str) -> Any:
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = self.n_ctx, N_BATCH, N_BATCH, 1
        params.n_threads = params.n_threads_batch = self.n_threads
        params.no_perf = True
        if variant == "recorder":
            shape = (self.n_layer, int(self.metadata("{arch}.expert_count")))
            self.recorder = capi.NativeRecorder(self.model, 1, shape, sums=True)  # as detection does
            self.recorder.install(params)
        if variant == "trace":
            shape = (self.n_layer, int(self.metadata("{arch}.expert_count")))
            self.tracer = capi.NativeRecorder(self.model, 1, shape)
            self.tracer.install(params)
        ctx = self.lib.llama_init_from_model(self.model, params)
        if not ctx:
            raise SystemExit("llama.cpp cannot make a context; is there enough memory?")
        if self.recorder is not None and variant == "recorder":
            self.recorder.bind(ctx)
            self.recorder.set_stop(True)
        if self.tracer is not None and variant == "trace":
            self.tracer.bind(ctx)
        if variant in ("hard", "soft"):
            capi.attach(ctx, self.bias(variant))
        if variant == "rows":
            for row, seed in enumerate((1, 2)):
                capi.attach_row(ctx, row, self.bias("hard", seed), False)
        return ctx

    def tokens(self, n: int, start: int = 0) -> list[int]:
        """Tokens that are the same in every process."""
        return [(7919 + i * i * 31 + i * 101) % self.n_vocab for i in range(start, start + n)]

    def _fill(self, tokens: Sequence[int], start: int, outputs: str) -> None:
        self.batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i] = token, start + i
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
            self.batch.logits[i] = outputs == "all" or i + 1 == len(tokens)

    def _decode(self, ctx: Any, variant: str = "plain", rows: Sequence[int] = ()) -> float:
        """Seconds of one llama_decode of the batch that `_fill` made; `rows` steer its tokens in the variant `rows`."""
        start, cpu = time.perf_counter(), time.process_time()
        if variant == "rows":
            capi.set_token_rows(ctx, rows)
        if variant == "trace" and self.tracer is not None:
            self.tracer.set_trace([True] * self.batch.n_tokens)
        status = self.lib.llama_decode(ctx, self.batch)
        self.lib.llama_synchronize(ctx)
        if variant == "trace" and self.tracer is not None:
            experts = self.tracer.trace().experts  # the last layer routes the outputs alone
            if len(experts) != self.batch.n_tokens or (experts[:, :-1] < 0).any():
                raise SystemExit(f"the trace has {len(experts)} of {self.batch.n_tokens} tokens, or lacks layers")
        seconds = time.perf_counter() - start
        self.cpu += time.process_time() - cpu
        if status:
            raise SystemExit(f"llama_decode failed with {status}")
        return seconds

    def _logits(self, ctx: Any, n: int = 1) -> bytes:
        """The logits of the n outputs; fails unless they are finite, because the time would then be meaningless."""
        logits = np.ctypeslib.as_array(self.lib.llama_get_logits(ctx), (n * self.n_vocab,))
        if not np.isfinite(logits).all() or logits.min() == logits.max():
            raise SystemExit("the logits are not finite or all the same")
        return logits.tobytes()

    def prompt(self, variant: str, n: int) -> dict[str, Any]:
        """Time a prompt of n tokens on an empty KV cache."""
        if variant == "detect":
            return self._detect(n)
        ctx = self.contexts[variant]
        self.lib.llama_memory_clear(self.lib.llama_get_memory(ctx), False)
        self.cpu = 0.0
        outputs = "all" if self.whole or variant in ("all", "recorder") else "last"
        tokens = self.tokens(n)
        parts = [(start, tokens[start : start + N_BATCH]) for start in range(0, n, N_BATCH)]
        if variant != "recorder":
            seconds = 0.0
            digest = hashlib.sha256()
            for at, part in parts:
                self._fill(part, at, outputs)
                seconds += self._decode(ctx, variant, [i % 3 - 1 for i in range(len(part))])
                digest.update(self._logits(ctx, len(part) if outputs == "all" else 1))
            return {"seconds": seconds, "cpu": self.cpu, "logits": digest.hexdigest()}
        assert self.recorder is not None
        self.recorder.reset()
        start = time.perf_counter()
        for at, part in parts:
            self._fill(part, at, outputs)
            self.recorder.set_mask([0] * len(part))
            self._decode(ctx)
        counts, seen = self.recorder.counts()
        seconds = time.perf_counter() - start
        k = int(self.metadata("{arch}.expert_used_count"))
        if list(seen) != [n] * self.n_layer or sum(counts) != n * k * self.n_layer:
            raise SystemExit(f"the recorder saw {list(seen)} of {n} tokens")
        return {"seconds": seconds, "cpu": self.cpu}

    def decode(self, variant: str, start: int, n: int) -> dict[str, Any]:
        """Time n tokens, one after the other, after a prompt of `start` tokens."""
        ctx = self.contexts[variant]
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(ctx), 0, start, -1)
        seconds = self.cpu = 0.0
        digest = hashlib.sha256()
        for i, token in enumerate(self.tokens(n, start)):
            self._fill([token], start + i, "last")
            seconds += self._decode(ctx, variant, [(start + i) % 3 - 1])
            digest.update(self._logits(ctx))
        return {"seconds": seconds, "cpu": self.cpu, "logits": digest.hexdigest()}

    def _detect(self, n: int) -> dict[str, Any]:
        """Time record_counts on a pair of texts of n/2 tokens, all of them counted, which share no beginning."""
        rng = random.Random(1)
        sides = [first + "".join(rng.choices(LETTERS, k=n // 2 - 1)) for first in "AB"]
        pair = Pair("0", *sides, *sides)
        start, cpu = time.perf_counter(), time.process_time()
        done: list[RecordingProgress] = []
        options = RecordingOptions(n_threads=self.n_threads, n_batch=N_BATCH, n_ubatch=N_BATCH)
        counts = record_counts(self.llama, [pair], options, on_batch=done.append)
        answer = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        if (counts.n1, counts.n2) != (n // 2, n // 2):
            raise SystemExit(f"record_counts saw {counts.n1} and {counts.n2} tokens, not {n // 2}")
        if done[-1].n_decoded != n:
            raise SystemExit(f"record_counts computed {done[-1].n_decoded} of {n} tokens")
        return answer

    def biases(self, n: int) -> dict[str, list[float]]:
        """Milliseconds of setting, swapping and clearing a bias in a live context, and of the token decoded next."""
        first, same, other = self.bias("hard"), self.bias("hard", 2), self.bias("hard", 3, range(0, self.n_layer, 2))
        steps: dict[str, Callable[[Any], None]] = {
            "set": lambda ctx: capi.attach(ctx, first),
            "swap": lambda ctx: capi.attach(ctx, same),
            "swap, other layers": lambda ctx: capi.attach(ctx, other),
            "clear": capi.detach,
        }
        found: dict[str, list[float]] = {}

        def note(name: str, seconds: float) -> None:
            found.setdefault(name, []).append(1e3 * seconds)

        for _ in range(n):
            ctx = self._context("plain")
            try:
                self._fill(self.tokens(16), 0, "last")
                self._decode(ctx)
                position = 16
                # in a new context the first bias is compared with the model, the later ones with the cached facts
                for name, step in [("set, first", steps["set"]), ("clear", steps["clear"]), *steps.items()]:
                    for label in ("a token", "a token"):
                        self._fill(self.tokens(1, position), position, "last")
                        note(label, self._decode(ctx))
                        position += 1
                    start = time.perf_counter()
                    step(ctx)
                    note(name, time.perf_counter() - start)
                    self._fill(self.tokens(1, position), position, "last")
                    note(f"{name}: next token", self._decode(ctx))
                    position += 1
            finally:
                self.lib.llama_free(ctx)
        return found


def _quiet(stock: Any) -> None:
    """Turn llama.cpp's log off.

    The patched library drops it in C++. For the stock one llama_cpp would call Python with each line, of which CUDA has
    some in every evaluation; it gets a function of ggml's that does nothing, and with arguments no more.
    """
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    if stock is not None:
        stock.llama_log_set(ctypes.cast(stock.llama_cpp._lib.ggml_time_init, ctypes.c_void_p), None)


def _stock_llama_cpp() -> Any:
    import llama_cpp

    if hasattr(llama_cpp.llama_cpp._lib, "steermoe_abi_version"):
        raise SystemExit("LLAMA_CPP_LIB_PATH names a patched build, not a stock one")
    return llama_cpp


def serve(handlers: dict[str, Callable[..., Any]]) -> None:
    """Answer requests until stdin ends. stdout is only for answers: everything else that is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = handlers[request.pop("do")](**request)
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a model on request.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--variants", default="plain")
    parser.add_argument("--no-mmap", action="store_true")
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--no-repack", action="store_true")
    parser.add_argument("--whole", action="store_true", help="compute the last layer for every token, too")
    parser.add_argument("--gpu-layers", type=int, default=0, help="layers on the first device")
    arguments = parser.parse_args()
    runner = Runner(
        arguments.model,
        stock=arguments.stock,
        variants=[name for name in arguments.variants.split(",") if name],
        n_threads=arguments.threads,
        mmap=not arguments.no_mmap,
        n_ctx=arguments.ctx,
        repack=not arguments.no_repack,
        whole=arguments.whole,
        n_gpu_layers=arguments.gpu_layers,
    )
    handlers = {"prompt": runner.prompt, "decode": runner.decode, "biases": runner.biases}
    serve(handlers | {"memory": memory_use, "load": lambda: runner.loaded})


if __name__ == "__main__":
    main()
