"""Full ranking of the catalog: each user's exact top list, and HR, Recall, NDCG and MRR of it.

A top list holds the items of the largest scores, of equal scores the smaller id: it follows from the scores alone. A block
of the catalog at a time is scored, so that memory never holds all scores; lists of blocks, and of workers that hold a part
of the catalog each, merge into the list of the whole.

Shapes: b users, n items, D columns of a vector, k places of a list, u users that count.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sellarec.evaluation.bootstrap import CHUNK_WEIGHTS, Interval, percentile_interval, user_weights
from sellarec.evaluation.results import PAIR_SEPARATOR, interval_numbers

METRICS = ("hit", "recall", "ndcg", "mrr")

BLOCK_SCORES = 1 << 21
"""Scores of a block, unless its items are given: 8 MB of float32, which a processor's caches still help with."""

SMALLEST_BLOCK = 1024
"""Items of a block, unless they are given, are at least so many, however many users there are."""

CHUNK = 32
"""Neighbouring items whose largest score says whether any of them can reach a list."""

ScoresOf = Callable[[Tensor, Tensor], Tensor]
"""(users [b, ...], items [n, ...]) -> floating-point scores [b, n], larger for what to recommend."""


class TopList(NamedTuple):
    """The best items of each user, best first; of equal scores (-0.0 equals 0.0) the smaller id first."""

    scores: Tensor  # [b, k], -inf where a user has fewer than k items
    items: Tensor  # int64 [b, k], -1 there


@dataclass(frozen=True)
class UserMetrics:
    """Ranking metrics of each user that has relevant items, by ascending id."""

    users: np.ndarray  # int64 [u]
    values: Mapping[str, np.ndarray]  # float64 [u] each: "hit@5", "recall@5", "ndcg@5", "mrr@5", "hit@10", ...

    def means(self) -> dict[str, float]:
        """Each metric's unweighted mean over the users; nan where there are none."""
        return {name: float(values.mean()) if values.size else float("nan") for name, values in self.values.items()}


def product(users: Tensor, items: Tensor) -> Tensor:
    """The scores of vectors: users [b, D], items [n, D] -> their inner products [b, n]."""
    return users @ items.T


