"""Write docs/images/*.svg, the pictures of `steermoe chat`.

The real program runs in a pseudo-terminal with the embedded model and greedy decoding; input is typed, and the screen
is then drawn. The same program and model give the same pictures.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pyte

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT))  # for tests/

from tests.support.terminal import FAINT, Terminal  # noqa: E402

TINY = ("chat", "-m", "tiny", "--temp", "0", "-t", "1")


@dataclass(frozen=True)
class Picture:
    """A command and its typed input; `rest` is typed at the last prompt without Enter."""

    title: str
    arguments: tuple[str, ...]
    messages: tuple[str, ...]
    columns: int = 96
    rest: str = ""


PICTURES = {
    "chat": Picture(
        "Steering changes in the middle of a chat",
        (*TINY, "--map", "digits-words"),
        ("Count from three to nine.", "/reverse", "Count from three to nine.", "/why"),
        rest="/re",
    ),
    "chat-compare": Picture(
        "Unsteered and steered, side by side, and the experts behind the answer",
        (*TINY, "--map", "digits-words", "--activate", "8", "--deactivate", "8", "--reverse"),
        ("/compare", "Count from three to nine.", "/experts"),
    ),
}

# A dark terminal: names of colours as pyte gives them.
BACKGROUND, FOREGROUND, GREY = "#16181d", "#d8dbe2", f"#{FAINT}"
COLOURS = {
    "black": "#3b4048", "red": "#e8706f", "green": "#8ccf7e", "brown": "#e5c76b", "blue": "#67b0e8",
    "magenta": "#c47fd5", "cyan": "#6cbfbf", "white": "#d8dbe2",
}  # fmt: skip
CELL, LINE, SIZE, MARGIN, BAR = 8.4, 18, 14, 14, 30  # pixels


def play(picture: Picture, state: Path) -> list[dict[int, pyte.screens.Char]]:
    """Run the program; returns the rows of the screen, including those scrolled out of it."""
    env = {"XDG_STATE_HOME": str(state), "HOME": str(state), "STEERMOE_CONFIG": "/dev/null"}
    with Terminal(*picture.arguments, columns=picture.columns, rows=60, env=env) as terminal:
        terminal.prompt()
        for message in picture.messages:
            terminal.say(message)
        if picture.rest:
            terminal.type(picture.rest)
            terminal.until(lambda: "answer the last message again" in terminal.text)  # the menu
        buffer = terminal.screen.buffer
        last = max(y for y in range(60) if any(cell.data.strip() for cell in buffer[y].values()))
        return [dict(buffer[y]) for y in range(last + 1)]


def draw(picture: Picture, rows: Sequence[dict[int, Any]]) -> str:
    """The rows as SVG."""
    width = round(picture.columns * CELL + 2 * MARGIN)
    height = BAR + len(rows) * LINE + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="{SIZE}" role="img">',
        f"<title>{escape(picture.title)}</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="{BACKGROUND}"/>',
        f'<text x="{width / 2:g}" y="20" fill="{GREY}" text-anchor="middle">{escape(command(picture))}</text>',
    ]
    for y, row in enumerate(rows):
        for x, n, text, cell in runs(row, picture.columns):
            parts += draw_run(MARGIN + x * CELL, BAR + y * LINE, n * CELL, text, cell)
    return "\n".join([*parts, "</svg>"]) + "\n"


def command(picture: Picture) -> str:
    """The command line that starts it, without the flags that only make the picture reproducible."""
    shown = [word for word in picture.arguments if word not in ("-t", "1")]
    return " ".join(["steermoe", *shown])


def runs(row: dict[int, Any], columns: int) -> list[tuple[int, int, str, Any]]:
    """Adjacent cells with the same style: (first column, cells, text, style)."""
    found: list[tuple[int, int, str, Any]] = []
    blank = pyte.screens.Char(" ")
    for x in range(columns):
        cell = row.get(x, blank)
        look = cell._replace(data="")
        if found and found[-1][3] == look:
            first, n, text, _ = found[-1]
            found[-1] = (first, n + 1, text + cell.data, look)
        else:
            found.append((x, 1, cell.data, look))
    return [run for run in found if run[2].strip() or run[3].bg != "default" or run[3].reverse]


def draw_run(x: float, y: float, width: float, text: str, look: Any) -> list[str]:
    """A run as background and text; `textLength` keeps the columns whatever the font is."""
    front, back = colour(look.fg, FOREGROUND), colour(look.bg, "")
    if look.reverse:
        front, back = back or BACKGROUND, front
    parts = [f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{LINE}" fill="{back}"/>'] if back else []
    style = (' font-weight="bold"' if look.bold else "") + (' font-style="italic"' if look.italics else "")
    cell = width / len(text)
    # each piece between wide gaps has its own coordinates, for viewers without textLength and xml:space
    for piece in re.finditer(r"\S+( \S+)*", text):
        start, length = x + piece.start() * cell, len(piece[0]) * cell
        parts.append(
            f'<text x="{start:g}" y="{y + 13:g}" fill="{front}"{style} textLength="{length:g}" xml:space="preserve">'
            f"{escape(piece[0])}</text>"
        )
    return parts


def colour(name: str, default: str) -> str:
    """A colour of pyte: a name, six hex digits, or "default"."""
    if name == "default":
        return default
    return COLOURS.get(name.removeprefix("bright"), f"#{name}" if len(name) == 6 else default)


def render() -> dict[str, str]:
    """The text of every picture by its file name."""
    with tempfile.TemporaryDirectory() as folder:
        return {f"{name}.svg": draw(picture, play(picture, Path(folder) / name)) for name, picture in PICTURES.items()}


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, text in render().items():
        (IMAGES / name).write_text(text, encoding="utf-8")
        print(f"written: {IMAGES / name}", file=sys.stderr)
