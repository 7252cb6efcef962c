"""AUC and UAUC against scikit-learn, one user at a time, and their laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from sellarec.evaluation.metrics import auc, uauc, user_aucs

# Few levels make heavy ties, within and across the classes; -0.0 must tie with 0.0.
TIED = st.sampled_from([-1.5, -0.0, 0.0, 1e-30, 0.5])
ANY_FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=True)
ANY_FLOAT64 = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def logs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, labels and scores: few users with many rows, single-row users, one-class users, often tied scores."""
    scores, dtype = draw(st.sampled_from([(TIED, np.float64), (ANY_FLOAT32, np.float32), (ANY_FLOAT64, np.float64)]))
    rows = draw(st.lists(st.tuples(st.integers(-3, 4), st.integers(0, 1), scores), max_size=40))
    users, labels, values = zip(*rows, strict=True) if rows else ((), (), ())
    return np.array(users, dtype=np.int64), np.array(labels, dtype=np.int8), np.array(values, dtype=dtype)


def exact_ranks(scores: np.ndarray) -> np.ndarray:
    """Small whole numbers in the same order, as scikit-learn refuses infinities."""
    return np.unique(scores, return_inverse=True)[1]


def sklearn_user_aucs(users: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> dict[int, float]:
    ranks = exact_ranks(scores)
    return {
        int(user): roc_auc_score(labels[users == user], ranks[users == user])
        for user in np.unique(users)
        if len(set(labels[users == user])) == 2
    }


@settings(deadline=None)  # a busy machine is no failure
@given(logs())
def test_auc_equals_scikit_learn(log):
    _, labels, scores = log
    if len(set(labels)) < 2:
        assert np.isnan(auc(labels, scores))
    else:
        assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, exact_ranks(scores)), abs=1e-12)


@settings(deadline=None)  # a busy machine is no failure
@given(logs())
def test_user_aucs_and_uauc_equal_scikit_learn_per_user(log):
    users, labels, scores = log
    expected = sklearn_user_aucs(users, labels, scores)
    found = user_aucs(*log)
    assert found.users.tolist() == list(expected)
    assert found.aucs == pytest.approx(list(expected.values()), abs=1e-12)
    for user, positives, negatives in zip(found.users, found.positives, found.negatives, strict=True):
        assert (positives, negatives) == (labels[users == user].sum(), (1 - labels[users == user]).sum())
    value, counted = uauc(*log)
    assert counted == len(expected)
    if expected:
        assert value == pytest.approx(np.mean(list(expected.values())), abs=1e-12)
    else:
        assert np.isnan(value)


@settings(deadline=None)  # a busy machine is no failure
@given(logs(), st.data())
def test_any_order_and_any_sharding_of_the_rows_give_the_same_bits(log, data):
    users, labels, scores = log
    shard_of_row = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(users), max_size=len(users))), dtype=int)
    order = np.array(data.draw(st.permutations(range(len(users)))), dtype=int)
    shards = [order[shard_of_row[order] == shard] for shard in (2, 0, 3, 1)]
    gathered = [np.concatenate([column[shard] for shard in shards]) for column in log]
    np.testing.assert_array_equal(auc(*gathered[1:]), auc(labels, scores))
    for one, other in zip(user_aucs(*gathered), user_aucs(*log), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(uauc(*gathered), uauc(*log))


@settings(deadline=None)  # a busy machine is no failure
@given(logs())
def test_rising_transformations_change_nothing_and_negation_mirrors(log):
    users, labels, scores = log
    rising = 3 * exact_ranks(scores) - 7
    np.testing.assert_array_equal(auc(labels, rising), auc(labels, scores))
    np.testing.assert_array_equal(user_aucs(users, labels, rising).aucs, user_aucs(*log).aucs)
    np.testing.assert_allclose(auc(labels, -scores), 1 - auc(labels, scores), atol=1e-12)


SCORES = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0]), st.floats(width=32, allow_nan=False))


