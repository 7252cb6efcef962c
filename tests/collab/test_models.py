"""The models' scores against plain restatements, row by row; what unseen users, padding and other rows of a batch mean."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import (
    COUNTS,
    HISTORIES,
    ITEMS,
    RATE,
    batch_of,
    leaves,
    make,
    represent,
    small_log,
    some_rows,
    table_rows,
    vectors_of,
)
from torch import Tensor

from sellarec.collab import unseen
from sellarec.collab.model import CollabModel, Sizes, padded, places
from sellarec.collab.models import binary_mf, din, fism, lightgcn, mf, sasrec, svdpp
from sellarec.collab.task import build_collab
from sellarec.config import COLLAB_MODELS, DENSE_SETTINGS, MODEL_SETTINGS, Collab
from sellarec.training.table import Jagged
from sellarec.training.task import WHOLE, Alone

torch.set_num_threads(1)

SIZES = Sizes(5, ITEMS, RATE)
LOG_ODDS = math.log(RATE / (1 - RATE))
MODELS = ("mf", "svdpp", "lightgcn", "sasrec", "din", "fism", "binary_mf")
WITHOUT_HISTORY = {"mf", "lightgcn", "binary_mf"}
SWITCHES = pytest.mark.parametrize(
    ("biases", "global_mean"), [(True, True), (True, False), (False, True), (False, False)]
)


def built(kind: Any, seed: int = 0, **changes: Any) -> CollabModel:
    torch.manual_seed(seed)
    model = kind.Model(SIZES, Collab(**{"dim": 4, "history": 6, "init_std": 0.5} | changes))
    for name, weight in model.named_parameters():
        if "norm" in name or "bias" in name:  # as drawn they are 1 and 0, which would hide a mistake
            torch.nn.init.uniform_(weight, 0.3, 1.5)
    return model.eval()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def jagged(lengths: list[int], dim: int = 4, seed: int = 1) -> Jagged:
    return Jagged(drawn(sum(lengths), dim, seed=seed), torch.tensor(lengths))


def seen(rows: int) -> dict[str, Tensor]:
    return {"user_seen": torch.ones(rows), "item_seen": torch.ones(rows)}


def product(user: Tensor, item: Tensor, biases: bool, global_mean: bool) -> float:
    columns = 3 if biases else 4
    found = LOG_ODDS if global_mean else 0.0
    for k in range(columns):
        found += float(user[k]) * float(item[k])
    return found + (float(user[3]) + float(item[3]) if biases else 0.0)


def test_all_files_of_the_folder_are_models():
    assert set(COLLAB_MODELS) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_the_tables_have_the_sizes_of_the_log(name, tmp_path):
    settings = Collab(dim=8, init_std=0.5, model=name)
    tables = {table.name: table for table in build_collab(small_log(tmp_path), settings, None).tables}
    features = ("item", "history") if name in ("sasrec", "din") else ("item",)
    width, std = (8, 0.5)
    if name == "fism":  # a user's row has the bias alone; the loss of its own takes the catalog
        features, width, std = ("item", "history", WHOLE + "item"), 4, 0.0
    assert (tables["user"].rows, tables["user"].dim, tables["user"].init_std) == (5, width, std)
    assert (tables["item"].rows, tables["item"].features, tables["item"].init_std) == (7, features, 0.5)
    assert set(tables) == {"user", "item", "history"} if name == "svdpp" else {"user", "item"}
    if name == "svdpp":
        assert (tables["history"].rows, tables["history"].init_std) == (7, 0.0), "learnt from nothing"
    assert all(table.read is None for table in tables.values())


def test_without_rows_of_users_sasrec_has_no_table_of_them():
    assert [table.name for table in built(sasrec, user_rows=False).tables] == ["item"]


@SWITCHES
def test_the_product_of_all_pairs_is_that_of_each(biases, global_mean):
    model = built(mf, biases=biases, global_mean=global_mean)
    users, items = drawn(3, 4), drawn(5, 4, seed=1)
    found = model.products(users, items)
    torch.testing.assert_close(model.product(users[:, None], items[None]), found)
    for u in range(3):
        for i in range(5):
            assert found[u, i].item() == pytest.approx(
                product(users[u], items[i], biases, global_mean), rel=1e-5, abs=1e-6
            )


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_log_of_one_label_has_no_constant(rate):
    assert mf.Model(Sizes(5, 7, rate), Collab(dim=4)).constant == 0.0


@SWITCHES
@pytest.mark.parametrize("name", ["mf", "lightgcn"])
def test_a_score_is_a_product_and_unseen_ones_are_rows_of_zeros(name, biases, global_mean, tmp_path):
    task = make(tmp_path, model=name, biases=biases, global_mean=global_mean)
    batch = batch_of(task, some_rows(), None)
    vectors = vectors_of(task, batch)
    score = task.score(None, batch, vectors)
    for row, mask in enumerate([(1, 1), (1, 0), (0, 1)]):
        user, item = (vectors[side][row].detach() * mask[k] for k, side in enumerate(("user", "item")))
        assert score[row].item() == pytest.approx(product(user, item, biases, global_mean), rel=1e-5, abs=1e-6)
    neither = batch_of(task, some_rows(user_seen=[False] * 3, item_seen=[False] * 3), None)
    np.testing.assert_allclose(task.score(None, neither, vectors).detach(), LOG_ODDS if global_mean else 0, rtol=1e-6)


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_binary_mf_counts_the_signs_that_are_equal(temperature, tmp_path):
    """Less those that are not; with a temperature, their share over it. Gradients are those of tanh, and an unseen user or item
    has no signs."""
    task = make(tmp_path, model="binary_mf", temperature=temperature)
    batch = batch_of(task, some_rows(), None)
    vectors = vectors_of(task, batch)
    user, item = represent(task, batch, vectors)
    assert [row.tolist() for row in (user[2], item[1])] == [[0] * 4] * 2
    for made, rows, at in ((user, vectors["user"], 0), (item, vectors["item"], 0), (item, vectors["item"], 2)):
        assert made[at].tolist() == [1.0 if value > 0 else -1.0 for value in rows[at].tolist()]
    score = task.score(None, batch, vectors)
    equal = sum((user[0] == item[0]).tolist()) - sum((user[0] != item[0]).tolist())
    scale = 1 if temperature is None else 1 / (4 * temperature)
    assert score.tolist() == pytest.approx([LOG_ODDS + equal * scale, LOG_ODDS, LOG_ODDS])
    score[0].backward()
    expected = (1 - vectors["user"][0].detach().tanh() ** 2) * item[0] * scale
    torch.testing.assert_close(vectors["user"].grad[0], expected.detach())
    torch.testing.assert_close(
        vectors["item"].grad[0], ((1 - vectors["item"][0].detach().tanh() ** 2) * user[0] * scale).detach()
    )


@SWITCHES
def test_svdpp_adds_the_rows_of_the_history_over_the_root_of_their_number(biases, global_mean, tmp_path):
    task = make(tmp_path, model="svdpp", biases=biases, global_mean=global_mean)
    batch = batch_of(task, some_rows(), None)
    vectors = vectors_of(task, batch)
    score = task.score(None, batch, vectors)
    row = iter(vectors["history"].values.detach())
    for at, history in enumerate(HISTORIES):
        user = vectors["user"][at].detach() * [1, 1, 0][at]
        for _ in history:
            user = user + next(row) / len(history) ** 0.5
        item = vectors["item"][at].detach() * [1, 0, 1][at]
        assert score[at].item() == pytest.approx(product(user, item, biases, global_mean), rel=1e-5, abs=1e-6)


def plain_sasrec(model: Any, history: Tensor) -> Tensor:
    """States [L, D] at all positions of one history, after Kang and McAuley (2018), with torch's basic operations alone."""

    def norm(x: Tensor, layer: Any) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (
            x.var(1, unbiased=False, keepdim=True) + 1e-8
        ).sqrt() * layer.weight + layer.bias

    def linear(x: Tensor, layer: Any) -> Tensor:
        return x @ layer.weight.T + layer.bias

    states = history * math.sqrt(history.shape[1]) + model.position[: len(history)]
    for block in model.blocks:
        query = norm(states, block.norms[0])
        width = history.shape[1] // block.heads
        q, k, v = linear(query, block.query), linear(states, block.key), linear(states, block.value)
        rows = []
        for at in range(len(history)):
            heads = []
            for part in (slice(h * width, (h + 1) * width) for h in range(block.heads)):
                logits = torch.stack(
                    [(q[at, part] * k[other, part]).sum() / math.sqrt(width) for other in range(at + 1)]
                )
                weights = logits.exp() / logits.exp().sum()
                heads.append(sum(weights[other] * v[other, part] for other in range(at + 1)))
            rows.append(torch.cat(heads))
        states = query + linear(torch.stack(rows), block.out)
        inner = norm(states, block.norms[1])
        states = inner + linear(linear(inner, block.forward_1).clamp(min=0), block.forward_2)
    return norm(states, model.norm)


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 2), (3, 4)])
def test_sasrec_is_a_causal_transformer_over_the_history(layers, heads):
    model = built(sasrec, layers=layers, heads=heads, user_rows=False)
    lengths = [3, 0, 6, 1]
    history, item = jagged(lengths), drawn(4, 4, seed=2)
    users = model.user(seen(4), {"item": item, "history": history})
    score = model(seen(4), {"item": item, "history": history}, item[:, None])[1][0][:, 0]
    for row, rows in enumerate(history.values.split(lengths)):
        expected = plain_sasrec(model, rows)[-1] if len(rows) else torch.zeros(4)
        torch.testing.assert_close(users[row], expected, rtol=1e-4, atol=1e-5)
        assert score[row].item() == pytest.approx(
            product(users[row].detach(), item[row], True, True), rel=1e-4, abs=1e-5
        )


