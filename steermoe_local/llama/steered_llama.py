"""`SteeredLlama`: a `llama_cpp.Llama` whose experts are promoted or suppressed."""

from __future__ import annotations

import inspect
import os
import threading
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import ModelError, SteerMoEError, UsageError
from ..steering.bias_file import BiasFile, none_if_empty, read_bias
from ..steering.bias_plan import AnyBias, BiasPlan
from ..steering.plan import AnySteering, SteeringPlan
from ..steering.steering import Steering
from . import backends, capi
from .loaded_model import loaded_identity
from .plan_rows import KnownKey, PlanRows, PlanRun
from .plan_state import require_tokens
from .reasoning_styles import reasoning_style
from .template_date import AnyDate, template_date
from .tokenizing import common_prefix, token_bytes

if TYPE_CHECKING:
    from llama_cpp import Llama
    from llama_cpp.llama_cache import BaseLlamaCache
else:
    Llama = capi.llama_cpp().Llama
    from llama_cpp.llama_cache import BaseLlamaCache
from .completion_formatter import own_rendering

Bias = AnyBias | AnySteering | str | os.PathLike[str]

_LLAMA_ARGUMENTS = {
    name
    for name, parameter in inspect.signature(Llama.__init__).parameters.items()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
} - {"self"}


class SteeredLlama(Llama):
    """A `llama_cpp.Llama` that runs steered by a bias file or by a plan.

    Takes every argument of `llama_cpp.Llama`, but an unknown one raises TypeError instead of being ignored, and
    `verbose` is off by default. Without a bias it computes bit for bit what an unpatched llama.cpp computes.

    Under a plan (`BiasPlan`) the tokens given to `generate` are the prompt, and those that it draws are the reply; so
    it is in `create_completion` and `create_chat_completion`, which use it. The reply of a chat is split into thinking
    and answer by the markers of the model's chat template, all of another reply is answer. A token in memory is used
    again only if it was computed under the bias that it gets now. Raise UsageError under a plan: `eval` called by
    itself, since nothing says of which phase its tokens are; `embed`, tokens sent into `generate`, and a draft model.
    """

    n_tokens: int

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        bias: Bias | None = None,
        force: bool = False,
        verbose: bool = False,
        flash_attn: bool | Literal["auto"] = False,
        devices: Sequence[str] | None = None,
        rpc_servers: Sequence[str] = (),
        cpu_moe: bool = False,
        n_cpu_moe: int = 0,
        tensor_buft_overrides: Mapping[str, str] | Sequence[tuple[str, str]] = (),
        repack: bool = True,
        date: AnyDate = None,
        **kwargs: Any,
    ) -> None:
        """Load a model and steer it.

        Args:
            model_path: path of a GGUF model.
            bias: a `BiasFile`, the path of one, a `BiasPlan`, a `Steering` or `SteeringPlan`, which is built for the
                model, or None for no steering.
            force: accept a bias whose router hash is another one, as long as the shape fits.
            verbose: let llama.cpp log to stderr.
            flash_attn: use flash attention; "auto": where the backend has it.
            devices: names of the devices to offload to (llama.cpp: --device), empty for none, None for all.
            rpc_servers: HOST:PORT of llama.cpp RPC servers whose devices are used first (--rpc). Only on networks that
                you trust: see docs/backends.md.
            cpu_moe, n_cpu_moe: keep the experts' weights of all, or of the first n, layers on the CPU.
            tensor_buft_overrides: buffer types, like "CPU", by regular expressions of tensor names (-ot); they come
                before cpu_moe.
            repack: keep a second copy of quantized weights in a layout that the CPU multiplies faster (llama.cpp:
                --repack). Without it, a Q4_0, Q4_K, IQ4_NL or MXFP4 model takes about half the memory.
            date: for chat templates that print one, a `datetime.date` or YYYY-MM-DD; None: the day of each request.
            kwargs: arguments of `llama_cpp.Llama`. Without `n_threads`, it is the number of physical cores,
                or fewer for a tiny model (docs/performance.md).

        Raises ModelError (the model cannot be loaded or steered), ModelMismatchError (bias of another model),
        FormatError (not a valid bias file), UsageError (an unknown device or buffer type; a plan with a condition on
        routing, with a token that the model lacks, or with a draft model), NativeError (an RPC server that cannot be
        used), and what `Steering.build` and `SteeringPlan.build` raise.
        """
        unknown = sorted(set(kwargs) - _LLAMA_ARGUMENTS)
        if unknown:
            raise TypeError(f"SteeredLlama: unknown argument {unknown[0]!r}; see llama_cpp.Llama for the known ones")
        path = os.fspath(model_path)
        if not os.path.isfile(path):
            raise ModelError(f"{path}: no such file; give the path of a GGUF model")
        loaded = _load(bias)
        self._bias: AnyBias | None = None
        self._rows: PlanRows | None = None  # of a plan
        self._run: PlanRun | None = None  # the generation whose tokens are evaluated now
        self._keys: list[KnownKey] = []  # under a plan, of the tokens in memory
        self._chats = False  # inside a chat completion
        self._force = force
        if n_cpu_moe < 0:
            raise UsageError(f"n_cpu_moe is {n_cpu_moe}; give a number of layers")
        if rpc_servers:
            backends.add_rpc_servers(rpc_servers)
        overrides = list(
            tensor_buft_overrides.items() if isinstance(tensor_buft_overrides, Mapping) else tensor_buft_overrides
        )
        if cpu_moe or n_cpu_moe:
            overrides += backends.cpu_moe_patterns(None if cpu_moe else n_cpu_moe)
        self._placement = backends.Placement.of(devices, overrides, rpc_servers)

        given, given_batch = kwargs.get("n_threads"), kwargs.get("n_threads_batch")

        def model_params(params: Any) -> None:
            self._placement.apply(params)
            params.use_extra_bufts = repack

        def context_params(model: Any, params: Any) -> None:
            params.n_threads = given or capi.model_threads(model)
            params.n_threads_batch = given_batch or params.n_threads
            if flash_attn == "auto":
                params.flash_attn_type = backends.FLASH_ATTN["auto"]

        with (
            capi.loading(path),
            capi.unsteered_environment(),
            backends.parameters(model_params, context_params),
            own_rendering(None if date is None else template_date(date)),
        ):
            super().__init__(path, verbose=verbose, flash_attn=bool(flash_attn), **kwargs)
        self.n_threads, self.n_threads_batch = self.context_params.n_threads, self.context_params.n_threads_batch
        with suppress(SteerMoEError):  # a model without routers: set_bias raises
            capi.router_sha256(self._model.model)  # kept with the model, so that setting a bias is quick
        if loaded is not None:
            try:
                self.set_bias(loaded)
            except Exception:
                self.close()
                raise

    @property
    def bias(self) -> AnyBias | None:
        """The bias or plan that steers the model, None for unsteered. Assigning calls `set_bias`."""
        return self._bias

    @bias.setter
    def bias(self, bias: Bias | None) -> None:
        self.set_bias(bias)

    def set_bias(self, bias: Bias | None) -> None:
        """Steer by another bias (or its path), plan or `Steering` from the next token on; None stops steering.

        The KV cache was computed under the old steering, so it is cleared: the next call computes its whole prompt
        again. From plan to plan it stays, and of it is used what was computed under the same bias, token by token. On
        an error the old steering stays.

        Raises ModelMismatchError, FormatError, ModelError, UsageError (a plan with a condition on routing, with a token
        that the model lacks, or with a draft model), and what `Steering.build` and `SteeringPlan.build` raise.
        """
        loaded = self._built(_load(bias))
        try:
            self._attach(loaded)
        except SteerMoEError:
            raise
        except BaseException:  # an interrupt: nobody knows how far it came
            capi.detach(self._ctx.ctx)
            self._bias = self._rows = None
            self._forget()
            raise

    def _built(self, bias: AnyBias | AnySteering | None) -> AnyBias | None:
        """A steering as it is for this model. Raises ModelMismatchError, and what building it raises."""
        if not isinstance(bias, Steering | SteeringPlan):
            return bias
        identity = loaded_identity(self._model)
        bias.check(identity, self.model_path, self._force)
        return bias.build(identity)

    def _attach(self, loaded: AnyBias | None) -> None:
        rows = None
        if isinstance(loaded, BiasPlan):
            self._require_no_draft()
            require_tokens(loaded, self._n_vocab)
            rows = PlanRows(loaded, native_bias)
            rows.attach(self._ctx.ctx, self._force)
        elif loaded is None:
            capi.detach(self._ctx.ctx)
        else:
            capi.attach(self._ctx.ctx, native_bias(loaded), self._force)
            if self._rows is not None:
                self._rows.detach(self._ctx.ctx)
        keeps = rows is not None and self._rows is not None
        self._bias, self._rows = loaded, rows
        if not keeps:
            self._forget()

    #
    # plans
    #

    def generate(self, tokens: Sequence[int], *arguments: Any, **keywords: Any) -> Generator[int, Any, None]:
        """`llama_cpp.Llama.generate`; under a plan `tokens` are the prompt, and what is drawn is the reply."""
        if self._rows is None:
            return super().generate(tokens, *arguments, **keywords)  # type: ignore[no-any-return]
        self._require_no_draft()
        reset = arguments[7] if len(arguments) > 7 else keywords.get("reset", True)
        return self._planned(self._rows, list(tokens), reset, super().generate(tokens, *arguments, **keywords))

    def _planned(
        self, rows: PlanRows, tokens: list[int], reset: bool, inner: Generator[int, Any, None]
    ) -> Generator[int, Any, None]:
        """Draw from `inner` under a plan, with of the memory only what has the plan's biases."""
        style = None
        if self._chats:
            prompt = self.detokenize(tokens, special=True).decode("utf-8", "replace")
            style = reasoning_style(self.metadata.get("tokenizer.chat_template", ""), prompt)
        vocabulary = self._model.vocab
        run = PlanRun(
            rows, 0 if reset else self.n_tokens, tokens, style, lambda token: token_bytes(vocabulary, token, True)
        )
        if reset:
            held = [(int(token), key) for token, key in zip(self._input_ids, self._known_keys(), strict=True)]
            n = common_prefix(held, list(zip(tokens, run.keys, strict=True)))
            if n < self.n_tokens:  # what comes behind was computed otherwise, and so were the last logits
                self.n_tokens, self._requires_eval = n, True
        try:
            while True:
                self._run = run
                try:
                    token = next(inner)
                except StopIteration:
                    return
                finally:
                    self._run = None
                if (yield token) is not None:
                    raise UsageError("SteeredLlama: under a plan no tokens are sent into generate; give a prompt")
                if rows is not self._rows:
                    raise UsageError("SteeredLlama: the plan was changed while this was generated; start again")
        finally:
            inner.close()

    def _require_no_draft(self) -> None:
        if self.draft_model is not None:
            raise UsageError("SteeredLlama: a plan steers token by token; leave out the draft model, or the plan")

    def _known_keys(self) -> list[KnownKey]:
        """Keys of the tokens in memory."""
        n = self.n_tokens
        return [*self._keys[:n], *[None] * (n - len(self._keys))]

    def eval(self, tokens: Sequence[int]) -> None:
        """`llama_cpp.Llama.eval`. Raises UsageError under a plan, outside of `generate`."""
        run = self._run
        if self._rows is None:
            super().eval(tokens)
            return
        if run is None:
            raise UsageError(
                "SteeredLlama: a plan steers by the phases of a prompt and its reply, which eval does not know; use "
                "generate, create_completion or create_chat_completion"
            )
        tokens, start = list(tokens), 0
        while start < len(tokens):
            first = self.n_tokens
            n = min(self.n_batch, len(tokens) - start)
            if run.needs_logits:
                n = min(n, run.n_decided(first) or 1)
                if not run.n_decided(first):
                    run.saw_logits(np.array(capi.logits(self._ctx.ctx, -1, self._n_vocab), np.float32))
            part = tokens[start : start + n]
            wanted, keys = run.decide(part, first)
            del self._keys[first:]
            self._keys += [None] * (first - len(self._keys))
            try:
                capi.set_token_rows(self._ctx.ctx, wanted)
                super().eval(part)
            except BaseException:
                capi.set_token_rows(self._ctx.ctx, ())  # of this decode, which may not have come, and of no other
                raise
            self._keys += keys
            start += n

    def create_chat_completion(self, *arguments: Any, **keywords: Any) -> Any:
        """`llama_cpp.Llama.create_chat_completion`; under a plan its reply has phases."""
        before, self._chats = self._chats, True
        try:
            return super().create_chat_completion(*arguments, **keywords)
        finally:
            self._chats = before

    def _create_completion(self, *arguments: Any, **keywords: Any) -> Iterator[Any]:
        parts = super()._create_completion(*arguments, **keywords)
        return parts if self._rows is None else self._continued(parts, self._chats)

    def _continued(self, parts: Iterator[Any], chats: bool) -> Iterator[Any]:
        """The parts of a completion, which is computed while they are taken, perhaps long after it was asked for."""
        while True:
            before, self._chats = self._chats, chats
            try:
                part = next(parts)
            except StopIteration:
                return
            finally:
                self._chats = before
            yield part

    def embed(self, *arguments: Any, **keywords: Any) -> Any:
        """`llama_cpp.Llama.embed`. Raises UsageError under a plan."""
        if self._rows is not None:
            raise UsageError("SteeredLlama: a plan does not say what steers embeddings; set a bias, or None")
        return super().embed(*arguments, **keywords)

    def save_state(self) -> Any:
        """`llama_cpp.Llama.save_state`; under a plan the state keeps what each token was computed under."""
        state = super().save_state()
        if self._rows is not None:
            state.steering_keys = self._known_keys()
        return state

    def load_state(self, state: Any) -> None:
        """`llama_cpp.Llama.load_state`; of a state of a plan only tokens computed under the present steering are used.

        Under a plan nothing is used of a state that was saved without one.
        """
        super().load_state(state)
        keys: list[KnownKey] | None = getattr(state, "steering_keys", None)
        if self._rows is not None:
            self._keys = [] if keys is None else list(keys)
        elif keys is not None:
            bias = none_if_empty(self._bias) if isinstance(self._bias, BiasFile) else None
            self.n_tokens = common_prefix(keys, ["" if bias is None else bias.key] * len(keys))

    def layer_info(self) -> list[capi.LayerInfo]:
        """How each layer routes, and whether it can be and is steered."""
        n_layer = capi.llama_cpp().llama_model_n_layer(self._model.model)
        return [capi.layer_info(self._ctx.ctx, layer) for layer in range(n_layer)]

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        """Set a prompt cache; its entries are only found under the steering that computed them."""
        super().set_cache(None if cache is None else _CacheBySteering(cache, self))

    def close(self) -> None:
        """Free the model. `Llama.__del__` calls this too, also when the constructor refused its arguments."""
        if hasattr(self, "_stack"):
            super().close()

    def _forget(self) -> None:
        self._keys = []
        memory = capi.llama_cpp().llama_get_memory(self._ctx.ctx)
        if memory is not None:
            capi.llama_cpp().llama_memory_clear(memory, True)
        self.reset()


