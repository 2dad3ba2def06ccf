"""Tests of the wheel for 64-bit ARM Linux under qemu (make test-arm64).

The wheel has one libggml-cpu for each group of processors. Which one is loaded, ggml decides by what the processor
says of itself: four of those that qemu knows have it load different ones. The others are loaded from copies of the
libraries that have no better one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLDEST, NEWEST = 17, 36  # glibc 2.x of the wheels that Debian 12's Python can load
AT_ONCE = 2  # processors; qemu computes with one core for each
TEST_PACKAGES = ("pytest", "filelock", "httpx", "hypothesis")

NUMBERS = ("tests/native/test_native_oracle.py", "tests/native/test_quantization.py")
ALL = (
    *NUMBERS,
    "tests/native/test_native_bias.py",  # hostile files
    "tests/native/test_native_steering.py",
    "tests/native/test_trace.py",
    "tests/detection/test_recorder.py",
    "tests/llama/test_cpu.py",
)


@dataclass(frozen=True)
class Processor:
    """A processor as qemu names it, the library that is loaded on it, and what that was built for by ggml's names.

    `tests` run besides those of tests/integration/arm64. `alone`: the library is the only one in its folder.
    """

    cpu: str
    library: str
    features: tuple[str, ...]
    tests: tuple[str, ...] = ()
    alone: bool = False


PROCESSORS = (
    Processor("cortex-a53", "armv8.0_1", (), ALL),
    Processor("cortex-a76", "armv8.2_2", ("DOTPROD", "FP16_VA"), NUMBERS),
    Processor("max,sve=off", "armv8.6_0", ("DOTPROD", "FP16_VA", "MATMUL_INT8"), NUMBERS),
    # vectors of 128 bits, as most processors have, and of 256
    Processor("max,sve-max-vq=1", "armv8.6_2", ("DOTPROD", "FP16_VA", "MATMUL_INT8", "SVE"), NUMBERS),
    Processor("max,sve-max-vq=2", "armv8.6_1", ("DOTPROD", "FP16_VA", "MATMUL_INT8", "SVE"), alone=True),
    Processor("max,sve-max-vq=2", "armv8.2_3", ("DOTPROD", "FP16_VA", "SVE"), alone=True),
    Processor("cortex-a76", "armv8.2_1", ("DOTPROD",), alone=True),
)


class Arm64:
    """A folder that tests/integration/arm64/prepare.sh has made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.python = self.folder / "venv" / "bin" / "python"
        self.packages = (self.folder / "venv" / "packages").resolve()

    @property
    def version(self) -> str:
        """Of its Python, such as 3.11."""
        return self.packages.parent.name.removeprefix("python")

    def install(self, wheels: Sequence[Path]) -> None:
        """Install wheels, what they depend on, and what the tests need."""
        names = [wheel.name.partition("-")[0].replace("_", "-") for wheel in wheels]
        wanted = {re.split(r"[^\w.-]", line)[0]: line for wheel in wheels for line in requirements(wheel)}
        wanted |= {name: name for name in TEST_PACKAGES}
        shutil.rmtree(self.packages)
        tags = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(NEWEST, OLDEST - 1, -1)]
        tags += ["--platform=manylinux2014_aarch64", f"--python-version={self.version}", "--implementation=cp"]
        tags += [f"--abi=cp{self.version.replace('.', '')}", "--abi=abi3", "--abi=none", "--only-binary=:all:"]
        pip = [sys.executable, "-P", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += [f"--target={self.packages}", *tags]
        subprocess.run([*pip, *(line for name, line in wanted.items() if name not in names)], check=True)
        subprocess.run([*pip, "--no-deps", *map(str, wheels)], check=True)

    def libraries(self, processor: Processor) -> Path:
        """The folder of libraries for a processor: that of the package, or one with a single libggml-cpu."""
        source = self.packages / "steermoe_local" / "lib"
        if not processor.alone:
            return source
        folder = self.folder / "alone" / processor.library
        shutil.rmtree(folder, ignore_errors=True)
        target = folder / "steermoe_local" / "lib"
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("libggml-cpu-*"))
        shutil.copy2(source / f"libggml-cpu-{processor.library}.so", target)
        shutil.copytree(self.packages / "steermoe_local.libs", folder / "steermoe_local.libs")
        return target

    def test(self, processor: Processor, reference: Path, options: Sequence[str]) -> bool:
        """Run the tests on a processor."""
        env = os.environ | {
            "QEMU_CPU": processor.cpu,
            "STEERMOE_LIB_PATH": str(self.libraries(processor)),
            "STEERMOE_ARM64_REFERENCE": str(reference),
            "STEERMOE_ARM64_FEATURES": " ".join(processor.features),
        }
        pytest = [self.python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        passed, words, begin = True, "", time.monotonic()
        for arguments in filter(None, (["-m", "arm64", "tests/integration/arm64"], [*processor.tests])):
            command = [str(word) for word in (*pytest, *arguments)]
            done = subprocess.run(
                command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            passed &= done.returncode == 0
            words += done.stdout if done.returncode else done.stdout.strip().rpartition("\n")[2] + "\n"
        seconds = time.monotonic() - begin
        print(f"== {processor.library} on {processor.cpu}, {seconds:.0f} s:\n{words}", end="", flush=True)
        return passed


def requirements(wheel: Path) -> list[str]:
    """What a wheel depends on, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    return [line.partition(";")[0].strip() for line in lines if "extra ==" not in line]


def main(arguments: list[str]) -> int:
    """`install FOLDER WHEEL...`, or `test FOLDER [OPTIONS OF PYTEST]`."""
    what, arm64, rest = arguments[0], Arm64(Path(arguments[1])), arguments[2:]
    if what == "install":
        arm64.install([Path(name) for name in rest])
        return 0
    reference = arm64.folder / "reference"
    subprocess.run([sys.executable, "-m", "tests.integration.arm64.answers", reference], cwd=ROOT, check=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        passed = pool.map(lambda processor: arm64.test(processor, reference, rest), PROCESSORS)
        failed = [processor.library for processor, good in zip(PROCESSORS, passed, strict=True) if not good]
    if failed:
        print(f"error: tests failed on {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
