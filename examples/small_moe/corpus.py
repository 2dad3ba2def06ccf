"""Make the documents that the model reads: `python -m small_moe.corpus PACKAGES OUTPUT.jsonl`.

Pages and sources become plain text (HTML as Markdown, manual pages as `man` shows them), cleaned, without paragraphs
that occur before, and are split into `train`, `heldout` and `test` by page: all translations of a page, and of all
sizes, are in one part. One line of OUTPUT is a document: {"id", "part", "kind", "language", "text"}.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import html2text
from lxml import html

from .sources import Package, packages

PARTS = (("heldout", 0.06), ("test", 0.10))  # cumulated shares; the rest is for training
LEAST = 300  # characters of a document
MOST = 60_000  # of a document: one long page is not to outweigh many
LONG_PARAGRAPH = 40  # characters from which on a repeated paragraph is dropped
MOST_OF_KIND = 14_000_000  # characters of one kind in one language
_OVERSTRIKE = re.compile(".\x08")
_BLANKS = re.compile(r"\n{3,}")
_UNWANTED = (
    "//script|//style|//nav|//aside|//noscript|//form|//footer|//header"
    "|//*[contains(concat(' ', @class, ' '), ' headerlink ') or contains(@class, 'navheader')"
    " or contains(@class, 'navfooter') or contains(@class, 'docnav') or contains(@class, 'toc')]"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", type=Path, help="the folder that fetch.py filled")
    parser.add_argument("output", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    jobs = [(package, path) for package in packages() for path in _files(package, args.packages)]
    seen: set[bytes] = set()
    characters: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    with ProcessPoolExecutor(args.workers) as pool, args.output.open("w", encoding="utf-8") as out:
        for document in pool.map(_document, *zip(*jobs, strict=True), chunksize=32):
            if document is None:
                continue
            name = f"{document['kind']} {document['language']}"
            text = _without_repeated(document["text"], seen)
            if text is None or characters[name] > MOST_OF_KIND:
                continue
            characters[name] += len(text)
            kept[f"{name} {document['part']}"] += 1
            out.write(json.dumps({**document, "text": text}, ensure_ascii=False) + "\n")
    for name, n in sorted(characters.items()):
        parts = ", ".join(f"{part} {kept[f'{name} {part}']}" for part in ("train", "heldout", "test"))
        print(f"{name}: {n / 1e6:.1f} M characters; documents: {parts}", file=sys.stderr)


def _files(package: Package, folder: Path) -> list[Path]:
    root = folder / package.name
    found = {path for pattern in package.files for path in root.glob(pattern) if path.is_file()}
    found = {path for path in found if not path.is_symlink()}
    # in an order of their own: the limit of a kind is not to take the first folders only
    order = sorted(found, key=lambda path: _digest(path.relative_to(root).as_posix()))
    if not order:
        sys.exit(f"error: {root}: no files like {package.files[0]}; run fetch.py again")
    return [path for path in order if not any(part in str(path) for part in package.without)]


def _document(package: Package, path: Path) -> dict[str, str] | None:
    """One document, or None if it has too little text."""
    match = package.path.search(path.as_posix())
    if match is None:
        return None
    fields = match.groupdict()
    language = fields.get("lang") or package.language
    raw = path.read_bytes()
    if path.suffix == ".gz":
        text = _manual(gzip.decompress(raw))
    elif path.suffix == ".html":
        text = _page(raw, package.main)
    else:
        text = raw.decode("utf-8", "replace")
    text = _clean(text)
    if len(text) < LEAST:
        return None
    # translations of one page share its name, whatever package they are in
    group = f"{package.kind} {fields['page'].removesuffix('.gz')}"
    identifier = f"{package.name}/{fields['page']}/{language}"
    return {
        "id": identifier,
        "part": _part(group),
        "kind": package.kind,
        "language": language,
        "text": text[:MOST],
    }


def _page(raw: bytes, main: str) -> str:
    tree = html.fromstring(raw)
    found = tree.xpath(main)
    if not found:
        return ""
    for element in found[0].xpath(_UNWANTED):
        element.drop_tree()
    writer = html2text.HTML2Text(bodywidth=0)
    writer.ignore_links = writer.ignore_images = writer.ignore_emphasis = True
    writer.unicode_snob = True
    return writer.handle(html.tostring(found[0], encoding="unicode"))


def _manual(raw: bytes) -> str:
    done = subprocess.run(["mandoc", "-K", "utf-8", "-T", "utf8", "-O", "width=78"], input=raw, capture_output=True)
    text = _OVERSTRIKE.sub("", done.stdout.decode("utf-8", "replace"))
    lines = text.splitlines()
    return "\n".join(lines[1:-1])  # without the header and the footer, which are alike in all pages


def _clean(text: str) -> str:
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\u00a0", " ")
    text = "".join(c for c in text if c in "\n\t" or not unicodedata.category(c).startswith("C"))
    lines = [line.rstrip() for line in text.split("\n")]
    return _BLANKS.sub("\n\n", "\n".join(lines)).strip()


def _without_repeated(text: str, seen: set[bytes]) -> str | None:
    """The text without long paragraphs that an earlier document has, None if less than half of it is left."""
    kept, n = [], 0
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if len(key) >= LONG_PARAGRAPH:
            digest = hashlib.blake2b(key.encode(), digest_size=12).digest()
            if digest in seen:
                continue
            seen.add(digest)
        kept.append(paragraph)
        n += len(paragraph)
    return "\n\n".join(kept) if n >= max(LEAST, len(text) / 2) else None


def _part(group: str) -> str:
    at = int.from_bytes(bytes.fromhex(_digest(group))[:8], "big") / 2**64
    return next((part for part, share in PARTS if at < share), "train")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    main()
