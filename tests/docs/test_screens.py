"""The pictures in docs/images are of the program as it is."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.scripts import load_script

if sys.platform == "win32":
    pytest.skip("pseudo-terminals", allow_module_level=True)


def screens() -> Any:
    return load_script("docs/screens.py")


def texts(svg: str) -> list[str]:
    """The words of a picture. Numbers may differ in the last digit from machine to machine, so they are left out."""
    pieces = [element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    return sorted({re.sub(r"\d+(\.\d+)?", "0", piece) for piece in pieces} - {"0", "-"})


def test_the_pictures_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    drawn = screens().render()
    assert set(drawn) == {path.name for path in (ROOT / "docs" / "images").glob("chat*.svg")}
    for name, svg in drawn.items():
        kept = (ROOT / "docs" / "images" / name).read_text("utf-8")
        assert kept.startswith("<svg ")
        # rows of /experts are numbers: which of them fit a line may differ
        words = [{text for text in texts(svg) if "%" not in text} for svg in (svg, kept)]
        assert words[0] == words[1], f"{name}: run make docs"


def test_a_wrong_answer_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = screens()

    def rows(*lines: str) -> list[dict[int, Any]]:
        blank = module.pyte.screens.Char(" ")
        return [{x: blank._replace(data=char) for x, char in enumerate(line)} for line in lines]

    picture = module.PICTURES["chat-compare"]
    right = "4, 5, 6, 7, 8, 9                 │ four, five, six, seven, eight, nine"
    module.check(picture, rows("> Count from four to nine.", right))
    for wrong in (right.replace(", nine", ""), right.replace(", 9", ""), "", "six" + right):
        with pytest.raises(SystemExit, match="is not there"):
            module.check(picture, rows(wrong))
