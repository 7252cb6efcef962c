"""Matrix factorisation: its score and its loss by hand, and what unseen and padding rows mean."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from sellarec.collab.mf import MatrixFactorization, build_collab, mf_score
from sellarec.config import Collab
from sellarec.training.tables import Jagged

RATE, L2 = 0.7, 0.1


def task() -> MatrixFactorization:
    return build_collab(5, 7, RATE, Collab(dim=4, l2=L2), {})


def rows(**changes) -> pa.Table:
    columns = {
        "row": [10, 11, 12],
        "user": [0, 4, 2],
        "item": [6, 1, 1],
        "label": pa.array([1, 0, 1], pa.int8()),
        "user_seen": [True, True, False],
        "item_seen": [True, False, True],
        "weight": pa.array([1, 1, 1], pa.float32()),
    }
    return pa.table(columns | changes)


def vectors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(3, 4, generator=generator, requires_grad=True) for name in ("user", "item")}


def no_gather(x: torch.Tensor) -> torch.Tensor:
    return x


def test_the_score_is_log_odds_plus_product_plus_biases():
    user, item = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[3.0, -1.0, 0.25]])
    assert mf_score(user, item, 2.0).tolist() == [2.0 + (3.0 - 2.0) + 0.5 + 0.25]


def test_the_tables_have_the_sizes_of_the_log():
    user, item = build_collab(5, 7, RATE, Collab(dim=8, init_std=0.5), {}).tables
    assert (user.name, user.rows, user.dim, user.features) == ("user", 5, 8, ("user",))
    assert (item.name, item.rows, item.dim, item.init_std) == ("item", 7, 8, 0.5)
    assert build_collab(5, 7, RATE, Collab(), {}).facts()["log_odds"] == pytest.approx(math.log(0.7 / 0.3))


def test_an_unseen_user_or_item_is_a_row_of_zeros():
    model, found = task(), vectors()
    batch = model.collate(rows(), None)
    score = model.score(None, batch, found)
    log_odds = math.log(RATE / (1 - RATE))
    user, item = (found[name].detach().numpy() for name in ("user", "item"))
    both = log_odds + user[0, :3] @ item[0, :3] + user[0, 3] + item[0, 3]
    np.testing.assert_allclose(score.detach().numpy(), [both, log_odds + user[1, 3], log_odds + item[2, 3]], rtol=1e-5)
    neither = model.collate(rows(user_seen=[False] * 3, item_seen=[False] * 3), None)
    np.testing.assert_allclose(model.score(None, neither, found).detach().numpy(), [log_odds] * 3, rtol=1e-6)


def test_the_loss_is_the_sum_of_logistic_losses_and_norms():
    model, found = task(), vectors()
    batch = model.collate(rows(), 0)
    user, item, label = found["user"].detach().numpy(), found["item"].detach().numpy(), np.array([1, 0, 1])
    score = model.score(None, batch, found).detach().numpy().astype(np.float64)
    logistic = np.log1p(np.exp(np.where(label == 1, -score, score)))
    norms = (user**2).sum(1) + (item**2).sum(1)
    assert model.loss(None, batch, found, no_gather).item() == pytest.approx(
        (logistic + L2 / 2 * norms).sum(), rel=1e-5
    )


def test_rows_of_weight_zero_have_no_effect():
    model, found = task(), vectors()
    padded = model.collate(rows(weight=pa.array([1, 0, 1], pa.float32())), 0)
    loss = model.loss(None, padded, found, no_gather)
    loss.backward()
    assert model.targets(padded) == 2
    assert all((found[name].grad[1] == 0).all() and (found[name].grad[0] != 0).any() for name in found)
    kept = model.collate(rows().take([0, 2]), 0)
    alone = {name: vector.detach()[[0, 2]] for name, vector in found.items()}
    assert model.loss(None, kept, alone, no_gather).item() == pytest.approx(loss.item(), rel=1e-6)


def test_ids_are_looked_up_as_they_are():
    model = task()
    ids = model.lookups(model.collate(rows(), 0))
    assert {name: value.tolist() for name, value in ids.items()} == {"user": [0, 4, 2], "item": [6, 1, 1]}
    assert set(ids) == {feature for table in model.tables for feature in table.features}


HISTORIES = [[6, 1, 2], [], [3]]
COUNTS = np.array([[3, 2, 1, 1, 0, 1, 2], [2, 1, 1, 1, 0, 1, 1]])


@pytest.fixture
def counts(tmp_path):
    np.save(tmp_path / "counts.npy", COUNTS)
    return tmp_path / "counts.npy"


def some_vectors(model: MatrixFactorization, batch: dict, seed: int = 3) -> dict:
    """Vectors of a batch's ids, equal ids alike."""
    generator = torch.Generator().manual_seed(seed)
    tables = {table.name: torch.randn(table.rows, 4, generator=generator) for table in model.tables}
    of = {feature: tables[table.name] for table in model.tables for feature in table.features}
    found = {}
    for name, ids in model.lookups(batch).items():
        jagged = isinstance(ids, Jagged)
        leaf = of[name][ids.values if jagged else ids].clone().requires_grad_()
        found[name] = Jagged(leaf, ids.lengths) if jagged else leaf
    return found


