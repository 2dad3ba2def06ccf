"""A report as one HTML page that needs nothing else: pictures inside, no scripts, no addresses, every text escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable
from pathlib import Path

from ..._util.html_page import html_page
from ..._util.visible import visible
from .document import Block, Code, Document, Heading, Listed, Picture, Table, Words, one_line

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--back:#fff;--line:#d3d8de;--faint:#56606b;--soft:#f3f5f7}
@media (prefers-color-scheme:dark){:root{--ink:#e3e6ea;--back:#15181c;--line:#3a4149;--faint:#9aa4af;--soft:#1f242a}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:72rem;margin:0 auto;
padding:1.5rem;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.15rem;margin-top:2rem}
.verdict{font-size:1.1rem;font-weight:650;border-left:4px solid currentColor;background:var(--soft);padding:.7rem 1rem;
margin:1rem 0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{border-bottom:1px solid var(--line);padding:.3rem .7rem;text-align:left;vertical-align:top}
th{white-space:nowrap}.note{color:var(--faint);font-size:.85rem}
img{max-width:100%;height:auto;background:#fff;border-radius:6px;margin:.5rem 0}
pre,code{font-family:ui-monospace,monospace;font-size:.88rem;background:var(--soft)}
pre{padding:.7rem 1rem;overflow-x:auto;border-radius:6px}
"""
_KINDS = {".png": "image/png", ".svg": "image/svg+xml"}


def html_report(document: Document, folder: Path | None = None) -> str:
    """The report as a page. `folder` has the files of its pictures; one that is not there is left out.

    Raises OSError for a picture that cannot be read.
    """
    parts = [f"<h1>{_text(document.title)}</h1>"]
    if document.verdict:
        parts.append(f'<p class="verdict">{_text(document.verdict)}</p>')
    parts += [_part(block, folder) for block in document.blocks]
    return html_page(one_line(document.title), _STYLE, "\n".join(filter(None, parts)) + "\n")


def _text(text: str) -> str:
    return html.escape(one_line(text))


def _part(block: Block, folder: Path | None) -> str:
    match block:
        case Table():
            return _table(block)
        case Heading():
            return f"<h2>{_text(block.text)}</h2>"
        case Words():
            return f"<p>{f'<strong>{_text(block.lead)}:</strong> ' if block.lead else ''}{_text(block.text)}</p>"
        case Listed():
            items = (f"<code>{_text(item)}</code>" if block.code else _text(item) for item in block.items)
            return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"
        case Code():
            return f"<pre><code>{html.escape(visible(block.text))}</code></pre>"
        case Picture():
            return _image(block, folder)


def _table(table: Table) -> str:
    def row(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    title = f"<h2>{_text(table.title)}</h2>\n" if table.title else ""
    rows = "\n".join(row(cells, "td") for cells in table.rows)
    head = f"<thead>{row(table.header, 'th')}</thead>"
    note = f'\n<p class="note">{_text(table.note)}</p>' if table.note else ""
    return f'{title}<div class="wide"><table>{head}\n<tbody>{rows}</tbody></table></div>{note}'


def _image(picture: Picture, folder: Path | None) -> str:
    path = None if folder is None else folder / picture.name
    kind = _KINDS.get(Path(picture.name).suffix.lower())
    if path is None or kind is None or not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<p><img src="data:{kind};base64,{data}" alt="{_text(picture.name)}"></p>'
