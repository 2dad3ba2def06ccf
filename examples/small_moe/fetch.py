"""Download the packages of sources.toml with apt and unpack them: `python -m small_moe.fetch FOLDER`.

Each goes to FOLDER/NAME/. What is there already is kept, so the command can be repeated.
"""

from __future__ import annotations

import argparse
import fnmatch
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from .sources import Package, packages


def fetch(package: Package, folder: Path, any_version: bool) -> None:
    """Download and unpack one package into `folder`; ends the program with a message when apt does not have it."""
    if folder.is_dir():
        return
    named = package.name if any_version else f"{package.name}={package.version}"
    with tempfile.TemporaryDirectory() as temporary:
        done = subprocess.run(["apt-get", "download", "-q", named], cwd=temporary, capture_output=True, text=True)
        found = list(Path(temporary).glob("*.deb"))
        if done.returncode or len(found) != 1:
            sys.exit(
                f"error: {named}: apt cannot download it ({done.stderr.strip().splitlines()[-1:]}); run `apt-get "
                "update`, or take --any-version and say in the card which versions were used"
            )
        unpacked = Path(temporary) / "unpacked"
        subprocess.run(["dpkg-deb", "-x", found[0], unpacked], check=True)
        if package.archive:
            unpacked = _from_archive(package, unpacked / package.archive, Path(temporary) / "files")
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.move(unpacked, part)
        part.rename(folder)  # a folder that is there is whole


def _from_archive(package: Package, archive: Path, target: Path) -> Path:
    """Unpack those files of the archive inside a package that are wanted; its first folder is left out."""
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = member.name.partition("/")[2]
            if member.isfile() and any(
                fnmatch.fnmatch(inside, pattern.replace("**/", "*")) for pattern in package.files
            ):
                member.name = inside
                tar.extract(member, target, filter="data")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--any-version", action="store_true", help="take the versions that apt has")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for package in packages():
        print(package.name, package.version, flush=True)
        fetch(package, args.folder / package.name, args.any_version)


if __name__ == "__main__":
    main()
