"""Every chat template of the archive on the vocabulary of its family: renderings, targets, thinking, dates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.rehearsal import page
from tests.integration.rehearsal.conversations import RENDERINGS, TARGETS
from tests.integration.rehearsal.families import SENTENCEPIECE, family
from tests.integration.rehearsal.rendering import Desk, names

pytestmark = pytest.mark.rehearsal

each_template = pytest.mark.parametrize("name", names(), scope="module")


@pytest.fixture(scope="module")
def sentencepiece(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """The template on a SentencePiece vocabulary."""
    with Desk.open(name, tmp_path_factory.mktemp("spm"), SENTENCEPIECE) as opened:
        yield opened


@each_template
@pytest.mark.parametrize("case", list(RENDERINGS))
def test_renderings(desk: Desk, case: str) -> None:
    desk.check_rendering(case)


@each_template
@pytest.mark.parametrize("case", list(TARGETS))
def test_targets(desk: Desk, case: str) -> None:
    desk.check_target(case)


@pytest.mark.parametrize("name", [n for n in names() if family(n) != SENTENCEPIECE], scope="module")
def test_targets_on_sentencepiece(sentencepiece: Desk) -> None:
    for case in TARGETS:
        sentencepiece.check_target(case)


@each_template
def test_messages_that_are_lost(desk: Desk) -> None:
    desk.check_losses()


@each_template
def test_thinking(desk: Desk) -> None:
    desk.check_thinking()


@each_template
def test_dates(desk: Desk) -> None:
    desk.check_date()


@each_template
def test_the_page_is_current(desk: Desk) -> None:
    assert page.template_row(desk) in page.PAGE.read_text("utf-8").splitlines(), "make docs"
