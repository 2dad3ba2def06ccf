"""The page as files: what a browser would be told to do. No browser is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

import steermoe_local.server
from tests.support.running_server import Running, running

FOLDER = Path(steermoe_local.server.__file__).parent / "page"
FILES = sorted(path.name for path in FOLDER.iterdir())
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = {
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' data:",
    "connect-src 'self'",
    "form-action 'none'",
    "base-uri 'none'",
    "frame-ancestors 'none'",
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(parallel=1, api_key="a key") as found:
        yield found


def text(name: str) -> str:
    return (FOLDER / name).read_text("utf-8")


def address(name: str) -> str:
    return "/" if name == "index.html" else f"/page/{name}"


class Tags(HTMLParser):
    """All start tags with their attributes, and the text within scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style"):
            self.inline += data.strip()


@pytest.fixture(scope="module")
def tags() -> Tags:
    parser = Tags()
    parser.feed(text("index.html"))
    return parser


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_served_to_everyone(server: Running, name: str) -> None:
    response = httpx.get(server.url + address(name), timeout=60, trust_env=False)
    assert response.status_code == 200
    assert response.text == text(name)
    assert response.headers["content-type"].partition(";")[0] == TYPES[Path(name).suffix]
    assert {part.strip() for part in response.headers["content-security-policy"].split(";")} == POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert httpx.head(server.url + address(name), timeout=60, trust_env=False).status_code == 200
    assert httpx.post(server.url + address(name), json={}, timeout=60, trust_env=False).status_code == 401


def test_nothing_else_is_in_the_folder() -> None:
    assert {Path(name).suffix for name in FILES} <= set(TYPES)
    assert {"index.html", "page.css", "page.js"} <= set(FILES)


def test_no_inline_script_style_or_handler(tags: Tags) -> None:
    assert not tags.inline
    for tag, attributes in tags.found:
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "action", "data"):
            value = attributes.get(name) or ""
            assert not re.match(r"[a-z]+:|//", value), f"{tag} {name}={value}: from elsewhere"
    scripts = [attributes for tag, attributes in tags.found if tag == "script"]
    assert scripts == [{"type": "module", "src": "page/page.js"}]


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".js", ".css"))])
def test_nothing_from_elsewhere_and_no_markup_from_text(name: str) -> None:
    source = text(name)
    assert not re.search(r"https?:|url\(|@import|//[a-z]+\.[a-z]", source), "nothing is loaded from elsewhere"
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert word not in source, f"{word}: text would become markup, or code"
    assert len(source.splitlines()) <= 330, "split it"


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_modules_know_what_they_import(name: str) -> None:
    for names, module in re.findall(r'^import \{ ([^}]+) \} from "\./([^"]+)";$', text(name), re.MULTILINE):
        assert module in FILES
        for wanted in names.split(", "):
            assert re.search(rf"^export (async )?(function\*? |const |class ){wanted}\b", text(module), re.MULTILINE), (
                wanted
            )
            assert len(re.findall(rf"\b{wanted}\b", text(name))) > 1, f"{wanted} is not used"
    assert len(re.findall(r"^import ", text(name), re.MULTILINE)) == len(
        re.findall(r'^import \{ [^}]+ \} from "\./', text(name), re.MULTILINE)
    )


def test_every_id_that_is_asked_for_is_there_once(tags: Tags) -> None:
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    scripts = "".join(text(name) for name in FILES if name.endswith(".js"))
    wanted = set(re.findall(r'byId\("([^"]+)"\)', scripts))
    assert len(wanted) > 40
    assert wanted <= set(ids)


def test_every_field_has_a_name(tags: Tags) -> None:
    """A label, or aria-label; what a label encloses is covered by the browser's own names (test_page.py)."""
    labels = {attributes.get("for") for tag, attributes in tags.found if tag == "label"}
    for tag, attributes in tags.found:
        if tag in ("select", "textarea") or (tag == "input" and attributes.get("type") not in ("radio", "checkbox")):
            assert attributes["id"] in labels or attributes.get("aria-label"), attributes


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast of two colours, #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str) -> None:
    """Texts have 4.5, edges of fields and marks 3, in both schemes."""
    light, dark = re.findall(r":root \{(.*?)\}", text("page.css"), re.DOTALL)[:2]
    light_experts, dark_experts = re.findall(r":root \{(.*?)\}", text("tokens.css"), re.DOTALL)[:2]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light + light_experts))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", dark + dark_experts))
    texts = {
        "ink": ("back", "card", "field", "code", "question", "accent-soft", "wrong-back", "cell"),
        "faint": ("back", "card", "field", "code", "accent-soft"),  # marks of steered text, in reasoning
        "accent": ("card", "accent-soft"),
        "accent-ink": ("accent",),
        "wrong": ("card", "wrong-back"),
    }
    for front, backs in texts.items():
        for back in backs:
            assert contrast(colours[front], colours[back]) >= 4.5, (front, back)
    for front, back in (
        ("field-line", "card"),
        ("field-line", "field"),
        ("ink", "up"),
        ("ink", "down"),
        ("up", "cell"),
        ("down", "cell"),
    ):
        assert contrast(colours[front], colours[back]) >= 3, (front, back)