def test_sasrec_in_training_mode_drops_nothing_where_dropout_is_0():
    model = built(sasrec)
    vectors = {"item": drawn(2, 4), "history": jagged([2, 3]), "user": drawn(2, 4, seed=5)}
    found = model.user(seen(2), vectors)
    torch.testing.assert_close(model.train().user(seen(2), vectors), found)
    dropping = built(sasrec, dropout=0.5).train()
    assert not torch.equal(dropping.user(seen(2), vectors), dropping.user(seen(2), vectors))


def test_sasrec_adds_the_users_row_where_it_is_seen():
    model, without = built(sasrec), built(sasrec, user_rows=False)
    batch = seen(3) | {"user_seen": torch.tensor([1.0, 0.0, 1.0])}
    vectors = {"item": drawn(3, 4), "history": jagged([2, 3, 0]), "user": drawn(3, 4, seed=5)}
    found = model.user(batch, vectors) - without.user(batch, vectors)
    torch.testing.assert_close(found, vectors["user"] * torch.tensor([[1.0], [0.0], [1.0]]))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 1000))
@settings(max_examples=25)
def test_at_every_position_of_a_sequence_sasrec_sees_what_came_before_alone(lengths, seed):
    """A position's state is the user's vector of a row that has the history up to there; later items don't change it."""
    model = built(sasrec, user_rows=False, heads=2)
    history = jagged(lengths, seed=seed)
    states = model.user({}, {"item": Jagged(history.values, history.lengths), "history": history})
    assert states.shape == history.values.shape
    parts = [rows[: at + 1] for rows in history.values.split(lengths) for at in range(len(rows))]
    rows = Jagged(torch.cat(parts), torch.tensor([len(part) for part in parts]))
    users = model.user(seen(len(parts)), {"item": drawn(len(parts), 4), "history": rows})
    torch.testing.assert_close(states, users, rtol=1e-4, atol=1e-5)


