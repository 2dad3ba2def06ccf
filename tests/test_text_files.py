"""Text is read and written alike on every system: encodings and ends of lines are named where files are opened."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.support.paths import ROOT

PACKAGE = ROOT / "steermoe_local"


def calls(source: str) -> Iterator[tuple[int, str, ast.Call]]:
    """(line, name, call) of each call of a function or method of that name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield node.lineno, name, node


def faults(source: str) -> list[str]:
    """What is wrong in a module, one line each."""
    found = []
    for line, name, call in calls(source):
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        if name == "read_text" and not (call.args or "encoding" in named):
            found.append(f"{line}: read_text without an encoding")
        if name == "write_text":
            if len(call.args) < 2 and "encoding" not in named:
                found.append(f"{line}: write_text without an encoding")
            if "newline" not in named:
                found.append(f"{line}: write_text without newline; Windows would end lines otherwise")
        if name == "TextIOWrapper" and len(call.args) < 2 and "encoding" not in named:
            found.append(f"{line}: TextIOWrapper without an encoding")
        if name in ("open", "fdopen") and (isinstance(call.func, ast.Name) or name == "fdopen"):
            mode = named.get("mode", call.args[1] if len(call.args) > 1 else ast.Constant("r"))
            text = mode.value if isinstance(mode, ast.Constant) and isinstance(mode.value, str) else "b"
            if "b" in text:
                continue
            if "encoding" not in named:
                found.append(f"{line}: open without an encoding")
            to_null = ast.unparse(call.args[0]) == "os.devnull"
            if set(text) & set("wax+") and "newline" not in named and not to_null:
                found.append(f"{line}: open for writing without newline")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.name", "os.linesep"):
            found.append(f"{node.lineno}: {ast.unparse(node)}; ask sys.platform, see _util/windows.py")
    return found


def test_encodings_and_ends_of_lines_are_named() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    assert len(paths) > 300
    found = {str(path.relative_to(PACKAGE)): faults(path.read_text("utf-8")) for path in paths}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_what_is_found() -> None:
    source = """
import io, os
p.read_text()
p.write_text("a")
p.write_text("a", "utf-8")
open("a")
open("a", "w", encoding="utf-8")
io.TextIOWrapper(raw)
os.fdopen(1, "w")
os.name
"""
    assert [fault.partition(":")[0] for fault in faults(source)] == ["3", "4", "4", "5", "6", "7", "8", "9", "9", "10"]
    good = """
p.read_text("utf-8")
p.write_text("a", "utf-8", newline="\\n")
open("a", "rb")
open("a", "w", encoding="utf-8", newline="")
open(os.devnull, "w", encoding="utf-8")
archive.open("a")
"""
    assert faults(good) == []
