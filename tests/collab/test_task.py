"""A collaborative model as the loop takes it: losses by hand, the same however rows lie on workers, what is saved and read."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from engine_log import write_log
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small import (
    COUNTS,
    ITEMS,
    SEEN,
    USERS,
    batch_of,
    leaves,
    make,
    prepared,
    save_table,
    small_log,
    some_rows,
    together,
    vectors_of,
)
from torch import Tensor
from torch.nn import functional as F

import sellarec
from sellarec.collab import unseen
from sellarec.collab.losses import bpr, sampled_softmax
from sellarec.collab.task import WEIGHTS, CollabTask, build_collab
from sellarec.config import Collab
from sellarec.errors import UserError
from sellarec.training.table import Jagged, initial_rows
from sellarec.training.task import INITIAL, WHOLE, Alone

torch.set_num_threads(1)

L2 = 0.1
MODELS = ("mf", "svdpp", "lightgcn", "sasrec", "din", "fism", "binary_mf")
RANKED = ("mf", "svdpp", "lightgcn", "sasrec", "din")
"""Models that take a ranking loss."""
DENSE = ("sasrec", "din", "fism")


def dense(task: CollabTask) -> list[Tensor]:
    return list(task.network.parameters())


def norm(vectors: dict[str, Any], name: str) -> np.ndarray:
    return leaves(vectors)[name].detach().square().sum(1).numpy().astype(np.float64)


def of_lists(values: np.ndarray, found: Jagged) -> list[float]:
    """The mean of each list; 0 for none."""
    return [float(part.mean()) if len(part) else 0.0 for part in np.split(values, found.lengths.cumsum(0)[:-1])]


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_sum_of_logistic_losses_and_norms(name, tmp_path):
    task = make(tmp_path, model=name)
    batch = batch_of(task, some_rows())
    vectors = vectors_of(task, batch)
    label = np.array([1, 0, 1])
    score = task.score(None, batch, vectors).detach().numpy().astype(np.float64)
    logistic = np.log1p(np.exp(np.where(label == 1, -score, score)))
    norms = norm(vectors, "user") + norm(vectors, "item")
    if name in ("svdpp", "sasrec", "din", "fism"):
        norms = norms + of_lists(norm(vectors, "history"), vectors["history"])
    expected = (logistic + L2 / 2 * norms).sum()
    if name == "fism":
        expected += of_consumption(vectors, batch).sum().item()
    loss = task.loss(None, batch, vectors, Alone())
    assert task.targets(batch) == 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def of_consumption(vectors: dict[str, Any], batch: dict[str, Any], catalog: Tensor | None = None) -> Tensor:
    """FISM's own loss [b]: which of the seen items a row holds, whatever its label, given the mean of its history's rows.

    Beside what an item's bias learns stands the logarithm of its train rows; of an unseen one that is -inf.
    """
    catalog = vectors[WHOLE + "item"] if catalog is None else catalog
    lists = vectors["history"].values.split(vectors["history"].lengths.tolist())
    users = torch.stack([rows.mean(0)[:-2] if len(rows) else torch.zeros(catalog.shape[1] - 2) for rows in lists])
    logits = users @ catalog[:, :-2].T + catalog[:, -2] + torch.from_numpy(np.where(SEEN, COUNTS[0], 0)).log()
    return F.cross_entropy(logits, batch["item"], reduction="none")


@pytest.mark.parametrize("ends", [[], [3], [2, 5], [0, 4], [2, 4]])
def test_fisms_own_loss_is_cross_entropy_over_the_seen_items_however_rows_lie_on_workers(ends, tmp_path):
    """Of workers with different numbers of rows, of one with none; labels of both kinds count, rows of weight 0 don't."""
    task = make(tmp_path, model="fism", dim=8, l2=0.0)
    torch.nn.init.normal_(task.network.liking, generator=torch.Generator().manual_seed(1))
    rows = some_rows(item_seen=[True] * 3).take([0, 1, 2, 0, 1, 2, 0])
    weight = np.ones(7, np.float32)
    weight[4] = 0
    changes = {"row": range(7), "item": [6, 1, 1, 0, 2, 5, 3], "weight": weight}
    for column, values in changes.items():
        rows = rows.set_column(rows.column_names.index(column), column, pa.array(values))
    rows = prepared(task, rows)
    parts = [rows.slice(a, b - a) for a, b in zip([0, *ends], [*ends, 7], strict=True)]
    given = []
    for rank, part in enumerate(parts):
        batch = task.collate(part, 0)
        given.append((batch, vectors_of(task, batch, workers=len(parts), rank=rank)))

    def work(peers: Any) -> Tensor:
        return task.loss(None, *given[peers.rank], peers)

    total = torch.stack(together(len(parts), work)).sum() if ends else task.loss(None, *given[0], Alone())
    total.backward()

    # once more, plainly, of all rows: the target's logit is that of its row among the looked-up ones
    batch = task.collate(rows, 0)
    vectors = vectors_of(task, batch)
    score = task.score(None, batch, vectors)
    logistic = F.binary_cross_entropy_with_logits(score, batch["label"], reduction="none")
    expected = ((logistic + of_consumption(vectors, batch)) * batch["weight"]).sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    plain = leaves(vectors)
    names = [name for name in plain if name != "item"]
    wanted = dict(zip(names, torch.autograd.grad(expected, [plain[name] for name in names]), strict=True))
    found = {
        name: torch.cat([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in each])
        for name in plain
        for each in [[leaves(vectors)[name] for _, vectors in given]]
    }
    # what of the plain loss reaches a target's row in the catalog lies on the looked-up one
    of_targets = torch.zeros_like(found[WHOLE + "item"]).index_add(0, batch["item"], found["item"])
    bias = found["item"][:, -1]
    of_targets[:, -1] = 0
    found[WHOLE + "item"] = found[WHOLE + "item"] + of_targets
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert (bias != 0).tolist() == (weight > 0).tolist()
    assert (found["item"][4] == 0).all() and (found["user"][4] == 0).all(), "a row of weight 0"
    assert (wanted[WHOLE + "item"][~torch.from_numpy(SEEN)] == 0).all(), "an unseen item has no part"


