"""How many test rows training has nothing of, counted by hand."""

from pathlib import Path

import pyarrow as pa
import pytest
from prepared import prepare_into, rules, source_of

from sellarec.collab import unseen
from sellarec.collab.unseen import unseen_shares
from sellarec.data.log import Log

TRAIN = [("a", "x", 1), ("b", "y", 0), ("a", "y", 1), ("c", "z", 0), ("d", "v", 1), ("a", "u", 1)]
VALID = [("b", "w", 1), ("d", "x", 0)]
TEST = [("a", "new", 1), ("b", "x", 1), ("other", "x", 1), ("c", "z", 0), ("a", "z", 1), ("d", "v", 1)]


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Log:
    return log_of(tmp_path_factory.mktemp("log"), TEST)


def log_of(folder: Path, test: list[tuple[str, str, int]]) -> Log:
    lines = [(*line, split) for split, part in (("train", TRAIN), ("valid", VALID), ("test", test)) for line in part]
    user, item, label, split = zip(*lines, strict=True)
    rows = {"user": user, "item": item, "label": pa.array(label, pa.int8()), "split": split}
    return prepare_into(folder, source_of(pa.table(rows | {"timestamp": range(len(lines))})), rules(split="given"))


@pytest.mark.parametrize(
    ("case", "rows"),
    [
        (unseen.USER, 1),
        (unseen.ITEM, 1),
        (unseen.HISTORY, 3),  # that of b has w alone, which isn't in train
        (unseen.USER_WITHOUT_POSITIVE, 2),  # b and c; the other one isn't in train at all
        (unseen.ITEM_WITHOUT_POSITIVE, 2),  # z
    ],
)
def test_test_rows_are_counted_by_what_training_has_not(log, case, rows):
    assert unseen_shares(log, [case], 9) == {case: pytest.approx(rows / 6)}


@pytest.mark.parametrize(("longest", "rows"), [(3, 3), (2, 5)])
def test_items_of_no_sequence_are_counted(log, longest, rows):
    """z has no positive, v is the only one of its user; of a's three a sequence of two has no room for x."""
    case = unseen.ITEM_WITHOUT_SEQUENCE
    assert unseen_shares(log, [case], longest) == {case: pytest.approx(rows / 6)}


def test_cases_that_no_row_is_have_a_share_of_0(tmp_path):
    log = log_of(tmp_path, [("d", "v", 1), ("a", "x", 0)])
    cases = [unseen.HISTORY, unseen.USER, unseen.ITEM, unseen.USER_WITHOUT_POSITIVE, unseen.ITEM_WITHOUT_POSITIVE]
    assert unseen_shares(log, cases, 9) == dict.fromkeys(cases, 0.0)
