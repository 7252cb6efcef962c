"""Top lists against a full sort, metrics against ir-measures, intervals against a naive bootstrap."""

import functools
import itertools
import json
from unittest import mock

import ir_measures
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, R, Success, nDCG
from torch import Tensor

from sellarec.evaluation import bootstrap as bootstrap_module
from sellarec.evaluation import ranking
from sellarec.evaluation.bootstrap import bootstrap
from sellarec.evaluation.ranking import (
    TopList,
    UserMetrics,
    concatenate,
    mean_intervals,
    merge,
    product,
    ranking_records,
    top_k,
    user_metrics,
)

# Few levels make heavy ties; -0.0 must tie with 0.0.
LEVELS = torch.tensor([-torch.inf, -1.5, -0.0, 0.0, 1e-30, 0.5, torch.inf])
NONE_OUT = torch.zeros(0, dtype=torch.int64)


def jagged(lists: list[list[int]]) -> tuple[Tensor, Tensor]:
    whole = [item for items in lists for item in items]
    return torch.tensor(whole, dtype=torch.int64), torch.tensor([len(items) for items in lists], dtype=torch.int64)


def sorted_whole(scores: Tensor, first: int, k: int, excluded: list[list[int]]) -> TopList:
    """The definition: each user's items sorted by (larger score, smaller id), without the excluded ones and -inf."""
    top_scores, top_items = (
        torch.full((len(scores), k), -torch.inf, dtype=scores.dtype),
        torch.full((len(scores), k), -1),
    )
    for row, out in enumerate(excluded):
        values = {first + column: value for column, value in enumerate(scores[row].tolist())}
        kept = [item for item, value in values.items() if item not in out and value > -np.inf]
        kept = sorted(kept, key=lambda item: (-values[item], item))[:k]
        top_items[row, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
        top_scores[row, : len(kept)] = scores[row, torch.tensor(kept, dtype=torch.int64) - first]
    return TopList(top_scores, top_items)


def top_of(scores: Tensor, first: int, stop: int, k: int, excluded: list[list[int]], **settings) -> TopList:
    """top_k of ready scores [b, n], of which the items first to stop - 1 are ranked."""

    def scores_of(users: Tensor, items: Tensor) -> Tensor:
        assert torch.equal(users, torch.arange(len(scores)))
        return scores[:, items[0] : items[-1] + 1]  # a view: top_k must not write into it

    users, items = torch.arange(len(scores)), torch.arange(first, stop)
    return top_k(users, items, first, k, jagged(excluded), scores_of=scores_of, **settings)


def assert_same(one: TopList, other: TopList) -> None:
    assert one.items.dtype == other.items.dtype == torch.int64
    assert one.items.tolist() == other.items.tolist()
    assert one.scores.dtype == other.scores.dtype
    assert one.scores.tolist() == other.scores.tolist()


@st.composite
def catalogs(draw: st.DrawFn) -> tuple[Tensor, list[list[int]]]:
    """Scores [b, n] with and without ties, and excluded items: repeated ones, ones outside the catalog, all of them."""
    b, n, seed = draw(st.integers(0, 4)), draw(st.integers(0, 150)), draw(st.integers(0, 1 << 20))
    rng = np.random.default_rng(seed)
    scores = LEVELS[torch.from_numpy(rng.integers(draw(st.integers(0, 6)), 7, size=(b, n)))]
    if draw(st.booleans()):
        scores = torch.from_numpy(rng.normal(size=(b, n)))
        if draw(st.booleans()):
            scores = scores.sort(1).values  # each block beats the last one
    shares = draw(st.lists(st.sampled_from([0, 0.1, 0.9, 1]), min_size=b, max_size=b))
    excluded = [
        [*np.flatnonzero(rng.random(n) < share).tolist(), *rng.integers(-5, n + 5, size=3).tolist()] for share in shares
    ]
    return scores.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))), excluded