def test_no_gradient_reaches_a_later_item():
    model = built(sasrec, user_rows=False)
    values = drawn(5, 4).requires_grad_()
    history = Jagged(values, torch.tensor([5]))
    states = model.user({}, {"item": Jagged(values, history.lengths), "history": history})
    for at in range(5):
        (gradient,) = torch.autograd.grad(states[at].square().sum(), values, retain_graph=True)
        reached = gradient.abs().sum(1) > 0
        assert reached[: at + 1].all() and not reached[at + 1 :].any()


def plain_din(model: Any, user: Tensor, history: Tensor, item: Tensor, biases: bool, global_mean: bool) -> float:
    """One candidate of one row, after Zhou et al. (2018)."""

    def layers(x: Tensor, network: Any) -> Tensor:
        linear = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
        slopes = [layer.weight for layer in network if isinstance(layer, torch.nn.PReLU)]
        for k, layer in enumerate(linear):
            x = layer.weight @ x + layer.bias
            if k < len(slopes):
                x = torch.where(x > 0, x, slopes[k] * x)
        return x[0]

    pooled = torch.zeros(4)
    for other in history:
        pooled = pooled + layers(torch.cat([item, other, item - other, item * other]), model.attention) * other
    score = layers(torch.cat([user, pooled, item]), model.network)
    return (score + (LOG_ODDS if global_mean else 0.0) + (user[3] + item[3] if biases else 0.0)).item()