@torch.no_grad()
def top_k(
    users: Tensor,
    items: Tensor,
    first_item: int,
    k: int,
    excluded: tuple[Tensor, Tensor],
    *,
    scores_of: ScoresOf = product,
    block_items: int | None = None,
) -> TopList:
    """Each user's k best items of a part of the catalog, exactly: what a full sort by (larger score, smaller id) begins with.

    Every score is made, but only b * `block_items` are held at a time. The list depends on the scores alone. A matrix
    product may give the same pair other last bits in a batch of another size, as BLAS sums in another order: where
    lists must agree to the bit, give `scores_of` the same batches of users.

    A few hundred to a thousand users at a time are best on a CPU. Scores of -inf mean the same as being excluded.

    Args:
        users: [b, D], or whatever `scores_of` takes.
        items: [n, D], or whatever `scores_of` takes: the items `first_item` to `first_item` + n - 1.
        first_item: id of the first of the items; the part of the catalog that a worker holds may begin anywhere.
        k: places of a list.
        excluded: items that must not appear, such as those seen in training: ids int64 [m] in any order, of one user
            after the other, and lengths int64 [b] that add up to m. Items of other parts of the catalog are allowed
            and mean nothing here. All tensors are on one device.
        scores_of: scores of all users for some of the items. What it returns is not changed.
        block_items: items scored at a time; by default as many as give `BLOCK_SCORES` scores. On a GPU more are faster.

    Raises:
        ValueError: on k or `block_items` below 1, lengths that don't fit, scores of another shape or of whole numbers,
            or a NaN score, of an excluded item too.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; it is {k}")
    ids, lengths = excluded
    b, n = len(users), len(items)
    if lengths.shape != (b,) or ids.ndim != 1 or int(lengths.sum()) != len(ids):
        raise ValueError(
            f"excluded must have one length for each of {b} users, adding up to its {tuple(ids.shape)} ids; "
            f"it has lengths of shape {tuple(lengths.shape)} that add up to {int(lengths.sum())}"
        )
    if block_items is None:
        block_items = max(BLOCK_SCORES // max(b, 1), SMALLEST_BLOCK)
    if block_items < 1:
        raise ValueError(f"block_items must be at least 1; it is {block_items}")
    device = lengths.device
    rows, ids = torch.repeat_interleave(torch.arange(b, device=device), lengths), ids - first_item
    here = (ids >= 0) & (ids < n)
    if not here.all():
        rows, ids = rows[here], ids[here]
    starts = range(0, n, block_items)
    if len(starts) > 1:  # by block; in each they stay in the order of the rows of its scores
        blocks, order = (ids // block_items).sort(stable=True)
        rows, ids = rows[order], ids[order]
        bounds = torch.searchsorted(blocks, torch.arange(len(starts) + 1, device=device)).tolist()
    else:
        bounds = [0, len(ids)]
    best = _nothing(b, k, torch.get_default_dtype(), device)
    for index, start in enumerate(starts):
        stop = min(start + block_items, n)
        scores = scores_of(users, items[start:stop])
        if scores.shape != (b, stop - start) or not scores.is_floating_point():
            raise ValueError(
                f"scores must be floating-point numbers of shape {(b, stop - start)}; "
                f"they are {scores.dtype} of shape {tuple(scores.shape)}"
            )
        if index == 0:
            best = _nothing(b, k, scores.dtype, device)
        out = slice(bounds[index], bounds[index + 1])
        width = -(-(stop - start) // CHUNK) * CHUNK
        theirs = scores_of is not product  # perhaps a view of what is kept
        if width > stop - start or (theirs and out.start < out.stop):
            whole = scores.new_empty(b, width)
            whole[:, : stop - start] = scores
            whole[:, stop - start :] = -torch.inf
            scores = whole
        if out.start < out.stop:
            places, flat = rows[out] * width + ids[out] - start, scores.view(-1)
            _refuse_nan(flat.index_select(0, places), first_item + start, first_item + stop)
            flat.index_fill_(0, places, -torch.inf)
        _update(best, scores, first_item + start, first_item + stop)
    return best


def merge(a: TopList, b: TopList, k: int) -> TopList:
    """The k best items of two lists that share no item, such as those of two workers' parts of the catalog.

    Associative and commutative, as long as no list on the way is cut below k: lists merge in any order to the same one.

    Raises:
        ValueError: on k below 1, or lists of different numbers of users.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; it is {k}")
    if len(a.items) != len(b.items):
        raise ValueError(f"the lists must be of the same users; they are of {len(a.items)} and {len(b.items)}")
    scores, items = torch.cat([a.scores, b.scores], dim=1), torch.cat([a.items, b.items], dim=1)
    items, order = items.sort(dim=1)
    # Stable: among equal scores the smaller id, which comes first already, stays first.
    scores, by_score = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    items = items.gather(1, by_score)
    missing = max(k - scores.shape[1], 0)
    return TopList(
        functional.pad(scores[:, :k], (0, missing), value=-torch.inf),
        functional.pad(items[:, :k], (0, missing), value=-1),
    )


