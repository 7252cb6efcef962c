"""Training of every collaborative model, step for step: one to three workers against plain tables and layers in float64.

The engine is the loop's own, with its tables, its graph and FSDP2, in processes over gloo and without Ray.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoint_cases
import engine_cases
import numpy as np
import pyarrow as pa
import pytest
from engine_cases import Run
from engine_log import HISTORY, ITEMS, write_log, write_rows
from plain_collab import PlainCollab, Target, World
from safetensors.numpy import load_file

from sellarec.config import Collab, Tables
from sellarec.data.log import read_log
from sellarec.training.table import SavedTable, initial_rows

LOSS = {"rtol": 2e-5, "atol": 1e-6}
ROWS = {"rtol": 1e-4, "atol": 5e-5}
"""Tables, dense weights and scores in float32 against float64, after STEPS steps."""


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"))


def settings_of(**changes: Any) -> Collab:
    usual: dict[str, Any] = {
        "dim": 8, "init_std": 0.4, "l2": 0.05, "learning_rate": 0.01, "table_learning_rate": 0.1, "negatives_per_row": 3,
    }  # fmt: skip
    return Collab(**usual | changes)


SASREC: dict[str, Any] = {"model": "sasrec", "layers": 2, "heads": 2, "history": HISTORY}
SEQUENCES: dict[str, Any] = SASREC | {"train_on": "sequences", "user_rows": False}
DIN: dict[str, Any] = {"model": "din", "hidden": (6, 5), "history": 4}
RANKING: dict[str, dict[str, Any]] = {
    "bpr": {"loss": "bpr"},
    "softmax": {"loss": "softmax", "negatives": "popularity"},
    "bpr in-batch": {"loss": "bpr", "negatives": "in-batch"},
    "softmax in-batch": {"loss": "softmax", "negatives": "in-batch"},
    "softmax shared": {"loss": "softmax", "shared_negatives": True},
    "full-softmax": {"loss": "full-softmax"},
}
MODELS: dict[str, dict[str, Any]] = {
    "mf": {"model": "mf"},
    "svdpp": {"model": "svdpp", "history": 4},
    "lightgcn": {"model": "lightgcn", "layers": 2},
    "sasrec": SASREC,
    "din": DIN,
    "fism": {"model": "fism", "history": 4},
    "binary_mf": {"model": "binary_mf"},
}
# In a ranking loss a column of the users' biases is without effect: its gradient is rounding, which Adam makes whole steps of.
# So is what din adds to all scores of a batch (`idle_weights`); small steps keep its effect on other batches small.
RANKED = {"sasrec": SASREC | {"biases": False}, "din": DIN | {"learning_rate": 0.001}}
SOME_LOSSES: dict[str, tuple[str, ...]] = {"fism": (), "din": ("bpr", "softmax"), "binary_mf": ("softmax shared",)}
"""Ranking losses that a model takes, or is tried with, where these are not all."""
CASES: dict[str, dict[str, Any]] = {f"{model}, bce": settings for model, settings in MODELS.items()}
CASES |= {
    f"{model}, {loss}": RANKED.get(model, settings) | chosen
    for model, settings in MODELS.items()
    for loss, chosen in RANKING.items()
    if loss in SOME_LOSSES.get(model, RANKING)
}
CASES |= {
    f"sequences, {loss}": SEQUENCES | {"biases": False} | RANKING[loss] for loss in ("bpr", "softmax", "full-softmax")
}
CASES |= {
    "mf without biases": {"biases": False, "global_mean": False, "table_optimizer": "adagrad"},
    "mf, temperature": {"temperature": 0.5, "loss": "softmax"},
    "lightgcn, cosines in the loss": {
        "model": "lightgcn",
        "biases": False,
        "temperature": 0.5,
        "plain_score": True,
        "log_q": False,
        **RANKING["softmax in-batch"],
    },
    "fism, adam": {"model": "fism", "history": 2, "table_optimizer": "adam", "clip": 0.05, "l2": 0.0},
    "mf, sgd": {"table_optimizer": "sgd", "loss": "softmax"},
    "lightgcn, adam": {"model": "lightgcn", "table_optimizer": "adam", "loss": "bpr"},
    "sasrec, adam": SASREC | {"table_optimizer": "adam", "table_weight_decay": 0.02, "optimizer": "adam"},
    "din without biases": DIN | {"biases": False, "table_optimizer": "adam", "weight_decay": 0.1, "clip": 0.05},
}

QUICK = {
    # each model, row-wise (on one worker every case is) and table-wise, on 1, 2 and 3 workers
    ("mf, bce", "table-wise", 1),
    ("mf, bce", "row-wise", 2),
    ("mf, temperature", "row-wise", 2),
    ("mf, full-softmax", "table-wise", 2),
    ("mf without biases", "table-wise", 2),
    ("mf, softmax in-batch", "row-wise", 3),
    ("mf, softmax shared", "row-wise", 3),
    ("mf, full-softmax", "row-wise", 3),
    ("mf, sgd", "row-wise", 3),
    ("mf, bce", "table-wise", 3),
    ("lightgcn, bce", "table-wise", 1),
    ("lightgcn, full-softmax", "row-wise", 2),
    ("lightgcn, softmax in-batch", "table-wise", 2),
    ("lightgcn, bce", "row-wise", 3),
    ("lightgcn, softmax shared", "row-wise", 3),
    ("lightgcn, cosines in the loss", "row-wise", 3),
    ("lightgcn, adam", "table-wise", 3),
    ("sasrec, softmax shared", "table-wise", 1),
    ("sasrec, bce", "row-wise", 2),
    ("sequences, full-softmax", "row-wise", 2),
    ("sasrec, adam", "table-wise", 2),
    ("sasrec, bpr in-batch", "row-wise", 3),
    ("sasrec, softmax", "table-wise", 3),
    ("sequences, bpr", "table-wise", 3),
    ("din, bpr", "table-wise", 1),
    ("din without biases", "row-wise", 2),
    ("din, softmax", "table-wise", 2),
    ("din, bpr", "row-wise", 3),
    ("din, bce", "table-wise", 3),
    ("svdpp, bce", "table-wise", 1),
    ("svdpp, bce", "row-wise", 2),
    ("svdpp, softmax", "table-wise", 2),
    ("svdpp, bce", "row-wise", 3),
    ("svdpp, softmax", "table-wise", 3),
    ("binary_mf, bce", "table-wise", 1),
    ("binary_mf, softmax shared", "row-wise", 2),
    ("binary_mf, bce", "table-wise", 2),
    ("binary_mf, bce", "row-wise", 3),
    ("binary_mf, softmax shared", "table-wise", 3),
    ("fism, bce", "table-wise", 1),
    ("fism, bce", "row-wise", 2),
    ("fism, adam", "table-wise", 2),
    ("fism, bce", "row-wise", 3),
    ("fism, adam", "table-wise", 3),
    # what else there is
    ("mf, sgd", "column-wise", 2),
    ("lightgcn, adam", "column-wise", 2),
    ("mf without biases", "column-wise", 3),
    ("sasrec, bce", "auto", 2),
    ("mf, bce", "auto", 3),
}


def grid() -> list:
    return [
        pytest.param(
            case,
            sharding,
            workers,
            marks=()
            if (workers, sharding) == (1, "row-wise") or (case, sharding, workers) in QUICK
            else pytest.mark.slow,
        )
        for workers in (1, 2, 3)
        for case in CASES
        for sharding in ("row-wise", "table-wise", "column-wise", "auto")
        if workers > 1 or sharding in ("row-wise", "table-wise")
        if sharding != "column-wise" or "table_optimizer" in CASES[case]
        if sharding != "auto" or case.endswith(", bce")
    ]


def world_of(log: Path, settings: Collab) -> World:
    train = read_log(log).split("train", ["user", "item", "label"]).to_pylist()
    positives = [row for row in train if row["label"] == 1]
    facts = read_log(log).facts
    counted = np.zeros(facts["items"])
    if settings.negatives == "uniform":
        counted[[row["item"] for row in train]] = 1
    else:
        np.add.at(counted, [row["item"] for row in positives], 1)
    return World(
        facts["users"],
        facts["items"],
        len(positives) / len(train),
        tuple({(row["user"], row["item"]) for row in positives}),
        np.isin(np.arange(facts["items"]), [row["item"] for row in train]),
        counted / counted.sum(),
        np.bincount([row["item"] for row in train], minlength=facts["items"]).astype(np.float64),
    )


def raw_rows(log: Path) -> dict[int, dict]:
    return {
        row["row"]: row | {"split": split}
        for split in ("train", "valid")
        for row in read_log(log).split(split).to_pylist()
    }


READS_HISTORY = ("svdpp", "sasrec", "din", "fism")


def targets_of(log: Path, settings: Collab, world: World, rows: pa.Table) -> list[Target]:
    """Of prepared rows; all but the drawn negatives is made once more from the log."""
    raw, out = raw_rows(log), []
    for prepared in rows.to_pylist():
        row = raw[prepared["row"]]
        history = [item for item in row["history"] if world.seen[item]]
        steps = [(history[-settings.history :], row["item"])]
        if settings.train_on == "sequences":
            sequence = [
                r["item"] for r in raw.values() if (r["user"], r["label"]) == (row["user"], 1) and r["split"] == "train"
            ][-settings.history - 1 :]
            assert sequence[-1] == row["item"]
            steps = [(sequence[:at], sequence[at]) for at in range(1, len(sequence))]
        liked = tuple(sequence) if settings.train_on == "sequences" else (*row["history"], row["item"])
        number = settings.negatives_per_row if "negative" in prepared else 0
        assert len(prepared.get("negative", ())) == number * len(steps)
        for place, (before, item) in enumerate(steps):
            drawn = slice(place * number, (place + 1) * number)
            out.append(
                Target(
                    row["user"],
                    item,
                    row["label"],
                    tuple(before) if settings.model in READS_HISTORY else (),
                    row["user_seen"],
                    row["item_seen"],
                    tuple(prepared.get("negative", ())[drawn]),
                    tuple(prepared.get("negative_log_q", ())[drawn]),
                    liked if number else (),
                )
            )
    return out


def catalog_scores(log: Path, settings: Collab, world: World, plain: PlainCollab) -> np.ndarray:
    """Of all items for each query, float64 [queries, items]; -inf where an item is excluded."""
    queries, scores = engine_cases.queries_of(log), []
    for query in queries:
        history = [item for item in query["history"] if world.seen[item]][-settings.history :]
        read = tuple(history) if settings.model in READS_HISTORY else ()
        scores += plain.score(
            [Target(query["user"], i, 0, read, query["user_seen"], world.seen[i]) for i in range(world.items)]
        ).tolist()
    matrix = np.array(scores).reshape(len(queries), world.items)
    for row, query in zip(matrix, queries, strict=True):
        row[query["excluded"]] = -np.inf
    return matrix


class Twin:
    """What the engine has to find: losses, scores of the valid split and of the catalog, tables and dense weights."""

    def __init__(self, run: Run, dense: dict[str, np.ndarray]) -> None:
        task, order, settings = engine_cases.task_of(run), engine_cases.order_of(run), run.settings
        world = world_of(run.log, settings)
        tables = {t.name: initial_rows(t, engine_cases.SEED, 0, t.rows) for t in task.tables}
        plain = PlainCollab(settings, world, tables, dense)
        self.losses = []
        for step in range(run.steps):
            rows = pa.concat_tables(engine_cases.rows_of(order, task, task.prepare, step, step + 1))
            assert len(rows) == order.batch_rows(step)
            self.losses.append(plain.step(targets_of(run.log, settings, world, rows), engine_cases.rate_at(step)))
        valid = read_log(run.log).split("valid", ["row"])
        scored = replace(settings, train_on="rows")
        self.scores = plain.score(targets_of(run.log, scored, world, valid))
        self.catalog = catalog_scores(run.log, settings, world, plain) if settings.model != "din" else None
        self.tables = {name: rows.detach().numpy() for name, rows in plain.tables.items()}
        self.dense = {name: weight.detach().numpy() for name, weight in plain.dense.items()}
        self.idle, self.kinks = (
            {name: elements.numpy() for name, elements in of.items()} for of in (plain.idle, plain.kinks)
        )


@pytest.fixture(scope="module")
def twins():
    """Each case's twin, made once."""
    return {}