def test_a_history_adds_to_the_users_row():
    model = build_collab(5, 7, RATE, Collab(dim=4, model="svd++"), {})
    assert [table.name for table in model.tables] == ["user", "item", "history"] and "history" in model.columns
    batch = model.collate(rows(history=pa.array(HISTORIES)), None)
    found = some_vectors(model, batch)
    score = model.score(None, batch, found)
    row = iter(found["history"].values.detach().numpy())
    for at, history in enumerate(HISTORIES):
        added = sum((next(row) for _ in history), np.zeros(4)) / max(1, len(history)) ** 0.5
        user = found["user"][at].detach().numpy() * [1, 1, 0][at] + added
        item = found["item"][at].detach().numpy() * [1, 0, 1][at]
        expected = model.facts()["log_odds"] + user[:3] @ item[:3] + user[3] + item[3]
        assert score[at].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["bpr", "softmax"])
@pytest.mark.parametrize("kind", ["uniform", "popularity", "in-batch"])
@pytest.mark.parametrize("name", ["mf", "svd++"])
def test_a_ranking_loss_takes_positives_and_doesnt_depend_on_how_rows_lie_on_workers(loss, kind, name, counts):
    settings = Collab(dim=4, model=name, loss=loss, negatives=kind, negatives_per_row=3, l2=L2)
    model = build_collab(5, 7, RATE, settings, {}, counts, seed=2)
    table = rows(history=pa.array(HISTORIES)).select([*model.columns, "weight"])
    table = pa.concat_tables([table, table, table.slice(0, 2)])
    table = table.set_column(0, "row", pa.array(range(len(table))))
    weight = np.ones(len(table), np.float32)
    weight[5] = 0
    table = table.set_column(table.column_names.index("weight"), "weight", pa.array(weight))
    prepared = model.prepare(table, 0, np.zeros(len(table), np.int64))

    def gradients(parts: list[slice]) -> tuple[float, dict[str, torch.Tensor]]:
        """The loss summed over workers, each of which sees all rows of the others by `gather`."""
        batches = [model.collate(prepared.slice(p.start, p.stop - p.start), 0) for p in parts]
        whole = model.collate(prepared, 0)
        found = some_vectors(model, whole)
        given = [{name: value[part] for name, value in found.items()} for part in parts]
        represented = [model.represent(batch, vectors)[1] for batch, vectors in zip(batches, given, strict=True)]
        total = torch.zeros(())
        for batch, vectors in zip(batches, given, strict=True):

            def gather(x: torch.Tensor, own=batch) -> torch.Tensor:
                if x.dim() == 2:
                    return torch.cat(represented)
                if x is own["item"] or x is own["user"]:
                    return whole["item" if x is own["item"] else "user"]
                return whole["log_q"] if x is own["log_q"] else model.row_weights(whole)

            total = total + model.loss(None, batch, vectors, gather)
        total.backward()
        assert sum(model.targets(batch) for batch in batches) == 4
        return total.item(), {
            name: (value.values if isinstance(value, Jagged) else value).grad for name, value in found.items()
        }

    alone, expected = gradients([slice(0, 8)])
    assert alone > 0.1
    counted = (table["label"].to_numpy() == 1) & (weight > 0)
    assert ((expected["user"].abs().sum(1) > 0).numpy() <= counted).all() and expected["user"][0].abs().sum() > 0
    for parts in ([slice(0, 4), slice(4, 8)], [slice(0, 3), slice(3, 6), slice(6, 8)]):
        total, found = gradients(parts)
        assert total == pytest.approx(alone, rel=1e-5)
        for feature, gradient in expected.items():
            torch.testing.assert_close(found[feature], gradient, rtol=1e-4, atol=1e-6)


def test_a_ranking_model_scores_rows_without_negatives(counts):
    settings = Collab(dim=4, loss="bpr", negatives_per_row=3)
    model = build_collab(5, 7, RATE, settings, {}, counts, seed=2)
    table = model.prepare(rows(history=pa.array(HISTORIES)), 0, np.zeros(3, np.int64))
    batch = model.collate(table, None)
    assert batch["negative"].shape == (3, 0)
    plain = task()
    torch.testing.assert_close(
        model.score(None, batch, vectors()), plain.score(None, plain.collate(rows(), None), vectors())
    )
