"""The sharded graph against the whole one as a dense float64 matrix, on one to three workers.

Three processes serve all tests here, over gloo: this file run as a script is one of them. Graphs and ids are drawn by
hypothesis; among them are graphs without edges and with fewer users or items than workers.
"""

import contextlib
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sellarec.errors import UserError
from sellarec.training import graph as module
from sellarec.training.graph import ShardedGraph

PROCESSES = 3
CPU = torch.device("cpu")
PATIENCE = 60
"""Seconds that a case may take, the start of the processes included."""


@dataclass(frozen=True)
class Case:
    """A graph and what is computed on it.

    Attributes:
        rows: (user, item, label) in the log's order.
        asked: by kind, the ids that each of PROCESSES workers fetches; of fewer workers the last takes what is left over.
    """

    users: int
    items: int
    rows: list[tuple[int, int, int]]
    columns: int = 4
    asked: dict[str, list[list[int]]] = field(
        default_factory=lambda: {kind: [[] for _ in range(PROCESSES)] for kind in ("user", "item")}
    )

    @property
    def size(self) -> int:
        return self.users + self.items

    def numbers(self, seed: int, rows: int | None = None) -> Tensor:
        shape = (self.size if rows is None else rows, self.columns)
        return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()

    def part(self, kind: str, rank: int, workers: int) -> tuple[list[int], Tensor]:
        """What a worker fetches, and the gradient of it."""
        lists = self.asked[kind]
        before = sum(map(len, lists[:rank]))
        ids = lists[rank] if rank < workers - 1 else [i for ids in lists[rank:] for i in ids]
        return ids, self.numbers(5, sum(map(len, lists)))[before : before + len(ids)]

    def edges(self) -> set[tuple[int, int]]:
        return {(user, item) for user, item, label in self.rows if label == 1}

    def adjacency(self) -> Tensor:
        matrix = torch.zeros(self.size, self.size, dtype=torch.float64)
        for user, item in self.edges():
            matrix[user, self.users + item] = matrix[self.users + item, user] = 1
        return matrix

    def normalized(self) -> Tensor:
        matrix = self.adjacency()
        scale = matrix.sum(1).clamp(min=1) ** -0.5
        return scale[:, None] * matrix * scale

    def write(self, folder: Path) -> list[Path]:
        """The log in three files of small row groups, some of them empty."""
        columns = np.array(self.rows, np.int64).reshape(-1, 3)
        paths = []
        for number, part in enumerate(np.array_split(columns, 3)):
            types = {"user": np.int64, "item": np.int64, "label": np.int8}
            table = {name: part[:, k].astype(of) for k, (name, of) in enumerate(types.items())}
            table["rating"] = pa.nulls(len(part), pa.float32())
            paths.append(folder / f"part-{number}.parquet")
            pq.write_table(pa.table(table), paths[-1], row_group_size=2)
        return paths


def own_rows(graph: ShardedGraph, case: Case, whole: Tensor) -> Tensor:
    (first, stop), (first_item, stop_item) = graph.own["user"], graph.own["item"]
    return torch.cat([whole[first:stop], whole[case.users + first_item : case.users + stop_item]])


def loss_of(layers: list[Tensor], users: Tensor, items: Tensor, gradient: Tensor) -> Tensor:
    """Not linear, so that gradients depend on all that was fetched."""
    return sum((layer**2).sum() for layer in layers) + torch.tanh(users).sum() + (torch.sin(items) * gradient).sum()


def convolve(multiply, rows: Tensor) -> list[Tensor]:
    layers = [rows]
    for _ in range(3):
        layers.append(multiply(layers[-1]))
    return layers


def compute(case: Case, paths: list[Path], group: dist.ProcessGroup | None) -> dict:
    """All that the tests compare, of one worker."""
    rank, workers = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    graph = ShardedGraph.read(paths, case.users, case.items, group, CPU)
    found = {"own": graph.own, "received": graph.received, "sent": graph.sent, "entries": graph.entries}

    def leaf() -> Tensor:
        return own_rows(graph, case, case.numbers(1)).requires_grad_()

    rows = leaf()
    product = graph.multiply(rows)
    (product * own_rows(graph, case, case.numbers(2))).sum().backward()
    found["product"], found["product gradient"] = product.detach(), rows.grad
    found["product of gradient"] = graph.multiply(own_rows(graph, case, case.numbers(2)))
    for kind in ("user", "item"):
        rows = leaf()
        ids, gradient = case.part(kind, rank, workers)
        vectors = graph.fetch(rows, kind, torch.tensor(ids, dtype=torch.int64))
        (vectors * gradient).sum().backward()
        found[kind], found[f"{kind} gradient"] = vectors.detach(), rows.grad
    for number in range(2):
        rows = leaf()
        layers = convolve(graph.multiply, rows)
        mean = torch.stack(layers).mean(0)
        users, items = (
            graph.fetch(mean, kind, torch.tensor(case.part(kind, rank, workers)[0], dtype=torch.int64))
            for kind in ("user", "item")
        )
        loss = loss_of(layers, users, items, case.part("item", rank, workers)[1])
        loss.backward()
        found[f"loss {number}"], found[f"loss gradient {number}"] = loss.detach(), rows.grad
    return found