def twin_of(twins: dict, run: Run, found: list[dict]) -> Twin:
    # neither the sharding nor the workers have a part in it
    key = repr(replace(run, storage=Tables(), output=None, max_columns=1024))
    if key not in twins:
        twins[key] = Twin(run, found[0]["dense"])
    return twins[key]


def idle_weights(settings: Collab) -> set[str]:
    """Weights of which elements may be without effect on the loss of a step: the biases of sasrec's keys; and where scores are
    only compared, what din adds to all of them, as a hidden layer's bias does whose unit is positive for all rows."""
    if settings.model == "sasrec":
        return {f"blocks.{block}.key.bias" for block in range(settings.layers)}
    if settings.model == "din" and settings.loss != "bce":
        return {f"network.{3 * layer}.bias" for layer in range(len(settings.hidden) + 1)}
    return set()


def close_lists(lists: np.ndarray, scores: np.ndarray) -> None:
    """Each list has all items but the excluded ones by their plain scores, of equal ones the smaller id first, and no other."""
    for found, of_items in zip(lists, scores, strict=True):
        expected = np.lexsort((np.arange(len(of_items)), -of_items))[: np.isfinite(of_items).sum()]
        listed = found[: len(expected)]
        assert sorted(listed) == sorted(expected) and (found[len(expected) :] == -1).all()
        # scores that are nearly equal may lie in another order in float32
        np.testing.assert_allclose(of_items[listed], of_items[expected], err_msg="ranking", **ROWS)
        are_tied = np.diff(of_items[listed]) == 0
        assert (np.diff(listed)[are_tied] > 0).all(), f"of equal scores the larger id is first: {listed}"


