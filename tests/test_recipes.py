"""Recipes of published methods: their resolved settings beside the values that were published."""

import dataclasses

import pytest
from published import COLLM, COLLM_SASREC, SELLA, SELLA_BOOK

from sellarec.command_line import parse
from sellarec.config import Config, result_settings


@pytest.mark.parametrize("section", SELLA)
def test_sella_official_is_what_was_published(section: str) -> None:
    found = dataclasses.asdict(getattr(parse(["collm-ml-1m", "sella-official"]), section))
    assert {name: found[name] for name in SELLA[section]} == SELLA[section]


@pytest.mark.parametrize("section", SELLA)
def test_sella_official_book_is_what_was_published_for_books(section: str) -> None:
    found = dataclasses.asdict(getattr(parse(["collm-amazon-book", "sella-official-book"]), section))
    published = SELLA[section] | SELLA_BOOK.get(section, {})
    assert {name: found[name] for name in published} == published


def test_sella_official_book_is_sella_official_but_for_what_is_stated_for_books() -> None:
    """And for how many valid rows there are: all of them are scored, as of movies."""
    movies, books = (result_settings(parse(["collm-amazon-book", f"sella-official{which}"])) for which in ("", "-book"))
    differ = {name for name in movies if movies[name] != books[name]}
    rows = {"collab.valid_rows", "align.valid_rows"}
    assert differ == {f"{section}.{name}" for section in SELLA_BOOK for name in SELLA_BOOK[section]} | rows
    valid = parse(["collm-amazon-book"]).data.expected[1]
    assert all(books[name] >= valid for name in rows)


@pytest.mark.parametrize("model", [*COLLM, "sasrec"])
def test_collms_recipes_are_what_it_states(model: str) -> None:
    found = dataclasses.asdict(parse(["collm-ml-1m", f"collm-{model}"]).collab)
    published = {**COLLM, "sasrec": COLLM_SASREC}[model]
    assert {name: found[name] for name in published} == published


def test_a_method_recipe_sets_nothing_of_the_data() -> None:
    assert parse(["collm-ml-1m", "sella-official"]).data == parse(["collm-ml-1m"]).data
    assert parse(["collm-ml-1m"]).data != Config().data