@given(
    st.lists(st.tuples(st.integers(-128, 127), st.booleans(), SCORES), min_size=1, max_size=40),
    st.sampled_from([np.int8, np.int64]),
    st.sampled_from([np.float16, np.float32]),
)
def test_sorting_packed_rows_changes_nothing(rows, user_dtype, score_dtype):
    """Of scores of 64 bits rows aren't packed; the two zeros tie, infinities are scores."""
    users, labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    with np.errstate(over="ignore"):
        scores = scores.astype(score_dtype)
    users = users.astype(user_dtype)
    assert auc(labels, scores) == pytest.approx(auc(labels, scores.astype(np.float64)), nan_ok=True, abs=0)
    for mine, others in zip(
        user_aucs(users, labels, scores), user_aucs(users, labels, scores.astype(np.float64)), strict=True
    ):
        np.testing.assert_array_equal(mine, others)


@pytest.mark.parametrize("users", [np.array([0, 2**63, 0, 2**63], np.uint64), np.array([-(2**63), 2**63 - 1] * 2)])
def test_ids_too_far_apart_to_be_packed(users):
    found = user_aucs(users, np.array([1, 0, 0, 1]), np.array([1, 2, 3, 4], np.float32))
    assert found.aucs.tolist() == [0, 1]


def test_hand_counted():
    users = np.array([7, 7, 7, 7, 3, 5, 5, 9, 9])
    labels = np.array([1, 0, 1, 0, 1, 0, 0, 1, 0])
    scores = np.array([0.9, 0.9, 0.1, 0.2, 0.5, 0.3, 0.4, 0.8, 0.1])
    # User 7 wins 1.5 of 4 pairs (one tie, one win), user 9 its only pair; user 3 has one row, user 5 one class.
    found = user_aucs(users, labels, scores)
    assert found.users.tolist() == [7, 9]
    assert found.aucs.tolist() == [0.375, 1.0]
    assert (found.positives.tolist(), found.negatives.tolist()) == ([2, 1], [2, 1])
    assert uauc(users, labels, scores) == (0.6875, 2)
    # Pooled, the positives .9, .1, .5 and .8 win 4.5, 0.5, 4 and 4 of 5 pairs each.
    assert auc(labels, scores) == 13 / 20


def test_scores_one_bit_apart_are_not_tied():
    for dtype in (np.float32, np.float64):
        low = np.array(1.0, dtype=dtype)
        scores = np.array([low, np.nextafter(low, dtype(2))], dtype=dtype)
        assert auc(np.array([0, 1]), scores) == 1.0
        assert uauc(np.array([4, 4]), np.array([1, 0]), scores) == (0.0, 1)


def test_adjacent_users_with_the_same_score_do_not_share_a_tie():
    assert user_aucs(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0]), np.array([0.1, 0.5, 0.5, 0.7])).aucs.tolist() == [
        1,
        0,
    ]


def test_many_rows_do_not_overflow():
    rows = 300_000
    labels = np.arange(rows) % 2
    assert auc(labels.astype(np.int8), labels.astype(np.float32)) == 1.0


@pytest.mark.parametrize(
    ("users", "labels", "scores", "message"),
    [
        ([0, 0, 1], [0, 1, 1], [0.1, np.nan, np.nan], "2 of 3 scores are NaN"),
        ([0, 0, 1], [0, 1, 2], [0.1, 0.2, 0.3], "row 2 has 2"),
        ([0, 0, 1], [0, 1], [0.1, 0.2, 0.3], r"\(2,\) and \(3,\)"),
        ([0, 0], [0, 1, 1], [0.1, 0.2, 0.3], r"shape \(3,\); it is \(2,\)"),
        ([0.0, 0.0, 1.0], [0, 1, 1], [0.1, 0.2, 0.3], "must be integers"),
        ([0, 0, 1], [0, 1, 1], ["a", "b", "c"], "real numbers"),
    ],
)
def test_what_is_refused(users, labels, scores, message):
    with pytest.raises(ValueError, match=message):
        user_aucs(np.array(users), np.array(labels), np.array(scores))