def close(found: list[dict], run: Run, twin: Twin, first: int = 0) -> None:
    assert run.output is not None
    for worker in found:
        np.testing.assert_allclose(worker["losses"], twin.losses[first:], err_msg="losses", **LOSS)
    idle, shift = idle_weights(run.settings), 0.0
    scores = found[0]["scores"]["score"]
    if run.settings.model == "din" and idle:
        shift = (scores - twin.scores).mean()
    np.testing.assert_allclose(scores - shift, twin.scores, err_msg="scores", **ROWS)
    if twin.catalog is not None:
        whole, short = found[0]["lists"]
        close_lists(whole, twin.catalog)
        np.testing.assert_array_equal(short, whole[:, : engine_cases.CUT])
    for name, rows in twin.tables.items():
        saved = SavedTable(run.output / "tables", name)
        np.testing.assert_allclose(saved.read(0, len(rows)), rows, err_msg=name, **ROWS)
    file = run.output / "collab.safetensors"
    weights = load_file(file) if file.exists() else {}
    assert set(weights) == set(twin.dense)
    assert idle <= set(twin.dense)
    for name, expected in twin.dense.items():
        told = ~twin.kinks[name]
        if name in idle:
            told = told & ~twin.idle[name]
        np.testing.assert_allclose(weights[name][told], expected[told], err_msg=name, **ROWS)


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "sharding", "workers"), grid())
def test_any_number_of_workers_takes_the_steps_of_one_process(gloo, twins, log, tmp_path, case, sharding, workers):
    """Losses of each step; then tables, dense weights, scores of the valid split, and rankings of the whole catalog, on every
    worker count and sharding. Two epochs begin, of which the first ends with a short batch: of three workers two have padding
    alone there."""
    run = Run(settings_of(**CASES[case]), log, Tables(sharding=sharding), output=tmp_path)
    found = gloo.call(workers, engine_cases.train, run)
    close(found, run, twin_of(twins, run, found))
    for exchanges, on_tables in (worker["seconds"] for worker in found):
        assert 0 < exchanges < on_tables if workers > 1 else exchanges == 0


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "workers", "then"),
    [
        pytest.param("lightgcn, adam", (1, "row-wise"), (3, "table-wise")),
        pytest.param("sasrec, adam", (3, "row-wise"), (2, "table-wise")),
        pytest.param("din, softmax", (2, "table-wise"), (3, "row-wise")),
        pytest.param("mf without biases", (3, "table-wise"), (1, "row-wise")),
        pytest.param("mf without biases", (2, "column-wise"), (3, "column-wise")),
        pytest.param("fism, adam", (3, "row-wise"), (2, "column-wise")),
    ],
)
def test_a_checkpoint_goes_on_with_other_workers_as_if_nothing_had_been(
    gloo, twins, log, tmp_path, case, workers, then
):
    """Tables, dense weights and both optimizers; of wide tables in pieces."""
    folder = tmp_path / "checkpoint"
    run = Run(settings_of(**CASES[case]), log, Tables(sharding=workers[1]), max_columns=4)
    if run.settings.table_optimizer == "rowwise-adagrad":
        run = replace(run, max_columns=1024)  # pieces have accumulators of their own
    found = gloo.call(workers[0], engine_cases.train, replace(run, checkpoint=folder, save_at=3))
    twin = twin_of(twins, run, found)
    resumed = replace(run, storage=Tables(sharding=then[1]), start_at=3, start_from=folder, output=tmp_path / "output")
    close(gloo.call(then[0], engine_cases.train, resumed), resumed, twin, first=3)


