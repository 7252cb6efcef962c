"""Stage align: the collaborative loss plus the contrastive one, for every model; nothing else changes."""

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import ITEMS, Alone, batch_of, leaves, make, prepared, some_rows, together, vectors_of
from torch import Tensor

from sellarec.alignment.align import PROJECTION, AlignTask, build_align
from sellarec.alignment.contrastive import Views, contrastive_loss
from sellarec.collab.task import WEIGHTS
from sellarec.config import Align

torch.set_num_threads(1)

WIDTH = 8
VECTORS = np.random.default_rng(0).standard_normal((ITEMS, WIDTH)).astype(np.float32)
MODELS = ("mf", "svdpp", "lightgcn", "sasrec", "din", "fism")
LOSSES = [
    (name, loss)
    for name in MODELS
    for loss in ("bce", "bpr", "full-softmax")
    if (name, loss) != ("din", "full-softmax") and (name != "fism" or loss == "bce")
]
SETTINGS = Align(weight=0.4, temperature=0.3, hidden=6)


def aligned(folder, settings: Align = SETTINGS, **collab: Any) -> AlignTask:
    task = make(folder, **collab)
    torch.manual_seed(9)
    return build_align(task, WIDTH, lambda start, stop: VECTORS[start:stop], 4, settings)


def train_rows(number: int = 6) -> Any:
    rows = some_rows(item_seen=[True] * 3, user_seen=[True] * 3)
    return rows.take(np.arange(number) % 3)


@pytest.mark.parametrize(("name", "loss"), LOSSES)
def test_the_loss_is_the_collaborative_one_and_the_contrastive_one_of_the_same_rows(name, loss, tmp_path):
    task = aligned(tmp_path, model=name, loss=loss)
    batch = batch_of(task, train_rows())
    vectors = vectors_of(task, batch)
    without = {feature: found for feature, found in vectors.items() if feature != "semantic"}
    collab = make(tmp_path, model=name, loss=loss)
    collab.network.load_state_dict(task.model.network.state_dict())
    weights = collab.row_weights(batch)
    views = task.model.projection(vectors["item"]), vectors["semantic"]
    each = contrastive_loss(Views(*views, batch["item"], *views, batch["item"], weights), SETTINGS)
    expected = collab.loss(None, batch, without, Alone()) + 0.4 * (each * weights).sum()
    found = task.loss(task.model, batch, vectors, Alone())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert task.targets(batch) == collab.targets(batch) == (6 if loss == "bce" else 4)
    found.backward()
    of_positives = batch["label"] > 0
    gradient = leaves(vectors)["semantic"].grad
    assert ((gradient.abs().sum(1) > 0) >= of_positives).all(), "both views are drawn"
    for weight in task.model.projection.parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", MODELS)
def test_it_scores_as_the_collaborative_model_does(name, tmp_path):
    task, collab = aligned(tmp_path, model=name), make(tmp_path, model=name)
    assert task.columns == collab.columns and task.graph == collab.graph and task.whole == collab.whole
    batch = batch_of(task, some_rows(), None)
    vectors = vectors_of(task, batch)
    torch.testing.assert_close(task.score(task.model, batch, vectors), collab.score(None, batch, vectors))


@pytest.mark.parametrize(("name", "loss"), LOSSES)
def test_it_doesnt_depend_on_how_rows_lie_on_workers(name, loss, tmp_path):
    task = aligned(tmp_path, model=name, loss=loss)
    rows = train_rows(8).set_column(0, "row", [list(range(8))])
    table = prepared(task, rows.select([*task.columns, "weight"]))

    def total(workers: int) -> tuple[float, dict[str, Tensor]]:
        given = []
        for rank in range(workers):
            batch = task.collate(table.slice(rank * 8 // workers, 8 // workers), 0)
            given.append((batch, vectors_of(task, batch, workers=workers, rank=rank)))
        task.model.zero_grad()
        if workers == 1:
            loss = task.loss(task.model, *given[0], Alone())
        else:
            loss = torch.stack(together(workers, lambda peers: task.loss(task.model, *given[peers.rank], peers))).sum()
        loss.backward()
        found = {
            feature: torch.cat([leaves(vectors)[feature].grad for _, vectors in given])
            for feature in given[0][1]
            if leaves(given[0][1])[feature].grad is not None
        }
        return loss.item(), found | {n: w.grad.clone() for n, w in task.model.named_parameters()}

    alone, expected = total(1)
    for workers in (2, 4):
        loss, found = total(workers)
        assert loss == pytest.approx(alone, rel=1e-5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_semantic_table_starts_from_the_distilled_vectors(tmp_path):
    task = aligned(tmp_path)
    semantic = task.tables[-1]
    assert (semantic.name, semantic.rows, semantic.dim) == ("semantic", ITEMS, WIDTH)
    assert semantic.read is not None and (semantic.read(2, 4) == VECTORS[2:4]).all()
    batch = batch_of(task, train_rows())
    assert set(task.lookups(batch)) == {"user", "item", "semantic"}
    assert task.lookups(batch)["semantic"].tolist() == batch["item"].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_projection_and_model_are_saved_apart(name, tmp_path):
    """So that a model without the projection is built from what align left."""
    task = aligned(tmp_path, model=name)
    weights = {n: w.detach() + 0.1 for n, w in task.model.named_parameters()}
    (tmp_path / "out").mkdir()
    task.save(tmp_path / "out", weights)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {PROJECTION, *[WEIGHTS] * (name in ("sasrec", "din", "fism"))}
    task.model.projection.load_state_dict(load_file(tmp_path / "out" / PROJECTION))
    if WEIGHTS in files:
        task.model.network.load_state_dict(load_file(tmp_path / "out" / WEIGHTS))
    for n, weight in task.model.named_parameters():
        assert torch.equal(weight, weights[n])
    assert task.facts() == make(tmp_path, model=name).facts()
