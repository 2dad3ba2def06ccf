"""steermoe serve."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ..._util.regular_files import open_regular
from ...errors import SteerMoEError, UsageError
from ...maps.recommended import CURES
from ...models.embedded import embedded_models
from ...models.user_maps import MAP_FILE, user_maps, user_maps_folder
from ...steering.presets import PRESETS
from ...steering.rules import RULES, json_cap
from ..failures import log_to_stderr
from ..options.common import FILE, context_option, strength_option, template_options
from ..options.groups import OWN, STEERING, in_help, is_given
from ..options.groups import rank as rank_of
from ..options.llama import LlamaFlags, llama_options
from ..options.opening import check_memory, context_size, open_engine, warn_of_unknown_reasoning
from ..options.plans import RuleText
from ..options.positionals import model_argument
from ..options.sampling import sampling_options
from ..options.secrets import SecretOption, warn_of_readers
from ..options.steering import CAP, OF_EACH_RULE, RANK, SOFT_WEIGHTS, SteeringFlags, rule_choice
from ..options.system_text import NameOrPath
from ..output import say, warn

_SOURCES = ("steering", "steer", "plan")
_NUMBERS = ("activate", "deactivate", "preset", "rank")
_RULE = ("mode", "strength", "cap", "weights")
_MAX_KEY = 1 << 16  # bytes of a key's file
_PLAN = "start-plan"  # the name of a plan of --steer

if TYPE_CHECKING:
    from ...generation.engine import Engine
    from ...model_files.model_info import ModelInfo
    from ...server import SteeringRegistry
    from ...steering.plan import SteeringPlan


@click.command()
@in_help(
    {"": OWN, **dict.fromkeys((*_SOURCES, *_NUMBERS, *_RULE, "force"), STEERING)},
    rare=(
        *("rank", "mode", "cap", "weights", "preset", "force", "maps_writable", "no_auth", "api_key", "cors_origins"),
        *("allowed_hosts", "queue_limit", "timeout", "log_prompts", "aliases"),
    ),
)
@model_argument
@click.option("-a", "--alias", "aliases", multiple=True, metavar="NAME", help="Further name of the model for clients.")
@click.option(
    "--maps",
    "maps_folder",
    type=FILE,
    metavar="DIR",
    help="Folder of maps and bias files that requests can name.  [default: your maps folder, if there is one]",
)
@click.option("--maps-writable", is_flag=True, help="Keep in it what POST /v1/steering registers.")
@click.option(
    "--learn/--no-learn",
    "learn",
    default=None,
    help="Let requests have steerings learnt, between the requests of others.  [default: if the address is local]",
)
@click.option(
    "--steering",
    type=NameOrPath(),
    metavar="NAME|FILE",
    help="What steers unless a request says otherwise: a name of --maps, or a file of a map, bias or plan.  "
    "[default: none]",
)
@click.option(
    "--steer",
    type=RuleText(),
    multiple=True,
    metavar="RULE",
    help='Rule of a plan that steers unless a request says otherwise, like "answer: digits-words +2 -2"; may be given '
    f"again. Requests call it {_PLAN}.",
)
@click.option("--plan", type=FILE, metavar="FILE", help="File of such a plan; requests call it by its name.")
@click.option("--activate", type=click.IntRange(0), metavar="N", help="Experts to promote by that map.")
@click.option("--deactivate", type=click.IntRange(0), metavar="N", help="Experts to suppress by that map.")
@click.option(
    *RANK[0], **{**RANK[1], "default": None, "show_default": False, "help": "Score by which they are chosen."}
)
@click.option("--mode", type=click.Choice(RULES), help="Steering rule for that map.")
@strength_option("strength", type=float, metavar="X", help="Strength of the soft rule, in logits.")
@click.option(*CAP[0], **CAP[1])
@click.option(*SOFT_WEIGHTS[0], **SOFT_WEIGHTS[1])
@click.option(
    "--preset", type=click.Choice(PRESETS), help="Numbers of experts that the paper took for this model, for that map."
)
@click.option("--force", is_flag=True, help="Accept maps whose router hash is another one, if the shape fits.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port, 0: a free one.")
@click.option(
    "--api-key",
    cls=SecretOption,
    instead="--api-key-file FILE or the variable STEERMOE_API_KEY",
    metavar="KEY",
    help="Key that clients must send; STEERMOE_API_KEY keeps it out of `ps`.",
)
@click.option("--api-key-file", type=FILE, metavar="FILE", help="Read the key from a file.")
@click.option("--no-auth", is_flag=True, help="Serve everyone who can reach an address that is not this machine's own.")
@click.option(
    "--cors", "cors_origins", multiple=True, metavar="ORIGIN", help="Let web pages of this origin use the server."
)
@click.option(
    "--allowed-host", "allowed_hosts", multiple=True, metavar="NAME", help="Host name that clients may use for it."
)
@click.option(
    "-np",
    "--parallel",
    type=click.IntRange(1, 256),
    default=4,
    show_default=True,
    metavar="N",
    help="Answers decoded at once.",
)
@context_option("Context of each answer in tokens, 0: the model's.  [default: at most 4096]")
@click.option(
    "--queue",
    "queue_limit",
    type=click.IntRange(0, 10_000),
    default=64,
    show_default=True,
    metavar="N",
    help="Requests that may wait; more get 429.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1, 86_400),
    default=600,
    show_default=True,
    metavar="SECONDS",
    help="Longest time of a request, waiting included.",
)
@click.option("--log-prompts", is_flag=True, help="Write prompts and answers to the log, too.")
@sampling_options
@template_options
@llama_options
def serve(
    model: Path,
    maps_folder: Path | None,
    maps_writable: bool,
    steering: str | None,
    steer: tuple[str, ...],
    plan: Path | None,
    activate: int | None,
    deactivate: int | None,
    rank: str | None,
    mode: str | None,
    strength: float | None,
    cap: float | None,
    weights: str | None,
    preset: Literal["faithful", "safe"] | None,
    force: bool,
    api_key: str | None,
    api_key_file: Path | None,
    parallel: int,
    ctx_size: int | None,
    n_predict: int | None,
    template_arguments: Mapping[str, Any] | None,
    flags: LlamaFlags,
    **options: Any,
) -> None:
    """Serve a model under OpenAI's API, steered differently by each request, with a page at /.

    A request's field `steering` is the name of a map, bias file or plan of --maps, an object like {"map": NAME,
    "activate": 8, "reverse": true}, rules of a plan, or null for none; the model's name can carry it, too:
    tiny:digits-words. The sampling options are the defaults of requests. docs/server.md has the rest.

    \b
    Examples:
      steermoe serve tiny
      steermoe serve olmoe.gguf --maps maps/ --steering faithful -np 8 -c 8192
      steermoe serve tiny --steer "thinking: none" --steer "answer: digits-words"
      steermoe serve tiny --host 0.0.0.0 --api-key-file key.txt
    """
    _require_packages()
    from ...llama.template_client import template_problem
    from ...model_files.model_info import model_info
    from ...server import ServerSettings, SteeringRegistry
    from ...server.learning import learn_jobs
    from ...server.program import run_server

    values = {"activate": activate, "deactivate": deactivate, "preset": preset, "rank": rank}
    numbers: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    if preset is not None and {"activate", "deactivate"} & set(numbers):
        raise UsageError("--preset gives the numbers and the side; leave out --activate and --deactivate, or --preset")
    if preset is not None and numbers.pop("rank", "rd") != "rd" and is_given("rank"):
        raise UsageError("--preset gives the paper's numbers, which are those of --rank rd; leave out one of them")
    given = frozenset(filter(is_given, ("activate", "deactivate", "preset", "rank", *_RULE)))
    steering, rules = _start(steering, steer, plan, force)
    if rules.wanted and given:
        raise UsageError(f"--{min(given)}: {OF_EACH_RULE}")
    if steering is None and given:
        raise UsageError(f"--{min(given)}: of which map? give it with --steering NAME|FILE")
    if steering is not None:
        rule = rule_choice(mode, strength, cap, weights, given)
        numbers |= rule | ({"cap": json_cap(rule["cap"])} if "cap" in rule else {})
    maps_folder = _folder(maps_folder)
    facts = model_info(model, routers=rules.wanted)
    start_plan = _start_plan(rules, facts, model, maps_folder) if rules.wanted else None
    settings = ServerSettings(
        model=_name(model),
        api_key=_key(api_key, api_key_file),
        maps_folder=maps_folder,
        maps_writable=maps_writable,
        max_tokens=n_predict,
        template_arguments=template_arguments or {},
        **options,
    )
    if not facts.chat_template:
        warn(f"{model}: no chat template, so only /v1/completions can answer")
    elif problem := template_problem(facts.chat_template):
        warn(f"{problem}; only /v1/completions can answer")
    warn_of_unknown_reasoning(facts)
    n_ctx = context_size(facts, ctx_size)
    flags = check_memory(facts, flags, n_ctx, parallel)  # before it listens: nobody connects to what cannot run
    registry = SteeringRegistry(folder=maps_folder, writable=maps_writable, force=force)
    log_to_stderr("%(asctime)s %(message)s")
    logging.getLogger("steermoe.server").setLevel(logging.INFO)

    @contextmanager
    def load() -> Iterator[Engine]:
        with open_engine(facts, flags, n_ctx, parallel, force=force) as engine:
            warn(*registry.open(engine.identity))
            if steering is not None:
                _choose_default(registry, steering, numbers, bool(given))
            elif start_plan is not None:
                registry.add_plan(start_plan)  # what it warns of was said when the plan was opened
                registry.default = start_plan.name
            yield engine

    with closing(registry):
        registry.claim()  # before the model is loaded
        jobs = learn_jobs(model, registry, _of_learner(flags)) if settings.learns and facts.identity else None
        run_server(settings, registry, load, say, jobs)


def _of_learner(flags: LlamaFlags) -> list[str]:
    """The server's flags that matter to a process that learns on the CPU: what it measures is to be what is served."""
    words = [f"--flash-attn={flags.flash_attn}", f"--cache-type-k={flags.cache_type_k}"]
    words += [f"--cache-type-v={flags.cache_type_v}", "--mmap" if flags.mmap else "--no-mmap"]
    words += [] if flags.threads is None else [f"--threads={flags.threads}"]
    words += ["--no-repack"] if flags.repack is False else []
    return words + ([] if flags.memory_check else ["--no-memory-check"])


