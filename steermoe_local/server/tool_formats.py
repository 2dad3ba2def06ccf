"""How chat templates write calls of tools: one table.

The formats are those of the templates' own histories, from which models learn them; tests render such histories and
read them back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .tool_readers import (
    MINIMAX,
    Call,
    NotACall,
    Reader,
    Schemas,
    json_calls,
    keyed_call,
    marked_calls,
    read_cdata,
    read_elements,
    read_gemma,
    read_python,
)


@dataclass(frozen=True)
class ToolFormat:
    """The format of calls in a reply: they begin with one of `openings`, or with the reply itself if `bare`.

    The regular expression `where` finds it in a template.
    """

    name: str
    where: str
    openings: tuple[str, ...]
    read: Reader
    bare: bool = False

    def calls(self, text: str, schemas: Schemas) -> tuple[list[Call], str]:
        """(the calls that a text begins with, the text behind them); only calls of tools that were offered count.

        A call that is cut off or malformed is text.
        """
        found: list[Call] = []
        position = 0
        while position < len(text):
            try:
                calls, end = self.read(text, position, schemas)
            except (NotACall, ValueError, SyntaxError, RecursionError, MemoryError):
                break
            if not calls or any(call.name not in schemas for call in calls):
                break
            found += calls
            position = end
        return found, text[position:]


def tool_format(template: str) -> ToolFormat | None:
    """The format of a chat template's calls, None if it is not known."""
    return next((format_ for format_ in FORMATS if re.search(format_.where, template)), None)


_NAME = r"(?P<name>[^<>\"\s]+)"
_PARAMETER = r"<parameter=(?P<key>[^<>]+)>\n?(?P<value>.*?)\n?</parameter>"
_START_CALL = r"<\|start\|>(?:(?!<\|message\|>).){0,400}?\bto="

