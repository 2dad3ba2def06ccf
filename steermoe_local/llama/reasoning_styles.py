"""How chat templates mark the reasoning in a reply: one table of tags, one of formats with channels."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .thinking import mentions_reasoning


@dataclass(frozen=True)
class Tags:
    """Markers around the reasoning at the beginning of a reply and, optionally, around the answer after it.

    `always`: the answer has its markers also in a reply without reasoning. `header` may stand before each part and
    `ending` behind the answer. The regular expression `where` tells a template with these tags; "": one of the
    reasoning's markers does.
    """

    opening: str
    closing: str
    answer_opening: str = ""
    answer_closing: str = ""
    always: bool = False
    header: str = ""
    ending: str = ""
    where: str = ""

    def of(self, template: str) -> bool:
        """Has the template these tags?"""
        if self.where:
            return re.search(self.where, template) is not None
        known = self.opening in template or self.closing in template
        return known and (not self.answer_opening or self.answer_opening in template)


# Tags of chat templates of models in GGUF form; where several are in a template, the longer entry comes first.
TAGS = (
    # <answer> and <response> must follow closely: templates have them for the results of tools, too.
    Tags("<think>", "</think>", "<answer>", "</answer>", where="</think>[^<]{0,120}<answer>"),  # Hunyuan
    Tags("<think>", "</think>", "<response>", "</response>", where="</think>[^<]{0,120}<response>"),  # ERNIE, Granite
    Tags("<think>", "</think>"),  # Qwen3, DeepSeek, GLM, MiniMax-M2, ...
    Tags("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", answer_closing="[END FINAL RESPONSE]"),  # Apriel
    Tags("Here is my thought process:", "Here is my response:"),  # Granite 3.2
    Tags("<thinking>", "</thinking>"),
    Tags("<thought>", "</thought>"),  # EXAONE Deep
    Tags("<seed:think>", "</seed:think>"),
    Tags("<mm:think>", "</mm:think>", where="mm:think"),  # MiniMax-M3
    Tags("<think:opensource>", "</think:opensource>", where="':opensource'"),  # Hy3
    Tags("[THINK]", "[/THINK]"),  # Magistral, Ministral
    Tags("<|channel>thought", "<channel|>"),  # Gemma 4
    Tags("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    Tags("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", always=True),  # Cohere
    Tags("<|START_THINKING|>", "<|END_THINKING|>", "<|START_TEXT|>", "<|END_TEXT|>", always=True),  # Cohere 2
    Tags("<|think|>", "<|end|>", "<|content|>", "<|end|>", always=True, header="<|begin|>assistant"),  # Solar
    Tags(  # Kimi-K3
        "<|open|>think<|sep|>",
        "<|close|>think<|sep|>",
        "<|open|>response<|sep|>",
        "<|close|>response<|sep|>",
        always=True,
        ending="<|close|>message<|sep|>",
        where=r"open_tag\('think'",
    ),
)

START, MESSAGE = "<|start|>", "<|message|>"


@dataclass(frozen=True)
class Channels:
    """A format of replies that consist of messages: <|start|>HEADER<|message|>TEXT, then one of `ends`.

    In HEADER, behind the role, `markers` may stand. `final` is the header of the answer, without the role; the regular
    expression `is_answer` finds an answer's header, `is_call` that of a call of a tool, all others are reasoning.
    `known` finds a header that says which kind it is; a message without one is an answer.
    """

    ends: tuple[str, ...]
    markers: tuple[str, ...]
    final: str
    known: str
    is_answer: str
    is_call: str
    where: str

    @property
    def all_markers(self) -> tuple[str, ...]:
        """All marker texts."""
        return (START, MESSAGE, *self.ends, *self.markers)


CHANNELS = (
    Channels(  # OpenAI's harmony (gpt-oss): <|start|>ROLE to=RECIPIENT<|channel|>CHANNEL<|message|>TEXT<|end|>
        ends=("<|end|>", "<|return|>", "<|call|>"),
        markers=("<|channel|>", "<|constrain|>"),
        final="<|channel|>final",
        known=r"<\|channel\|>",
        is_answer=r"<\|channel\|>\s*final\b",
        is_call=r"\bto=functions\.",
        where="<|channel|>",
    ),
    Channels(  # Muse: <|start|>ROLE to=RECIPIENT<|message|>TEXT<|eom|>, the last one <|eot|>
        ends=("<|eom|>", "<|eot|>"),
        markers=(),
        final=" to=user",
        known=r"\bto=",
        is_answer=r"\bto=user\b",
        is_call=r"\bto=(?!self\b)",
        where="to=self",
    ),
)


@dataclass(frozen=True)
class ReasoningStyle:
    """How a model marks its reasoning: by `tags` or by `channels`; the other is None.

    `prefix` is the part of the reply that the prompt already ends with: a template may open the reasoning itself.
    `keeps_calls`: calls of tools, which channels tell from answers, are answer, with their markers.
    """

    tags: Tags | None
    prefix: str = ""
    channels: Channels | None = None
    keeps_calls: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """All marker texts. Those that are control tokens must be detokenized (`Request.special`)."""
        if self.channels is not None:
            return self.channels.all_markers
        tags = self.tags
        assert tags is not None
        texts = (tags.opening, tags.closing, tags.answer_opening, tags.answer_closing, tags.header, tags.ending)
        return tuple(dict.fromkeys(filter(None, texts)))

    def answer_opening(self, prompt: str) -> str:
        """What a prompt, rendered to be answered, lacks so that the answer itself comes next, without reasoning."""
        if self.channels is not None:
            return "" if MESSAGE in self.prefix else self.channels.final + MESSAGE
        tags = self.tags
        assert tags is not None
        closing = ""
        if self.prefix:  # the template opened the reasoning; blank lines as templates have them around an empty one
            blank = self.prefix.endswith("\n")
            closing = f"\n{tags.closing}\n\n" if blank else tags.closing
        marked = tags.answer_opening and (tags.always or closing)
        if not marked or prompt.rstrip().endswith(tags.answer_opening):
            return closing
        header = tags.header if closing else ""
        return closing + header + tags.answer_opening


def reasoning_style(template: str, prompt: str = "") -> ReasoningStyle | None:
    """The reasoning style of a chat template, None if no known markers are in it; `prompt` is the rendered prompt.

    A reply to a prompt that ends with the opening marker begins inside the reasoning.
    """
    for channels in CHANNELS:
        if channels.where in template and MESSAGE in template:
            start = prompt.rfind(START)
            return ReasoningStyle(None, prompt[start:] if start >= 0 else "", channels)
    for tags in TAGS:
        if tags.of(template):
            opened = prompt.rstrip().endswith(tags.opening)
            return ReasoningStyle(tags, prompt[prompt.rfind(tags.opening) :] if opened else "")
    return None


def unknown_reasoning(template: str) -> str | None:
    """A warning for a chat template that knows of reasoning, but marks it in a way that is not known here."""
    if reasoning_style(template) is not None or not mentions_reasoning(template):
        return None
    return (
        "the markers of this chat template's reasoning are not known, so reasoning stays in the answers; "
        "turn it off by the template's own variable (--chat-template-kwargs)"
    )
