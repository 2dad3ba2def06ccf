"""Control pairs: sides that differ in form alone, and pairs whose sides mean nothing.

A map of a behaviour should look like neither of them (docs/pairs.md).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from .._util.files import StrPath, read_bytes
from ..errors import FormatError, PairsError, UsageError
from .builders import Tally
from .pairs import Message, Pair, Side, load_pairs

__all__ = ["SURFACES", "prompts_of", "shuffled_pairs", "superficial_pairs"]

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
"""What `superficial_pairs` changes, and how: (text, number of the pair) -> the same content in another form."""


def superficial_pairs(pairs: Iterable[Pair], tally: Tally, kinds: Sequence[str] = tuple(SURFACES)) -> Iterator[Pair]:
    """Control pairs that differ in nothing but form: a side as it is against itself longer, in capitals, formatted.

    The sides of the pairs are taken in turn (positive of the first pair, negative of the second, ...), so both
    behaviours stand on both sides; the kinds in turn as well. The id gets "~" and the kind.
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
    """The pairs with the sides of a random half of them (rounded down) swapped; those get "~swapped" to their id.

    Counts of such pairs show what is left of a map when the sides mean nothing. Raises UsageError for a single pair.
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
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError:
        raise PairsError(f"{path}: not UTF-8; save the file as UTF-8") from None
    sides = [(number, line, (Message("user", line),)) for number, line in enumerate(lines, 1) if line]
    if not sides:
        raise PairsError(f"{path}: no prompts in it; write one a line")
    return [Pair(f"line-{number}", side, side, line, line) for number, line, side in sides]


def _with_target(side: Side, target: str, changed: str) -> Side:
    """The side with the last occurrence of its target, which is the one that counts, replaced."""
    if isinstance(side, str):
        return changed.join(side.rsplit(target, 1))
    index = max(i for i, message in enumerate(side) if target in message.content)
    content = changed.join(side[index].content.rsplit(target, 1))
    return (*side[:index], Message(side[index].role, content), *side[index + 1 :])