@SWITCHES
def test_din_weighs_the_history_by_the_candidate(biases, global_mean):
    model = built(din, biases=biases, global_mean=global_mean, hidden=(6, 5))
    assert [layer.out_features for layer in model.network if isinstance(layer, torch.nn.Linear)] == [6, 5, 1]
    lengths = [3, 0, 5]
    user, item, history = drawn(3, 4), drawn(3, 4, seed=1), jagged(lengths, seed=2)
    more = drawn(3, 7, 4, seed=3)
    batch = seen(3) | {"user_seen": torch.tensor([1.0, 1.0, 0.0])}
    vectors = {"user": user, "item": item, "history": history}
    users, (one, many) = model(batch, vectors, item[:, None], more)
    for row, rows in enumerate(history.values.split(lengths)):
        own = user[row] * batch["user_seen"][row]
        expected = [plain_din(model, own, rows, each, biases, global_mean) for each in (item[row], *more[row])]
        torch.testing.assert_close(torch.cat([one[row], many[row]]), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    # an empty history pools nothing, so the user is his row
    torch.testing.assert_close(users[1], user[1])
    # a candidate at a time
    for k in range(7):
        torch.testing.assert_close(
            model(batch, vectors, more[:, k : k + 1])[1][0][:, 0], many[:, k], rtol=1e-5, atol=1e-6
        )


def unit(row: np.ndarray) -> np.ndarray:
    length = np.sqrt((row * row).sum())
    return row / length if length > 0 else row


def plain_fism(model: Any, user_bias: float, history: np.ndarray, item: np.ndarray, constant: float) -> float:
    """One row: the cosine of the history's mean direction and the item, what liking adds, and the biases."""
    mean = np.zeros(item.size - 2)
    for row in history:
        mean = mean + unit(row[:-2])
    user = unit(mean) + model.liking.detach().numpy().astype(np.float64)
    return constant + user_bias + item[-1] + float((user * unit(item[:-2])).sum())


@pytest.mark.parametrize("global_mean", [True, False])
def test_fism_scores_where_an_item_lies_beside_the_history(global_mean, tmp_path):
    """HISTORIES has an empty one; user 2 and the second row's item are unseen: no bias, and the item lies nowhere."""
    task = make(tmp_path, model="fism", dim=8, global_mean=global_mean)
    torch.nn.init.normal_(task.network.liking, generator=torch.Generator().manual_seed(1))
    batch = batch_of(task, some_rows(), None)
    vectors = vectors_of(task, batch)
    score = task.score(None, batch, vectors)
    found = {name: leaf.detach().numpy().astype(np.float64) for name, leaf in leaves(vectors).items()}
    constant = LOG_ODDS if global_mean else 0.0
    rows = np.split(found["history"], np.cumsum([len(history) for history in HISTORIES])[:-1])
    for at in range(3):
        bias, item = found["user"][at, -1] * [1, 1, 0][at], found["item"][at] * [1, 0, 1][at]
        assert score[at].item() == pytest.approx(
            plain_fism(task.network, bias, rows[at], item, constant), rel=1e-5, abs=1e-6
        )
    assert score[1].item() == pytest.approx(constant + found["user"][1, -1], rel=1e-5), "an unseen item"


def test_the_labels_of_fism_move_biases_and_liking_but_no_vector(tmp_path):
    task = make(tmp_path, model="fism", dim=8)
    batch = batch_of(task, some_rows(), None)
    vectors = vectors_of(task, batch)
    score = task.score(None, batch, vectors)
    torch.nn.functional.binary_cross_entropy_with_logits(score, batch["label"]).backward()
    found = {name: leaf.grad for name, leaf in leaves(vectors).items()}
    assert found["history"] is None
    assert (found["item"][:, :-1] == 0).all() and found["item"][0, -1] != 0
    assert (found["user"][:, :-1] == 0).all() and (found["user"][:2, -1] != 0).all()
    assert task.network.liking.grad is not None and (task.network.liking.grad != 0).any()


def test_fism_of_an_empty_history_knows_liking_and_biases_alone(tmp_path):
    task = make(tmp_path, model="fism", dim=8)
    with torch.no_grad():
        task.network.liking.copy_(drawn(6, seed=5))
    empty = some_rows(history=pa.array([[], [], []], pa.list_(pa.int64())))
    batch = batch_of(task, empty, None)
    vectors = vectors_of(task, batch)
    user, _ = represent(task, batch, vectors)
    assert torch.equal(user[:, :-2], task.network.liking.expand(3, 6)) and torch.equal(user[:, -2], torch.zeros(3))
    assert torch.equal(user[:, -1], vectors["user"][:, -1] * torch.tensor([1.0, 1.0, 0.0]))


def auxiliary(task: Any, rows: pa.Table) -> Tensor:
    """The model's own loss of some rows, on one process."""
    batch = batch_of(task, rows)
    vectors = vectors_of(task, batch)
    return task.network.auxiliary_loss(batch, vectors, torch.from_numpy(COUNTS[0]).float().log(), Alone())


def test_fism_leaves_out_items_of_the_history_in_training_alone(tmp_path):
    rows = some_rows().take([0] * 400)
    with_all, task = make(tmp_path, model="fism"), make(tmp_path, model="fism", dropout=0.5)
    expected = auxiliary(with_all, rows)
    assert (expected == expected[0]).all()
    task.network.eval()
    torch.testing.assert_close(auxiliary(task, rows), expected)
    task.network.train()
    torch.manual_seed(0)
    found = auxiliary(task, rows)
    # of three items, each is in or out: the eight means (of none: zeros) and no other; each an eighth of the time
    values, counts = np.unique(found.detach().numpy().round(5), return_counts=True)
    assert len(values) == 8 and counts.min() > 20 and counts.max() < 100
    items, each = table_rows(with_all.tables[1]), []
    for kept in range(8):
        of_them = [items[item] for at, item in enumerate(HISTORIES[0]) if kept >> at & 1]
        user = torch.stack(of_them).mean(0)[:-2] if of_them else torch.zeros(2)
        logits = items[:, :-2] @ user + items[:, -2] + torch.from_numpy(COUNTS[0]).log()  # -inf for the unseen item
        each.append(float(logits.logsumexp(0) - logits[6]))
    np.testing.assert_allclose(values, np.sort(each), rtol=1e-4)


TEMPERATURE = 0.2


@pytest.mark.parametrize("name", ["mf", "svdpp", "lightgcn", "sasrec"])
@pytest.mark.parametrize("biases", [True, False])
def test_with_a_temperature_the_score_is_a_cosine_over_it(name, biases, tmp_path):
    task = make(tmp_path, model=name, temperature=TEMPERATURE, biases=biases)
    task.network.eval()
    batch = batch_of(task, some_rows(), None)
    vectors = vectors_of(task, batch)
    users, items = (part.detach().numpy().astype(np.float64) for part in represent(task, batch, vectors))
    score = task.score(None, batch, vectors)
    every = task.network.products(*(torch.from_numpy(part).float() for part in (users, items)))
    for u in range(3):
        for i in range(3):
            user, item = users[u], items[i]
            columns = slice(0, 3 if biases else 4)
            expected = LOG_ODDS + float((unit(user[columns]) * unit(item[columns])).sum()) / TEMPERATURE
            expected += float(user[3] + item[3]) if biases else 0.0
            assert every[u, i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
            if u == i:
                assert score[u].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_lightgcn_is_the_mean_of_powers_of_the_normalised_adjacency(layers, biases):
    model = built(lightgcn, layers=layers, biases=biases)
    likes = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0]]).double()  # item 3 has no neighbour
    adjacency = torch.zeros(7, 7, dtype=torch.double)
    adjacency[:3, 3:], adjacency[3:, :3] = likes, likes.T
    root = adjacency.sum(1).clamp(min=1).rsqrt()
    matrix = root[:, None] * adjacency * root
    rows = drawn(7, 4).double().requires_grad_()
    widths = []

    def multiply(found: Tensor) -> Tensor:
        widths.append(found.shape[1])
        return matrix @ found

    smooth = model.propagate(rows, multiply)
    columns = 3 if biases else 4
    powers = torch.stack([torch.linalg.matrix_power(matrix, k) for k in range(layers + 1)]).mean(0)
    torch.testing.assert_close(smooth[:, :columns], powers @ rows[:, :columns])
    assert torch.equal(smooth[:, columns:], rows[:, columns:]), "a bias is its row's own"
    assert widths == [columns] * layers
    torch.testing.assert_close(smooth[6, :columns], rows[6, :columns] / (layers + 1), msg="a row without neighbours")


CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in MODELS] + [
    ("sasrec", {"user_rows": False}),
    ("sasrec", {"heads": 2}),
    ("din", {"biases": False}),
]


def of_row(batch: dict[str, Any], at: int) -> dict[str, Any]:
    return {name: found[at : at + 1] for name, found in batch.items()}


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_a_rows_score_doesnt_depend_on_the_rows_beside_it(name, changes, tmp_path):
    """Nor do longer histories beside it, so padding counts for nothing."""
    task = make(tmp_path, model=name, **changes)
    task.network.eval()
    table = pa.concat_tables([some_rows(), some_rows(history=pa.array([[1], [5, 6, 3, 2, 1, 0, 6], [3, 2]]))])
    batch = batch_of(task, table, None)
    vectors = vectors_of(task, batch)
    together, users = task.score(None, batch, vectors), represent(task, batch, vectors)
    assert together.shape == (6,) and together.dtype == torch.float32
    for at in range(6):
        alone = of_row(batch, at), of_row(vectors, at)
        torch.testing.assert_close(task.score(None, *alone), together[at : at + 1], rtol=1e-4, atol=1e-6)
        for one, all_ in zip(represent(task, *alone), users, strict=True):
            torch.testing.assert_close(one, all_[at : at + 1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_what_represents_a_row_is_what_is_scored(name, changes, tmp_path):
    task = make(tmp_path, model=name, **changes)
    task.network.eval()
    batch = batch_of(task, some_rows(), None)
    vectors = vectors_of(task, batch)
    user, item = represent(task, batch, vectors)
    assert user.shape == item.shape == (3, 4)
    assert (item[1] == 0).all(), "an unseen item is a row of zeros"
    if task.network.is_product:
        torch.testing.assert_close(task.network.product(user, item), task.score(None, batch, vectors))
    if name in WITHOUT_HISTORY:
        assert (user[2] == 0).all(), "an unseen user too"


@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_reaches_the_row_of_an_unseen_user_or_item(name, tmp_path):
    task = make(tmp_path, model=name)
    batch = batch_of(task, some_rows(), None)
    vectors = vectors_of(task, batch)
    # DIN's own layers see a row of zeros, whatever the row holds
    task.score(None, batch, vectors).square().sum().backward()
    found = leaves(vectors)
    assert (found["user"].grad[2] == 0).all() and (found["item"].grad[1] == 0).all()
    assert (found["user"].grad[0] != 0).any() and (found["item"].grad[0] != 0).any()


HISTORY_COUNTS = "masked (a row of zeros); its history still counts"


@pytest.mark.parametrize(
    ("name", "changes", "user", "history"),
    [
        *((name, {}, "masked (a row of zeros)", None) for name in sorted(WITHOUT_HISTORY)),
        ("svdpp", {}, HISTORY_COUNTS, "nothing is added to the user's row"),
        ("sasrec", {}, HISTORY_COUNTS, "the user's row alone"),
        ("sasrec", {"user_rows": False}, None, "a row of zeros as the user"),
        ("din", {}, HISTORY_COUNTS, "zeros in the place of its weighed sum"),
        ("fism", {}, HISTORY_COUNTS, "zeros in the place of its mean; what is learnt of liking still counts"),
    ],
)
def test_a_model_says_what_unseen_ones_are_to_it_and_keeps_to_that(name, changes, user, history, tmp_path):
    """Only of what it has: user 2 and the second row's item are unseen."""
    task = make(tmp_path, model=name, **changes)
    told = {unseen.USER: user, unseen.ITEM: "masked (a row of zeros)", unseen.HISTORY: history}
    assert task.network.unseen() == {case: words for case, words in told.items() if words is not None}

    def scores(**changes: Any) -> tuple[Tensor, Tensor]:
        batch = batch_of(task, some_rows(**changes), None)
        vectors = vectors_of(task, batch)
        for side in ("user", "item"):  # what masked rows hold has no part
            if side in vectors:
                vectors[side].data[batch[f"{side}_seen"] == 0] = 7.0
        return task.score(None, batch, vectors).detach(), task.network.represent_user(batch, vectors).detach()

    empty = {"history": pa.array([[], [4], []], pa.list_(pa.int64()))}  # item 4 has no train row
    full, none = scores(), scores(**empty)
    assert ((full[1][2] != none[1][2]).any() and full[0][2] != none[0][2]) == (history is not None)
    if name != "din":  # whose network reads rows of zeros too
        zeros = none[1][2] if name != "fism" else none[1][2] - torch.cat([task.network.liking.detach(), torch.zeros(2)])
        assert (zeros == 0).all(), "without a row or a history there is nothing"


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_lists_are_padded_with_zeros_after_their_ends(lengths):
    lists = jagged(lengths, dim=2)
    there, place = places(lists.lengths)
    found = padded(lists.values, there)
    assert place.tolist() == [k for length in lengths for k in range(length)]
    assert found.shape == (len(lengths), max(1, *lengths), 2) and there.shape == found.shape[:2]
    for row, values in enumerate(lists.values.split(lengths)):
        assert torch.equal(found[row, : len(values)], values) and (found[row, len(values) :] == 0).all()
        assert there[row].tolist() == [k < len(values) for k in range(there.shape[1])]
    assert torch.equal(found[there], lists.values)


def test_only_known_settings_are_read():
    """What a model says that it reads is a setting, and the others build without it."""
    for kind in (mf, svdpp, lightgcn, sasrec, din, fism, binary_mf):
        assert set(kind.Model.reads) <= set(MODEL_SETTINGS)
        assert kind.Model(SIZES, Collab(dim=4)).has_weights == (set(DENSE_SETTINGS) <= set(kind.Model.reads))
        assert (kind.Model(SIZES, Collab(dim=4)).history > 0) == ("history" in kind.Model.reads)
