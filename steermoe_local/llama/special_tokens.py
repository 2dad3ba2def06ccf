"""The special tokens of a vocabulary: what texts spell them, and that those around a text stand there once."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from ..errors import PairsError
from ..pairs.pairs import Side
from . import capi


class SpecialTokens:
    """The control tokens of one model (llama_cpp's `LlamaModel`)."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @functools.cached_property
    def control(self) -> dict[str, int]:
        """Texts of the control tokens, such as "<|im_end|>", and the tokens."""
        lib, vocab = capi.llama_cpp(), self._model.vocab
        return {
            self.text(token): token
            for token in range(lib.llama_vocab_n_tokens(vocab))
            if lib.llama_vocab_get_attr(vocab, token) & lib.LLAMA_TOKEN_ATTR_CONTROL
        }

    @functools.cached_property
    def _ends(self) -> list[str]:
        """Texts of the control tokens that end a text or a turn."""
        lib, vocab = capi.llama_cpp(), self._model.vocab
        return [name for name, token in self.control.items() if lib.llama_vocab_is_eog(vocab, token)]

    @functools.cached_property
    def _bos(self) -> str:
        """Text of the control token that begins a text, "" if there is none or it ends texts, too."""
        lib, vocab = capi.llama_cpp(), self._model.vocab
        token = lib.llama_vocab_bos(vocab)
        return next((name for name, own in self.control.items() if own == token and name not in self._ends), "")

    def text(self, token: int) -> str:
        """The vocabulary's text of a token."""
        text: bytes = capi.llama_cpp().llama_vocab_get_text(self._model.vocab, token)
        return text.decode("utf-8", "replace")

    def spelled(self, side: Side) -> list[str]:
        """Warnings of control tokens that the messages of a side spell: the model does not read them as text.

        Raises PairsError where a message spells a token that begins or ends a text or a turn, and where a plain text
        goes on behind a token that begins one.
        """
        if isinstance(side, str):
            self._check_text(side)
            return []
        warnings = []
        for index, message in enumerate(side):
            for name in self.control:
                if not name or name not in message.content:
                    continue
                where = f"message {index + 1} ({message.role}) spells {name!r}"
                if name == self._bos or name in self._ends:
                    raise PairsError(
                        f"{where}, which the model reads as the token that begins or ends a text, not as these "
                        "letters; write it in another way"
                    )
                if message.role in ("system", "user"):
                    warnings.append(f"{where}, which the model reads as that special token, not as these letters")
        return warnings

    def _check_text(self, text: str) -> None:
        bos = self._bos
        if not bos or bos not in text:
            return
        for found in re.finditer(re.escape(bos), text):
            if found.start() and not text[: found.start()].rstrip().endswith(tuple(self._ends)):
                raise PairsError(
                    f"the text spells {bos!r} at character {found.start() + 1}, which the model reads as the token "
                    "that begins a text, not as these letters; write it in another way"
                )

    def once(self, tokens: Sequence[int]) -> tuple[list[int], list[str]]:
        """The tokens of a text that the tokenizer put its own around, without its own where the text has them already.

        Also says what was left out.
        """
        lib, vocab = capi.llama_cpp(), self._model.vocab
        own, warnings = list(tokens), []
        bos, eos = lib.llama_vocab_bos(vocab), lib.llama_vocab_eos(vocab)
        if lib.llama_vocab_get_add_bos(vocab) and own[:2] == [bos, bos]:
            del own[0]
            warnings.append(self._doubled("begins", bos))
        if lib.llama_vocab_get_add_eos(vocab) and own[-2:] == [eos, eos]:
            del own[-1]
            warnings.append(self._doubled("ends", eos))
        return own, warnings

    def _doubled(self, verb: str, token: int) -> str:
        name = self.text(token)
        return f"the text {verb} with {name!r}, which the tokenizer adds by itself: it is there once, not twice"
