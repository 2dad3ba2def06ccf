"""Say what the libraries of a wheel contain: an SBOM in CycloneDX's form, and the licences of what is in them.

CMakeLists.txt calls it with the prepared tree; a wheel has the results in `.dist-info/sboms/` (PEP 770) and
`.dist-info/licenses/`. Libraries that auditwheel adds are in its own SBOM beside this one. Versions and licence texts
are read from the tree: where it lacks one, the build stops, for the list below is then wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PIN_FILE = ROOT / "steermoe_local" / "llama_cpp_pin.txt"


class BundleError(Exception):
    """An error to print to the user of the build."""


@dataclass(frozen=True)
class Part:
    """A piece of software that is compiled into the libraries."""

    name: str
    license: str  # SPDX's identifier, or "public domain"
    text: str  # file of the tree with the licence; of a source file its first comment, or the notice
    supplier: str
    version: Callable[[Path], str] | None = None
    url: str = ""
    notice: str = ""  # of code inside another's source file, which says no more of its licence than this line


def _numbers(file: str, prefix: str, parts: tuple[str, ...]) -> Callable[[Path], str]:
    def version(tree: Path) -> str:
        text = (tree / file).read_text("utf-8")
        found = [re.search(rf"\b{prefix}_{part}[ \t]+(\d+)", text) for part in parts]
        if not all(found):
            raise BundleError(f"{file}: has no {prefix}_{parts[0]}; adapt native/bundled.py")
        return ".".join(match[1] for match in found if match)

    return version


THREE = ("MAJOR", "MINOR", "PATCH")
PARTS = (
    Part(
        "llama.cpp",
        "MIT",
        "LICENSE",
        "The ggml authors",
        _numbers("CMakeLists.txt", "LLAMA_VERSION", THREE),
        "https://github.com/ggml-org/llama.cpp",
    ),
    Part(
        "ggml",
        "MIT",
        "LICENSE",
        "The ggml authors",
        _numbers("ggml/CMakeLists.txt", "GGML_VERSION", THREE),
        "https://github.com/ggml-org/ggml",
    ),
    Part("llamafile sgemm", "MIT", "ggml/src/ggml-cpu/llamafile/sgemm.cpp", "Mozilla Foundation"),
    Part(
        "xxHash",
        "BSD-2-Clause",
        "vendor/hash/xxhash/LICENSE",
        "Yann Collet",
        _numbers("vendor/hash/xxhash/xxhash.h", "XXH_VERSION", ("MAJOR", "MINOR", "RELEASE")),
        "https://github.com/Cyan4973/xxHash",
    ),
    Part("sha1", "public domain", "vendor/hash/sha1/sha1.c", "Steve Reid"),
    Part("sha256", "public domain", "vendor/hash/sha256/LICENSE", "Igor Pavlov"),
    Part("rotate-bits", "MIT", "vendor/hash/rotate-bits/LICENSE.md", "William Casarin"),
    Part(
        "YaRN",
        "MIT",
        "ggml/src/ggml-cpu/ops.cpp",
        "Jeffrey Quesnelle and Bowen Peng",
        url="https://github.com/jquesnelle/yarn",
        notice="MIT licensed. Copyright (c) 2023 Jeffrey Quesnelle and Bowen Peng.",
    ),
    Part(
        "ggllm.cpp",
        "MIT",
        "src/llama-vocab.cpp",
        "The ggllm.cpp authors",
        url="https://github.com/cmp-nct/ggllm.cpp",
        notice="adapted from https://github.com/cmp-nct/ggllm.cpp [MIT License]",
    ),
)
# where systems keep the licence of GNU's OpenMP, which auditwheel copies into a portable wheel
LIBGOMP = (
    "/usr/share/doc/libgomp1/copyright",
    "/usr/share/doc/libgomp1-*-cross/copyright",
    "/usr/share/licenses/libgomp/COPYING*",
    "/usr/share/licenses/libgcc/COPYING*",
)
# folders of vendor/ that are compiled into libraries of a wheel, and those that only llama.cpp's programs use
COMPILED = {"hash": {"rotate-bits", "sha1", "sha256", "xxhash"}}
PROGRAMS_ONLY = {"cpp-httplib", "miniaudio", "nlohmann", "sheredom", "stb"}


def check_vendored(tree: Path) -> None:
    """Raise BundleError for vendored code that this list does not know."""
    found = {path.name for path in (tree / "vendor").iterdir() if path.is_dir()}
    unknown = found - COMPILED.keys() - PROGRAMS_ONLY
    for folder, known in COMPILED.items():
        unknown |= {path.name for path in (tree / "vendor" / folder).iterdir() if path.is_dir()} - known
    if unknown:
        raise BundleError(f"vendor/ of the tree has {', '.join(sorted(unknown))}; add it to native/bundled.py")


def license_text(tree: Path, part: Part) -> str:
    """The licence of a part, as the tree has it."""
    path = tree / part.text
    if not path.is_file():
        raise BundleError(f"{part.text}: the tree has no such file; adapt native/bundled.py")
    text = path.read_text("utf-8")
    if part.notice:
        if part.notice not in text:
            raise BundleError(f"{part.text}: no longer says {part.notice!r}; adapt native/bundled.py")
        terms = (tree / "LICENSE").read_text("utf-8").partition("Permission is hereby granted")
        return f"{part.notice}\n\n{terms[1]}{terms[2]}"
    if path.suffix in (".c", ".cpp"):
        lines = text.splitlines()
        if lines[0].startswith("//"):
            end = next(i for i, line in enumerate(lines) if not line.startswith("//"))
            return "\n".join(line.removeprefix("//").strip() for line in lines[:end]) + "\n"
        return text.partition("/*")[2].partition("*/")[0].strip() + "\n"
    return text


def sbom(tree: Path, version: str, backends: list[str]) -> dict[str, Any]:
    """The SBOM (CycloneDX 1.6) of the libraries of a wheel."""
    pin = re.fullmatch(r"llama-cpp-python==(\S+) --hash=sha256:([0-9a-f]{64})\s*", PIN_FILE.read_text("utf-8"))
    if pin is None:
        raise BundleError(f"{PIN_FILE}: expected one line `llama-cpp-python==X --hash=sha256:Y`")
    check_vendored(tree)
    own = f"pkg:pypi/steermoe-local@{version}"
    components = []
    for part in PARTS:
        plain = re.sub(r"[^a-z0-9.]+", "-", part.name.lower())
        number = part.version(tree) if part.version else ""
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": f"{own}#{plain}",
            "supplier": {"name": part.supplier},
            "name": part.name,
            "licenses": [{"license": {"name" if part.license == "public domain" else "id": part.license}}],
        }
        if number:
            component["version"] = number
        if part.url:
            component["externalReferences"] = [{"type": "vcs", "url": part.url}]
        if part.name == "llama.cpp":
            component["description"] = f"patched; from the sources of llama-cpp-python {pin[1]}"
            component["modified"] = True
        if part.name == "ggml":
            component["modified"] = True
            component["properties"] = [{"name": "steermoe:backend", "value": backend} for backend in backends]
        components.append(component)
    source = f"pkg:pypi/llama-cpp-python@{pin[1]}"
    components.append(
        {
            "type": "file",
            "bom-ref": source,
            "name": f"llama_cpp_python-{pin[1]}.tar.gz",
            "version": pin[1],
            "description": "the archive that the sources above were taken from",
            "hashes": [{"alg": "SHA-256", "content": pin[2]}],
            "purl": source,
        }
    )
    body = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": own,
                "name": "steermoe-local",
                "version": version,
                "licenses": [{"license": {"id": "MIT"}}],
                "purl": own,
            }
        },
        "components": components,
        "dependencies": [{"ref": own, "dependsOn": [component["bom-ref"] for component in components[:-1]]}],
    }
    # of the content, so that equal builds give equal files
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(body, sort_keys=True))
    return {"$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json", **body, "serialNumber": f"urn:uuid:{number}"}


def libgomp_license(root: Path = Path("/")) -> str:
    """The licence of GNU's OpenMP, as the system that builds has it (the GPL with GCC's exception)."""
    for pattern in LIBGOMP:
        if found := sorted(root.glob(pattern.removeprefix("/"))):
            return "\n\n".join(path.read_text("utf-8", "replace") for path in found)
    raise BundleError(f"no licence of libgomp on this system; looked for {', '.join(LIBGOMP)}")


def write(tree: Path, output: Path, backends: list[str], libgomp: bool = False) -> None:
    """Write `sboms/` and `licenses/` into a folder. `libgomp`: GNU's OpenMP is going to be in the wheel, too."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    (output / "sboms").mkdir(parents=True, exist_ok=True)
    (output / "licenses").mkdir(exist_ok=True)
    text = json.dumps(sbom(tree, version, backends), indent=1) + "\n"
    (output / "sboms" / "steermoe-local.cdx.json").write_text(text, "utf-8", newline="\n")
    for part in PARTS:
        name = "LICENSE." + re.sub(r"[^a-z0-9.]+", "-", part.name.lower())
        (output / "licenses" / name).write_text(license_text(tree, part), "utf-8", newline="\n")
    if libgomp:
        (output / "licenses" / "LICENSE.libgomp").write_text(libgomp_license(), "utf-8", newline="\n")


def main() -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, required=True, help="the prepared llama.cpp tree")
    parser.add_argument("--output", type=Path, required=True, help="gets sboms/ and licenses/")
    parser.add_argument("--backends", default="", help="ggml's backends in the build, with commas")
    parser.add_argument("--libgomp", action="store_true", help="GNU's OpenMP is going to be in the wheel")
    arguments = parser.parse_args()
    backends = [name for name in arguments.backends.split(",") if name]
    try:
        write(arguments.tree, arguments.output, backends, arguments.libgomp)
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
