"""Markdown on the page: what becomes of it, of hostile texts, and how often the server is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import browser as browsers
from tests.support.page_desk import Desk, desk
from tests.support.running_server import running

pytestmark = browsers.marks()


@pytest.fixture(scope="module")
def tab() -> Iterator[Desk]:
    with browsers.chromium() as browser, running(parallel=1) as server, desk(browser, server) as made:
        yield made.open()


def run(tab: Desk, module: str, body: str, given: Any = None) -> Any:
    """Run a function's body with a module's exports as `m` and what is given as `x`."""
    script = f"""async (x) => {{ const m = await import("/page/{module}.js"); {body} }}"""
    return tab.page.evaluate(script, given)


CODE = (
    '<div class="code"><div class="code-head" data-language="{0}"><button type="button" class="quiet" '
    'aria-label="Copy this code">Copy</button></div><pre tabindex="0" aria-label="{1}"><code>{2}</code></pre></div>'
)
LINK = '<a href="{0}" title="{0}" target="_blank" rel="noopener noreferrer">{1}</a>'
MARKDOWN: dict[str, tuple[str, list[str]]] = {
    "plain": ("one\ntwo\n\nthree", ["<p>one\ntwo</p>", "<p>three</p>"]),
    "line ends": ("one\r\ntwo\rthree\r\n\r\nfour", ["<p>one\ntwo\nthree</p>", "<p>four</p>"]),
    "inline": ("a **b *c* d** `e*f` *g*", ["<p>a <strong>b <em>c</em> d</strong> <code>e*f</code> <em>g</em></p>"]),
    "not emphasis": ("2 * 3 * 4, ** x **", ["<p>2 * 3 * 4, ** x **</p>"]),
    "snake": ("snake_case_name", ["<p>snake_case_name</p>"]),
    "a number": ("4.", ["<p>4.</p>"]),
    "heading": (
        "# One\ntext",
        ['<p class="heading level-1" role="heading" aria-level="3">One</p>', "<p>text</p>"],
    ),
    "no heading": ("#hash", ["<p>#hash</p>"]),
    "code": ("```py x\n# a **b**\n```\nc", [CODE.format("py", "Code py", "# a **b**"), "<p>c</p>"]),
    "open code": ("```\na\n\nb", [CODE.format("", "Code", "a\n\nb")]),
    "longer fence": ("````\n```\n````", [CODE.format("", "Code", "```")]),
    "ticks": ("``a`b``", ["<p><code>a`b</code></p>"]),
    "list": (
        "3. a\n   b\n4. **c**\n   - d",
        ['<ol start="3"><li>a\nb</li><li><strong>c</strong><ul><li>d</li></ul></li></ol>'],
    ),
    "a list that goes on": ("- a\n**b**\n\n* c", ["<ul><li>a\n<strong>b</strong></li></ul>", "<ul><li>c</li></ul>"]),
    "table": (
        "| a | b |\n|:-:|---|\n| 1 | **2** |\n\nc",
        [
            '<div class="wide-table" tabindex="0" role="region" aria-label="Table"><table><thead><tr>'
            '<th class="to-center" scope="col">a</th><th scope="col">b</th></tr></thead><tbody><tr>'
            '<td class="to-center">1</td><td><strong>2</strong></td></tr></tbody></table></div>',
            "<p>c</p>",
        ],
    ),
    "quote": ("> a\n> > b", ["<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"]),
    "rule": ("a\n\n---\nb", ["<p>a</p>", "<hr>", "<p>b</p>"]),
    "html": (
        "<b>x</b> <img src=x onerror=alert(1)>",
        ["<p>&lt;b&gt;x&lt;/b&gt; &lt;img src=x onerror=alert(1)&gt;</p>"],
    ),
    "link": ("[a](https://b.c/d)", ["<p>" + LINK.format("https://b.c/d", "a") + "</p>"]),
    "bare address": ("See https://b.c/d.", ["<p>See " + LINK.format("https://b.c/d", "https://b.c/d") + ".</p>"]),
    "address": ("<me@b.c>", ["<p>" + LINK.format("mailto:me@b.c", "me@b.c") + "</p>"]),
    "script": ("[a](javascript:alert(1))", ["<p>[a](javascript:alert(1))</p>"]),
    "data": ("[a](data:text/html,x)", ["<p>[a](data:text/html,x)</p>"]),
    "NUL": ("a\0 *b*", ["<p>a\ufffd <em>b</em></p>"]),
    "nothing": ("", []),
}

# Shows texts one after the other, each until the server has read it (or only the last one, if they come at once).
READ = """const { Server } = await import("/page/api.js");
const reader = new m.Reader(new Server());
reader.start();
const into = document.createElement("div");
const shown = new m.Rendered(into, reader);
const read = async () => {
    shown.ready = 0;
    while (into.dataset.read !== "true") await new Promise((done) => setTimeout(done));
};
"""
SHOW = f"""{READ}
for (const text of x.texts) {{ shown.show(text); if (x.slowly) await read(); }}
await read();
return [...into.children].map((one) => one.outerHTML);"""


@pytest.mark.parametrize("name", MARKDOWN)
def test_markdown(tab: Desk, name: str) -> None:
    text, blocks = MARKDOWN[name]
    assert run(tab, "markdown", SHOW, {"texts": [text]}) == blocks
    growing = [text[:n] for n in range(len(text) + 1)]
    for slowly in (True, False):
        found = run(tab, "markdown", SHOW, {"texts": growing, "slowly": slowly})
        assert found == blocks, "an answer that grows ends as if it had come at once"
    assert run(tab, "markdown", SHOW, {"texts": ["*another* text", text]}) == blocks


TOKENS = [
    *("`", "```", "**", "*", "\n", "\n\n", "- ", "1. ", "# ", "  ", "a", "b c", "> ", "|", "|-|\n"),
    *("[a](https://b.c)", "https://b.c", "<img src=x onerror=alert(1)>", "&lt;", "[x](javascript:alert(1))"),
]
ALLOWED = {
    *("P", "STRONG", "EM", "CODE", "PRE", "UL", "OL", "LI", "SPAN", "DIV", "BUTTON", "BLOCKQUOTE", "HR", "A"),
    *("TABLE", "THEAD", "TBODY", "TR", "TH", "TD"),
}
ATTRIBUTES = {
    *("class", "tabindex", "role", "aria-level", "aria-label", "data-language", "start", "scope", "type"),
    *("href", "title", "target", "rel"),
}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(TOKENS) | st.text(max_size=8), max_size=30).map("".join))
def test_markdown_makes_nothing_else(tab: Desk, text: str) -> None:
    """Of any text: no other elements and attributes, no other links, and no word is lost."""
    text = text.encode("utf-8", "ignore").decode()
    body = f"""{READ} shown.show(x); await read();
    const all = [...into.querySelectorAll("*")];
    return [all.map((one) => one.tagName), all.flatMap((one) => one.getAttributeNames()),
        all.map((one) => one.href).filter(Boolean), into.textContent];"""
    names, attributes, links, shown = run(tab, "markdown", body, text)
    assert set(names) <= ALLOWED
    assert set(attributes) <= ATTRIBUTES
    assert all(re.match("https?:|mailto:", link) for link in links), links
    hidden = sum(line.count("<img") for line in text.splitlines() if "```" in line)  # behind a code block's language
    assert text.count("<img") - hidden <= shown.count("<img") <= text.count("<img")


HOSTILE = [
    *(
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        " javascript:alert(1)",
        "java\nscript:alert(1)",
        "\x01javascript:a",
    ),
    *("data:text/html,<script>alert(1)</script>", "vbscript:a", "file:///etc/passwd", "blob:https://b.c/d", "//b.c"),
    *("/v1/steering", "https", "", "https:", "view-source:https://b.c", "filesystem:https://b.c", None, 5, {}),
]


@pytest.mark.parametrize("href", HOSTILE, ids=repr)
def test_the_page_checks_links_itself(tab: Desk, href: Any) -> None:
    """Whatever a server answers."""
    assert run(tab, "markdown", "return m.linkOf(x)", href) is None
    assert run(tab, "markdown", "return m.linkOf(x)", "https://b.c/d?e#f") == "https://b.c/d?e#f"


def test_a_tree_of_other_elements(tab: Desk) -> None:
    """What this page does not know becomes a span without attributes: the server cannot make it a script."""
    body = """const into = document.createElement("div");
    const tree = { tag: "script", from: 0, src: "x", children: [{ tag: "iframe", srcdoc: "x", onload: "y",
        children: [{ text: "<b>", at: 0 }] }, { tag: "a", href: "javascript:x", onclick: "y", children: [] }] };
    const reader = new m.Reader({ markdown: async () => ({ blocks: [tree] }) });
    reader.start();
    new m.Rendered(into, reader).show("*a*");
    while (into.dataset.read !== "true") await new Promise((done) => setTimeout(done));
    return into.innerHTML;"""
    assert run(tab, "markdown", body) == "<span><span>&lt;b&gt;</span><span></span></span>"


def test_one_question_at_a_time(tab: Desk) -> None:
    """Of many texts that grow, each frame; a block that is complete is not asked for again."""
    body = """let [most, now, asked] = [0, 0, []];
    const { Server } = await import("/page/api.js");
    const server = new Server();
    const reader = new m.Reader({ markdown: async (text) => {
        asked.push(text);
        most = Math.max(most, ++now);
        const found = await server.markdown(text);
        now--;
        return found;
    } });
    reader.start();
    const all = x.map(() => document.createElement("div"));
    const shown = all.map((into) => new m.Rendered(into, reader));
    const text = "A *paragraph* of text.\\n\\n".repeat(200);
    for (let end = 0; end < text.length; end += 100) {
        for (const one of shown) one.show(text.slice(0, end + 100));
        await new Promise((done) => setTimeout(done, 10));
    }
    while (!all.every((into) => into.dataset.read === "true")) await new Promise((done) => setTimeout(done, 10));
    const sum = asked.reduce((sum, one) => sum + one.length, 0);
    const shares = sum / (all.length * text.length);
    return [most, asked.length, shares, all.map((into) => into.querySelectorAll("em").length)];"""
    most, n_asked, share, found = run(tab, "markdown", body, [1, 2, 3])
    assert most == 1
    assert n_asked < 150
    assert share < 2, "characters read for each one shown"
    assert found == [200, 200, 200]


def test_blocks_keep_their_elements(tab: Desk) -> None:
    body = f"""{READ} shown.show("*a*\\n\\nb *c*"); await read();
    const [first, second] = into.children;
    shown.show("*a*\\n\\nb *c* d\\n\\ne"); await read();
    return [first === into.children[0], second === into.children[1], into.children.length];"""
    assert run(tab, "markdown", body) == [True, False, 3]


@pytest.mark.parametrize(
    "text", ["> " * 100 + "a *b*", "`" + "a" * 70_000, "a *b*\n\n" + "> " * 100], ids=["deep", "long", "in the end"]
)
def test_what_cannot_be_read_is_text(tab: Desk, text: str) -> None:
    """The server says 400 to it once; nothing of it is lost."""
    tab.watch.expected.add("status of 400")
    body = f"{READ} shown.show(x); await read(); return into.textContent.length;"
    assert run(tab, "markdown", body, text) >= len(text) - 4


def test_a_long_answer_is_read_in_parts(tab: Desk) -> None:
    body = f"{READ} shown.show(x); await read(); return into.querySelectorAll('em').length;"
    assert run(tab, "markdown", body, "A *paragraph*.\n\n" * 12_000) == 12_000


def test_a_server_that_is_away(tab: Desk) -> None:
    """The text stands there as it is, and is read when the server is back."""
    body = """const into = document.createElement("div");
    const { Problem } = await import("/page/api.js");
    let asked = 0;
    const reader = new m.Reader({ markdown: async () => {
        if (asked++ === 0) throw new Problem("gone", "away");
        return { blocks: [{ tag: "hr", from: 0, children: [] }] };
    } });
    new m.Rendered(into, reader).show("***");
    const before = asked;
    reader.start();
    while (!asked) await new Promise((done) => setTimeout(done));
    await new Promise((done) => setTimeout(done, 50));
    const away = [asked, into.textContent];
    reader.start();
    while (into.dataset.read !== "true") await new Promise((done) => setTimeout(done));
    return [before, away, into.innerHTML];"""
    assert run(tab, "markdown", body) == [0, [1, "***"], "<hr>"]


HEAVY = [
    "`" * 50_000,
    "`a ``b " * 10_000,
    "**a " * 20_000,
    "**a *b" * 10_000,
    "*a " * 20_000,
    "# " + " " * 50_000 + "x",
    "```" + "a" * 50_000 + "`",
    "- " * 30_000,
    "[" * 10_000 + "a" + "]" * 10_000,
    "|a" * 300 + "\n" + "|-" * 300 + "\n" + "|a|b\n" * 60,
]


@pytest.mark.parametrize("text", HEAVY, ids=range(len(HEAVY)))
def test_markdown_takes_no_time(tab: Desk, text: str) -> None:
    """The page's own work; the server's is bounded (tests/_util/test_markdown.py)."""
    tab.watch.expected.add("status of 400")
    body = f"""{READ} let most = 0, last = performance.now();
    const tick = () => {{ const now = performance.now(); most = Math.max(most, now - last); last = now; }};
    const timer = setInterval(tick);
    shown.show(x); await read(); clearInterval(timer); return most;"""
    assert run(tab, "markdown", body, text) < 2000
