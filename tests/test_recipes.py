"""Recipes of published methods: their resolved settings beside the values that were published."""

import dataclasses

import pytest
from published import COLLM_SASREC, SELLA

from sellarec.command_line import parse
from sellarec.config import Config


@pytest.mark.parametrize("section", SELLA)
def test_sella_official_is_what_was_published(section: str) -> None:
    found = dataclasses.asdict(getattr(parse(["collm-ml-1m", "sella-official"]), section))
    assert {name: found[name] for name in SELLA[section]} == SELLA[section]


def test_collm_sasrec_is_what_its_script_has() -> None:
    found = dataclasses.asdict(parse(["collm-ml-1m", "collm-sasrec"]).collab)
    assert {name: found[name] for name in COLLM_SASREC} == COLLM_SASREC


def test_a_method_recipe_sets_nothing_of_the_data() -> None:
    assert parse(["collm-ml-1m", "sella-official"]).data == parse(["collm-ml-1m"]).data
    assert parse(["collm-ml-1m"]).data != Config().data
