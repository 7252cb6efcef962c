"""The sharded graph against the whole one as a dense float64 matrix, on one to three workers.

Graphs and ids are drawn by hypothesis; among them are graphs without edges and with fewer users or items than workers.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo_workers import Gloo
from graph_cases import CPU, WORKERS, Case, compute, compute_as_worker, convolve, loss_of
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sellarec.errors import UserError
from sellarec.training import graph as module
from sellarec.training.graph import ShardedGraph


def on_workers(gloo: Gloo, workers: int, case: Case, paths: list[Path]) -> list[dict]:
    """What each worker found, by rank."""
    found = gloo.call(workers, compute_as_worker, case, paths)
    return [{name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in own.items()} for own in found]


@st.composite
def cases(draw) -> Case:
    """Small graphs with repeated positives, negatives, and users and items that have none."""
    users, items = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    user, item = st.integers(0, users - 1), st.integers(0, items - 1)
    rows = draw(st.lists(st.tuples(user, item, st.sampled_from([1, 1, 0])), max_size=30))
    asked = {
        kind: draw(st.lists(st.lists(ids, max_size=5), min_size=WORKERS, max_size=WORKERS))
        for kind, ids in (("user", user), ("item", item))
    }
    return Case(users, items, rows, draw(st.sampled_from([1, 3, 8])), asked)


def joined(found: list[dict], name: str) -> Tensor:
    """The whole matrix of which each worker has its own rows: users, then items."""
    parts = []
    for worker in found:
        start, stop = worker["own"]["user"]
        parts.append((worker[name][: stop - start], worker[name][stop - start :]))
    return torch.cat([users for users, _ in parts] + [items for _, items in parts])


def check(case: Case, found: list[dict]) -> None:
    """Forward, gradients and traffic, against the dense twin."""

    def close(one: Tensor, other: Tensor) -> None:
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-5)

    matrix, whole, workers = case.normalized(), case.numbers(1).double(), len(found)
    for kind, count in (("user", case.users), ("item", case.items)):
        ranges = [worker["own"][kind] for worker in found]
        assert [i for start, stop in ranges for i in range(start, stop)] == list(range(count))
        assert all(stop - start <= -(-count // workers) for start, stop in ranges)
    close(joined(found, "product"), matrix @ whole)
    close(joined(found, "product gradient"), matrix @ case.numbers(2).double())
    assert torch.equal(joined(found, "product gradient"), joined(found, "product of gradient"))
    for kind, first in (("user", 0), ("item", case.users)):
        gradient = torch.zeros_like(whole)
        for rank, worker in enumerate(found):
            ids, part = case.part(kind, rank, workers)
            places = first + torch.tensor(ids, dtype=torch.int64)
            assert torch.equal(worker[kind], case.numbers(1)[places])
            gradient.index_add_(0, places, part.double())
        close(joined(found, f"{kind} gradient"), gradient)

    twin = whole.clone().requires_grad_()
    layers = convolve(lambda rows: matrix @ rows, twin)
    mean = torch.stack(layers).mean(0)
    ids = {kind: [i for part in case.asked[kind] for i in part] for kind in case.asked}
    users, items = mean[: case.users][ids["user"]], mean[case.users :][ids["item"]]
    loss = loss_of(layers, users, items, case.numbers(5, len(ids["item"])).double())
    loss.backward()
    close(sum(worker["loss 0"] for worker in found), loss.detach())
    close(joined(found, "loss gradient 0"), twin.grad)
    for worker in found:
        assert torch.equal(worker["loss 0"], worker["loss 1"])
        assert torch.equal(worker["loss gradient 0"], worker["loss gradient 1"])

    check_traffic(case, found)


def check_traffic(case: Case, found: list[dict]) -> None:
    """A worker receives the neighbours of its own rows that are others'."""
    adjacency = case.adjacency() > 0
    received = []
    for worker in found:
        (u0, u1), (i0, i1) = worker["own"]["user"], worker["own"]["item"]
        own = [*range(u0, u1), *range(case.users + i0, case.users + i1)]
        remote = adjacency[own].any(0)
        remote[own] = False
        received.append(int(remote.sum()))
        assert worker["entries"] == adjacency[own].sum()
        assert worker["received"] <= min(worker["entries"], case.size - len(own))
    assert [worker["received"] for worker in found] == received
    assert sum(worker["sent"] for worker in found) == sum(received)
    assert sum(received) <= min(2 * len(case.edges()), (len(found) - 1) * case.size)


@pytest.mark.distributed
@settings(max_examples=25, phases=[Phase.reuse, Phase.generate])  # to shrink what hangs would take long
@given(case=cases())
def test_any_number_of_workers_computes_what_the_dense_matrix_gives(gloo, tmp_path_factory, case):
    """And a product comes out the same to the bit."""
    paths = case.write(tmp_path_factory.mktemp("log"))
    product = joined([compute(case, paths, None)], "product")
    for workers in range(1, WORKERS + 1):
        found = on_workers(gloo, workers, case, paths)
        check(case, found)
        assert torch.equal(joined(found, "product"), product)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(1, 1, [(0, 0, 1)], asked={"user": [[], [0, 0], [0]], "item": [[0], [], []]}), id="one edge"),
        pytest.param(Case(2, 5, [(0, 4, 1), (0, 4, 1), (1, 4, 0)]), id="nothing fetched"),
        pytest.param(Case(4, 3, [(3, 2, 0)], asked={"user": [[3], [], [0, 3]], "item": [[], [], []]}), id="no edges"),
        pytest.param(Case(4, 3, []), id="no rows"),
        pytest.param(Case(3, 0, [], asked={"user": [[2], [0], [1]], "item": [[], [], []]}), id="no items"),
    ],
)
def test_workers_without_rows_or_edges_take_part(gloo, tmp_path, case):
    paths = case.write(tmp_path)
    for workers in range(1, WORKERS + 1):
        check(case, on_workers(gloo, workers, case, paths))


