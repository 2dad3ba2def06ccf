"""Makes HTML pages that need nothing from outside and run nothing."""

from __future__ import annotations

import html

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content-Security-Policy of every page: no scripts, no addresses, pictures only as data: URIs."""


def html_page(title: str, style: str, body: str) -> str:
    """One whole page. `title` is escaped here; `style` and `body` are ours, with every text in them escaped."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style></head>\n<body>\n{body}</body></html>\n"
    )