def _start(
    steering: str | None, steer: tuple[str, ...], plan: Path | None, force: bool
) -> tuple[str | None, SteeringFlags]:
    """What steers from the start: a name or file, or the rules of a plan; what is nearer counts.

    Raises UsageError for two on the command line, and for bad rules, FormatError for a bad file.
    """
    named = {name: value for name, value in (("steering", steering), ("steer", steer), ("plan", plan)) if value}
    typed = [f"--{name}" for name in sorted(named) if is_given(name)]
    if len(typed) > 1:
        raise UsageError(f"{typed[0]} and {typed[1]} both steer; give one of them")
    nearest = min(named, key=rank_of, default=None)
    rules = SteeringFlags(
        steer=steer if nearest == "steer" else (), plan=plan if nearest == "plan" else None, force=force
    )
    _ = rules.rules
    return steering if nearest == "steering" else None, rules


def _folder(given: Path | None) -> Path | None:
    """The maps folder: the given one, else the user's if it is there."""
    if given is not None and (is_given("maps_folder") or given.is_dir()):
        return given
    users = user_maps_folder()
    return users if users.is_dir() else None


def _start_plan(rules: SteeringFlags, facts: ModelInfo, model: Path, maps_folder: Path | None) -> SteeringPlan:
    """The plan of the rules, checked before the model is loaded; those of the command line are called `_PLAN`.

    Raises ModelError for a model without experts, and what the rules, names and numbers raise.
    """
    from ...server.own_plan import require_plan_name
    from ...steering.plan import SteeringPlan
    from ..chat.maps import MapFinder

    identity = facts.require_moe()
    folders = () if maps_folder is None else (maps_folder,)
    plan = rules.open(identity, model, MapFinder(folders, identity, model, rules.force).find)
    assert isinstance(plan, SteeringPlan)
    plan = replace(plan, name=_PLAN) if plan.path is None else plan
    require_plan_name(plan.name)
    plan.build(identity)  # impossible numbers are refused now
    return plan