# The first whose `where` is in a template counts.
FORMATS = (
    ToolFormat(  # gpt-oss
        "harmony",
        r"<\|channel\|>",
        ("<|start|>",),
        json_calls(
            rf"{_START_CALL}functions\.(?P<name>[^<\s]+)(?:(?!<\|message\|>).){{0,400}}<\|message\|>",
            r"(?:<\|call\|>|<\|end\|>)?",
        ),
    ),
    ToolFormat(
        "muse",
        r"<atem:invoke",
        ("<|start|>",),
        marked_calls(
            rf"(?:{_START_CALL}[^<\s]+\s*<\|message\|>\s*)?(?:<atem:function_calls>\s*)?<atem:invoke name=\"{_NAME}\">",
            r"<atem:parameter name=\"(?P<key>[^\"]+)\">(?P<value>.*?)</atem:parameter>",
            r"</atem:invoke>\s*(?:</atem:function_calls>)?\s*(?:<\|eom\|>|<\|eot\|>)?",
        ),
    ),
    ToolFormat(
        "kimi-k3",
        r"open_tag\('call'|<\|open\|>call ",
        ("<|open|>tools<|sep|>",),
        marked_calls(
            r"(?:<\|open\|>tools<\|sep\|>\s*)?<\|open\|>call tool=\"(?P<name>[^\"]+)\"[^<]*<\|sep\|>",
            r"<\|open\|>argument key=\"(?P<key>[^\"]+)\" type=\"(?P<kind>[^\"]+)\"<\|sep\|>"
            r"(?P<value>.*?)<\|close\|>argument<\|sep\|>",
            r"<\|close\|>call<\|sep\|>\s*(?:<\|close\|>tools<\|sep\|>)?",
        ),
    ),
    ToolFormat(
        "kimi-k2",
        r"<\|tool_call_argument_begin\|>",
        ("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
        json_calls(
            r"(?:<\|tool_calls_section_begin\|>\s*)?<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[^:<\s]+):\d+\s*"
            r"<\|tool_call_argument_begin\|>",
            r"<\|tool_call_end\|>\s*(?:<\|tool_calls_section_end\|>)?",
        ),
    ),
    ToolFormat(
        "deepseek-dsml",  # V3.2, V4
        r"｜DSML｜",
        ("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>"),
        marked_calls(
            rf"(?:<｜DSML｜(?:function|tool)_calls>\s*)?<｜DSML｜invoke name=\"{_NAME}\">",
            r"<｜DSML｜parameter name=\"(?P<key>[^\"]+)\"(?: string=\"(?P<kind>true|false)\")?>"
            r"(?P<value>.*?)</｜DSML｜parameter>",
            r"</｜DSML｜invoke>\s*(?:</｜DSML｜(?:function|tool)_calls>)?",
        ),
    ),
    ToolFormat(  # R1, V3, V3.1
        "deepseek",
        r"<｜tool▁call▁begin｜>",
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        json_calls(
            r"(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?"
            r"(?P<name>[^<\s]+)\s*(?:<｜tool▁sep｜>|```json)",
            r"(?:```)?\s*<｜tool▁call▁end｜>\s*(?:<｜tool▁calls▁end｜>)?",
        ),
    ),
    ToolFormat(
        "solar",
        r"<\|tool_call:begin\|>",
        ("<|tool_calls|>",),
        json_calls(
            r"(?:<\|tool_calls\|>\s*)?<\|tool_call:begin\|>[^<]*<\|tool_call:name\|>(?P<name>[^<\s]+)<\|tool_call:args\|>",
            r"<\|tool_call:end\|>\s*(?:<\|calls\|>)?",
        ),
    ),
    ToolFormat(
        "minimax-m3",
        r"\]<\]minimax\[>\[",
        (MINIMAX + "<tool_call>",),
        marked_calls(
            rf"(?:{re.escape(MINIMAX)}<tool_call>\s*)?{re.escape(MINIMAX)}<invoke name=\"{_NAME}\">",
            rf"{re.escape(MINIMAX)}<(?P<key>[^<>/]+)>(?P<value>.*?){re.escape(MINIMAX)}</(?P=key)>",
            rf"{re.escape(MINIMAX)}</invoke>\s*(?:{re.escape(MINIMAX)}</tool_call>)?",
            read_elements,
        ),
    ),
    ToolFormat(
        "minimax-m2",
        r"<minimax:tool_call>",
        ("<minimax:tool_call>",),
        marked_calls(
            rf"(?:<minimax:tool_call>\s*)?<invoke name=\"{_NAME}\">",
            r"<parameter name=\"(?P<key>[^\"]+)\">(?P<value>.*?)</parameter>",
            r"</invoke>\s*(?:</minimax:tool_call>)?",
        ),
    ),
    ToolFormat(
        "hy3",
        r"'<tool_sep\{\}>'|<tool_sep:opensource>",
        ("<tool_calls:opensource>",),
        marked_calls(
            r"(?:<tool_calls:opensource>\s*)?<tool_call:opensource>\s*(?P<name>[^<\s]+)\s*<tool_sep:opensource>",
            r"<arg_key:opensource>(?P<key>.*?)</arg_key:opensource>\s*"
            r"<arg_value:opensource>(?P<value>.*?)</arg_value:opensource>",
            r"</tool_call:opensource>\s*(?:</tool_calls:opensource>)?",
        ),
    ),
    ToolFormat(
        "seed",
        r"<seed:tool_call>",
        ("<seed:tool_call>",),
        marked_calls(
            rf"<seed:tool_call>\s*<function={_NAME}>",
            _PARAMETER,
            r"</function>\s*</seed:tool_call>",
        ),
    ),
    ToolFormat(  # GLM, Ling 3, Laguna, Spark
        "glm",
        r"<arg_key>",
        ("<tool_call>",),
        marked_calls(
            r"<tool_call>\s*(?P<name>[^<\s]+)",
            r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
            r"</tool_call>",
        ),
    ),
    ToolFormat(  # Qwen3-Coder, Qwen3.5, Nemotron 3, StepFun
        "qwen3-coder",
        r"<parameter=",
        ("<tool_call>", "<function="),
        marked_calls(
            rf"(?:<tool_call>\s*)?<function={_NAME}>",
            _PARAMETER,
            r"</function>\s*(?:</tool_call>)?",
        ),
    ),
    ToolFormat(
        "minicpm5",
        r"<param name=",
        ("<function ",),
        marked_calls(
            rf"<function name=\"{_NAME}\">",
            r"<param name=\"(?P<key>[^\"]+)\">(?P<value>(?:<!\[CDATA\[.*?\]\]>)|.*?)</param>",
            r"</function>",
            read_cdata,
        ),
    ),
    ToolFormat(
        "functionary-v3.1", r"<function=", ("<function=",), json_calls(r"<function=(?P<name>[^>\s]+)>", "</function>")
    ),
    ToolFormat("gemma-4", r"<\|tool_call>", ("<|tool_call>",), read_gemma),
    ToolFormat(
        "lfm2", r"<\|tool_call_start\|>|<\|tool_list_start\|>|List of tools: \[", ("<|tool_call_start|>",), read_python
    ),
    ToolFormat(
        "cohere", r"<\|START_ACTION\|>", ("<|START_ACTION|>",), json_calls(r"<\|START_ACTION\|>", r"<\|END_ACTION\|>")
    ),
    ToolFormat(
        "apertus",
        r"<\|tools_prefix\|>",
        ("<|tools_prefix|>",),
        json_calls(r"<\|tools_prefix\|>", r"<\|tools_suffix\|>", keyed_call),
    ),
    ToolFormat("nemotron-v2", r"<TOOLCALL>", ("<TOOLCALL>",), json_calls(r"<TOOLCALL>", r"</TOOLCALL>")),
    ToolFormat(  # Granite 3, Phi-4-mini
        "granite-3", r"<\|tool_call\|>", ("<|tool_call|>",), json_calls(r"<\|tool_call\|>", r"(?:<\|/tool_call\|>)?")
    ),
    ToolFormat("gigachat", r"<\|function_call\|>", ("<|function_call|>",), json_calls(r"<\|function_call\|>", "")),
    ToolFormat(
        "gigachat-3",
        r"function call<\|role_sep\|>|'function call'",
        ("<|message_sep|>\n\nfunction call<|role_sep|>", "function call<|role_sep|>"),
        json_calls(r"(?:<\|message_sep\|>\s*)?function call<\|role_sep\|>", r"(?:<\|message_sep\|>)?"),
    ),
    ToolFormat(  # [TOOL_CALLS][{...}], or [TOOL_CALLS]name[ARGS]{...}
        "mistral",
        r"\[TOOL_CALLS\]",
        ("[TOOL_CALLS]",),
        json_calls(r"\[TOOL_CALLS\]\s*(?:(?P<name>[^\[{<\s]+)\s*(?:\[CALL_ID\][^\[]*)?\[ARGS\])?", ""),
    ),
    ToolFormat(  # Apriel, MiniMax-M1: one or several objects, or a list
        "tool_calls",
        r"<tool_calls>",
        ("<tool_calls>",),
        json_calls(r"(?:<tool_calls>\s*)?(?=[\[{])", r"(?:</tool_calls>)?"),
    ),
    ToolFormat(  # Hermes, Qwen2.5 and 3, Granite 4, SmolLM3, ...
        "hermes", r"<tool_call>", ("<tool_call>",), json_calls(r"<tool_call>", r"(?:</tool_call>|\Z)")
    ),
    ToolFormat("firefunction", r"\bfunctools\b", ("functools[",), json_calls(r"functools(?=\[)", "")),
    ToolFormat(
        "llama-3",
        r"\{\"name\": function name, \"parameters\"",
        ("<|python_tag|>",),
        json_calls(r"(?:<\|python_tag\|>)?\s*;?", ""),
        bare=True,
    ),
)