def test_only_fisms_own_loss_moves_its_vectors(tmp_path):
    task = make(tmp_path, model="fism", dim=8, l2=0.0)
    gradients = []
    for label in ([1, 1, 1], [0, 0, 0]):
        batch = batch_of(task, some_rows(item_seen=[True] * 3, label=pa.array(label, pa.int8())))
        vectors = vectors_of(task, batch)
        task.loss(None, batch, vectors, Alone()).backward()
        gradients.append({name: leaf.grad for name, leaf in leaves(vectors).items()})
    one, other = gradients
    for name in ("item", "history", WHOLE + "item"):
        assert torch.equal(one[name][:, :-1], other[name][:, :-1]) and (one[name][:, :-1] != 0).any()
    assert (one["item"][:, -1] < 0).all() and (other["item"][:, -1] > 0).all()
    assert (one["user"][:, :-1] == 0).all()


def test_lightgcn_holds_the_rows_of_the_tables_small(tmp_path):
    task = make(tmp_path, model="lightgcn", l2=0.3)
    batch = batch_of(task, some_rows())
    vectors = vectors_of(task, batch)
    smoothed = {**vectors, "user": vectors["user"] * 2, "item": vectors["item"] * 2}
    without = make(tmp_path, model="lightgcn", l2=0.0)
    part = task.loss(None, batch, smoothed, Alone()) - without.loss(None, batch, smoothed, Alone())
    norms = norm(vectors, INITIAL + "user") + norm(vectors, INITIAL + "item")
    assert part.item() == pytest.approx(0.15 * norms.sum(), rel=1e-4)


