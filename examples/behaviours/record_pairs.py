"""JSON / prose: facts of a record as a JSON object or as a sentence."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from common import Built, lines

_FORMS = ("{question}", "{question} Answer in JSON or in a sentence.", "{question} Keep it short.")
_HELDOUT_FORMS = ("{question}", "{question} Use a sentence or a JSON object.", "{question} Be brief.")


@dataclass(frozen=True)
class _Record:
    questions: tuple[str, str]
    heldout: tuple[str, str]
    data: str
    prose: str


def _records() -> list[_Record]:
    found: list[_Record] = []
    wordings: list[str] = []
    prose = ""
    names: list[str] = []
    for line in lines("records.txt"):
        if line.startswith("@ "):
            *wordings, prose = line[2:].split(" | ")[:5]
            names = line[2:].split(" | ")[5:]
            continue
        given = line.split(" | ")
        texts = [value.removeprefix("N:") for value in given]
        values: list[str | int] = [
            int(text) if text != value else text for text, value in zip(texts, given, strict=True)
        ]
        values[0] = texts[0].removeprefix("the ")
        fields: dict[str, object] = dict(zip(names, values, strict=False))
        if names[-1] == "items":
            fields = {names[0]: values[0], "items": values[1:]}
        sentence = prose.format(*texts)
        sentence = sentence[0].upper() + sentence[1:]
        data = json.dumps(fields, ensure_ascii=False, indent=2 if len(found) % 4 == 3 else None)
        one, two, three, four = (wording.format(*texts) for wording in wordings)
        found.append(_Record((one, two), (three, four), data, sentence))
    return found


def json_or_prose() -> Built:
    draw = random.Random(7)
    records = _records()
    draw.shuffle(records)
    pairs: list[tuple[str, str, str]] = []
    heldout: list[dict[str, str]] = []
    for index, record in enumerate(records):
        # of some records both wordings, on the same side of the split
        in_pair = index < len(records) * 6 // 11
        wordings, forms = (record.questions, _FORMS) if in_pair else (record.heldout, _HELDOUT_FORMS)
        chosen = wordings if index % 3 == 0 else wordings[index % 2 :][:1]
        for number, question in enumerate(chosen):
            prompt = forms[(len(pairs) + len(heldout)) % len(forms)].format(question=question)
            if in_pair:
                data = record.data if (index + number) % 5 else f"```json\n{record.data}\n```"
                if number:  # another layout
                    data = data.replace('", "', '",\n  "').replace('{"', '{\n  "', 1).replace("}", "\n}")
                pairs.append((prompt, data, record.prose))
            else:
                heldout.append({"prompt": prompt})
    return Built(pairs, heldout)
