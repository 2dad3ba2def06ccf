"""The official JSON Schema test suite (json-schema-org), out of the source archive of jsonschema.

`make test` fetches the archive by name and hash: `python -m tests.support.json_schema_suite`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.paths import ROOT

NAME, VERSION = "jsonschema", "4.26.0"
SHA256 = "0c26707e2efad8aa1bfc5b7ce170f3fccc2e4918ff85989ba9ffa9facb2be326"
FOLDER = ROOT / "build" / "json-schema-suite"
ARCHIVE = FOLDER / f"{NAME}-{VERSION}.tar.gz"

# Groups that need other documents, or that assert what later drafts made a note.
_LEFT_OUT = {"dynamicRef", "optional/content", "optional/cross-draft", "optional/format-assertion", "refRemote"}
_LEFT_OUT |= {"vocabulary"}


def fetch() -> None:
    """Download the archive, unless it is there. Exits with a message if that fails."""
    if not ARCHIVE.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        print(f"fetching the JSON Schema test suite ({NAME} {VERSION})", flush=True)
        pin = FOLDER / "pin.txt"
        pin.write_text(f"{NAME}=={VERSION} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:", "--require-hashes", "-r", str(pin), "-d", str(FOLDER)]
        if subprocess.run(command, check=False).returncode != 0 or not ARCHIVE.exists():
            sys.exit(f"pip could not download it; with no network, put the archive at {ARCHIVE}")
    if hashlib.sha256(ARCHIVE.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{ARCHIVE}: not the archive with the pinned hash; delete it")


def groups(draft: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, group) of a draft, like "draft7": each group has a schema, and instances that are valid or not."""
    if not ARCHIVE.exists():
        missing = pytest.fail if os.environ.get("STEERMOE_REQUIRE_TOOLS") else pytest.skip
        missing("the JSON Schema test suite is not there; run make test, or python -m tests.support.json_schema_suite")
    top = f"{NAME}-{VERSION}/json/tests/{draft}/"
    with tarfile.open(ARCHIVE) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            name = member.name.removeprefix(top).removesuffix(".json")
            if member.isfile() and member.name == f"{top}{name}.json" and name not in _LEFT_OUT:
                data = archive.extractfile(member)
                assert data is not None
                for group in json.load(data):
                    yield name, group


if __name__ == "__main__":
    fetch()