@settings(deadline=None, max_examples=150)  # a busy machine is no failure
@given(catalogs(), st.integers(1, 30), st.sampled_from([1, 7, 32, 100, 1000]), st.sampled_from([1, 3, 32]))
def test_top_lists_equal_a_full_sort_in_blocks_and_chunks_of_any_size(catalog, k, block_items, chunk):
    scores, excluded = catalog
    before = scores.clone()
    expected = sorted_whole(scores, 0, k, excluded)
    with mock.patch.object(ranking, "CHUNK", chunk):
        found = top_of(scores, 0, scores.shape[1], k, excluded, block_items=block_items)
    if scores.shape[1] == 0:
        assert found.items.tolist() == expected.items.tolist()
    else:
        assert_same(found, expected)
    assert torch.equal(scores, before)


@settings(deadline=None)  # a busy machine is no failure
@given(catalogs(), st.integers(1, 12), st.data())
def test_lists_of_parts_merge_in_any_order_to_that_of_the_whole(catalog, k, data):
    scores, excluded = catalog
    cuts = sorted({0, scores.shape[1], *data.draw(st.lists(st.integers(0, scores.shape[1]), max_size=5))})
    # A part may hold longer lists than are wanted in the end, never shorter ones.
    parts = [
        top_of(scores, start, stop, data.draw(st.integers(k, 20)), excluded, block_items=data.draw(st.integers(1, 60)))
        for start, stop in itertools.pairwise(cuts)
    ] or [sorted_whole(scores, 0, k, excluded)]
    while len(parts) > 1:
        one, other = data.draw(st.permutations(range(len(parts))))[:2]
        width = data.draw(st.integers(k, 20))
        both = merge(parts[one], parts[other], width)
        assert_same(both, merge(parts[other], parts[one], width))
        parts = [part for index, part in enumerate(parts) if index not in (one, other)] + [both]
    nothing = TopList(torch.zeros(len(scores), 0, dtype=scores.dtype), torch.zeros(len(scores), 0, dtype=torch.int64))
    assert_same(merge(parts[0], nothing, k), sorted_whole(scores, 0, k, excluded))


@settings(deadline=None)  # a busy machine is no failure
@given(st.data())
def test_merge_is_associative_and_commutative(data):
    k = data.draw(st.integers(1, 6))
    items = data.draw(st.permutations(range(18)))
    lists = [
        sorted_whole(LEVELS[torch.tensor([data.draw(st.lists(st.integers(0, 6), min_size=6, max_size=6))])], 0, k, [[]])
        for _ in range(3)
    ]
    # Items of the lists are drawn apart from their scores, each list in its own order again.
    a, b, c = (
        merge(TopList(top.scores, torch.tensor([own])[:, :k].where(top.items >= 0, -1)), TopList(*NO_LIST), k)
        for top, own in zip(lists, (items[:6], items[6:12], items[12:]), strict=True)
    )
    assert_same(merge(a, b, k), merge(b, a, k))
    assert_same(merge(merge(a, b, k), c, k), merge(a, merge(b, c, k), k))


NO_LIST = torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.int64)


def test_inner_products_of_vectors():
    """Whole numbers are exact in any order of summation, and tie often."""
    torch.manual_seed(0)
    users, items = torch.randint(-2, 3, (20, 8)).float(), torch.randint(-2, 3, (1_500, 8)).float()
    seen = [torch.randint(1_500, (100,)).tolist() for _ in range(20)]
    expected = sorted_whole(users @ items.T, 0, 20, seen)
    for block_items in (None, 64, 1_000):
        assert_same(top_k(users, items, 0, 20, jagged(seen), block_items=block_items), expected)
    parts = [top_k(users, items[cut : cut + 600], cut, 20, jagged(seen)) for cut in (1_200, 0, 600)]
    assert_same(functools.reduce(lambda one, other: merge(one, other, 20), parts), expected)


def test_ids_beyond_32_bits_and_lists_without_gradients():
    first = 1 << 40
    users, items = torch.ones(1, 1, requires_grad=True), torch.tensor([[1.0], [3.0], [2.0]], requires_grad=True)
    found = top_k(users, items, first, 4, jagged([[first + 1]]))
    assert found.items.tolist() == [[first + 2, first, -1, -1]]
    assert found.scores.tolist() == [[2, 1, -np.inf, -np.inf]]
    assert not found.scores.requires_grad


