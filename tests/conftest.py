"""Fixtures: the embedded model, random models, llama.cpp's programs."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_learner import FakeLearner
from tests.support.paths import BUILD
from tests.support.random_models import STEERABLE, RandomModel, write_random_model

# Files that take a minute or more, the longest first; between two that compile in one folder are others.
LONG = (
    "native/test_row_products.py",
    "learning/test_learn.py",
    "docs/test_docs.py",
    "native/test_tile_ops.py",
    "cli/test_planted_files.py",
    "native/test_row_products_sanitized.py",
    "server/test_learn_process.py",
    "cli/test_two_processes.py",
    "learning/test_resume.py",
    "cli/test_learn_command.py",
    "server/test_stopping.py",
    "integration/page/test_page_markdown.py",
    "native/test_architectures.py",
    "attribution/test_fit.py",
    "llama/test_template_limits.py",
    "learning/test_clock.py",
    "server/test_names_under_load.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files begin first, so that no process of `make test` waits for one of them at the end."""
    here = Path(__file__).parent
    places = {here / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m alone` and `-m "not alone"` (make test): files without such tests are not imported, which takes long."""
    chosen = config.getoption("markexpr")
    if chosen not in ("alone", "not alone") or not collection_path.match("test_*.py"):
        return None
    text = collection_path.read_text("utf-8")
    without = "pytest.mark.alone" not in text if chosen == "alone" else "\npytestmark = pytest.mark.alone" in text
    return True if without else None


@pytest.fixture(scope="session", autouse=True)
def _unsteered_environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A variable or the configuration of the person who runs the tests must not steer them."""
    from steermoe_local.cli import main
    from steermoe_local.cli.options import settings

    for name in ("STEERMOE_FORCE", *settings.option_variables(main)):
        os.environ.pop(name, None)
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.touch()
    os.environ["STEERMOE_CONFIG"] = str(path)
    os.environ["XDG_DATA_HOME"] = str(tmp_path_factory.mktemp("data"))  # where no maps folder is


@pytest.fixture(autouse=True)
def _no_maps_of_other_tests(_unsteered_environment: None) -> Iterator[None]:
    """What a test puts into the user's maps folder is not there for the next one."""
    data = Path(os.environ["XDG_DATA_HOME"])
    yield
    shutil.rmtree(data / "steermoe-local", ignore_errors=True)


@pytest.fixture(autouse=True)
def _unexpected_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line ends them with a line and status 1; a test that starts it here must see that they are none."""
    from steermoe_local.cli import failures

    def report(error: BaseException, where: str = "") -> None:
        raise error

    monkeypatch.setattr(failures, "report", report)


@pytest.fixture(scope="session", autouse=True)
def _interrupts() -> None:
    """A shell's background job ignores SIGINT, and so would every program that a test starts and interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_path() -> Path:
    """The embedded model."""
    return Path(str(resources.files("steermoe_local").joinpath("data/tiny-moe.gguf")))


@pytest.fixture(scope="session")
def tiny_f32_path(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with its F16 weights as F32: the same numbers, and sums that round in F32 alone."""
    from tests.integration.reference.native import write_f32

    return write_f32(tiny_path, tmp_path_factory.mktemp("tiny-f32") / "tiny-f32.gguf")


@pytest.fixture(scope="session")
def tiny_model(tiny_path: Path) -> Iterator[Any]:
    """The embedded model, loaded once (llama_cpp's `LlamaModel`)."""
    from tests.support.low_level import open_model

    model = open_model(tiny_path)
    yield model
    model.close()


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RandomModel], Path]:
    """Path of a random model, written once a session."""
    folder = tmp_path_factory.mktemp("random-models")

    def path_of(model: RandomModel) -> Path:
        path = folder / f"{model.arch}-{abs(hash(model)):x}.gguf"
        return path if path.exists() else write_random_model(path, model)

    return path_of


@pytest.fixture(scope="session", params=STEERABLE)
def steerable(request: pytest.FixtureRequest, random_model: Any) -> Iterator[tuple[RandomModel, Path, Any]]:
    """Each steerable way to route: description, path and loaded model."""
    from tests.support.low_level import open_model

    path = random_model(STEERABLE[request.param])
    model = open_model(path)
    yield STEERABLE[request.param], path, model
    model.close()


def is_of_another_processor(program: Path) -> bool:
    """Of ELF files alone: those of x86-64 beside a Python for 64-bit ARM, and the other way round."""
    with program.open("rb") as file:
        head = file.read(20)
    machine = {b"\x3e\x00": "x86_64", b"\xb7\x00": "aarch64"}.get(head[18:]) if head.startswith(b"\x7fELF") else None
    return machine is not None and machine != platform.machine()


@pytest.fixture(scope="session")
def tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one of llama.cpp's programs; skips when they were not built (make tools)."""

    def run(name: str, *args: Any, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        program = BUILD / "bin" / name
        if not program.exists():
            missing = pytest.fail if os.environ.get("STEERMOE_REQUIRE_TOOLS") else pytest.skip
            missing(f"{name} is not built: make tools")
        if is_of_another_processor(program):
            pytest.skip(f"{name} is built for another kind of processor than this Python (make test-arm64)")
        command = [str(program), *map(str, args)]
        return subprocess.run(
            command,
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def learner() -> Iterator[FakeLearner]:
    """What the server starts as `steermoe learn`; the test says what it does."""
    found = FakeLearner()
    yield found
    found.close()


@pytest.fixture
def maps_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's maps folder, of this test alone; it is not there yet."""
    monkeypatch.setenv("STEERMOE_MAPS", str(tmp_path / "maps"))
    return tmp_path / "maps"