class _CacheBySteering(BaseLlamaCache):
    """A prompt cache whose keys begin with a number for the steering, so that steerings share no states."""

    def __init__(self, inner: BaseLlamaCache, llama: SteeredLlama) -> None:
        super().__init__()
        self.inner = inner
        self._llama = llama

    def _key(self, key: Sequence[int]) -> tuple[int, ...]:
        bias = self._llama.bias
        if isinstance(bias, BiasFile):
            bias = none_if_empty(bias)
        # no token is negative
        return (-1 if bias is None else -2 - int(bias.key[:12], 16), *key)

    @property
    def cache_size(self) -> int:
        """Size of the entries in bytes."""
        return int(self.inner.cache_size)

    def __getitem__(self, key: Sequence[int]) -> Any:
        if key not in self:
            raise KeyError("Key not found")
        return self.inner[self._key(key)]

    def __contains__(self, key: Sequence[int]) -> bool:
        # The inner cache finds the longest common prefix; the steering's number alone does not count as one.
        found = self.inner._find_longest_prefix_key(self._key(key))
        return found is not None and found[0] == self._key(key)[0] and tuple(found[1:2]) == tuple(key[:1])

    def __setitem__(self, key: Sequence[int], value: Any) -> None:
        self.inner[self._key(key)] = value


