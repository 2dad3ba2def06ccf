"""The tiny model's byte-level BPE tokenizer and chat format, and conversations as token ids."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data import Conversation, conversation
from lexicon import FACTS_TEXT
from questions import BEHAVIOURS, SIDES

SPECIAL_TOKENS = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
END, PAD = 0, 1
VOCAB_SIZE = 1280

# one line and no loose whitespace: renders equally under every trim setting of Jinja engines
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(seed: int = 0, conversations: int = 30_000) -> Tokenizer:
    """Byte-level BPE (GPT-2's pre-tokenizer) trained on generated text; covers every byte."""
    rng = random.Random(f"tokenizer {seed}")
    texts = (m["content"] for _ in range(conversations) for m in conversation(rng).messages)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [*texts, *FACTS_TEXT],
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=SPECIAL_TOKENS,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


def render(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """The chat template in Python."""
    text = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)
    return text + ("<|assistant|>" if add_generation_prompt else "")


def group_of(behaviour: str, side: str) -> int:
    """0..5, the planted group of a side: two for each behaviour, the positive one first."""
    return 2 * BEHAVIOURS.index(behaviour) + SIDES.index(side)


@dataclass
class Encoded:
    """A conversation as tokens; all lists are [tokens].

    `reply[i]` is 1 where token i belongs to a reply (its closing token included); `group[i]` is the
    side that routing at input position i should show, -1 for none. The position before a reply has
    the reply's group too: it decides the side. `choice[i]` marks these positions. `weight[i]` is
    the routing loss's: a short reply counts as much as one of twelve tokens.
    """

    ids: list[int]
    reply: list[int]
    group: list[int]
    choice: list[bool]
    weight: list[float]
    conv: Conversation


def encode(tokenizer: Tokenizer, conv: Conversation) -> Encoded:
    """Tokenize message by message: control tokens separate them, so this is exact."""
    out = Encoded([], [], [], [], [], conv)
    contents = tokenizer.encode_batch([m["content"] for m in conv.messages])
    for message, side, content in zip(conv.messages, conv.sides, contents, strict=True):
        group = group_of(conv.behaviour, side) if side else -1
        is_reply = message["role"] == "assistant"
        n = len(content.ids)
        role = tokenizer.token_to_id(f"<|{message['role']}|>")
        out.ids += [role, *content.ids, END]
        out.reply += [0] + [int(is_reply)] * (n + 1)
        out.group += [group] * (n + 1) + [-1]
        out.weight += [max(1.0, 12 / (n + 1)) if group >= 0 else 1.0] * (n + 1) + [1.0]
        out.choice += [group >= 0] + [False] * (n + 1)
    return out