@pytest.mark.distributed
@pytest.mark.parametrize(("sharding", "workers"), [("row-wise", 2), ("table-wise", 3), ("column-wise", 2)])
def test_an_export_of_many_files_a_worker_has_the_same_rows(gloo, log, tmp_path, sharding, workers):
    """A few rows are written, and compared, at a time, whole or in pieces of their columns."""
    columns = 4 if sharding == "column-wise" else 1024
    optimizer = {"table_optimizer": "adam"}
    run = Run(settings_of(model="mf", **optimizer), log, Tables(sharding=sharding), max_columns=columns)
    rows = {}
    row = 4 * run.settings.dim
    for name, limits in {"one": {}, "rows": {"file_rows": 3}, "bytes": {"file_bytes": 3 * row}}.items():
        output = tmp_path / name
        gloo.call(workers, engine_cases.train, replace(run, output=output, **limits))
        saved = SavedTable(output / "tables", "item")
        rows[name] = saved.read(0, saved.facts["rows"])
        files = [shard["file"] for shard in saved.facts["shards"]]
        # of a worker's columns alone a file may have more rows for its bytes
        assert (len(files) >= saved.facts["rows"] // 3) == (name != "one") and len(files) == len(set(files))
        assert name != "bytes" or all(4 * s["rows"] * s["columns"] <= 3 * row for s in saved.facts["shards"])
        for first in (0, 2, 5):  # across the ends of files
            assert np.array_equal(saved.read(first, first + 4), rows[name][first : first + 4])
    assert np.array_equal(rows["rows"], rows["one"]) and np.array_equal(rows["bytes"], rows["one"])


@pytest.fixture(scope="module")
def with_dislikes(tmp_path_factory) -> tuple[Path, int, int]:
    """A log, and the ids of its user, and of its item, of which train has negative rows alone."""
    folder = tmp_path_factory.mktemp("dislikes")
    generator = np.random.default_rng(3)
    user, item = generator.integers(0, 6, 70), generator.integers(0, 8, 70)
    label = (generator.random(70) < 0.7) & (user != 2) & (item != 3)
    log = read_log(write_rows(folder, user, item, label))
    return folder, *(
        table["external_id"].to_pylist().index(one) for table, one in ((log.users(), "2"), (log.items(), "3"))
    )


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"loss": "bce"}, ("user", "item")),
        ({"loss": "bpr", "negatives": "in-batch"}, ()),
        ({"loss": "softmax", "negatives": "popularity", "model": "lightgcn", "table_optimizer": "adam"}, ()),
        ({"loss": "bpr"}, ("item",)),
        ({"loss": "full-softmax"}, ("item",)),
        ({"loss": "bpr", "negatives": "popularity", "table_weight_decay": 0.1}, ("user", "item")),
        (SASREC | {"loss": "softmax", "negatives": "popularity"}, ()),
    ],
    ids=str,
)
def test_what_a_ranking_loss_has_no_target_of_keeps_its_initial_row(gloo, with_dislikes, tmp_path, changes, changed):
    """Bit for bit, unless what the task names (`CollabTask.unseen`) has changed it."""
    folder, user, item = with_dislikes
    run = Run(settings_of(**{"model": "mf"} | changes), folder, output=tmp_path)
    gloo.call(1, engine_cases.train, run)
    task = engine_cases.task_of(run)
    for table in task.tables:
        row = user if table.name == "user" else item
        kept = SavedTable(tmp_path / "tables", table.name).read(row, row + 1)
        initial = initial_rows(table, engine_cases.SEED, row, row + 1)
        assert np.array_equal(kept, initial) == (table.name not in changed), table.name
        words = task.unseen().get(f"{table.name} without a positive")
        assert words is None if run.settings.loss == "bce" else ("changed" in words) >= (table.name in changed)


