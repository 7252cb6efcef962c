"""Matrix factorisation: its score and its loss by hand, and what unseen and padding rows mean."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from sellarec.collab.mf import MatrixFactorization, build_collab, mf_score
from sellarec.config import Collab

RATE, L2 = 0.7, 0.1


def task() -> MatrixFactorization:
    return MatrixFactorization(build_collab(5, 7, RATE, Collab(dim=4)).tables, RATE, L2)


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
    user, item = build_collab(5, 7, RATE, Collab(dim=8, init_std=0.5)).tables
    assert (user.name, user.rows, user.dim, user.features) == ("user", 5, 8, ("user",))
    assert (item.name, item.rows, item.dim, item.init_std) == ("item", 7, 8, 0.5)
    assert build_collab(5, 7, RATE, Collab()).facts()["log_odds"] == pytest.approx(math.log(0.7 / 0.3))


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