@pytest.mark.distributed
def test_a_long_tailed_graph(gloo, tmp_path):
    """Hundreds of neighbours a row, and ids that are asked for often."""
    generator = np.random.default_rng(0)
    users, items, count = 61, 307, 8_000
    drawn = [(generator.zipf(1.3, count) - 1) % rows for rows in (users, items)]
    rows = np.stack([*drawn, generator.random(count) < 0.8], axis=1).tolist()
    asked = {kind: [drawn[k][:400].tolist(), [], drawn[k][400:500].tolist()] for k, kind in enumerate(("user", "item"))}
    case = Case(users, items, rows, 16, asked)
    paths = case.write(tmp_path)
    whole = compute(case, paths, None)
    for workers in range(1, WORKERS + 1):
        found = on_workers(gloo, workers, case, paths)
        check(case, found)
        assert torch.equal(joined(found, "product"), whole["product"])


@given(case=cases(), merge=st.integers(0, 5))
def test_a_log_is_read_alike_however_many_entries_are_merged_at_once(tmp_path_factory, case, merge):
    """Also in another order, and with each row twice: on one worker, without a group."""
    folder = tmp_path_factory.mktemp("log")
    found = compute(case, case.write(folder), None)
    check(case, [found])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MERGE_ENTRIES", merge)
        other = replace(case, rows=[row for row in reversed(case.rows) for _ in range(2)])
        again = compute(other, other.write(folder), None)
    assert again["entries"] == found["entries"] == 2 * len(case.edges())
    assert torch.equal(again["product"], found["product"])


@given(cases())
def test_the_square_roots_of_degrees_stay_as_they_are(tmp_path_factory, case):
    """The matrix's eigenvector to 1; no row grows, whatever the degrees: its largest eigenvalue."""
    graph = ShardedGraph.read(case.write(tmp_path_factory.mktemp("log")), case.users, case.items, None, CPU)
    roots = case.adjacency().sum(1).sqrt().float()[:, None]
    torch.testing.assert_close(graph.multiply(roots), roots)
    rows = case.numbers(3)
    assert graph.multiply(rows).norm() <= rows.norm() * (1 + 1e-5)


def test_ids_of_any_shape_are_fetched(tmp_path):
    case = Case(3, 2, [(0, 0, 1)])
    graph, rows = ShardedGraph.read(case.write(tmp_path), 3, 2, None, CPU), case.numbers(1)
    for ids in (torch.tensor([[1, 0, 1], [1, 1, 0]]), torch.tensor(1), torch.empty(0, 3, dtype=torch.int64)):
        assert torch.equal(graph.fetch(rows, [("item", ids)])[0], rows[3:][ids])


def test_gradients_of_the_multiply_have_gradients(tmp_path):
    case = Case(3, 2, [(0, 0, 1), (2, 1, 1), (2, 0, 1)])
    graph = ShardedGraph.read(case.write(tmp_path), 3, 2, None, CPU)
    rows = case.numbers(1).requires_grad_()
    (gradient,) = torch.autograd.grad((graph.multiply(rows) ** 2).sum() / 2, rows, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), rows)
    matrix = case.normalized().float()
    torch.testing.assert_close(second, matrix @ matrix @ torch.ones(5, 4))


@pytest.mark.parametrize("row", [(3, 0, 1), (0, 2, 1), (-1, 0, 1), (0, -1, 1)])
def test_ids_that_the_log_does_not_have_are_refused(tmp_path, row):
    rows = [(0, 0, 1), (1, 1, 1), (0, 1, 0), row, (1, 0, 1)]  # of two in the second file it is the second
    paths = Case(3, 2, rows).write(tmp_path)
    kind, count = ("user", 3) if row[0] in (3, -1) else ("item", 2)
    wrong = row[0] if kind == "user" else row[1]
    with pytest.raises(
        UserError, match=f"{kind} is {wrong} in row 3 of .*, but table {kind} has the ids 0 to {count - 1}"
    ):
        ShardedGraph.read(paths, 3, 2, None, CPU)


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "part-0.parquet").write_bytes(b"no Parquet")
    for name in ("part-0.parquet", "part-1.parquet"):
        with pytest.raises(UserError, match="Cannot read the prepared log"):
            ShardedGraph.read([str(tmp_path / name)], 3, 2, None, CPU)


def test_fetching_what_is_not_there_and_rows_that_do_not_fit_are_refused(tmp_path):
    """Item 2 of 2 would be no row; user 3 of 3 would be item 0."""
    case = Case(3, 2, [(0, 0, 1)])
    graph, rows = ShardedGraph.read(case.write(tmp_path), 3, 2, None, CPU), case.numbers(1)
    for kind, ids in (("user", [0, 3]), ("item", [2]), ("item", [-1, 0])):
        with pytest.raises(IndexError, match=f"{kind}s .* the graph has"):
            graph.fetch(rows, [(kind, torch.tensor(ids))])
    for refused in (lambda: graph.multiply(rows[:1]), lambda: graph.fetch(rows[:4], [("user", torch.tensor([0]))])):
        with pytest.raises(ValueError, match="this worker owns 5"):
            refused()
