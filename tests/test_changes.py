"""Settings that change while a stage trains: how they are read, and what is refused."""

from dataclasses import replace

import pytest

from sellarec.artifacts import fingerprint
from sellarec.changes import in_words, windows
from sellarec.checks import check
from sellarec.command_line import parse
from sellarec.config import Config
from sellarec.errors import UserError
from sellarec.run import settings_of


def config_of(*changes: str) -> Config:
    return parse(["demo", "--align.changes", *changes])


def test_where_nothing_changes_there_is_one_window() -> None:
    config = parse(["demo"])
    for stage in ("prepare", "pretrain", "adapt", "align", "evaluate"):
        (window,) = windows(config, stage)
        assert (window.first, window.last) == (0, None) and window.config == config


def test_each_change_holds_until_the_next_and_leaves_the_rest() -> None:
    config = config_of("2 temperature=0.15 weight=0.5", "5 temperature=0.4")
    found = windows(config, "align")
    assert [(window.first, window.last) for window in found] == [(0, 2), (2, 5), (5, None)]
    usual = config.align
    assert [window.config.align.temperature for window in found] == [usual.temperature, 0.15, 0.4]
    assert [window.config.align.weight for window in found] == [usual.weight, 0.5, 0.5]
    others = {replace(window.config, align=usual) for window in found}
    assert others == {config}, "other sections stay"


def test_a_change_is_read_as_it_is_written() -> None:
    settings = {"temperature": 0.1234, "learning_rate": 3e-05}
    first, last = windows(config_of(in_words(3, settings)), "align")
    assert (first.last, last.first) == (3, 3)
    assert {name: getattr(last.config.align, name) for name in settings} == settings


def test_changes_belong_to_the_fingerprint_and_none_leave_it_as_it_was() -> None:
    marks = {
        fingerprint(settings_of("align", config))
        for config in (parse(["demo"]), config_of("2 temperature=0.15"), config_of("3 temperature=0.15"))
    }
    assert len(marks) == 3
    assert "changes" not in settings_of("align", parse(["demo"]))["align"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["temperature=0.15"], ["'temperature=0.15'", "a number of evaluations is needed"]),
        (["2"], ["'2'", "what holds after them"]),
        (["2 temperature"], ["'2 temperature'", "what holds after them"]),
        (["2 temperature=warm"], ["'2 temperature=warm'"]),
        (["0 temperature=0.15"], ["1 or more"]),
        (["3 temperature=0.15", "3 weight=0.1"], ["name each number once"]),
        (["3 temperature=0.15", "2 weight=0.1"], ["order them"]),
        (["2 hidden=64"], ["hidden can't be changed while align trains", "temperature", "table_learning_rate"]),
        (["2 unseen_dropout=0.1"], ["unseen_dropout can't be changed while align trains"]),
        (["2 temperature=0"], ["after evaluation 2", "align.temperature is 0"]),
        (["2 temperature=nan"], ["after evaluation 2", "align.temperature is nan"]),
        (["2 rince_q=0.5"], ["after evaluation 2", "rince"]),
    ],
)
def test_changes_that_are_refused(changes: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        check(config_of(*changes))
    assert all(word in str(refusal.value) for word in words), refusal.value