def test_the_norms_of_negatives_count_by_their_mean(tmp_path):
    task = make(tmp_path, loss="bpr")
    batch = batch_of(task, some_rows())
    vectors = vectors_of(task, batch)
    part = task.loss(None, batch, vectors, Alone()) - make(tmp_path, loss="bpr", l2=0.0).loss(
        None, batch, vectors, Alone()
    )
    norms = norm(vectors, "user") + norm(vectors, "item") + norm(vectors, "negative").reshape(3, 3).mean(1)
    assert part.item() == pytest.approx(L2 / 2 * (norms * [1, 0, 1]).sum(), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        (name, loss)
        for name in MODELS
        for loss in ("bce", "bpr", "softmax", "full-softmax")
        if (name, loss) != ("din", "full-softmax") and (name in RANKED or loss == "bce")
    ],
)
def test_rows_of_weight_zero_have_no_effect(name, loss, tmp_path):
    task = make(tmp_path, model=name, loss=loss)
    rows = some_rows(
        label=pa.array([1, 1, 1], pa.int8()), item_seen=[True] * 3, weight=pa.array([1, 0, 1], pa.float32())
    )
    padded = batch_of(task, rows)
    vectors = vectors_of(task, padded)
    total = task.loss(None, padded, vectors, Alone())
    total.backward()
    assert task.targets(padded) == 2
    found = leaves(vectors)
    assert all((found[side].grad[1] == 0).all() and (found[side].grad[0] != 0).any() for side in ("user", "item"))
    kept = batch_of(task, rows.take([0, 2]))
    assert task.loss(None, kept, vectors_of(task, kept), Alone()).item() == pytest.approx(total.item(), rel=1e-5)


def test_ids_are_looked_up_as_they_are(tmp_path):
    task = make(tmp_path)
    ids = task.lookups(batch_of(task, some_rows()))
    assert {name: value.tolist() for name, value in ids.items()} == {"user": [0, 4, 2], "item": [6, 1, 1]}
    assert task.prepare is None and task.prepare_to_score is None and "history" not in task.columns


@pytest.mark.parametrize(
    ("name", "loss"), [(name, loss) for loss in ("bce", "softmax") for name in (MODELS if loss == "bce" else RANKED)]
)
def test_what_is_looked_up_lies_in_a_table(name, loss, tmp_path):
    task = make(tmp_path, model=name, loss=loss, history=2)
    features = {feature for table in task.tables for feature in table.features}
    assert task.whole == (("item",) if name == "fism" else ())
    assert (WHOLE + "item" in features) == (name == "fism")
    features -= {WHOLE + "item"}  # the loop looks it up, in training
    read = name in ("svdpp", "sasrec", "din", "fism")
    assert set(task.lookups(batch_of(task, some_rows()))) == features
    assert features == {"user", "item", *["history"] * read, *["negative"] * (loss == "softmax")}
    to_score = batch_of(task, some_rows(), None)
    assert set(task.lookups(to_score)) == features - {"negative"}
    assert ("history" in task.columns) == (read or loss == "softmax")
    if read:
        # two at most, of those with train rows (item 4 has none)
        batch = batch_of(task, some_rows(history=pa.array([[1, 2, 3, 4], [4], []])), None)
        assert (batch["history"].values.tolist(), batch["history"].lengths.tolist()) == ([2, 3], [2, 0, 0])


def test_facts_say_the_constant_and_what_unseen_ones_are(tmp_path):
    facts = make(tmp_path).facts()
    assert facts["constant"] == pytest.approx(math.log(0.7 / 0.3), rel=1e-6)
    assert facts["unseen"] == dict.fromkeys([unseen.USER, unseen.ITEM], "masked (a row of zeros)")
    assert make(tmp_path, global_mean=False).facts()["constant"] == 0


CHANGED = "its initial row, which only {} may have changed"


@pytest.mark.parametrize(
    ("settings", "user", "item"),
    [
        ({"loss": "bce"}, None, None),
        ({"loss": "bpr"}, "its initial row", CHANGED.format("negatives")),
        ({"loss": "full-softmax"}, "its initial row", CHANGED.format("negatives")),
        ({"loss": "bpr", "negatives": "in-batch"}, "its initial row", "its initial row"),
        ({"loss": "softmax", "negatives": "popularity"}, "its initial row", "its initial row"),
        (
            {"loss": "softmax", "table_weight_decay": 0.1},
            CHANGED.format("table_weight_decay"),
            CHANGED.format("table_weight_decay and negatives"),
        ),
        ({"model": "svdpp", "loss": "bpr"}, "its initial row", CHANGED.format("negatives")),
        ({"model": "din", "loss": "bpr"}, "its initial row", CHANGED.format("negatives and histories")),
        ({"model": "sasrec", "user_rows": False, "loss": "bpr"}, None, CHANGED.format("negatives and histories")),
    ],
    ids=str,
)
def test_what_a_ranking_loss_has_no_target_of_is_said_too(tmp_path, settings, user, item):
    """Beside what the model says of unseen ones."""
    task = make(tmp_path, **settings)
    found = task.facts()["unseen"]
    assert task.network.unseen().items() <= found.items()
    assert (found.get(unseen.USER_WITHOUT_POSITIVE), found.get(unseen.ITEM_WITHOUT_POSITIVE)) == (user, item)
    assert len(found) == len(task.network.unseen()) + (user is not None) + (item is not None)


