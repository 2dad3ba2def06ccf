"""Control pairs: pairs whose sides differ only in form, and pairs with sides swapped at random.

A map of a behaviour should differ from the maps of both (docs/pairs.md).
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from .._util.file_kinds import StrPath, require_kind
from .._util.files import read_bytes
from ..errors import FormatError, PairsError, UsageError
from .builders import Tally
from .pairs import Message, Pair, Side, load_pairs
from .prompts import read_prompts

_SWAPPED = "~swapped"
_OPENINGS = ("In other words: ", "To say it once more: ", "Here it is, as asked: ", "As far as this goes: ")
_ENDINGS = (" That is all.", " Nothing needs to be added.", " That is the whole of it.", " There is no more to it.")


def _longer(text: str, number: int) -> str:
    sentence = text if text.endswith((".", "!", "?")) else text + "."
    return _OPENINGS[number % len(_OPENINGS)] + sentence + _ENDINGS[number // len(_OPENINGS) % len(_ENDINGS)]


def _formatted(text: str, number: int) -> str:
    forms = (f"**{text}**", f"- {text}", f"> {text}", "\n".join(text.split()), f'"{text}"')
    changed = forms[number % len(forms)]
    return changed if changed != text else forms[0]  # a single word has no lines to break


def _other_case(text: str, _: int) -> str:
    return text.upper() if text.upper() != text else text.lower()


SURFACES: dict[str, Callable[[str, int], str]] = {
    "length": _longer,
    "casing": _other_case,
    "format": _formatted,
}
"""The changes of `superficial_pairs`: (text, number of the pair) -> the same content in another form."""


def superficial_pairs(pairs: Iterable[Pair], tally: Tally, kinds: Sequence[str] = tuple(SURFACES)) -> Iterator[Pair]:
    """Control pairs that differ only in form: a side of a pair against itself longer, in capitals or formatted.

    Positive and negative sides are taken in turn, so that both behaviours are on both sides; so are the kinds. "~" and
    the kind are appended to the id.
    """
    unknown = [kind for kind in kinds if kind not in SURFACES]
    if unknown or not kinds:
        raise UsageError(f"kinds of surface: {', '.join(unknown) or 'none'}; take some of {', '.join(SURFACES)}")
    for number, pair in enumerate(pairs):
        tally.rows += 1
        # every kind gets both sides, whatever the number of kinds
        side, target = pair.sides()[number // len(kinds) % 2]
        kind = kinds[number % len(kinds)]
        changed = SURFACES[kind](target, number // len(kinds) // 2)
        if changed == target:
            tally.skip(f"nothing to change ({kind})")
            continue
        yield Pair(f"{pair.id}~{kind}", side, _with_target(side, target, changed), target, changed)


def shuffled_pairs(pairs: Sequence[Pair], *, seed: int = 0) -> Iterator[Pair]:
    """The pairs, with the sides of a random half of them (rounded down) swapped and "~swapped" appended to their ids.

    The map of such pairs is what chance makes. Raises UsageError for a single pair.
    """
    if len(pairs) < 2:
        raise UsageError("sides are swapped in half of the pairs, so it takes two pairs at least; give more")
    swapped = set(random.Random(seed).sample(range(len(pairs)), len(pairs) // 2))
    for index, pair in enumerate(pairs):
        if index not in swapped:
            yield pair
            continue
        back = pair.id.endswith(_SWAPPED) and pair.id != _SWAPPED
        name = pair.id.removesuffix(_SWAPPED) if back else pair.id + _SWAPPED
        yield Pair(name, pair.negative, pair.positive, pair.negative_target, pair.positive_target)


def prompts_of(path: StrPath) -> list[Pair]:
    """The pairs of a pairs file; a text file gives one for each line, with the same prompt on both sides.

    Raises PairsError.
    """
    try:
        data = read_bytes(path, "pairs or prompts", 1 << 30)
    except FormatError as error:
        raise PairsError(str(error)) from error
    if data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        return load_pairs(path)
    require_kind(path, "pairs or lines of text", error=PairsError)
    try:
        items = read_prompts(io.BytesIO(data), str(path), as_json=False)
    except FormatError as error:
        raise PairsError(str(error)) from None
    texts = [(str(item.id), str(item.content).strip()) for item in items]
    return [Pair(name, (Message("user", text),), (Message("user", text),), text, text) for name, text in texts]


def _with_target(side: Side, target: str, changed: str) -> Side:
    """The side with the last occurrence of its target, the counted one, replaced."""
    if isinstance(side, str):
        return changed.join(side.rsplit(target, 1))
    index = max(i for i, message in enumerate(side) if target in message.content)
    content = changed.join(side[index].content.rsplit(target, 1))
    return (*side[:index], Message(side[index].role, content), *side[index + 1 :])
