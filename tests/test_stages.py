"""What stages tell beside what they make."""

import pyarrow as pa
import pytest
from prepared import prepare_into, rules, source_of

from sellarec import stages


def test_test_rows_that_the_train_split_does_not_know_are_counted(tmp_path):
    """Of five rows two have a user, and two an item, that train has not; one has neither."""
    lines = [
        *[("a", "x", 1, "train"), ("b", "y", 0, "train"), ("a", "y", 1, "train"), ("b", "x", 1, "valid")],
        *[("a", "new", 1, "test"), ("a", "x", 1, "test"), ("c", "x", 1, "test"), ("c", "other", 0, "test")],
        ("b", "x", 1, "test"),
    ]
    columns = zip(("user", "item", "label", "split"), map(list, zip(*lines, strict=True)), strict=True)
    table = pa.table({**dict(columns), "timestamp": list(range(len(lines)))})
    table = table.set_column(2, "label", table["label"].cast(pa.int8()))
    log = prepare_into(tmp_path, source_of(table), rules(split="given"))
    assert stages._cold_rows(log) == pytest.approx({"user": 2 / 5, "item": 2 / 5, "user or item": 3 / 5})