def test_of_sequences_it_is_the_items_that_lie_in_none(tmp_path):
    task = make(tmp_path, model="sasrec", user_rows=False, train_on="sequences", loss="softmax", negatives="popularity")
    found = task.facts()["unseen"]
    assert list(found) == [unseen.ITEM, unseen.HISTORY, unseen.ITEM_WITHOUT_SEQUENCE]
    assert found[unseen.ITEM_WITHOUT_SEQUENCE] == "its initial row"


WHOLE_BATCH = ("in-batch", "shared")
"""Kinds of negatives that take the scores of all workers' candidates."""

RANKING = [
    *((name, "bpr", kind, "rows") for name in RANKED for kind in ("uniform", "popularity", "in-batch", "shared")),
    *((name, "softmax", kind, "rows") for name in RANKED for kind in ("uniform", "in-batch", "shared")),
    *((name, "full-softmax", "uniform", "rows") for name in RANKED),
    *(("sasrec", loss, "uniform", "sequences") for loss in ("bpr", "softmax", "full-softmax")),
]
RANKING = [case for case in RANKING if case[0] != "din" or (case[2] not in WHOLE_BATCH and case[1] != "full-softmax")]


@pytest.mark.parametrize(("name", "loss", "kind", "train_on"), RANKING)
def test_a_ranking_loss_takes_positives_and_doesnt_depend_on_how_rows_lie_on_workers(
    name, loss, kind, train_on, tmp_path
):
    """Loss and gradients, of rows and of dense weights, added up over workers."""
    sequences = train_on == "sequences"
    shared = kind == "shared"
    kind = "popularity" if shared else kind
    task = make(
        tmp_path,
        model=name,
        loss=loss,
        negatives=kind,
        shared_negatives=shared,
        train_on=train_on,
        user_rows=not sequences,
    )
    table = some_rows(item_seen=[True] * 3).select([*task.columns, "weight"])
    table = pa.concat_tables([table, table, table.slice(0, 2)])
    weight = np.ones(8, np.float32)
    weight[5] = 0
    changes = {"row": range(8), "user": [0, 4, 2, 1, 4, 3, 0, 2], "item": [6, 1, 1, 0, 2, 5, 3, 1], "weight": weight}
    for column, values in changes.items():
        table = table.set_column(table.column_names.index(column), column, pa.array(values))
    table = prepared(task, table)

    def gradients(ends: list[int]) -> tuple[float, dict[str, Tensor]]:
        parts = [table.slice(a, b - a) for a, b in zip([0, *ends], [*ends, 8], strict=True)]
        workers = len(parts)
        given = []
        for rank, part in enumerate(parts):
            batch = task.collate(part, 0)
            given.append((batch, vectors_of(task, batch, workers=workers, rank=rank)))

        def work(peers: Any) -> Tensor:
            return task.loss(None, *given[peers.rank], peers)

        total = torch.stack(together(workers, work)).sum() if workers > 1 else task.loss(None, *given[0], Alone())
        weights = dense(task)
        for parameter in weights:
            parameter.grad = None
        total.backward()
        counted = sum(task.targets(batch).item() for batch, _ in given)
        assert counted == (10 if sequences else 4)
        found = {}
        for feature in given[0][1]:
            each = [leaves(vectors)[feature] for _, vectors in given]
            found[feature] = torch.cat([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in each])
        for number, parameter in enumerate(weights):
            assert parameter.grad is not None
            found[f"weight {number}"] = parameter.grad.clone()
        return total.item(), found

    alone, expected = gradients([])
    assert alone > 0.1
    counted = (table["label"].to_numpy() == 1) & (weight > 0)
    if not sequences and name != "lightgcn":
        assert ((expected["user"].abs().sum(1) > 0).numpy() <= counted).all() and expected["user"][0].abs().sum() > 0
    # full-softmax takes any slices, negatives of the whole batch equal ones, as the loop gives them
    for ends in ([4], [2, 4, 6], *([[3, 6]] if kind != "in-batch" and not shared else [])):
        total, found = gradients(ends)
        assert total == pytest.approx(alone, rel=1e-5)
        for feature, gradient in expected.items():
            torch.testing.assert_close(
                found[feature], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, f=feature: f"{f}: {m}"
            )


