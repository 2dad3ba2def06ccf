"""A process that reads prompts under settings of a context, and says which operations take the time.

    python attention_worker.py MODEL --threads N --ctx N --settings JSON [--times] [--stock]

`Worker` in workers.py is the other end. The settings are fields of llama_context_params. With --times every operation
is computed and timed alone; a prompt takes a little longer then.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from worker import _quiet, _stock_llama_cpp, memory_use, serve

from steermoe_local.llama import capi


class PromptReader:
    """A model and one context."""

    def __init__(
        self, path: Path, *, stock: bool, n_threads: int, n_ctx: int, settings: dict[str, int], times: bool
    ) -> None:
        self.lib = _stock_llama_cpp() if stock else capi.llama_cpp()
        _quiet()
        self.lib.llama_backend_init()
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise SystemExit(f"{path}: cannot be loaded")
        self.n_vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.no_perf = n_ctx, 1, True
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = n_threads
        for name, value in settings.items():
            setattr(params, name, value)
        self.n_batch = params.n_batch
        self.seconds: dict[str, float] = {}  # CPU time by operation
        self._begin = 0.0
        if times:
            base = ctypes.CDLL(str(Path(self.lib.llama_cpp._lib._name).with_name("libggml-base.so")))
            self._op_desc = base.ggml_op_desc
            self._op_desc.restype, self._op_desc.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
            self._callback = type(params.cb_eval)(self._time)  # llama.cpp calls it as long as the context lives
            params.cb_eval = self._callback
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context with {settings}")
        self.batch = self.lib.llama_batch_init(self.n_batch, 0, 1)

    def _time(self, tensor: Any, ask: bool, _: Any) -> bool:
        """Called before and after every operation."""
        now = time.process_time()
        if ask:
            self._begin = now
        else:
            name = self._op_desc(tensor).decode()
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._begin
        return True

    def prompt(self, n: int) -> dict[str, Any]:
        """CPU time of a prompt of n tokens on an empty KV cache, all and by operation, and a hash of its logits."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        self.seconds = {}
        cpu = 0.0
        for start in range(0, n, self.n_batch):
            count = min(self.n_batch, n - start)
            self.batch.n_tokens = count
            for i in range(count):
                at = start + i
                self.batch.token[i], self.batch.pos[i] = (7919 + at * at * 31 + at * 101) % self.n_vocab, at
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
                self.batch.logits[i] = at == n - 1
            begin = time.process_time()
            if status := self.lib.llama_decode(self.context, self.batch):
                raise SystemExit(f"llama_decode failed with {status}")
            self.lib.llama_synchronize(self.context)
            cpu += time.process_time() - begin
        logits = np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (self.n_vocab,))
        if not np.isfinite(logits).all() or logits.min() == logits.max():
            raise SystemExit("the logits are not finite or all the same")
        return {"cpu": cpu, "ops": self.seconds, "logits": hashlib.sha256(logits.tobytes()).hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Read prompts on request.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--ctx", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--stock", action="store_true")
    arguments = parser.parse_args()
    reader = PromptReader(
        arguments.model,
        stock=arguments.stock,
        n_threads=arguments.threads,
        n_ctx=arguments.ctx,
        settings=arguments.settings,
        times=arguments.times,
    )
    serve({"prompt": reader.prompt, "memory": memory_use})


if __name__ == "__main__":
    main()
