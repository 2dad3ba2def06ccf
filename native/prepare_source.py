"""Unpack and patch the llama.cpp tree for the build.

The archive of the pinned llama-cpp-python release carries the llama.cpp tree that its ctypes structs were written for.
It is fetched with pip by name and hash into a cache folder, unpacked, and patched. Called by CMakeLists.txt and the
Makefile; needs pip, and patch-ng (a pure Python `patch`, so that neither git nor patch has to be installed).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIN_FILE = ROOT / "steermoe_local" / "llama_cpp_pin.txt"
PATCHES = ROOT / "native" / "patches"

# Inside the archive; files that the build never reads are not unpacked.
TREE = "vendor/llama.cpp/"
UNUSED = tuple(
    TREE + folder
    for folder in (
        "docs/",
        "media/",
        "skills/",
        "app/",
        "benches/",
        "models/ggml-vocab",
        # of tools/ui the server still needs CMakeLists.txt and the templates next to it
        "tools/ui/src/",
        "tools/ui/tests/",
        "tools/ui/static/",
        "tools/ui/.storybook/",
    )
)


class PrepareError(Exception):
    """An error to print to the user of the build."""


def read_pin() -> tuple[str, str]:
    """Version of llama-cpp-python and SHA-256 of its source archive."""
    match = re.fullmatch(r"llama-cpp-python==(\S+) --hash=sha256:([0-9a-f]{64})\s*", PIN_FILE.read_text("utf-8"))
    if match is None:
        raise PrepareError(f"{PIN_FILE}: expected one line `llama-cpp-python==X --hash=sha256:Y`")
    return match[1], match[2]


def cache_folder() -> Path:
    """STEERMOE_CACHE_DIR, or steermoe-local in the user's cache folder."""
    if named := os.environ.get("STEERMOE_CACHE_DIR"):
        return Path(os.path.expanduser(named))
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", str(Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(base) / "steermoe-local"


def sha256(path: Path) -> str:
    """Hash of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(cache: Path) -> Path:
    """The pinned archive in the cache folder, downloaded with pip if it is not there yet."""
    version, digest = read_pin()
    archive = cache / f"llama_cpp_python-{version}.tar.gz"
    if archive.exists():
        found = sha256(archive)
        if found != digest:
            raise PrepareError(f"{archive}: its SHA-256 is {found}, {PIN_FILE.name} says {digest}; delete the file")
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    print(f"fetching llama-cpp-python {version} into {cache}", flush=True)
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "--require-hashes"]
    command += ["--quiet", "-r", str(PIN_FILE), "-d", str(cache)]
    result = subprocess.run(command, check=False)
    if result.returncode != 0 or not archive.exists():
        raise PrepareError(
            f"pip could not download llama-cpp-python {version} with the pinned hash; with no network, put "
            f"the archive at {archive} or build from a tree with -DSTEERMOE_LLAMA_CPP_SOURCE=DIR"
        )
    return archive


def unpack(archive: Path, output: Path) -> None:
    """Unpack the llama.cpp tree of the archive to `output`."""
    with tarfile.open(archive) as tar:
        members = []
        for member in tar:
            inner = member.name.partition("/")[2]
            if inner.startswith(TREE) and not inner.startswith(UNUSED):
                member.name = inner.removeprefix(TREE)
                members.append(member)
        if not members:
            raise PrepareError(f"{archive}: has no {TREE}")
        output.mkdir(parents=True)
        tar.extractall(output, members=members, filter="data")


def copy_tree(source: Path, output: Path) -> None:
    """Copy the user's own llama.cpp tree: the copy is patched, the original must not change."""
    if not (source / "src" / "llama-graph.cpp").is_file():
        raise PrepareError(f"{source}: not a llama.cpp tree (src/llama-graph.cpp is missing)")
    at_the_top = shutil.ignore_patterns(".git", "build*", "docs", "media")
    models = shutil.ignore_patterns("*.gguf")

    def ignore(folder: str, names: list[str]) -> set[str]:
        # cmake/build-info.cmake is needed
        return models(folder, names) | (at_the_top(folder, names) if Path(folder) == source else set())

    shutil.copytree(source, output, ignore=ignore)


def apply_patches(patches: Iterable[Path], tree: Path) -> None:
    """Apply unified diffs without fuzz: a patch that does not apply exactly must stop the build."""
    import patch_ng  # only here: the Makefile fetches before it is installed

    for path in patches:
        patch = patch_ng.fromfile(str(path))
        if not patch or not patch.apply(root=str(tree)):
            raise PrepareError(
                f"{path.name} does not apply to this llama.cpp; use the pinned release "
                f"({PIN_FILE.name}) or adapt the patch"
            )


def prepare(output: Path, source: Path | None, patched: bool, cache: Path) -> None:
    """Make `output` the tree to build, unless it is up to date."""
    patches = sorted(PATCHES.glob("*.patch")) if patched else []
    origin = str(source.resolve()) if source else "sha256:" + read_pin()[1]
    stamp_text = "\n".join([origin, *(f"{p.name} {sha256(p)}" for p in patches), sha256(Path(__file__))])
    stamp = output / ".steermoe-prepared"
    if source is None and stamp.exists() and stamp.read_text("utf-8") == stamp_text:
        return
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if source:
        copy_tree(source, temporary)
    else:
        unpack(fetch(cache), temporary)
    apply_patches(patches, temporary)
    (temporary / stamp.name).write_text(stamp_text, "utf-8")
    shutil.rmtree(output, ignore_errors=True)
    temporary.rename(output)
    print(f"llama.cpp tree ready, {len(patches)} patch(es) applied", flush=True)


def main() -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="where the tree goes")
    parser.add_argument("--source", type=Path, help="take this llama.cpp tree instead of the archive")
    parser.add_argument("--stock", action="store_true", help="do not patch")
    parser.add_argument("--fetch-only", action="store_true", help="fetch, print the archive's path")
    args = parser.parse_args()
    try:
        if args.fetch_only:
            print(fetch(cache_folder()))
        elif args.output:
            prepare(args.output, args.source, not args.stock, cache_folder())
        else:
            parser.error("--output or --fetch-only is needed")
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