def test_in_batch_negatives_are_other_users_other_positives(tmp_path):
    task = make(tmp_path, loss="softmax", negatives="in-batch", l2=0.0)
    assert "history" not in task.columns and {f for t in task.tables for f in t.features} == {"user", "item"}
    table = some_rows(
        user=[0, 0, 2], item=[6, 1, 1], label=pa.array([1, 1, 1], pa.int8()), user_seen=[True] * 3, item_seen=[True] * 3
    )
    batch = batch_of(task, table)
    vectors = vectors_of(task, batch)
    user, item = vectors["user"].detach(), vectors["item"].detach()
    scores = task.network.products(user, item)
    counts = torch.tensor([[False, False, True], [False, False, False], [True, False, False]])
    log_rest = torch.log1p(-batch["log_q"].exp())
    expected = sampled_softmax(scores.diagonal(), scores, counts, log_rest, batch["log_q"].expand(3, 3)).sum()
    assert task.loss(None, batch, vectors, Alone()).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["mf", "sasrec", "lightgcn"])
def test_cosines_of_the_loss_and_plain_products_of_scores(name, tmp_path):
    """`plain_score`: the loss is that of cosines, scores and rankings are those without a temperature; no logQ is taken off."""
    settings = {"model": name, "loss": "softmax", "negatives": "in-batch", "l2": 0.0, "biases": False, "log_q": False}
    task = make(tmp_path, temperature=0.2, plain_score=True, **settings)
    plain = make(tmp_path, **settings)
    if plain.model is not None:
        plain.model.load_state_dict(task.model.state_dict())
    table = some_rows(
        user=[0, 3, 2], item=[6, 1, 2], label=pa.array([1, 1, 1], pa.int8()), user_seen=[True] * 3, item_seen=[True] * 3
    )
    batch = batch_of(task, table)
    vectors = vectors_of(task, batch)
    users, items = task.users(None, batch, vectors), task.network.item(batch, vectors)
    score = task.score(None, batch, vectors)
    torch.testing.assert_close(score, plain.score(None, batch, vectors))
    torch.testing.assert_close(task.products(users, items), plain.products(users, items))
    torch.testing.assert_close(task.products(users, items).diagonal(), score)
    torch.testing.assert_close(score, (users * items).sum(1) + task.network.constant)
    cosines = F.normalize(users, dim=1) @ F.normalize(items, dim=1).T / 0.2
    expected = F.cross_entropy(cosines, torch.arange(3), reduction="sum")
    torch.testing.assert_close(task.loss(None, batch, vectors, Alone()), expected)


@pytest.mark.parametrize("loss", ["bpr", "softmax"])
def test_drawn_negatives_are_scored_for_their_own_user(loss, tmp_path):
    task = make(tmp_path, loss=loss, l2=0.0)
    batch = batch_of(task, some_rows(label=pa.array([1, 1, 1], pa.int8()), user_seen=[True] * 3, item_seen=[True] * 3))
    vectors = vectors_of(task, batch)
    user, item, others = vectors["user"], vectors["item"], vectors["negative"].values.view(3, 3, 4)
    positive, negative = task.network.product(user, item), task.network.product(user[:, None], others)
    log_q = batch["negative_log_q"].values.view(3, 3)
    losses = bpr(positive, negative, log_q.isfinite())
    if loss == "softmax":
        losses = sampled_softmax(positive, negative, log_q.isfinite(), batch["log_rest"], log_q)
    assert task.loss(None, batch, vectors, Alone()).item() == pytest.approx(losses.sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["mf", "svdpp", "sasrec", "lightgcn", "binary_mf"])