def _load(bias: Bias | None) -> AnyBias | AnySteering | None:
    if bias is None or isinstance(bias, BiasFile | BiasPlan | Steering | SteeringPlan):
        return bias
    return read_bias(bias)


_built_lock = threading.Lock()
_built: weakref.WeakKeyDictionary[BiasFile, capi.NativeBias] = weakref.WeakKeyDictionary()
_by_key: weakref.WeakValueDictionary[str, capi.NativeBias] = weakref.WeakValueDictionary()


def native_bias(bias: BiasFile) -> capi.NativeBias:
    """The native form of a bias, built once for all biases of one key.

    It lives as long as a BiasFile that it was asked for. Safe to call from several threads.
    """
    with _built_lock:
        native = _built.get(bias) or _by_key.get(bias.key)
        if native is None:
            native = _by_key[bias.key] = _build(bias)
        _built[bias] = native
        return native


def _build(bias: BiasFile) -> capi.NativeBias:
    identity = bias.identity
    return capi.NativeBias.from_values(
        architecture=identity.architecture,
        router_sha256=identity.router_sha256,
        mode=bias.mode,
        epsilon=bias.epsilon,
        cap=bias.cap,
        n_layer=identity.n_layer,
        n_expert=identity.n_expert,
        n_expert_used=identity.n_expert_used,
        layers={layer: row.tolist() for layer, row in bias.values.items()},
    )
