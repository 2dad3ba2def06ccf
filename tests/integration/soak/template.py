"""A model whose chat template is a program that takes all time or memory when a message asks for it."""

from __future__ import annotations

from pathlib import Path

from tests.support.gguf_copy import copy_model
from tests.support.running_server import TINY

BOMBS = ("time", "memory", "text", "raise", "recursion")

_TEMPLATE = """
{%- macro again(n) -%}{{ again(n + 1) }}{%- endmacro -%}
{%- set word = messages[-1]['content'] -%}
{%- if word == 'time' -%}{%- for a in range(9999) -%}{%- for b in range(9999) -%}{%- for c in range(9999) -%}
{%- endfor -%}{%- endfor -%}{%- endfor -%}{%- endif -%}
{%- if word == 'memory' -%}{%- set x = [0] * messages|length -%}{{ (word * 99999999 * 99)|length }}{%- endif -%}
{%- if word == 'text' -%}{%- for a in range(99999) -%}{{ word * 9999 }}{%- endfor -%}{%- endif -%}
{%- if word == 'raise' -%}{{ raise_exception('no') }}{%- endif -%}
{%- if word == 'recursion' -%}{{ again(0) }}{%- endif -%}
"""


def write_bombs(target: Path) -> Path:
    """Copy the embedded model with that template; other messages are rendered as by its own."""
    from gguf import GGUFReader

    own = GGUFReader(TINY).fields["tokenizer.chat_template"].contents()
    copy_model(TINY, target, template=_TEMPLATE + own)
    return target