def test_the_full_softmax_is_cross_entropy_over_the_seen_items(name, tmp_path):
    task = make(tmp_path, model=name, loss="full-softmax", l2=0.0)
    assert task.whole == ("item",) and any(WHOLE + "item" in table.features for table in task.tables)
    table = some_rows(item=[6, 1, 2], label=pa.array([1, 1, 1], pa.int8()), user_seen=[True] * 3, item_seen=[True] * 3)
    batch = batch_of(task, table)
    vectors = vectors_of(task, batch)
    users, _ = task.network(batch, vectors)
    logits = task.network.products(users, vectors[WHOLE + "item"]).masked_fill(~torch.from_numpy(SEEN), -torch.inf)
    loss = task.loss(None, batch, vectors, Alone())
    assert loss.item() == pytest.approx(
        F.cross_entropy(logits, torch.tensor([6, 1, 2]), reduction="sum").item(), rel=1e-5
    )


@pytest.mark.parametrize("loss", ["bpr", "softmax", "full-softmax"])
def test_a_sequence_has_the_losses_of_the_rows_that_it_stands_for(loss, tmp_path):
    """Every item after the first as a row with the history before it."""
    settings = {"model": "sasrec", "user_rows": False, "loss": loss, "negatives_per_row": 2, "l2": 0.0}
    task = make(tmp_path, **settings, train_on="sequences")
    sequences = [[6, 1, 2, 0], [3, 5], [0, 1, 2, 3, 5]]
    ones = pa.array([1, 1, 1], pa.int8())
    batch = batch_of(
        task,
        some_rows(
            item=[s[-1] for s in sequences], history=[s[:-1] for s in sequences], label=ones, item_seen=[True] * 3
        ),
    )
    assert task.targets(batch) == 8
    found = task.loss(None, batch, vectors_of(task, batch), Alone())
    rows = make(tmp_path, **settings)
    rows.network.load_state_dict(task.network.state_dict())
    parts = [(s[:at], s[at]) for s in sequences for at in range(1, len(s))]
    lengths = torch.tensor([len(history) for history, _ in parts])
    each: dict[str, Any] = {
        "item": batch["item"].values, "user": torch.zeros(8, dtype=torch.int64),
        "history": Jagged(torch.tensor([i for history, _ in parts for i in history]), lengths),
        **{name: torch.ones(8) for name in ("user_seen", "item_seen", "label", "weight")},
    }  # fmt: skip
    assert each["item"].tolist() == [item for _, item in parts]
    if loss != "full-softmax":
        two = torch.full((8,), 2)
        each |= {name: Jagged(batch[name].values, two) for name in ("negative", "negative_log_q")}
        each["log_q"] = batch["log_q"].values
    if loss == "softmax":
        each["log_rest"] = batch["log_rest"].values
    expected = rows.loss(None, each, vectors_of(rows, each), Alone())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_sequences_without_a_target_have_no_loss(tmp_path):
    for loss in ("bpr", "softmax", "full-softmax"):
        task = make(tmp_path, model="sasrec", user_rows=False, loss=loss, train_on="sequences")
        batch = batch_of(task, some_rows(history=pa.array([[]] * 3, pa.list_(pa.int64())), item_seen=[True] * 3))
        assert task.targets(batch) == 0
        assert task.loss(None, batch, vectors_of(task, batch), Alone()).item() == 0


@pytest.mark.parametrize("name", RANKED)
def test_a_ranking_model_scores_rows_without_negatives(name, tmp_path):
    task, plain = make(tmp_path, model=name, loss="bpr"), make(tmp_path, model=name)
    batch = batch_of(task, some_rows(), None)
    assert not {"negative", "log_q", "targets"} & set(batch)
    other = batch_of(plain, some_rows(), None)
    torch.testing.assert_close(
        task.score(None, batch, vectors_of(task, batch)), plain.score(None, other, vectors_of(plain, other))
    )


