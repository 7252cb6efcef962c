"""What stages tell beside what they make."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import prepare_into, rules, source_of

from sellarec import stages
from sellarec.ahead import check_labels
from sellarec.config import Collab, Config, Prompt
from sellarec.data.log import Log
from sellarec.errors import UserError
from sellarec.run import Run


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"unseen user": 2 / 5, "unseen item": 2 / 5}),
        ({"model": "svdpp"}, {"unseen user": 2 / 5, "unseen item": 2 / 5, "empty history": 2 / 5}),
        ({"model": "sasrec", "user_rows": False}, {"unseen item": 2 / 5, "empty history": 2 / 5}),
        (
            {"loss": "bpr"},
            {
                "unseen user": 2 / 5,
                "unseen item": 2 / 5,
                "user without a positive": 1 / 5,
                "item without a positive": 1 / 5,
            },
        ),
        (
            {"model": "sasrec", "user_rows": False, "train_on": "sequences", "loss": "full-softmax", "history": 1},
            {"unseen item": 2 / 5, "empty history": 2 / 5, "item in no sequence": 2 / 5},
        ),
    ],
    ids=str,
)
def test_test_rows_that_training_has_nothing_of_are_told_case_by_case(
    tmp_path, monkeypatch, capsys, settings, expected
):
    """By the cases that the model can meet with these settings. Of five rows two have a user, and two an item, that train has
    not; b has nothing but a dislike in train, and has liked before what train has not; c likes v in its first row of two."""
    lines = [
        *[("a", "x", 1, "train"), ("b", "y", 0, "train"), ("a", "z", 1, "train"), ("a", "v", 1, "train")],
        *[("b", "old", 1, "valid"), ("a", "x", 0, "valid")],
        *[("a", "new", 1, "test"), ("a", "x", 1, "test"), ("c", "v", 1, "test"), ("c", "other", 0, "test")],
        ("b", "y", 1, "test"),
    ]
    columns = zip(("user", "item", "label", "split"), map(list, zip(*lines, strict=True)), strict=True)
    table = pa.table({**dict(columns), "timestamp": list(range(len(lines)))})
    table = table.set_column(2, "label", table["label"].cast(pa.int8()))
    log = prepare_into(tmp_path / "log", source_of(table), rules(split="given"))
    this = run_on(log, monkeypatch, tmp_path / "workspace", collab=Collab(dim=4, **settings))
    monkeypatch.setattr(stages, "_train", lambda this, stage, build, order, tables: build().facts())
    facts = stages._collab(this)
    assert facts["test rows unseen"] == pytest.approx(expected) and list(facts["unseen"]) == list(expected)
    told = [
        f"collab    {case}, {100 * expected[case]:.1f}% of the test rows: {meaning}"
        for case, meaning in facts["unseen"].items()
    ]
    assert [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines() if "test rows:" in line] == told


def run_on(
    log: Log, monkeypatch: pytest.MonkeyPatch, workspace: Path, collab: Collab | None = None, **prompt: Any
) -> Run:
    monkeypatch.setattr(Run, "log", lambda self: log)
    this = Run.of(Config(workspace=str(workspace), prompt=Prompt(**prompt), collab=collab or Collab()))
    this.marks |= dict.fromkeys(("adapt", "collab", "fuse"), "0123456789abcdef")
    return this


@pytest.fixture
def with_first_rows(tmp_path) -> Log:
    """Two users' rows, of which the first of each has no history, nor has the one after a dislike."""
    users, labels = [0, 1, 0, 1, 0, 1, 0, 1, 2, 0, 1], [1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1]
    splits = ["train"] * 6 + ["valid"] * 3 + ["test"] * 2
    rows = {"user": users, "item": list(range(11)), "label": pa.array(labels, pa.int8()), "split": splits}
    return prepare_into(tmp_path / "log", source_of(pa.table(rows | {"timestamp": range(11)})), rules(split="given"))


@pytest.mark.parametrize("stage", ["adapt", "fuse"])
def test_prompts_are_made_of_rows_with_a_history_alone_where_that_is_asked_for(
    with_first_rows, tmp_path, monkeypatch, stage, capsys
):
    log, seen = with_first_rows, {}
    for asked in (True, False):
        this = run_on(log, monkeypatch, tmp_path / str(asked), with_history=asked)
        train = stages._prompts_order(this, stage, "train", 2, 0)
        valid = stages._valid_order(this, stage, getattr(this.config, stage))
        seen[asked] = [pq.read_table(order.groups[0].path)["row"].to_pylist() for order in (train, valid)]
        assert [train.rows, valid.rows] == [len(rows) for rows in seen[asked]]
        assert stages._valid_order(this, "collab", this.config.collab).rows == 3, "no prompts are made of those"
    assert seen == {True: [[2, 4, 5], [6, 7]], False: [[0, 1, 2, 3, 4, 5], [6, 7, 8]]}
    assert "3 of 6 train rows have a history" in capsys.readouterr().out


def test_rows_with_a_history_of_one_label_are_refused_before_any_stage(with_first_rows, tmp_path, monkeypatch):
    this = run_on(with_first_rows, monkeypatch, tmp_path, with_history=True)
    check_labels(this, ["collab", "adapt", "fuse"])
    monkeypatch.setattr("sellarec.ahead.count_with_history", lambda log, split: (3, 3))
    for stage in ("adapt", "fuse"):
        with pytest.raises(
            UserError, match=r"3 of the 3 rows with a history of the train split .*leave out prompt.with"
        ):
            check_labels(this, ["collab", stage])
