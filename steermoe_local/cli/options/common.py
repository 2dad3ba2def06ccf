"""What the commands share: options, printing, progress."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..._util.files import parse_json
from ...errors import UsageError
from ..program import EXIT_ERROR as EXIT_ERROR
from ..program import SteerMoEGroup as SteerMoEGroup
from .model import ModelPath as ModelPath
from .model import model_option as model_option

F = TypeVar("F", bound=Callable[..., Any])


class LayerCount(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A number of layers, or `all`."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """-1 stands for all, as in llama_cpp.Llama."""
        if value == "all":
            return -1
        try:
            layers = int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number of layers nor 'all'.", param, ctx)
        return max(layers, -1)


class Words(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Words with commas between them."""

    name = "words"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The words; an empty one is a mistake."""
        if isinstance(value, tuple):
            return value
        words = tuple(word.strip() for word in value.split(","))
        if not all(words):
            self.fail(f"{value!r} has an empty part.", param, ctx)
        return words


class Proportions(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Numbers from 0 with commas or slashes between them, like 3,1."""

    name = "proportions"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """The numbers; one of them at least is not 0."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in value.replace("/", ",").split(","))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < 0 or not 0 < sum(numbers) < float("inf"):
            self.fail(f"{value!r} is no list of proportions, like 3,1.", param, ctx)
        return numbers


class TensorOverrides(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """PATTERN=BUFFER, several with commas between them."""

    name = "overrides"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[str, str], ...]:
        """(pattern, buffer type) pairs."""
        if isinstance(value, tuple):
            return value
        pairs = tuple(part.partition("=") for part in value.split(","))
        if not all(pattern and buffer for pattern, _, buffer in pairs):
            self.fail(f"{value!r} is not PATTERN=BUFFER, like exps=CPU.", param, ctx)
        return tuple((pattern, buffer) for pattern, _, buffer in pairs)


# enum ggml_type of the types that llama.cpp takes for the KV cache (common/arg.cpp)
CACHE_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q4_0": 2,
    "q4_1": 3,
    "iq4_nl": 20,
    "q5_0": 6,
    "q5_1": 7,
}
QUANTIZED_CACHE_TYPES = set(CACHE_TYPES) - {"f32", "f16", "bf16"}
SPLIT_MODES = {"none": 0, "layer": 1, "row": 2, "tensor": 3}  # llama.h: enum llama_split_mode
FLASH_ATTN: dict[str, bool | str] = {"on": True, "off": False, "auto": "auto"}


@dataclass(frozen=True)
class LlamaFlags:
    """The flags of `llama_options`."""

    threads: int | None
    batch_size: int
    ubatch_size: int
    n_gpu_layers: int
    device: tuple[str, ...] | None
    split_mode: str
    tensor_split: tuple[float, ...] | None
    main_gpu: int
    cpu_moe: bool
    n_cpu_moe: int
    override_tensor: tuple[tuple[str, str], ...]
    rpc: tuple[str, ...] | None
    flash_attn: str
    cache_type_k: str
    cache_type_v: str
    mmap: bool
    mlock: bool
    memory_check: bool
    verbose: bool

    def __post_init__(self) -> None:
        """Raise UsageError for flags that exclude each other."""
        if self.cache_type_v in QUANTIZED_CACHE_TYPES and self.flash_attn == "off":
            raise UsageError(f"-ctv {self.cache_type_v} needs flash attention; add -fa on")

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of `SteeredLlama` for the model and where it goes."""
        return {
            "n_gpu_layers": self.n_gpu_layers,
            "devices": () if self.device == ("none",) else self.device,
            "split_mode": SPLIT_MODES[self.split_mode],
            "tensor_split": self.tensor_split and list(self.tensor_split),
            "main_gpu": self.main_gpu,
            "cpu_moe": self.cpu_moe,
            "n_cpu_moe": self.n_cpu_moe,
            "tensor_buft_overrides": self.override_tensor,
            "rpc_servers": self.rpc or (),
            "use_mmap": self.mmap,
            "use_mlock": self.mlock,
            "verbose": self.verbose,
        }

    def context_arguments(self) -> dict[str, Any]:
        """Arguments of `SteeredLlama` for its context."""
        return {
            "n_batch": self.batch_size,
            "n_ubatch": self.ubatch_size,
            "n_threads": self.threads,
            "n_threads_batch": self.threads,
            "flash_attn": FLASH_ATTN[self.flash_attn],
            "type_k": CACHE_TYPES[self.cache_type_k],
            "type_v": CACHE_TYPES[self.cache_type_v],
        }


