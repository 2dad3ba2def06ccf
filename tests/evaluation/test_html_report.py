"""Reports as pages: the verdict first, pictures inside, no scripts and no addresses, whatever the texts are."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from steermoe_local.evaluation.reports.document import Code, Document, Heading, Listed, Picture, Table, Words
from steermoe_local.evaluation.reports.html_report import html_report

HOSTILE = "</td><script>alert(1)</script>\x1b[31m\u202e\n# a `b` \"c\" 'd' &amp;"


def whole(text: str) -> Document:
    table = Table(text, (text, "b"), ((text, text),), text)
    listed = Listed((text, text)), Listed((text,), code=True)
    return Document(text, text, (Words(text, lead=text), Heading(text), Code(text), Picture(text), table, *listed))


def test_the_verdict_comes_first_in_both_forms() -> None:
    document = Document("title", "It works.", (Words("the question"), Table("Rates", ("a",), (("1",),))))
    lines = [line for line in document.markdown().splitlines() if line]
    assert lines[:4] == ["# title", "**It works.**", "the question", "## Rates"]
    page = html_report(document)
    assert page.index("<h1>title</h1>") < page.index("It works.") < page.index("the question") < page.index("Rates")


@pytest.mark.parametrize("text", [HOSTILE, "<img src=x onerror=alert(1)>", "", "javascript:alert(1)"])
def test_texts_stay_texts(text: str) -> None:
    page = html_report(whole(text))
    assert "<script" not in page
    assert "<img" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    body = page[page.index("<body>") : page.index("</html>")]
    tags = {element.tag for element in ElementTree.fromstring(body).iter()}  # well-formed: nothing was closed early
    allowed = "body h1 h2 p div table thead tbody tr th td ul li code pre strong"
    assert tags <= set(allowed.split(" "))


def test_the_policy_allows_styles_and_pictures_inside_alone() -> None:
    page = html_report(whole("text"))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)
    assert policy is not None
    assert policy[1] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert page.index("Content-Security-Policy") < page.index("<style>")
    assert not re.search(r"(?:href|src)=", page)
    assert not re.search(r"https?:|url\(|@import", page)


def test_pictures_are_inside(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG picture")
    (tmp_path / "a.txt").write_text("no picture")
    document = Document("t", "", (Picture("a.png"), Picture("gone.png"), Picture("a.txt")))
    page = html_report(document, tmp_path)
    found = re.findall(r'src="data:image/png;base64,(.*?)"', page)
    assert [base64.b64decode(data) for data in found] == [b"\x89PNG picture"]
    assert page.count("<img") == 1, "a picture that is not there is left out"
    assert "![a.png](a.png)" in document.markdown()


def test_code_cannot_end_its_fence() -> None:
    text = Document("t", "", (Code("a ```` b"), Listed(("x `y` z",), code=True))).markdown()
    assert "`````sh\na ```` b\n`````" in text
    assert "- `` x `y` z ``" in text
