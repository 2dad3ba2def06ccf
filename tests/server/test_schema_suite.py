"""Grammars of JSON Schemas against the official test suite, and against jsonschema as the judge of random walks."""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter
from typing import Any

import jsonschema
import pytest

from steermoe_local.server.api_errors import ApiError
from tests.support.json_schema_suite import groups
from tests.support.schema_walks import accepts, grammar_of, random_document, walk

# Groups that are accepted as grammars, and valid instances that these accept, when this was written. Less is a loss.
LEAST = {"draft2020-12": (190, 370), "draft7": (180, 330)}


def refused(schema: Any) -> bool:
    try:
        grammar_of(schema)
    except ApiError:
        return True
    return False


@pytest.mark.parametrize("draft", LEAST)
def test_the_official_suite(draft: str) -> None:
    """No grammar accepts an instance that the suite calls invalid, whatever the keyword; formats are asserted."""
    counts: Counter[str] = Counter()
    for file, group in groups(draft):
        if refused(group["schema"]):
            continue
        counts["schemas"] += 1
        for case in group["tests"]:
            text = json.dumps(case["data"], ensure_ascii=False, separators=(",", ":"))
            accepted = accepts(group["schema"], text)
            assert case["valid"] or not accepted, (file, group["description"], case["description"], text)
            counts["valid"] += accepted
    n_schemas, n_valid = LEAST[draft]
    assert counts["schemas"] >= n_schemas, counts
    assert counts["valid"] >= n_valid, counts


def validate(schema: Any, text: str) -> None:
    judge = jsonschema.Draft202012Validator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Python's re of brackets in a class
        judge(schema, format_checker=judge.FORMAT_CHECKER).validate(json.loads(text))


@pytest.mark.parametrize("seed", range(8))
def test_random_schemas_yield_valid_values(seed: int) -> None:
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    while counts["accepted"] < 40:
        schema = random_document(rng)
        if refused(schema):
            counts["refused"] += 1
            continue
        counts["accepted"] += 1
        for _ in range(3):
            validate(schema, walk(schema, rng))
    assert counts["refused"] < counts["accepted"], counts