_LLAMA_OPTIONS = (
    click.option("-t", "--threads", type=click.IntRange(1), help="Threads.  [default: by the number of cores]"),
    click.option(
        "-b", "--batch-size", type=click.IntRange(1), default=512, show_default=True, help="Tokens of one decode."
    ),
    click.option(
        "-ub", "--ubatch-size", type=click.IntRange(1), default=512, show_default=True, help="Tokens computed at once."
    ),
    click.option(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        "n_gpu_layers",
        type=LayerCount(),
        default=0,
        show_default=True,
        metavar="N",
        help="Layers kept on the GPU, -1 or `all` for all.",
    ),
    click.option(
        "-dev",
        "--device",
        type=Words(),
        metavar="DEV,...",
        help="Devices to offload to, `none` for none.  [default: all]",
    ),
    click.option(
        "-sm",
        "--split-mode",
        type=click.Choice(list(SPLIT_MODES)),
        default="layer",
        show_default=True,
        help="How the model is spread over several GPUs.",
    ),
    click.option("-ts", "--tensor-split", type=Proportions(), metavar="N0,N1,...", help="Share of each GPU, like 3,1."),
    click.option(
        "-mg",
        "--main-gpu",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="The GPU of `-sm none`, or of small tensors with `-sm row`.",
    ),
    click.option("-cmoe", "--cpu-moe", is_flag=True, help="Keep the experts' weights on the CPU."),
    click.option(
        "-ncmoe",
        "--n-cpu-moe",
        type=click.IntRange(0),
        default=0,
        metavar="N",
        help="Keep the experts' weights of the first N layers on the CPU.",
    ),
    click.option(
        "-ot",
        "--override-tensor",
        type=TensorOverrides(),
        multiple=True,
        metavar="PATTERN=BUFFER,...",
        help="Buffer type of the tensors whose names match a regular expression.",
    ),
    click.option(
        "--rpc",
        type=Words(),
        metavar="HOST:PORT,...",
        help="llama.cpp RPC servers to spread the model over; on trusted networks only (docs/backends.md).",
    ),
    click.option(
        "-fa",
        "--flash-attn",
        type=click.Choice(list(FLASH_ATTN)),
        default="off",
        show_default=True,
        help="Flash attention.",
    ),
    click.option(
        "-ctk",
        "--cache-type-k",
        type=click.Choice(list(CACHE_TYPES)),
        default="f16",
        show_default=True,
        metavar="TYPE",
        help="Type of the KV cache's keys.",
    ),
    click.option(
        "-ctv",
        "--cache-type-v",
        type=click.Choice(list(CACHE_TYPES)),
        default="f16",
        show_default=True,
        metavar="TYPE",
        help=f"Type of its values: {', '.join(CACHE_TYPES)}.",
    ),
    click.option("--mmap/--no-mmap", default=True, help="Map the file into memory.  [default: mmap]"),
    click.option("--mlock", is_flag=True, help="Keep the model in RAM, never swapped out."),
    click.option(
        "--memory-check/--no-memory-check",
        default=True,
        help="Refuse what does not fit into free memory before it is loaded.  [default: check]",
    ),
    click.option("--verbose", is_flag=True, help="Let llama.cpp log to stderr."),
)


def llama_options(command: F) -> F:
    """Flags of llama.cpp under its names; the command gets them as one argument, `flags` (LlamaFlags)."""

    @functools.wraps(command)
    def with_flags(**arguments: Any) -> Any:
        values = {name: arguments.pop(name) for name in LlamaFlags.__dataclass_fields__}
        values["override_tensor"] = tuple(pair for group in values["override_tensor"] for pair in group)
        return command(**arguments, flags=LlamaFlags(**values))

    wrapped: Any = with_flags
    for option in reversed(_LLAMA_OPTIONS):
        wrapped = option(wrapped)
    return cast(F, wrapped)


class JSONObject(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """The object; anything else is a mistake."""
        if isinstance(value, dict):
            return value
        try:
            data = parse_json(value)
        except ValueError as error:
            self.fail(f"{value!r} is not JSON: {error}.", param, ctx)
        if not isinstance(data, dict):
            self.fail(f'{value!r} is not a JSON object, like {{"name": true}}.', param, ctx)
        return data


def template_options(command: F) -> F:
    """--thinking and --chat-template-kwargs."""
    switch = click.option(
        "--thinking", is_flag=True, help="Turn the chat template's switch for thinking on.  [default: off]"
    )
    variables = click.option(
        "--chat-template-kwargs",
        "template_arguments",
        type=JSONObject(),
        metavar="JSON",
        help="Further variables for the chat template, as in llama.cpp.",
    )
    return switch(variables(command))


def meaning_options(command: F) -> F:
    """--positive, --negative and --license: what a new map says of itself."""
    positive = click.option("--positive", default="", help="What the positive side means, in words.")
    negative = click.option("--negative", default="", help="What the negative side means, in words.")
    license_ = click.option("--license", "license_", default="", help="Licence of the map, kept in it.")
    return positive(negative(license_(command)))


def json_option(command: F) -> F:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def print_json(data: Any) -> None:
    """Print one JSON document to stdout."""
    click.echo(json.dumps(data, ensure_ascii=False, indent=1, default=str))


def console(stderr: bool = False) -> Console:
    """A rich console that neither wraps nor colours when it is not a terminal."""
    wide = not (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, width=160 if wide else None, soft_wrap=False)


def facts_table(rows: list[tuple[str, str]]) -> Table:
    """Two columns without lines: a name and its value."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yield show(what, done, total), a bar on stderr if that is a terminal, else nothing."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show
