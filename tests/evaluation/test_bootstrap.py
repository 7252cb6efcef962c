"""The user bootstrap: weighted AUC against scikit-learn, pairs on the same draws, laws of the draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from sellarec.evaluation import bootstrap as bootstrap_module
from sellarec.evaluation.bootstrap import bootstrap, sort_rows, weighted_aucs
from sellarec.evaluation.metrics import auc, uauc


def make_log(seed: int, users: int = 40, rows: int = 600) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    taste = rng.normal(size=rows)
    labels = (taste + rng.normal(size=rows) > 0).astype(np.int8)
    scores = {
        "good": np.round(taste, 1),
        "poor": np.round(taste + 3 * rng.normal(size=rows), 1).astype(np.float32),
        "constant": np.zeros(rows),
    }
    user_ids = rng.integers(users, size=rows) * 11 - 5
    labels[user_ids == user_ids.min()] = 1  # a user of one class, before the others
    return user_ids, labels, scores


@settings(deadline=None)  # a busy machine is no failure
@given(st.data())
def test_weighted_auc_equals_scikit_learn(data):
    rows = data.draw(st.integers(1, 30))
    column = lambda values: np.array(data.draw(st.lists(values, min_size=rows, max_size=rows)))  # noqa: E731
    users, labels = column(st.integers(0, 4)), column(st.booleans())
    scores = column(st.sampled_from([-1.0, -0.0, 0.0, 2.0, 2.5]))
    weights = np.array(data.draw(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=3, max_size=3)))
    found = weighted_aucs(sort_rows(users, labels, scores), weights.T.astype(float))
    for value, user_weights in zip(found, weights, strict=True):
        row_weights = user_weights[users]
        if len(set(labels[row_weights > 0])) == 2:
            drawn = row_weights > 0
            expected = roc_auc_score(labels[drawn], scores[drawn], sample_weight=row_weights[drawn])
            assert value == pytest.approx(expected, abs=1e-12)
        else:
            assert np.isnan(value)


@pytest.mark.parametrize("metric", ["auc", "uauc"])
def test_replicates_equal_the_metric_of_repeated_rows(metric):
    """Each replicate is what the metric says of a log in which a drawn user's rows stand as often as it was drawn."""
    users, labels, scores = make_log(0, users=8, rows=60)
    replicates, seed = 20, 3
    intervals = bootstrap(users, labels, scores, metric, pairs=[("good", "poor")], replicates=replicates, seed=seed)
    user_ids = np.unique(users)
    samples = {name: [] for name in scores}
    for replicate in range(replicates):
        drawn = np.random.default_rng((seed, replicate)).integers(user_ids.size, size=user_ids.size)
        # A copy of a user is a user of its own.
        rows = [np.flatnonzero(users == user_ids[index]) for index in drawn]
        copies = np.repeat(np.arange(len(rows)), [len(of_user) for of_user in rows])
        rows = np.concatenate(rows)
        for name, values in scores.items():
            value = (
                auc(labels[rows], values[rows]) if metric == "auc" else uauc(copies, labels[rows], values[rows]).value
            )
            samples[name].append(value)
    for name, values in samples.items():
        found = intervals[name]
        assert (found.low, found.high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), abs=1e-12)
        assert found.value == (
            auc(labels, scores[name]) if metric == "auc" else uauc(users, labels, scores[name]).value
        )
        assert found.replicates == replicates
    difference = np.subtract(samples["good"], samples["poor"])
    pair = intervals["good", "poor"]
    assert (pair.low, pair.high) == pytest.approx(tuple(np.percentile(difference, [2.5, 97.5])), abs=1e-12)
    assert pair.value == intervals["good"].value - intervals["poor"].value


@pytest.mark.parametrize("metric", ["auc", "uauc"])
def test_pairs_are_exact(metric):
    users, labels, scores = make_log(1)
    scores |= {"twin": 2 * scores["good"] + 1}
    pairs = [("good", "twin"), ("good", "poor"), ("poor", "good")]
    intervals = bootstrap(users, labels, scores, metric, pairs=pairs, replicates=200, seed=0)
    twin = intervals["good", "twin"]
    assert (twin.value, twin.low, twin.high) == (0, 0, 0)
    forth, back = intervals["good", "poor"], intervals["poor", "good"]
    assert forth.low > 0
    assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low), abs=1e-15)
    assert (intervals["constant"].low, intervals["constant"].high) == (0.5, 0.5)
    alone = bootstrap(users, labels, {"poor": scores["poor"]}, metric, replicates=200, seed=0)
    assert alone["poor"] == intervals["poor"]


@pytest.mark.parametrize("metric", ["auc", "uauc"])
def test_same_bits_in_any_row_order_and_chunk_size(metric, monkeypatch):
    users, labels, scores = make_log(2)
    expected = bootstrap(users, labels, scores, metric, replicates=50, seed=9)
    order = np.random.default_rng(0).permutation(len(users))
    shuffled = {name: values[order] for name, values in scores.items()}
    assert bootstrap(users[order], labels[order], shuffled, metric, replicates=50, seed=9) == expected
    assert bootstrap(users, labels, scores, metric, replicates=50, seed=10) != expected
    monkeypatch.setattr(bootstrap_module, "CHUNK_WEIGHTS", 1)
    for name, interval in bootstrap(users, labels, scores, metric, replicates=50, seed=9).items():
        assert (interval.low, interval.high) == pytest.approx((expected[name].low, expected[name].high), abs=1e-14)


def test_replicates_without_both_classes_are_left_out_and_counted():
    users, labels = np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0])
    interval = bootstrap(users, labels, {"model": np.array([0.9, 0.8, 0.1, 0.2])}, "auc", replicates=400, seed=0)[
        "model"
    ]
    assert (interval.value, interval.low, interval.high) == (1, 1, 1)
    assert 140 < interval.replicates < 260  # half of the draws hold both users


@pytest.mark.parametrize("metric", ["auc", "uauc"])
@pytest.mark.parametrize("labels", [[], [1, 1, 1]])
def test_undefined_metric_is_nan(metric, labels):
    rows = len(labels)
    users, scores = np.arange(rows, dtype=np.int64), {"model": np.zeros(rows)}
    interval = bootstrap(users, np.array(labels), scores, metric, pairs=[("model", "model")], replicates=10, seed=0)[
        "model"
    ]
    assert np.isnan([interval.value, interval.low, interval.high]).all()
    assert interval.replicates == 0


@pytest.mark.parametrize("metric", ["auc", "uauc"])
def test_one_user_has_a_value_but_no_interval(metric):
    interval = bootstrap(
        np.array([4, 4]), np.array([0, 1]), {"model": np.array([0.1, 0.2])}, metric, replicates=10, seed=0
    )["model"]
    assert interval.value == 1
    assert np.isnan([interval.low, interval.high]).all()


def test_what_is_refused():
    users, labels, scores = make_log(0)
    with pytest.raises(ValueError, match="'ndcg'"):
        bootstrap(users, labels, scores, "ndcg", seed=0)
    with pytest.raises(ValueError, match="replicates must be at least 1; it is 0"):
        bootstrap(users, labels, scores, "auc", replicates=0, seed=0)
    with pytest.raises(ValueError, match=r"pairs name \['other'\]"):
        bootstrap(users, labels, scores, "auc", pairs=[("good", "other")], seed=0)
