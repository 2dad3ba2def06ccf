"""Prompts as a model sees them: chat template, tokens, and the tokens of a target."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from . import _native
from .errors import PairsError
from .pairs import Side, locate_target, target_tokens

__all__ = ["Prompt", "Renderer"]


@dataclass(frozen=True)
class Prompt:
    """Tokens of one side of a pair, cut behind the target, and which of them are the target's."""

    tokens: list[int]
    target: list[int]


class Renderer:
    """Renders and tokenizes for one loaded model (llama_cpp's `LlamaModel`)."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._metadata: dict[str, str] = model.metadata()
        self._formatter: Any = None
        self._control: list[str] | None = None

    def text(self, side: Side, *, generation_prompt: bool = False) -> str:
        """The prompt's text: a plain text as it is, messages through the model's chat template.

        `generation_prompt` adds what makes the model answer. Raises PairsError when the model has no template, or the
        template refuses the messages.
        """
        if isinstance(side, str):
            return side
        try:
            response = self._chat_formatter(generation_prompt)(messages=[message.to_dict() for message in side])
        except PairsError:
            raise
        except Exception as error:  # templates are code of the model's makers and raise anything
            raise PairsError(f"the model's chat template refuses these messages: {error}") from error
        return str(response.prompt)

    def prompt(self, side: Side, target: str) -> Prompt:
        """Tokens up to the target's last one, and the places of the target's tokens in them.

        What follows the target cannot change its routing (attention is causal), so it is cut off.
        Raises PairsError when the target cannot be located.
        """
        text = self.text(side)
        # A chat template writes the beginning-of-text token itself, a plain text does not.
        tokens = self.tokenize(text, add_special=isinstance(side, str))
        pieces = self._pieces(tokens, text.encode("utf-8"))
        # "end" must not be found inside "<|im_end|>", unless the target names that token itself
        special = [name for name in self._control_tokens() if name not in target]
        start, end = locate_target(text, side, target, special)
        chosen = target_tokens(pieces, start, end, tokens, self.tokenize(target, add_special=False))
        if not chosen:
            raise PairsError(f"target {target!r}: the tokenizer leaves nothing of it")
        return Prompt(tokens[: chosen[-1] + 1], chosen)

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """Tokens of a text; the names of special tokens in it become those tokens."""
        tokens: list[int] = self._model.tokenize(text.encode("utf-8"), add_special, True)
        return tokens

    def _control_tokens(self) -> list[str]:
        """Texts of the vocabulary's control tokens, such as "<|im_end|>"."""
        if self._control is None:
            lib, vocab = _native.llama_cpp(), self._model.vocab
            self._control = [
                lib.llama_vocab_get_text(vocab, token).decode("utf-8", "replace")
                for token in range(lib.llama_vocab_n_tokens(vocab))
                if lib.llama_vocab_get_attr(vocab, token) & lib.LLAMA_TOKEN_ATTR_CONTROL
            ]
        return self._control

    def _pieces(self, tokens: list[int], text: bytes) -> list[bytes]:
        """Bytes of each token, so that they join to the text."""
        pieces = [self._piece(token) for token in tokens]
        added = b"".join(pieces).find(text) if text else 0
        if added > 0:  # a BOS token or a blank that the tokenizer put before the text
            for index, piece in enumerate(pieces):
                cut = min(added, len(piece))
                pieces[index] = piece[cut:]
                added -= cut
                if not added:
                    break
        if not b"".join(pieces).startswith(text):
            raise PairsError(
                "the tokenizer changes this text, so the target cannot be located by its bytes; "
                "use another wording, without unusual blanks or characters"
            )
        return pieces

    def _piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            lib = _native.llama_cpp()
            n = lib.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, True)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def _chat_formatter(self, generation_prompt: bool) -> Any:
        if self._formatter is None:
            template = self._metadata.get("tokenizer.chat_template")
            if template is None:
                raise PairsError("the model has no chat template; write the pairs' sides as plain texts")
            from llama_cpp.llama_chat_format import Jinja2ChatFormatter

            eos, bos = self._model.token_eos(), self._model.token_bos()
            self._formatter = Jinja2ChatFormatter(
                template=template,
                eos_token=self._model.token_get_text(eos) if eos != -1 else "",
                bos_token=self._model.token_get_text(bos) if bos != -1 else "",
            )
        self._formatter.add_generation_prompt = generation_prompt
        return self._formatter