def test_the_same_scores_for_all_users_may_be_one_expanded_row():
    popularity = torch.tensor([[3.0, 5.0, 5.0, 1.0]])
    found = top_of(popularity.expand(2, 4), 0, 4, 3, [[1], []])
    assert found.items.tolist() == [[2, 0, 3], [1, 2, 0]]
    assert popularity.tolist() == [[3, 5, 5, 1]]


@pytest.mark.parametrize("out", [[], [1]])
def test_nan_scores_are_refused_of_excluded_items_too(out):
    scores = torch.zeros(1, 8)
    scores[0, 1] = torch.nan
    with pytest.raises(ValueError, match="scores of items 0 to 3 are NaN"):
        top_of(scores, 0, 8, 2, [out], block_items=4)


def test_what_top_lists_refuse():
    users, items, excluded = torch.zeros(2, 3), torch.zeros(5, 3), (NONE_OUT, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="k must be at least 1; it is 0"):
        top_k(users, items, 0, 0, excluded)
    with pytest.raises(ValueError, match="block_items must be at least 1; it is 0"):
        top_k(users, items, 0, 1, excluded, block_items=0)
    with pytest.raises(ValueError, match="each of 2 users"):
        top_k(users, items, 0, 1, (NONE_OUT, torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(ValueError, match="add up to 4"):
        top_k(users, items, 0, 1, (NONE_OUT, torch.tensor([1, 3])))
    with pytest.raises(ValueError, match=r"of shape \(2, 5\); they are torch.float32 of shape \(2, 3\)"):
        top_k(users, items, 0, 1, excluded, scores_of=lambda users, items: users)
    with pytest.raises(ValueError, match=r"they are torch\.int64"):
        top_k(users, items, 0, 1, excluded, scores_of=lambda users, items: product(users, items).long())
    found = top_k(users, items, 0, 1, excluded)
    with pytest.raises(ValueError, match="they are of 2 and 1"):
        merge(found, TopList(*NO_LIST), 1)
    with pytest.raises(ValueError, match="k must be at least 1; it is 0"):
        merge(found, found, 0)


@st.composite
def ranked_users(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Users, their lists (which may end early) and relevant items: none, few, more than a list holds, repeated ones."""
    users = draw(st.lists(st.integers(-5, 50), unique=True, max_size=5))
    places = draw(st.integers(1, 12))
    items = np.full((len(users), places), -1)
    relevant = []
    for row in range(len(users)):
        ranked = draw(st.lists(st.integers(0, 15), unique=True, max_size=places))
        items[row, : len(ranked)] = ranked
        relevant.append(draw(st.lists(st.integers(0, 20), max_size=15)))
    return np.array(users, dtype=np.int64), items, relevant


@settings(deadline=None)  # a busy machine is no failure
@given(ranked_users(), st.data())
def test_metrics_equal_ir_measures(case, data):
    users, items, relevant = case
    ks = data.draw(st.lists(st.integers(1, items.shape[1]), min_size=1, max_size=3, unique=True))
    found = user_metrics(users, items, jagged(relevant), ks)
    counted = {int(user): wanted for user, wanted in zip(users, relevant, strict=True) if wanted}
    assert found.users.tolist() == sorted(counted)
    assert list(found.values) == [f"{metric}@{k}" for k in ks for metric in ranking.METRICS]
    # Falling scores, as trec_eval breaks ties by the document's name.
    qrels = {str(user): {str(item): 1 for item in wanted} for user, wanted in counted.items()}
    run = {
        str(user): {str(item): float(-rank) for rank, item in enumerate(ranked) if item >= 0}
        for user, ranked in zip(users.tolist(), items.tolist(), strict=True)
    }
    measures = {
        f"{name}@{k}": of @ k for k in ks for name, of in zip(ranking.METRICS, (Success, R, nDCG, RR), strict=True)
    }
    calculated = list(ir_measures.iter_calc(measures.values(), qrels, run))
    for name, measure in measures.items():
        # Users whose list is empty, whom ir-measures may leave out, score 0.
        expected = {str(user): 0.0 for user in counted}
        expected |= {value.query_id: value.value for value in calculated if value.measure == measure}
        assert found.values[name] == pytest.approx([expected[str(user)] for user in found.users], abs=1e-12)


def test_metrics_counted_by_hand():
    items = np.array([[4, 7, 9, 1], [3, 2, -1, -1], [5, 6, 7, 8], [1, 2, 3, 4]])
    found = user_metrics(np.array([8, 2, 5, 1]), items, jagged([[7, 1, 7], [9], [], [4, 3, 2, 1, 0]]), [2, 4])
    assert found.users.tolist() == [1, 2, 8]  # user 5 has nothing to find
    assert found.values["hit@2"].tolist() == [1, 0, 1]
    assert found.values["recall@2"].tolist() == [2 / 5, 0, 1 / 2]
    assert found.values["recall@4"].tolist() == [4 / 5, 0, 1]
    assert found.values["ndcg@2"] == pytest.approx([1, 0, (1 / np.log2(3)) / (1 + 1 / np.log2(3))])
    assert found.values["ndcg@4"].tolist()[0] == 1  # all places are right, though an item is missing
    assert found.values["mrr@4"].tolist() == [1, 0, 1 / 2]
    assert found.means()["recall@4"] == pytest.approx(0.6)


def test_batches_of_users_in_any_order_give_the_same_bits():
    rng = np.random.default_rng(0)
    users, relevant = (
        rng.permutation(1_000)[:60],
        [rng.integers(30, size=size).tolist() for size in rng.integers(4, size=60)],
    )
    items = np.stack([rng.permutation(30)[:10] for _ in users])
    whole = user_metrics(users, items, jagged(relevant), [5, 10])
    slices = [slice(40, 60), slice(0, 25), slice(25, 40)]
    parts = [user_metrics(users[rows], items[rows], jagged(relevant[rows]), [5, 10]) for rows in slices]
    joined = concatenate(parts)
    assert joined.users.tolist() == whole.users.tolist()
    assert joined.means() == whole.means()
    assert all((joined.values[name] == values).all() for name, values in whole.values.items())
    with pytest.raises(ValueError, match="has metrics twice"):
        concatenate([whole, parts[0]])
    with pytest.raises(ValueError, match="the same metrics"):
        concatenate([whole, user_metrics(users[:1], items[:1], jagged([[1]]), [5])])
    with pytest.raises(ValueError, match="the same metrics"):
        concatenate([])


@pytest.mark.parametrize(
    ("users", "items", "relevant", "ks", "message"),
    [
        ([1, 2], [[3, 4]], [[3], [4]], [1], r"\(2,\) and \(1, 2\)"),
        ([1], [[3, 4]], [[3], [4]], [1], "each of 1 users"),
        ([1], [[3, 4]], [[3]], [3], "from 1 to the 2 places"),
        ([1], [[3, 4]], [[3]], [1, 1], "different numbers"),
        ([1], [[3, 4]], [[3]], [], "different numbers"),
        ([1], [[3, 4]], [[3]], [0, 1], "from 1 to"),
        ([1], [[3, 3]], [[3]], [1], "an item twice"),
        ([1, 1], [[3, 4], [3, 4]], [[3], [4]], [1], "user 1 has metrics twice"),
        ([1], [[3, 4]], [[-1]], [1], "negative"),
    ],
)
def test_what_metrics_refuse(users, items, relevant, ks, message):
    with pytest.raises(ValueError, match=message):
        user_metrics(np.array(users), np.array(items), jagged(relevant), ks)


def make_models(users: int = 30) -> dict[str, UserMetrics]:
    rng = np.random.default_rng(0)
    ids = np.arange(users) * 3
    good = {"recall@5": rng.random(users), "ndcg@5": rng.random(users)}
    poor = {name: values * rng.random(users) for name, values in good.items()}
    return {"good": UserMetrics(ids, good), "poor": UserMetrics(ids, poor)}


def test_intervals_equal_a_naive_bootstrap_and_do_not_depend_on_other_models(monkeypatch):
    models, pair, replicates, seed = make_models(), ("good", "poor"), 50, 3
    found = mean_intervals(models, pairs=[pair, ("good", "good")], replicates=replicates, seed=seed)
    for metric in ("recall@5", "ndcg@5"):
        columns = {name: models[name].values[metric] for name in models}
        columns[pair] = columns["good"] - columns["poor"]
        for name, values in columns.items():
            draws = [np.random.default_rng((seed, replicate)).integers(30, size=30) for replicate in range(replicates)]
            expected = np.percentile([values[drawn].mean() for drawn in draws], [2.5, 97.5])
            interval = found[name][metric]
            assert (interval.low, interval.high) == pytest.approx(tuple(expected), abs=1e-12)
            assert interval.value == pytest.approx(values.mean(), abs=1e-15)
            assert interval.replicates == replicates
        assert (found["good", "good"][metric].low, found["good", "good"][metric].high) == (0, 0)
    assert mean_intervals({"poor": models["poor"]}, replicates=replicates, seed=seed)["poor"] == found["poor"]
    monkeypatch.setattr(ranking, "CHUNK_WEIGHTS", 1)
    again = mean_intervals(models, replicates=replicates, seed=seed)["good"]["ndcg@5"]
    assert again.low == pytest.approx(found["good"]["ndcg@5"].low, abs=1e-14)


def test_draws_are_those_of_the_other_metrics():
    """A user with one positive and one negative row has UAUC 0 or 1, as it has a hit: the same users, the same interval."""
    rng = np.random.default_rng(0)
    hits = rng.integers(2, size=40).astype(float)
    scores = np.stack([hits, np.full(40, 0.5)], axis=1).ravel()
    rows = np.repeat(np.arange(40), 2), np.tile([1, 0], 40), {"model": scores}
    expected = bootstrap(*rows, "uauc", replicates=100, seed=5)["model"]
    found = mean_intervals({"model": UserMetrics(np.arange(40), {"hit@1": hits})}, replicates=100, seed=5)
    assert (found["model"]["hit@1"].low, found["model"]["hit@1"].high) == pytest.approx((expected.low, expected.high))
    assert isinstance(found["model"]["hit@1"], bootstrap_module.Interval)


def test_records():
    facts = {"seed": 3, "split": "test", "protocol": "full ranking, train and valid items masked"}
    records = ranking_records(
        make_models(), pairs=[("good", "poor")], seed=3, protocol=facts["protocol"], replicates=20
    )
    named = [(record["model"], record["metric"]) for record in records]
    assert named == [(name, metric) for name in ("good", "poor", "good - poor") for metric in ("recall@5", "ndcg@5")]
    for record in records:
        fields = ["model", "rows", "metric", "value", "low", "high", "count", "unit", "seed", "split", "protocol"]
        assert list(record) == fields
        assert record["low"] <= record["value"] <= record["high"]
        assert record.items() >= (facts | {"rows": "all", "count": 30, "unit": "users"}).items()
    json.dumps(records, allow_nan=False)


@pytest.mark.parametrize("users", [0, 1])
def test_no_users_have_no_mean_and_one_has_no_interval(users):
    for record in ranking_records(make_models(users), pairs=[("good", "poor")], seed=3, protocol="", replicates=20):
        assert record["count"] == users
        assert (record["value"] is None) == (users == 0)
        assert record["low"] is None
        assert record["high"] is None


def test_what_records_refuse():
    models = make_models()
    with pytest.raises(ValueError, match="holds ' - '"):
        ranking_records({"a - b": models["good"]}, seed=0, protocol="")
    with pytest.raises(ValueError, match="named twice"):
        ranking_records(models, pairs=[("good", "poor")] * 2, seed=0, protocol="")
    with pytest.raises(ValueError, match=r"pairs name \['other'\]"):
        ranking_records(models, pairs=[("good", "other")], seed=0, protocol="")
    with pytest.raises(ValueError, match="replicates must be at least 1; it is 0"):
        ranking_records(models, seed=0, protocol="", replicates=0)
    with pytest.raises(ValueError, match="of the same users"):
        ranking_records(models | {"poor": make_models(29)["poor"]}, seed=0, protocol="")
    assert ranking_records({}, seed=0, protocol="") == []