OPTIMIZERS = {
    "rowwise-adagrad": "row-wise Adagrad (fused)",
    "adagrad": "Adagrad (fused)",
    "sgd": "SGD (fused)",
    "adam": "Adam (dense gradients, all rows)",
}
"""As the objects that step are told of."""


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_settings_that_have_changed_since_a_checkpoint_hold_after_it(gloo, log, tmp_path, optimizer, workers):
    """Its own, and not those that the checkpoint's optimizer state was made with; and that is what is told of the optimizers."""
    folder = tmp_path / "checkpoint"
    run = Run(settings_of(**SASREC, weight_decay=0.1, table_optimizer=optimizer), log)
    gloo.call(workers, engine_cases.train, replace(run, checkpoint=folder, save_at=3))
    decay = 0.05 if optimizer in ("rowwise-adagrad", "adam") else 0.0  # others would ignore it, and are refused
    later = replace(run.settings, weight_decay=0.3, table_weight_decay=decay, table_learning_rate=0.2, clip=0.7)
    found = gloo.call(workers, engine_cases.optimizers_after_loading, replace(run, settings=later, start_from=folder))
    for of_worker in found:
        dense, tables = of_worker["dense"], of_worker["tables"]
        assert (dense["weight decay"], dense["largest gradient norm"]) == (0.3, 0.7)
        assert (tables["optimizer"], tables["learning rate"]) == (OPTIMIZERS[optimizer], 0.2)
        assert tables["weight decay"] == decay


