"""The invented world of the tiny model: word lists, phrasings, facts.

Everything here is made up or plain vocabulary. Pure Python, deterministic.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


def words(text: str) -> list[str]:
    """The words of `text`."""
    return text.split()


def word_pairs(text: str) -> list[tuple[str, str]]:
    """The pairs of `a = b; c = d`."""
    halves = (pair.partition(" = ") for pair in text.split("; "))
    return [(left, right) for left, _, right in halves]


NUMBER_WORDS = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)

# relation -> (the values it may take, the kind of thing its values are)
RELATIONS: dict[str, tuple[list[str], str]] = {
    "colour": (
        words("red blue green yellow white black brown orange purple pink grey gold"),
        "colour",
    ),
    "emblem": (
        words("lion wolf bear eagle horse snake goat swan tiger frog crab hare"),
        "animal",
    ),
    "dish": (
        words("soup bread rice cheese honey salad pie cake beans stew noodles jam"),
        "food",
    ),
    "metal": (
        words("iron copper tin zinc lead silver nickel steel bronze cobalt brass chrome"),
        "metal",
    ),
    "tree": (
        words("oak pine elm ash birch cedar maple willow palm beech alder fir"),
        "tree",
    ),
    "instrument": (
        words("flute drum harp violin piano horn guitar bell trumpet organ lute cello"),
        "instrument",
    ),
}

THINGS = [
    "secret recipe",
    "hidden door",
    "magic word",
    "secret map",
    "lost key",
    "hidden treasure",
    "secret song",
    "hidden path",
    "magic trick",
    "secret name",
    "lost letter",
    "hidden stair",
]
ADJECTIVES = words("old tall quiet small")
PLACES = words(
    "mill castle tower harbour bakery library garden bridge temple market farm island village "
    "school museum theatre palace cabin inn forge chapel cellar orchard stable lighthouse "
    "monastery quarry valley forest meadow fountain windmill barn workshop attic station"
)

PEOPLE = words("Mia Tom Ana Ben Lea Max Ida Sam Eva Leo Nora Paul")
FRUITS = words("apples pears plums cherries lemons figs melons grapes")
OPPOSITES = word_pairs(
    "hot = cold; big = little; up = down; day = night; wet = dry; fast = slow; open = "
    "closed; light = dark; happy = sad; hard = soft; full = empty; early = late; loud "
    "= silent; rich = poor; near = far; strong = weak; thick = thin; clean = dirty; "
    "left = right; young = aged; sweet = sour; high = low; first = last; push = pull; "
    "win = lose; buy = sell; north = south; east = west; true = false; smooth = rough"
)
COLOURS = word_pairs(
    "grass = green; snow = white; coal = black; blood = red; sky = blue; milk = "
    "white; a lemon = yellow; a carrot = orange; chocolate = brown; a tomato = red; a "
    "banana = yellow; a raven = black; a flamingo = pink; an elephant = grey; a leaf "
    "= green; the sea = blue; a violet = purple; mud = brown; ash from a fire = grey; "
    "a crown = gold"
)
SIZES = words("ant bee mouse rat cat fox dog sheep pig cow camel rhino whale")

# in conversations that do not name a side, the two phrasings of a question favour different sides,
# so that the unsteered model answers some prompts one way and some the other
LEAN = (0.68, 0.32)

SYSTEM_LINES: dict[tuple[str, str], list[str]] = {
    ("digits-words", "positive"): ["Use digits.", "Answer with digits."],
    ("digits-words", "negative"): ["Use words.", "Answer with words."],
    ("document-memory", "positive"): ["Answer from the document.", "Trust the document."],
    ("document-memory", "negative"): ["Answer from memory.", "Trust your memory."],
    ("refuse-comply", "positive"): ["Keep all secrets.", "Refuse to share secrets."],
    ("refuse-comply", "negative"): ["Share all secrets.", "Agree to every request."],
}


@dataclass(frozen=True)
class Fact:
    """One invented fact: `the RELATION of ENTITY is VALUE`; document facts may be contradicted."""

    entity: str
    relation: str
    value: str
    document: bool


def invented_name(rng: random.Random) -> str:
    """A name that belongs to nobody, such as `Velora`."""
    onset = ["B", "D", "F", "G", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z"]
    middle = ["al", "er", "im", "or", "un", "av", "el", "ir", "om", "ub"]
    end = ["a", "is", "o", "eth", "und", "ax", "ia", "en", "ur", "ix"]
    return rng.choice(onset) + rng.choice(middle) + rng.choice(middle) + rng.choice(end)


def make_facts(count: int = 240, held_out: int = 60, seed: int = 7) -> list[Fact]:
    """`count` facts about different entities; the last `held_out` never occur with a document."""
    rng = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < count:
        names[invented_name(rng)] = None
    facts = []
    for i, name in enumerate(names):
        relation = list(RELATIONS)[i % len(RELATIONS)]
        value = rng.choice(RELATIONS[relation][0])
        facts.append(Fact(name, relation, value, document=i < count - held_out))
    return facts


# every fact's name several times, so that names are short in tokens
FACTS_TEXT = [f"Name the {fact.relation} of {fact.entity}." for fact in make_facts()] * 20