def test_a_model_of_sequences_scores_rows(tmp_path):
    task = make(tmp_path, model="sasrec", user_rows=False, loss="full-softmax", train_on="sequences")
    plain = make(tmp_path, model="sasrec", user_rows=False)
    found = []
    for each in (task, plain):
        batch = batch_of(each, some_rows(), None)
        found.append(each.score(None, batch, vectors_of(each, batch)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["mf", "svdpp", "lightgcn", "sasrec", "fism", "binary_mf"])
def test_the_catalog_is_ranked_by_the_scores_of_rows(name, tmp_path):
    """`users`, `catalog` and `products` against `score`, item by item; an item without a train row counts as zeros."""
    task = make(tmp_path, model=name)
    task.network.eval()
    batch = batch_of(task, some_rows(), None)
    users = task.users(None, batch, vectors_of(task, batch))
    everything = {"item": np.arange(ITEMS), "item_seen": SEEN}
    for user in range(3):
        repeated = some_rows().take([user] * ITEMS)
        for column, values in everything.items():
            repeated = repeated.set_column(repeated.column_names.index(column), column, pa.array(values))
        each = batch_of(task, repeated, None)
        vectors = vectors_of(task, each)
        rows = task.catalog(torch.arange(ITEMS), vectors["item"])
        torch.testing.assert_close(
            task.products(users, rows)[user], task.score(None, each, vectors), rtol=1e-4, atol=1e-5
        )


@settings(max_examples=30)
@given(st.sampled_from(MODELS), st.permutations(range(3)), st.integers(0, 100))
def test_the_order_of_rows_changes_no_score(tmp_path_factory, name, order, seed):
    task = make(tmp_path_factory.getbasetemp(), model=name)
    task.network.eval()
    found = []
    for rows in (some_rows(), some_rows().take(order)):
        batch = batch_of(task, rows, None)
        found.append(task.score(None, batch, vectors_of(task, batch, seed)))
    torch.testing.assert_close(found[0][list(order)], found[1], rtol=1e-4, atol=1e-6)


def test_dense_weights_are_those_that_are_declared(tmp_path):
    for name in MODELS:
        task = make(tmp_path, model=name)
        assert (task.model is task.network) if name in DENSE else (task.model is None)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_scores_alike_when_it_is_built_again(name, tmp_path):
    task = make(tmp_path, model=name)
    for number, table in enumerate(task.tables):
        rows = np.random.default_rng(number).standard_normal((table.rows, 4)).astype(np.float32)
        save_table(tmp_path / "tables", table.name, rows, (3,))
    if name in DENSE:
        task.save(tmp_path, {n: w.detach() + 0.1 for n, w in task.network.named_parameters()})
    assert (tmp_path / WEIGHTS).is_file() == (name in DENSE)
    again, once_more = make(tmp_path, tmp_path, model=name), make(tmp_path, tmp_path, model=name)
    scores = []
    for each in (again, once_more):
        each.network.eval()
        batch = batch_of(each, some_rows(), None)
        scores.append(each.score(None, batch, vectors_of(each, batch)))
    assert torch.equal(*scores)
    for n, weight in again.network.named_parameters():
        assert torch.equal(weight, load_file(tmp_path / WEIGHTS)[n]) and not torch.equal(
            weight, task.network.state_dict()[n]
        )
    fresh = batch_of(task, some_rows(), None)
    assert not torch.allclose(task.score(None, fresh, vectors_of(task, fresh)), scores[0])


def test_a_model_starts_from_rows_of_a_smaller_log(tmp_path):
    rows = {"user": np.full((USERS, 4), 2, np.float32), "item": np.full((ITEMS, 4), 3, np.float32)}
    for name, values in rows.items():
        save_table(tmp_path / "tables", name, values)
    log = small_log(tmp_path / "grown", USERS + 2, ITEMS + 3, np.ones(ITEMS + 3, bool))
    user, item = build_collab(log, Collab(dim=4), tmp_path).tables
    assert (user.rows, user.read_rows, item.rows, item.read_rows) == (7, 5, 10, 7)
    shrunk = small_log(tmp_path / "shrunk", USERS, ITEMS - 1, SEEN[1:])
    with pytest.raises(UserError, match=r"table item in .* has 7 rows, but the log has only 6"):
        build_collab(shrunk, Collab(dim=4), tmp_path)
    with pytest.raises(UserError, match="holds no table history"):
        build_collab(log, Collab(dim=4, model="svdpp"), tmp_path)
    fresh = build_collab(log, Collab(dim=4), None).tables
    for table, anew, known in zip((user, item), fresh, rows.values(), strict=True):
        found = initial_rows(table, 1, 0, table.rows)
        assert (found[: len(known)] == known).all()
        assert (found[len(known) :] == initial_rows(anew, 1, len(known), table.rows)).all()


FIFTH = '''"""Popularity: an item's own number alone."""

from sellarec.collab.model import CollabModel
from sellarec.training.table import Table


class Model(CollabModel):
    """A score is the item's bias."""

    reads = ("dropout",)

    def __init__(self, sizes, settings):
        super().__init__(sizes, settings)
        self.tables = self.tables[1:]

    def user(self, batch, vectors):
        return vectors["item"].new_zeros(len(batch["user"]), vectors["item"].shape[1])
'''

USE = """
import sys, pathlib, torch
folder = pathlib.Path(sys.argv[1])
import sellarec
assert pathlib.Path(sellarec.__file__).is_relative_to(folder), sellarec.__file__
from sellarec.command_line import parse
from sellarec.errors import UserError
from small import batch_of, make, some_rows, vectors_of
from sellarec.training.task import Alone
config = parse(["--collab", "popularity", "--collab.dropout", "0.5"])
assert config.collab.model == "popularity"
try:
    parse(["--collab", "popularity", "--collab.heads", "2"])
except UserError as error:
    assert "collab.heads is 2, but collab.model is popularity" in str(error), error
else:
    raise SystemExit("heads were taken")
task = make(folder, model="popularity")
batch = batch_of(task, some_rows())
vectors = vectors_of(task, batch)
task.loss(None, batch, vectors, Alone()).backward()
batch = batch_of(task, some_rows(), None)
score = task.score(None, batch, vectors)
expected = task.network.constant + vectors["item"][:, -1] * batch["item_seen"]
torch.testing.assert_close(score, expected)
from sellarec.config import Adapt, Align
from sellarec.alignment.align import build_align
align = build_align(task, 8, lambda start, stop: torch.ones(stop - start, 8).numpy(), 4, Align(), torch.arange(2).numpy(), 1)
batch = batch_of(align, some_rows())
assert torch.isfinite(align.loss(align.model, batch, vectors_of(align, batch), Alone()))
"""


TRAIN = """
import engine_cases, numpy as np
from gloo_workers import Gloo
from sellarec.config import Collab
from sellarec.data.log import read_log
from sellarec.training.table import SavedTable
log, gloo, losses = pathlib.Path(sys.argv[2]), Gloo(folder), []
collab = Collab(model="popularity", dim=4, table_learning_rate=0.3)
unseen = ~read_log(log).items(["seen"])["seen"].to_numpy()
excluded = [query["excluded"] for query in engine_cases.queries_of(log)]
try:
    for workers in (1, 2):
        output = folder / f"of-{workers}"
        found = gloo.call(workers, engine_cases.train, engine_cases.Run(collab, log, steps=30, output=output))
        losses.append(np.reshape(found[0]["losses"], (6, 5)))  # epochs of five steps
        assert np.isfinite(losses[-1]).all() and losses[-1][5].mean() < 0.95 * losses[-1][0].mean(), losses
        biases = SavedTable(output / "tables", "item").read(0, len(unseen))[:, -1]
        biases[unseen] = 0
        by_bias = np.lexsort((np.arange(len(biases)), -biases)).tolist()
        for listed, left_out in zip(found[0]["lists"][0].tolist(), excluded, strict=True):
            assert [item for item in listed if item >= 0] == [item for item in by_bias if item not in left_out], listed
finally:
    gloo.end()
np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)
"""


@pytest.mark.distributed
def test_a_file_in_the_folder_of_models_is_a_model(tmp_path):
    """A copy of the package with one file more, and nothing else changed: it is trained on one worker and on two, to the same
    losses, which fall, and ranks the catalog."""
    source = Path(sellarec.__file__).parent
    shutil.copytree(source, tmp_path / "sellarec", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "sellarec" / "collab" / "models" / "popularity.py").write_text(FIFTH)
    (tmp_path / "log").mkdir()
    log = write_log(tmp_path / "log")
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(str(folder) for folder in (tmp_path, tests / "collab", tests / "training"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE + TRAIN, str(tmp_path), str(log)], env=environment, capture_output=True, text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