class Pool:
    """PROCESSES workers that compute cases, on as many of them as a case is to have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts = 0
        self.processes: list[subprocess.Popen] = []
        self.connections: list[Connection] = []

    def start(self) -> None:
        self.starts += 1
        store = self.folder / f"store-{self.starts}"
        with open(self.folder / "log", "a") as log:
            for rank in range(PROCESSES):
                own, theirs = Pipe()
                with theirs:
                    command = [sys.executable, __file__, str(theirs.fileno()), str(store), str(rank)]
                    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=log, stderr=log)
                self.connections.append(own)
                self.processes.append(process)

    def compute(self, case: Case, workers: int) -> list[dict]:
        """What each worker found, by rank."""
        if not self.processes:
            self.start()
        paths = case.write(self.folder)
        for connection in self.connections[:workers]:
            # the class has another name in the processes, whose main module this file is
            connection.send((asdict(case), paths, workers))
        answers: dict[Connection, dict | str] = {}
        while waiting := [connection for connection in self.connections[:workers] if connection not in answers]:
            for connection in (ready := wait(waiting, PATIENCE)):
                answers[connection] = connection.recv()
            failures = [answer for answer in answers.values() if isinstance(answer, str)]
            if failures or not ready:
                self.end()  # the others may wait for the one that failed
                pytest.fail(f"{workers} workers: {failures or 'no answer'}".replace("\\n", "\n"))
        found = [answers[connection] for connection in self.connections[:workers]]
        return [{name: as_tensor(value) for name, value in answer.items()} for answer in found]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for connection in self.connections:
            connection.close()
        self.processes, self.connections = [], []


def as_tensor(value):
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def serve(pipe: int, store: str, rank: int) -> None:
    """One process of the pool, until it is ended or the tests are."""
    torch.set_num_threads(1)
    store = dist.FileStore(store, PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=PATIENCE))
    groups = {workers: dist.new_group(list(range(workers))) for workers in range(1, PROCESSES + 1)}
    connection = Connection(pipe)
    with contextlib.suppress(EOFError):
        while True:
            case, paths, workers = connection.recv()
            try:
                found = compute(Case(**case), paths, groups[workers])
                found = {name: x.detach().numpy() if isinstance(x, Tensor) else x for name, x in found.items()}
            except Exception:
                found = traceback.format_exc()
            connection.send(found)


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Iterator[Pool]:
    torch.set_num_threads(1)
    pool = Pool(tmp_path_factory.mktemp("graph"))
    yield pool
    pool.end()


@st.composite
def cases(draw) -> Case:
    """Small graphs with repeated positives, negatives, and users and items that have none."""
    users, items = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    user, item = st.integers(0, users - 1), st.integers(0, items - 1)
    rows = draw(st.lists(st.tuples(user, item, st.sampled_from([1, 1, 0])), max_size=30))
    asked = {
        kind: draw(st.lists(st.lists(ids, max_size=5), min_size=PROCESSES, max_size=PROCESSES))
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
def test_any_number_of_workers_computes_what_the_dense_matrix_gives(pool, case):
    """And a product comes out the same to the bit."""
    product = joined([compute(case, case.write(pool.folder), None)], "product")
    for workers in range(1, PROCESSES + 1):
        found = pool.compute(case, workers)
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
def test_workers_without_rows_or_edges_take_part(pool, case):
    for workers in range(1, PROCESSES + 1):
        check(case, pool.compute(case, workers))


@pytest.mark.distributed
def test_a_long_tailed_graph(pool):
    """Hundreds of neighbours a row, and ids that are asked for often."""
    generator = np.random.default_rng(0)
    users, items, count = 61, 307, 8_000
    drawn = [(generator.zipf(1.3, count) - 1) % rows for rows in (users, items)]
    rows = np.stack([*drawn, generator.random(count) < 0.8], axis=1).tolist()
    asked = {kind: [drawn[k][:400].tolist(), [], drawn[k][400:500].tolist()] for k, kind in enumerate(("user", "item"))}
    case = Case(users, items, rows, 16, asked)
    whole = compute(case, case.write(pool.folder), None)
    for workers in range(1, PROCESSES + 1):
        found = pool.compute(case, workers)
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
        assert torch.equal(graph.fetch(rows, "item", ids), rows[3:][ids])


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
    paths = Case(3, 2, [(0, 0, 1), (1, 1, 1), row]).write(tmp_path)
    kind, count = ("user", 3) if row[0] in (3, -1) else ("item", 2)
    with pytest.raises(UserError, match=f"has {kind}s .* but the log has {count}"):
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
            graph.fetch(rows, kind, torch.tensor(ids))
    for refused in (lambda: graph.multiply(rows[:1]), lambda: graph.fetch(rows[:4], "user", torch.tensor([0]))):
        with pytest.raises(ValueError, match="this worker owns 5"):
            refused()


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
