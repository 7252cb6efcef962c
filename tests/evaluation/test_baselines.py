"""Item and user means: by hand, and the published facts of CoLLM's ML-1M."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sellarec.evaluation.baselines import fit_means, item_mean, item_user_mean
from sellarec.evaluation.metrics import auc, uauc


def test_by_hand():
    users, items = np.array([0, 0, 3, 3, 3]), np.array([1, 2, 1, 1, 4])
    labels = np.array([1, 0, 1, 0, 1], dtype=np.int8)
    means = fit_means(users, items, labels)
    assert means.global_mean == 0.6
    assert means.item_means == pytest.approx([0.6, (2 + 3) / (3 + 5), 3 / 6, 0.6, 4 / 6])
    assert means.user_means == pytest.approx([4 / 7, 0.6, 0.6, 5 / 8])
    # Known and unknown ids, within and beyond the ids of the train rows.
    items, users = np.array([1, 0, 9, 4]), np.array([3, 9, 0, 1])
    assert item_mean(means, items) == pytest.approx([5 / 8, 0.6, 0.6, 2 / 3])
    assert item_user_mean(means, users, items) == pytest.approx([5 / 8 + 5 / 8, 1.2, 0.6 + 4 / 7, 2 / 3 + 0.6])


def test_unknown_ids_tie_exactly():
    """Items within and beyond the train rows' ids; with 1 positive of 9 rows, 5 g / 5 is not g to the last bit."""
    items, labels = np.arange(9) * 2, np.arange(9) < 1
    means = fit_means(items, items, labels)
    assert 5 * means.global_mean / 5 != means.global_mean
    assert set(item_mean(means, np.array([1, 3, 10**9]))) == {means.global_mean}


def test_no_rows_to_score():
    none = np.array([], dtype=np.int64)
    assert item_user_mean(fit_means(np.array([0]), np.array([0]), np.array([1])), none, none).shape == (0,)


@pytest.mark.parametrize(
    ("users", "items", "labels", "message"),
    [
        ([], [], [], "no train rows"),
        ([0, -1], [0, 0], [0, 1], "user ids must not be negative; the smallest is -1"),
        ([0, 1], [0.5, 0.5], [0, 1], "item ids must be integers"),
        ([0, 1], [0, 1], [0, 3], "labels must be 0 or 1"),
        ([0, 1], [0, 1, 2], [0, 1], "same shape"),
    ],
)
def test_what_is_refused(users, items, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_means(np.array(users), np.array(items), np.array(labels))


def test_reproduces_the_published_facts_of_collm_ml_1m(sellarec_data: Path):
    columns = ["uid", "iid", "label", "not_cold"]
    folder = sellarec_data / "collm-ml1m"
    train, valid, test = (
        pq.read_table(folder / f"{split}_ood2.parquet", columns=columns) for split in ("train", "valid", "test")
    )
    means = fit_means(*(train[name].to_numpy() for name in columns[:3]))
    users, items, labels, warm = (test[name].to_numpy() for name in columns)
    warm = warm == 1
    assert len(labels) == 7_331
    of_item = item_mean(means, items)
    assert auc(labels, of_item) == pytest.approx(0.7094, abs=5e-5)
    assert uauc(users, labels, of_item) == (pytest.approx(0.6816, abs=5e-5), 224)
    of_both = item_user_mean(means, users, items)
    assert auc(labels, of_both) == pytest.approx(0.7317, abs=5e-5)
    assert auc(labels[warm], of_both[warm]) == pytest.approx(0.7603, abs=5e-5)
    assert auc(labels[~warm], of_both[~warm]) == pytest.approx(0.6899, abs=5e-5)
    both = pa.concat_tables([train, valid])
    means = fit_means(*(both[name].to_numpy() for name in columns[:3]))
    assert auc(labels, item_mean(means, items)) == pytest.approx(0.7165, abs=5e-5)
    assert auc(labels, item_user_mean(means, users, items)) == pytest.approx(0.7394, abs=5e-5)
