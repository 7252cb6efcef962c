"""Stage align: the collaborative loss plus the contrastive one, for every model; nothing else changes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from small import ITEMS, USERS, batch_of, leaves, make, prepared, represent, some_rows, together, vectors_of
from torch import Tensor

from sellarec.alignment.align import PROJECTION, AlignTask, build_align
from sellarec.alignment.contrastive import Views, contrastive_loss
from sellarec.alignment.disentangled import disentangled_loss
from sellarec.alignment.measures import compare_views
from sellarec.alignment.rows import LIKED
from sellarec.collab.task import WEIGHTS
from sellarec.config import Align
from sellarec.data.keys import uniform
from sellarec.training.table import Jagged
from sellarec.training.task import Alone

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
SEED = 7


def aligned(folder, settings: Align = SETTINGS, **collab: Any) -> AlignTask:
    task = make(folder, **collab)
    torch.manual_seed(9)
    return build_align(task, WIDTH, lambda start, stop: VECTORS[start:stop], 4, settings, np.arange(3), SEED)


def train_rows(number: int = 6) -> Any:
    rows = some_rows(item_seen=[True] * 3, user_seen=[True] * 3)
    return rows.take(np.arange(number) % 3)


@pytest.mark.parametrize(("contrastive", "projections"), [("info-nce", 1), ("rlmrec-con", 1), ("darec", 4)])
def test_projections_have_as_many_hidden_layers_as_are_set(tmp_path, contrastive, projections):
    for layers in (1, 3):
        task = aligned(tmp_path, replace(SETTINGS, contrastive=contrastive, layers=layers))
        weights = [weight for weight in task.model.projection.parameters() if weight.dim() == 2]
        assert len(weights) == projections * (layers + 1)
        assert sum(weight.shape == (6, 6) for weight in weights) == projections * (layers - 1)


@pytest.mark.parametrize(("name", "loss"), LOSSES)
def test_the_loss_is_the_collaborative_one_and_the_contrastive_one_of_the_same_rows(name, loss, tmp_path):
    task = aligned(tmp_path, model=name, loss=loss)
    batch = batch_of(task, train_rows())
    vectors = vectors_of(task, batch)
    without = {feature: found for feature, found in vectors.items() if feature != "semantic"}
    collab = make(tmp_path, model=name, loss=loss)
    collab.network.load_state_dict(task.model.network.state_dict())
    weights = collab.row_weights(batch)
    views = task.model.projection(represent(collab, batch, without)[1]), vectors["semantic"]
    each = contrastive_loss(Views(*views, batch["item"], *views, batch["item"], weights), SETTINGS, Alone())
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


@pytest.mark.parametrize("name", [*MODELS, "binary_mf"])
def test_what_is_projected_is_what_fuse_projects(name, tmp_path):
    """Of users and items, in training and to be measured: fuse starts from this projection. All that it is made of is drawn."""
    task = aligned(tmp_path, replace(SETTINGS, side="both"), model=name)
    batch = batch_of(task, train_rows())
    vectors = vectors_of(task, batch)
    projected: list[Tensor] = []
    task.model.projection.register_forward_pre_hook(lambda module, given: projected.append(given[0]))
    task.loss(task.model, batch, vectors, Alone()).backward()
    users, items = represent(make(tmp_path, model=name), batch, vectors)
    torch.testing.assert_close(projected, [items, users])
    assert (leaves(vectors)["item"].grad.abs().sum(0)[:-2] > 0).all()

    measured = vectors_of(task, dict.fromkeys(task.measured_features, batch["item"]))
    expected = compare_views(task.model.projection(items), measured["semantic"])
    weights = {name: weight.detach().clone() for name, weight in task.model.named_parameters()}
    assert task.measure(weights, measured, None) == expected


SIDES = [("mf", "bce"), ("mf", "bpr"), ("svdpp", "softmax"), ("lightgcn", "bce"), ("sasrec", "bpr"), ("din", "bce")]


@pytest.mark.parametrize(("name", "loss"), SIDES)
def test_users_are_drawn_to_the_mean_of_what_they_liked(name, loss, tmp_path):
    """By hand: the last two of a row's own history; rows without one have no term, and are nobody's negatives."""
    settings = replace(SETTINGS, side="users", history=2)
    task = aligned(tmp_path, settings, model=name, loss=loss)
    rows = train_rows().set_column(1, "user", [[0, 4, 2, 0, 1, 3]])
    batch = batch_of(task, rows)
    vectors = vectors_of(task, batch)
    assert "semantic" not in vectors
    collab = make(tmp_path, model=name, loss=loss)
    collab.network.load_state_dict(task.model.network.state_dict())
    found = task.loss(task.model, batch, vectors, Alone())
    without = {feature: value for feature, value in vectors.items() if feature != LIKED}
    total = collab.loss(None, batch, without, Alone())
    users, _ = collab.network(batch, without, collab.network.item(batch, without)[:, None])
    liked = {0: [1, 2], 2: [3], 3: [1, 2], 5: [3]}
    of_users = {0: 0, 2: 2, 3: 0, 5: 3}
    counted = [row for row in liked if collab.row_weights(batch)[row] > 0]
    left = torch.nn.functional.normalize(task.model.projection(users), dim=1)
    means = torch.from_numpy(np.stack([VECTORS[liked.get(row, [0])].mean(0) for row in range(6)]))
    right = torch.nn.functional.normalize(means, dim=1)
    for row in counted:
        others = [other for other in counted if of_users[other] != of_users[row]]
        for scores in (left @ right.T / 0.3, right @ left.T / 0.3):
            total = total + 0.4 / 2 * (scores[row, [row, *others]].logsumexp(0) - scores[row, row])
    assert len(counted) == 4 and found.item() == pytest.approx(total.item(), rel=1e-5)
    found.backward()
    assert (leaves(vectors)[LIKED].grad.abs().sum(1) > 0).all()
    assert leaves(vectors)["user"].grad.abs().sum() > 0


@pytest.mark.parametrize(("name", "loss"), [("mf", "bce"), ("lightgcn", "bpr"), ("sasrec", "bpr")])
def test_users_are_drawn_to_their_profiles(name, loss, tmp_path):
    """By hand, whatever the rows' histories; a user without a profile has no term, and is nobody's negative."""
    profiles = np.random.default_rng(1).standard_normal((USERS, WIDTH)).astype(np.float32)
    profiles[2] = 0
    torch.manual_seed(9)
    settings = replace(SETTINGS, side="users", user_vectors="profile")
    read = {"vectors": lambda start, stop: VECTORS[start:stop], "profiles": lambda start, stop: profiles[start:stop]}
    task = build_align(
        make(tmp_path, model=name, loss=loss), WIDTH, **read, dim=4, settings=settings, measured=np.arange(3), seed=1
    )
    assert {table.name: table.rows for table in task.tables if table.read} == {"semantic": ITEMS, "profile": USERS}
    batch = batch_of(task, train_rows().set_column(1, "user", [[0, 4, 2, 0, 1, 3]]))
    vectors = vectors_of(task, batch)
    assert LIKED not in batch and "semantic" not in vectors
    collab = make(tmp_path, model=name, loss=loss)
    collab.network.load_state_dict(task.model.network.state_dict())
    without = {feature: value for feature, value in vectors.items() if feature != "profile"}
    total = collab.loss(None, batch, without, Alone())
    users, _ = collab.network(batch, without, collab.network.item(batch, without)[:, None])
    left = torch.nn.functional.normalize(task.model.projection(users), dim=1)
    right = torch.nn.functional.normalize(torch.from_numpy(profiles)[batch["user"]], dim=1)
    counted = [row for row in (0, 1, 3, 4, 5) if collab.row_weights(batch)[row] > 0]
    for row in counted:
        others = [other for other in counted if batch["user"][other] != batch["user"][row]]
        for scores in (left @ right.T / 0.3, right @ left.T / 0.3):
            total = total + 0.4 / 2 * (scores[row, [row, *others]].logsumexp(0) - scores[row, row])
    found = task.loss(task.model, batch, vectors, Alone())
    assert len(counted) >= 3 and found.item() == pytest.approx(total.item(), rel=1e-5)
    found.backward()
    moved = leaves(vectors)["profile"].grad.abs().sum(1) > 0
    assert moved.nonzero()[:, 0].tolist() == counted


@pytest.mark.parametrize("mask_equal", [True, False])
def test_rlmrecs_contrast_projects_the_distilled_vectors(mask_equal, tmp_path):
    """By hand: a row finds its own one among those of the batch; users find the mean of what they liked."""
    task = aligned(tmp_path, replace(SETTINGS, contrastive="rlmrec-con", side="both", mask_equal=mask_equal))
    assert (task.model.projection.layers[0].in_features, task.model.projection.layers[2].out_features) == (WIDTH, 4)
    rows = train_rows().set_column(1, "user", [[0, 4, 2, 0, 1, 3]])
    batch = batch_of(task, rows)
    vectors = vectors_of(task, batch)
    found = task.loss(task.model, batch, vectors, Alone())
    collab = make(tmp_path)
    without = {name: value for name, value in vectors.items() if name not in ("semantic", LIKED)}
    total = collab.loss(None, batch, without, Alone())
    liked = {0: [6, 1, 2], 2: [3], 3: [6, 1, 2], 5: [3]}
    of_items = {row: vectors["semantic"][row] for row in range(6)}
    of_users = {row: torch.from_numpy(VECTORS[items].mean(0)) for row, items in liked.items()}
    for name, semantic in (("item", of_items), ("user", of_users)):
        ids = batch[name].tolist()
        projected = {row: task.model.projection(vector[None])[0] for row, vector in semantic.items()}
        for row in semantic:
            cosines = {
                other: torch.cosine_similarity(vectors[name][row], projected[other], dim=0) / 0.3
                for other in semantic
                if other == row or not mask_equal or ids[other] != ids[row]
            }
            total = total + 0.4 * (torch.stack(list(cosines.values())).logsumexp(0) - cosines[row])
    assert found.item() == pytest.approx(total.item(), rel=1e-5)
    found.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in task.model.projection.parameters())
    assert (leaves(vectors)["semantic"].grad.abs().sum(1) > 0).all(), "both views are drawn"


GENERATIVE = replace(SETTINGS, contrastive="rlmrec-gen", mask_share=0.5)


@pytest.mark.parametrize("side", ["items", "users"])
def test_rlmrecs_reconstruction_is_of_masked_rows_alone(side, tmp_path):
    """By hand: they find their distilled vectors among those of the other masked ones; the mean over them, once a target."""
    task = aligned(tmp_path, replace(GENERATIVE, side=side), model="lightgcn")
    rows = train_rows().set_column(1, "user", [[0, 4, 2, 0, 1, 3]]).set_column(2, "item", [[6, 1, 3, 0, 2, 5]])
    kept = set()
    for step in range(6):
        batch = batch_of(task, rows, step)
        vectors = vectors_of(task, batch)
        without = {name: value for name, value in vectors.items() if name not in ("semantic", LIKED)}
        expected = task._collab.loss(None, batch, without, Alone())
        ids = batch["item"] if side == "items" else batch["user"]
        nodes = (ids + USERS if side == "items" else ids).numpy()
        semantic = {row: VECTORS[batch["item"][row]] for row in range(6)}
        if side == "users":
            semantic = {
                row: VECTORS[items].mean(0) for row, items in {0: [6, 1, 2], 2: [3], 3: [6, 1, 2], 5: [3]}.items()
            }
        masked = [row for row in semantic if uniform(nodes, SEED, step)[row] < 0.5]
        kept |= set(semantic) - set(masked)
        losses = []
        for row in masked:
            found = task.model.projection(vectors["item" if side == "items" else "user"][row][None])
            others = [row, *(other for other in masked if ids[other] != ids[row])]
            cosines = torch.cosine_similarity(found, torch.from_numpy(np.stack([semantic[o] for o in others]))) / 0.3
            losses.append(cosines.logsumexp(0) - cosines[0])
        if losses:
            expected = expected + 0.4 * 6 * torch.stack(losses).mean()
        assert task.loss(task.model, batch, vectors, Alone()).item() == pytest.approx(expected.item(), rel=1e-5)
    assert kept, "none was ever left as it is"


def test_a_masked_node_is_a_row_of_zeros_the_same_on_any_worker(tmp_path):
    task = aligned(tmp_path, GENERATIVE, model="lightgcn")
    rows, nodes = torch.randn(USERS + ITEMS, 4), torch.arange(USERS + ITEMS)
    masked = [task.mask(rows, nodes, step) == 0 for step in range(50)]
    assert all((mask.all(1) == mask.any(1)).all() for mask in masked)
    assert 0.4 < torch.stack(masked).float().mean() < 0.6 and not torch.equal(masked[0], masked[1])
    for part in (slice(0, 4), slice(4, None)):
        assert torch.equal(task.mask(rows[part], nodes[part], 3) == 0, masked[3][part])
    assert aligned(tmp_path, model="lightgcn").mask(rows, nodes, 3) is rows


DISENTANGLED = Align(contrastive="darec", weight=0.4, hidden=6, centers=2)


@pytest.mark.parametrize(("name", "loss"), [("mf", "bce"), ("sasrec", "bpr")])
def test_darecs_term_is_once_that_of_the_rows_that_have_it(name, loss, tmp_path):
    """Of items and of users, whose semantic vectors are the mean of what they liked; k-means starts by item, user and step."""
    task = aligned(tmp_path, replace(DISENTANGLED, side="both"), model=name, loss=loss)
    rows = train_rows().set_column(1, "user", [[0, 4, 2, 0, 1, 3]]).set_column(2, "item", [[6, 1, 3, 0, 2, 5]])
    liked = {0: [6, 1, 2], 2: [3], 3: [6, 1, 2], 5: [3]}
    for step in (0, 1):
        batch = batch_of(task, rows, step)
        vectors = vectors_of(task, batch)
        without = {feature: found for feature, found in vectors.items() if feature not in ("semantic", LIKED)}
        total = task._collab.loss(task.model.network, batch, without, Alone())
        weights = {"items": task._collab.row_weights(batch)}
        weights["users"] = weights["items"] * torch.tensor([float(row in liked) for row in range(6)])
        users, _ = task.model.network(batch, without, task.model.network.item(batch, without)[:, None])
        sides = {
            "items": (vectors["item"], vectors["semantic"], batch["item"]),
            "users": (users, np.stack([VECTORS[liked.get(row, [0])].mean(0) for row in range(6)]), batch["user"]),
        }
        for side, (left, right, ids) in sides.items():
            found = task.model.projection(left, torch.as_tensor(right))
            drawn = torch.from_numpy(uniform(ids.numpy(), SEED, step))
            value = disentangled_loss(found, ids, weights[side], drawn, Alone(), DISENTANGLED)
            total = total + 0.4 * task.targets(batch) * value
        found = task.loss(task.model, batch, vectors, Alone())
        assert found.item() == pytest.approx(total.item(), rel=1e-5)
    found.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in task.model.projection.parameters())
    assert (leaves(vectors)["semantic"].grad.abs().sum(1) > 0).all() or loss == "bpr", "both views are drawn"


def test_with_both_sides_the_losses_add_up(tmp_path):
    found = {}
    for side in ("items", "users", "both"):
        task = aligned(tmp_path, replace(SETTINGS, side=side))
        batch = batch_of(task, train_rows())
        found[side] = task.loss(task.model, batch, vectors_of(task, batch), Alone()).item()
    task = make(tmp_path)
    batch = batch_of(task, train_rows())
    collab = task.loss(None, batch, vectors_of(task, batch), Alone()).item()
    assert found["both"] - collab == pytest.approx(found["items"] + found["users"] - 2 * collab, rel=1e-5)


def test_without_any_history_there_is_no_loss_of_users(tmp_path):
    task = aligned(tmp_path, replace(SETTINGS, side="users"))
    rows = train_rows()
    histories = pa.array([[]] * len(rows), pa.list_(pa.int64()))
    batch = batch_of(task, rows.set_column(rows.column_names.index("history"), "history", histories))
    vectors = vectors_of(task, batch)
    found = task.loss(task.model, batch, vectors, Alone())
    without = {name: value for name, value in vectors.items() if name != LIKED}
    assert found.item() == task._collab.loss(task.model.network, batch, without, Alone()).item()
    found.backward()
    assert all(torch.isfinite(weight.grad).all() for weight in task.model.projection.parameters())


@pytest.mark.parametrize("side", ["users", "both"])
@pytest.mark.parametrize(("name", "loss"), [("mf", "bce"), ("mf", "bpr"), ("sasrec", "softmax")])
def test_what_collab_reads_of_rows_is_the_same_on_either_side(name, loss, side, tmp_path):
    """Histories as it cuts them, negatives that leave out what is in them; scoring needs no liked items."""
    task = aligned(tmp_path, replace(SETTINGS, side=side, history=1), model=name, loss=loss, history=2)
    collab = make(tmp_path, model=name, loss=loss, history=2)
    for step in (0, None):
        ours, theirs = (batch_of(given, train_rows(), step) for given in (task, collab))
        if step is not None:
            assert ours.pop(LIKED).values.tolist() == [2, 3, 2, 3]
            assert (ours.pop("semantic", None) is not None) == (side == "both")
        assert ours.keys() == theirs.keys()
        for column, expected in theirs.items():
            found = ours[column]
            if isinstance(expected, Jagged):
                assert torch.equal(found.lengths, expected.lengths)
                found, expected = found.values, expected.values
            assert torch.equal(found, expected), column
        assert task.lookups(ours).keys() == collab.lookups(theirs).keys()


def test_a_frozen_semantic_table_is_declared_so(tmp_path):
    for semantic in ("trained", "frozen"):
        task = aligned(tmp_path, replace(SETTINGS, semantic=semantic))
        assert [table.frozen for table in task.tables] == [False, False, semantic == "frozen"]


@pytest.mark.parametrize("contrastive", ["info-nce", "rlmrec-con", "darec"])
@pytest.mark.parametrize("side", ["items", "users"])
def test_items_are_measured_in_the_space_of_the_projection(side, contrastive, tmp_path):
    """Whichever side is aligned: the projected rows and the semantic ones of the items that are looked up; with whole weights,
    as the loop has them."""
    task = aligned(tmp_path, replace(SETTINGS, side=side, contrastive=contrastive))
    vectors = vectors_of(task, dict.fromkeys(task.measured_features, torch.tensor(task.measured)))
    assert set(vectors) == {"item", "semantic"}
    weights = {name: weight.detach().clone() for name, weight in task.model.named_parameters()}
    with torch.no_grad():
        if contrastive == "darec":
            parts = task.model.projection
            views = parts.collab_shared(vectors["item"]), parts.semantic_shared(vectors["semantic"])
        elif contrastive == "rlmrec-con":
            views = vectors["item"], task.model.projection(vectors["semantic"])
        else:
            views = task.model.projection(vectors["item"]), vectors["semantic"]
        assert task.measure(weights, vectors, None) == compare_views(*views)


@pytest.mark.parametrize("user_vectors", ["liked", "profile"])
@pytest.mark.parametrize("name", [*MODELS, "binary_mf"])
def test_users_are_measured_as_fuse_projects_them_and_as_they_are_aligned(name, user_vectors, tmp_path):
    """By a row of each: what stands for the user in it, beside the mean of its last two liked items, or the profile."""
    settings = replace(SETTINGS, side="users", history=2, user_vectors=user_vectors)
    profiles = np.random.default_rng(1).standard_normal((USERS, WIDTH)).astype(np.float32)
    read = {"vectors": lambda start, stop: VECTORS[start:stop]}
    if user_vectors == "profile":
        read["profiles"] = lambda start, stop: profiles[start:stop]
    pq.write_table(train_rows(3).drop_columns(["weight"]).take([0, 2]), tmp_path / "rows.parquet")
    arguments = {"dim": 4, "settings": settings, "measured": np.arange(3), "seed": 1}
    task = build_align(make(tmp_path, model=name), WIDTH, **read, **arguments, measured_rows=tmp_path / "rows.parquet")
    batch = task.collate_measured(task.measured_rows)
    vectors = vectors_of(task, batch)
    with torch.no_grad():
        views = task.views_of_users(task.model.eval(), batch, vectors)
        network = make(tmp_path, model=name).network.eval()
        network.load_state_dict(task.model.network.state_dict())
        torch.testing.assert_close(views[0], task.model.projection(network.represent_user(batch, vectors)))
        expected = profiles[[0, 2]] if user_vectors == "profile" else [VECTORS[[1, 2]].mean(0), VECTORS[3]]
        torch.testing.assert_close(views[1], torch.from_numpy(np.stack(expected)))
        of_items = vectors_of(task, dict.fromkeys(task.measured_features, torch.arange(3)))
        weights = {name: weight.detach().clone() for name, weight in task.model.named_parameters()}
        found = task.measure(weights, of_items, views)
        assert found == task.measure(weights, of_items, None) | {"users": compare_views(*views)}


@pytest.mark.parametrize("name", MODELS)
def test_it_scores_as_the_collaborative_model_does(name, tmp_path):
    task, collab = aligned(tmp_path, model=name), make(tmp_path, model=name)
    assert task.columns == collab.columns and task.graph == collab.graph and task.whole == collab.whole
    batch = batch_of(task, some_rows(), None)
    vectors = vectors_of(task, batch)
    assert "semantic" not in vectors
    torch.testing.assert_close(task.score(task.model, batch, vectors), collab.score(None, batch, vectors))


@pytest.mark.parametrize(
    ("name", "loss", "options"),
    [(name, loss, {}) for name, loss in LOSSES]
    + [(name, loss, {"side": "both", "contrastive": "rince", "mask_equal": False}) for name, loss in SIDES]
    + [(name, loss, {"side": "both", "contrastive": "rlmrec-con"}) for name, loss in SIDES[:4]]
    + [("lightgcn", loss, {"side": "both", "contrastive": "rlmrec-gen", "mask_share": 0.6}) for loss in ("bce", "bpr")]
    + [(name, loss, {"side": "both", "contrastive": "darec", "centers": 2, "block": 3}) for name, loss in SIDES],
)
def test_it_doesnt_depend_on_how_rows_lie_on_workers(name, loss, options, tmp_path):
    task = aligned(tmp_path, replace(SETTINGS, **options), model=name, loss=loss)
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