def _require_packages() -> None:
    """Of an installation whose dependencies were left out (pip install --no-deps), or damaged."""
    for name in ("fastapi", "uvicorn", "pydantic", "prometheus_client", "llguidance", "markdown_it", "linkify_it"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"the server needs {name}; run pip install steermoe-local again")


def _name(model: Path) -> str:
    """By which clients know it: that of an embedded model, or the file's name without what splits add."""
    for name, path in embedded_models().items():
        if model == path:
            return name
    return re.sub(r"-\d{5}-of-\d{5}$", "", model.stem)


def _key(key: str | None, file: Path | None) -> str | None:
    if file is None:
        return key
    if key is not None:
        raise UsageError("--api-key and --api-key-file both give a key; give one of them")
    warn_of_readers(file)
    try:
        with open_regular(file, streams=True) as opened:
            found = opened.read(_MAX_KEY).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {file}: cannot be read: {error}") from None
    if not found:
        raise UsageError(f"--api-key-file {file}: empty; write the key into it")
    return found


def _choose_default(registry: SteeringRegistry, wanted: str, numbers: Mapping[str, Any], given: bool) -> None:
    """Steer by a registered name, or by a file, which is registered then, with the numbers and the rule.

    A bias file takes none: they are refused if they were `given` on the command line, and else left aside. Raises
    SteerMoEError.
    """
    from ...server.api_errors import ApiError

    path = Path(os.path.expanduser(wanted))
    name = wanted
    path = path / MAP_FILE if (path / MAP_FILE).is_file() else path
    unknown = wanted not in {entry.name for entry in registry.entries()}
    users = user_maps().get(wanted) if unknown else None
    if path.suffix in (".json", ".gguf") or path.exists() or users is not None:
        name, warnings = registry.add_file(path if users is None else users)
        warn(*warnings)
    try:
        if numbers and (registry.entry(name).is_map or given):  # no name is refused as one
            registry.choose(name, numbers)
        registry.resolve(name)
    except ApiError as error:
        cure = f"; {CURES}" if error.code == "no_numbers" else ""
        reason = str(error).partition("; ")[0] if cure else str(error)
        raise UsageError(f"--steering {wanted}: {reason}{cure}") from None
    except SteerMoEError as error:
        raise type(error)(f"--steering {wanted}: {error}") from None
    registry.default = name