def user_metrics(
    users: np.ndarray, items: np.ndarray, relevant: tuple[np.ndarray, np.ndarray], ks: Sequence[int]
) -> UserMetrics:
    """Metrics of each user's top list at several cuts; users without relevant items are left out.

    With the ranks r = 1, 2, … of the relevant items among the first k places, and R relevant items in all (in the list
    or not):

    - hit@k (HR, Success): 1 where there is such a rank, else 0.
    - recall@k: their number / R. Not divided by min(k, R), as some do: it can't reach 1 where R is above k.
    - ndcg@k: the sum of 1 / log2(1 + r), divided by what it were with min(k, R) relevant items in the first places.
    - mrr@k: 1 / the smallest r, else 0.

    Recall and NDCG are those of LightGCN's published code (gusye1234/LightGCN-PyTorch, `code/utils.py`:
    `RecallPrecision_ATk` and `NDCGatK_r`, the means over users with test items). On the same split its Recall@20 and
    NDCG@20 compare with these, provided that train items are excluded, as there, and nothing else is. There, ties fall as
    torch.topk lets them, and a test item that a user has twice counts twice in R. UltraGCN's code has the same two formulas
    but divides by all users: its numbers are smaller by the share of users that have no test items.

    Args:
        users: int ids, shape [b], each once.
        items: int ids, shape [b, places], best first, each once in a list; -1 where a list has ended.
        relevant: ids int [m], of one user after the other, and lengths int [b]; an item that is repeated counts once.
        ks: the cuts, each at most `places`, each once.

    Raises:
        ValueError: on shapes that don't fit, a cut outside 1 to `places`, a user or a list's item that is repeated, a
            negative relevant item.
    """
    users, items = np.asarray(users), np.asarray(items)
    ids, lengths = (np.asarray(part, dtype=np.int64) for part in relevant)
    b = users.size
    if users.shape != (b,) or items.ndim != 2 or len(items) != b:
        raise ValueError(f"users must have shape [b] and items [b, places]; they have {users.shape} and {items.shape}")
    if lengths.shape != (b,) or ids.ndim != 1 or lengths.sum() != ids.size:
        raise ValueError(
            f"relevant must have one length for each of {b} users, adding up to its {ids.shape} ids; "
            f"it has lengths of shape {lengths.shape} that add up to {lengths.sum()}"
        )
    places = items.shape[1]
    if not ks or len(set(ks)) < len(ks) or min(ks) < 1 or max(ks) > places:
        raise ValueError(f"the cuts must be different numbers from 1 to the {places} places of a list; they are {ks}")
    if ids.size and ids.min() < 0:
        raise ValueError(f"relevant items must not be negative; the smallest is {ids.min()}")
    in_order = np.sort(items, axis=1)
    if ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any():
        raise ValueError("a list holds an item twice")
    # A number for each pair of a user and an item.
    width, row = max(ids.max(initial=0), items.max(initial=0)) + 1, np.arange(b)
    wanted = np.sort(np.repeat(row, lengths) * width + ids)
    wanted = wanted[np.diff(wanted, prepend=-1) > 0]  # np.unique of plain numbers is far slower than a sort
    number = np.bincount(wanted // width, minlength=b)
    counted = np.flatnonzero(number)
    counted = counted[np.argsort(users[counted])]
    number, items = number[counted], items[counted, : max(ks)].astype(np.int64)
    hits = np.isin(counted[:, None] * width + items, wanted) & (items >= 0)

    found = hits.cumsum(axis=1)
    discounts = 1 / np.log2(np.arange(2, max(ks) + 2))
    gains, ideal = (hits * discounts).cumsum(axis=1), discounts.cumsum()
    first = hits.argmax(axis=1) + 1
    values: dict[str, np.ndarray] = {}
    for k in ks:
        hit = (found[:, k - 1] > 0).astype(np.float64)
        values |= {
            f"hit@{k}": hit,
            f"recall@{k}": found[:, k - 1] / number,
            f"ndcg@{k}": gains[:, k - 1] / ideal[np.minimum(number, k) - 1],
            f"mrr@{k}": hit / first,
        }
    return _checked(UserMetrics(users[counted].astype(np.int64), values))


def concatenate(parts: Sequence[UserMetrics]) -> UserMetrics:
    """The metrics of several batches of users, or of several workers' users, in one; the same in any order of the parts.

    Raises:
        ValueError: on no parts, parts with different metrics, or a user in two of them.
    """
    if len({tuple(part.values) for part in parts}) != 1:
        raise ValueError(f"the parts must hold the same metrics; they hold {[list(part.values) for part in parts]}")
    users = np.concatenate([part.users for part in parts])
    order = np.argsort(users)
    values = {name: np.concatenate([part.values[name] for part in parts])[order] for name in parts[0].values}
    return _checked(UserMetrics(users[order], values))


def mean_intervals(
    models: Mapping[str, UserMetrics],
    *,
    pairs: Sequence[tuple[str, str]] = (),
    replicates: int = 1_000,
    seed: int,
) -> dict[str | tuple[str, str], dict[str, Interval]]:
    """The mean of each model's metrics, and of each pair (a, b) that of a - b, with 95% intervals from `bootstrap`'s draws.

    A replicate draws as many users as count, with replacement, the same for all models and metrics.

    Args:
        models: the metrics of each model, of the same users.
        pairs: models to compare.
        replicates: number of resamples.
        seed: of the draws, not negative.

    Raises:
        ValueError: on fewer than one replicate, an unknown model, or models with different users or metrics.
    """
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1; it is {replicates}")
    unknown = {name for pair in pairs for name in pair} - set(models)
    if unknown:
        raise ValueError(f"pairs name {sorted(unknown)}; the models with metrics are {sorted(models)}")
    if not models:
        return {}
    first, *others = models
    users, metrics = models[first].users, tuple(models[first].values)
    for name in others:
        if tuple(models[name].values) != metrics or not np.array_equal(models[name].users, users):
            raise ValueError(
                f"{name!r} has {list(models[name].values)} of {models[name].users.size} users, {first!r} {list(metrics)} "
                f"of {users.size}: they must be of the same users"
            )
    samples = {name: {metric: np.full(replicates, np.nan) for metric in metrics} for name in models}
    if users.size > 1:
        chunk = max(1, CHUNK_WEIGHTS // users.size)
        for start in range(0, replicates, chunk):
            stop = min(start + chunk, replicates)
            shares = user_weights(users.size, start, stop, seed) / users.size
            for name, of_model in models.items():
                for metric in metrics:
                    samples[name][metric][start:stop] = of_model.values[metric] @ shares
    means = {name: of_model.means() for name, of_model in models.items()}
    intervals: dict[str | tuple[str, str], dict[str, Interval]] = {
        name: {
            metric: percentile_interval(means[name][metric], samples[name][metric], users.size) for metric in metrics
        }
        for name in models
    }
    for a, b in pairs:
        intervals[a, b] = {
            metric: percentile_interval(
                means[a][metric] - means[b][metric], samples[a][metric] - samples[b][metric], users.size
            )
            for metric in metrics
        }
    return intervals


def ranking_records(
    models: Mapping[str, UserMetrics],
    *,
    pairs: Sequence[tuple[str, str]] = (),
    rows: str = "all",
    split: str = "test",
    seed: int,
    protocol: str,
    replicates: int = 1_000,
) -> list[dict[str, Any]]:
    """The records of results.json: each model's mean metrics, such as "recall@20", then those of each pair's difference.

    `count` is the users that have relevant items. `value`, `low` and `high` are None where there are none, `low` and
    `high` alone where there is a single one.

    Args:
        models: the metrics of each model, of the same users.
        pairs: models (a, b) whose difference is recorded as the model "a - b".
        rows: which of the split's rows are relevant items, recorded.
        split: name of the split, recorded.
        seed: of the run, recorded; it seeds the bootstrap too.
        protocol: what was ranked and what was left out, in words, recorded: "full ranking, train and valid items masked".
        replicates: of the bootstrap over users.

    Raises:
        ValueError: on a pair named twice, a model whose name holds " - ", and as `mean_intervals`.
    """
    for name in models:
        if PAIR_SEPARATOR in name:
            raise ValueError(f"model {name!r} holds {PAIR_SEPARATOR!r}, which names a difference; call it otherwise")
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"a pair is named twice: {list(pairs)}")
    intervals = mean_intervals(models, pairs=pairs, replicates=replicates, seed=seed)
    counts: dict[str | tuple[str, str], int] = {name: of_model.users.size for name, of_model in models.items()}
    return [
        {
            "model": key if isinstance(key, str) else PAIR_SEPARATOR.join(key),
            "rows": rows,
            "metric": metric,
            **interval_numbers(interval),
            "count": counts[key if isinstance(key, str) else key[0]],
            "unit": "users",
            "seed": seed,
            "split": split,
            "protocol": protocol,
        }
        for key, of_metric in intervals.items()
        for metric, interval in of_metric.items()
    ]


def _nothing(b: int, k: int, dtype: torch.dtype, device: torch.device) -> TopList:
    scores = torch.full((b, k), -torch.inf, dtype=dtype, device=device)
    return TopList(scores, torch.full((b, k), -1, device=device))


def _update(best: TopList, scores: Tensor, first_item: int, stop: int) -> None:
    """Let a block's items, of larger ids than any in the lists, into the lists; scores: [b, n], n a multiple of CHUNK, those
    of no item (`stop` and on) -inf.

    An item gets in only where it beats the last place: as ids rise, one that ties with it doesn't. So a list looks into
    those chunks alone whose largest score beats its last place, and of them into the k largest, as each of these holds
    an item that beats whatever a further chunk holds. After the first blocks few lists look into few chunks.
    """
    k = best.scores.shape[1]
    chunks = scores.unflatten(1, (-1, CHUNK))
    largest = chunks.amax(2)
    _refuse_nan(largest, first_item, stop)
    beating = (largest > best.scores[:, -1:]).sum(1)
    rows = beating.nonzero()[:, 0]
    if not len(rows):
        return
    chosen = _largest(largest[rows], min(k, int(beating.max())))
    near = torch.cat([best.scores[rows], chunks[rows[:, None], chosen].flatten(1)], dim=1)
    within = torch.arange(CHUNK, device=scores.device)
    ids = torch.cat([best.items[rows], (first_item + chosen[:, :, None] * CHUNK + within).flatten(1)], dim=1)
    # Among equal scores the columns of `near` are by ascending id: the list's own, then the chunks in their order. So
    # of -inf the list's own empty places stay, and no excluded item takes one.
    columns = _largest(near, k)
    kept, order = near.gather(1, columns).sort(dim=1, descending=True, stable=True)
    best.scores[rows] = kept
    best.items[rows] = ids.gather(1, columns.gather(1, order))


def _largest(scores: Tensor, k: int) -> Tensor:
    """The columns of each row's k largest scores, of equal ones the first columns; int64 [b, min(k, n)], ascending."""
    b, n = scores.shape
    if n <= k:
        return torch.arange(n, device=scores.device).expand(b, n)
    values, columns = scores.topk(k + 1)
    # topk lets ties fall anyhow, which matters where the last place ties with the one after it: choose anew there.
    tied = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
    columns = columns[:, :k]
    if len(tied):
        rivals, last = scores[tied], values[tied, k - 1 : k]
        rank = torch.arange(n, 0, -1, dtype=torch.int32, device=scores.device)
        rank = torch.where(rivals > last, rank + n, torch.where(rivals == last, rank, 0))
        columns[tied] = rank.topk(k).indices
    return columns.sort(dim=1).values


def _refuse_nan(scores: Tensor, first: int, stop: int) -> None:
    if scores.isnan().any():
        raise ValueError(f"scores of items {first} to {stop - 1} are NaN; every item needs a score")


def _checked(metrics: UserMetrics) -> UserMetrics:
    repeated = np.flatnonzero(metrics.users[1:] == metrics.users[:-1])
    if repeated.size:
        raise ValueError(f"user {metrics.users[repeated[0]]} has metrics twice ({repeated.size} such users)")
    return metrics