# What is refused


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "sharding", "workers"),
    [
        ("mf, bce", "row-wise", 2),
        ("lightgcn, bpr", "row-wise", 2),
        ("sasrec, bce", "row-wise", 2),
        ("mf, bce", "row-wise", 1),
        ("lightgcn, bpr", "row-wise", 3),
        ("sasrec, bce", "table-wise", 3),
        ("mf without biases", "column-wise", 3),
    ],
)
@pytest.mark.parametrize(("column", "value"), [("item", ITEMS + 1), ("user", -1)])
def test_an_id_that_a_table_does_not_have_ends_all_workers_alike(gloo, log, case, sharding, workers, column, value):
    """Before any of them waits for another in a collective; when training and when scoring."""
    facts, last = read_log(log).facts, workers - 1
    run = Run(settings_of(**CASES[case]), log, Tables(sharding=sharding), damage=(last, column, value), steps=1)
    found = gloo.call(workers, engine_cases.refusal, run)
    rows = [each.pop("rows") for each in found]
    assert all(each == found[0] for each in found)
    for what in ("step", "score"):
        told = found[0][what]
        assert told.startswith(f"UserError: {column} is {value} in row {rows[last][-1]} (worker {last}), but"), told
        assert f"table {column} has the ids 0 to {facts[f'{column}s'] - 1}" in told


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dim": 4}, "table item has shape (12, 8) there and shape (12, 4) here"),
        ({"model": "svdpp"}, "table history has no place there and shape (12, 8) here"),
        ({"user_rows": False}, "table user has shape (10, 8) there and no place here"),
        ({"layers": 1}, "weight blocks.1.forward_1.bias has shape (8,) there and no place here"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_model_is_refused_by_all_workers(gloo, log, tmp_path, workers, changes, told):
    first = Run(settings_of(**SASREC), log)
    other = Run(settings_of(**(SASREC | changes)), log)
    for message in gloo.call(workers, checkpoint_cases.load_as_another, tmp_path, first, other):
        assert message.startswith(f"the checkpoint {tmp_path}/step-000000001 is of another model: "), message
        assert told in message and f"delete {tmp_path} to begin the stage again" in message, message


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "sharding", "workers"),
    [
        ("mf, bce", "row-wise", 2),
        ("mf, bce", "table-wise", 2),
        ("lightgcn, bce", "row-wise", 2),
        ("sasrec, bce", "table-wise", 2),
        ("mf, bce", "row-wise", 1),
        ("sasrec, bce", "row-wise", 3),
        ("lightgcn, bce", "table-wise", 3),
        ("mf without biases", "column-wise", 2),
        ("mf without biases", "column-wise", 3),
    ],
)
@pytest.mark.parametrize("row", [0, -1])
def test_a_row_that_is_not_finite_is_refused_by_all_workers(gloo, log, case, sharding, workers, row):
    """Though only one of them reads it."""
    row %= read_log(log).facts["items"]
    run = Run(settings_of(**CASES[case]), log, Tables(sharding=sharding), broken=(row, np.nan))
    found = gloo.call(workers, engine_cases.refusal, run)
    assert all(each == found[0] for each in found)
    assert f"table item: row {row} of those that it starts from holds a value that is not finite" in found[0]["made"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "sharding", "workers"),
    [
        ("mf, bce", "row-wise", 1),
        ("sasrec, bce", "row-wise", 3),
        ("lightgcn, bce", "table-wise", 2),
        ("mf without biases", "column-wise", 3),
    ],
)
def test_a_value_that_rows_of_its_type_cannot_hold_is_refused_by_all_workers(gloo, log, case, sharding, workers):
    """It is finite as it is read, by one of them; float16 would make infinity of it."""
    row = read_log(log).facts["items"] - 1
    run = Run(settings_of(**CASES[case]), log, Tables(sharding=sharding, dtype="float16"), broken=(row, -1e6))
    found = gloo.call(workers, engine_cases.refusal, run)
    assert all(each == found[0] for each in found)
    told = f"table item: row {row} of those that it starts from holds -1e+06, but tables.dtype is float16, which holds 65504"
    assert told in found[0]["made"]
    held = gloo.call(workers, engine_cases.refusal, replace(run, broken=(row, -65504.0)))
    assert all("made" not in each for each in held)


@pytest.mark.distributed
def test_a_file_of_earlier_rows_that_was_cut_off_is_refused_by_all_workers(gloo, log, tmp_path):
    """Though its rows are those of the second worker alone."""
    run = Run(settings_of(**CASES["mf, bce"]), log, output=tmp_path, steps=1)
    gloo.call(2, engine_cases.train, run)
    later = replace(run, init_from=tmp_path)
    assert all("made" not in each for each in gloo.call(2, engine_cases.refusal, later))
    *_, path = sorted((tmp_path / "tables").glob("item-*"))
    os.truncate(path, path.stat().st_size - 1)
    for worker in gloo.call(2, engine_cases.refusal, later):
        assert "table item: its rows " in worker["made"] and f"can't be read from {path}" in worker["made"]
