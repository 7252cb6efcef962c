"""Stage align, step for step: one to three workers against whole tables in one process. Rows of a frozen table never move."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import align_cases
import numpy as np
import pyarrow as pa
import pytest
from align_cases import Run, Twin
from prepared import prepare_into, rules, source_of
from safetensors.numpy import load_file

from sellarec.command_line import parse
from sellarec.config import Align, Collab, Tables
from sellarec.data.log import item_counts
from sellarec.training.table import SavedTable

sys.path.insert(0, str(Path(__file__).parents[2] / "jobs"))
import reproduce

CLOSE = {"rtol": 2e-4, "atol": 5e-5}
"""float32 sums in other orders, over the steps."""


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """Some 70 train rows, of which one in six has no history."""
    folder = tmp_path_factory.mktemp("log")
    generator = np.random.default_rng(4)
    count = 90
    user, item = generator.integers(0, 9, count), generator.integers(0, 13, count)
    label = generator.random(count) < 0.65
    rows = {"user": user, "item": item, "label": pa.array(label, pa.int8()), "timestamp": np.arange(count)}
    log = prepare_into(folder, source_of(pa.table(rows)), rules(history_cap=6))
    np.save(folder / "counts.npy", item_counts(log))
    align_cases.write_users(folder)
    return folder


DECAY = {"table_weight_decay": 0.05}
CASES: dict[str, dict[str, Any]] = {
    "as by default": {},
    "published": {"contrastive": "rince", "direction": "semantic-to-collab", "mask_equal": False},
    "published, adam": {
        "contrastive": "rince", "direction": "semantic-to-collab", "mask_equal": False, "table_optimizer": "adam", **DECAY,
    },
    "rince": {"contrastive": "rince", "rince_q": 0.3, "rince_lambda": 0.5, "block": 3},
    "users": {"side": "users", "history": 3},
    "both": {"side": "both", "block": 5, "table_optimizer": "adagrad"},
    "both, adam": {"side": "both", "mask_equal": False, "table_optimizer": "adam"},
    "profiles": {"side": "both", "user_vectors": "profile"},
    "profiles, frozen": {"side": "users", "user_vectors": "profile", "semantic": "frozen", "table_optimizer": "adam"},
    "frozen": {"semantic": "frozen", **DECAY},
    "frozen, sgd": {"semantic": "frozen", "side": "both", "table_optimizer": "sgd"},
    "frozen, adagrad": {"semantic": "frozen", "table_optimizer": "adagrad"},
    "frozen, adam": {"semantic": "frozen", "side": "users", "table_optimizer": "adam", **DECAY},
    "rlmrec-con": {"contrastive": "rlmrec-con", "side": "both", "block": 5},
    "rlmrec-con, frozen": {"contrastive": "rlmrec-con", "semantic": "frozen", "mask_equal": False, "table_optimizer": "adam"},
    "rlmrec-gen": {"contrastive": "rlmrec-gen", "side": "both", "mask_share": 0.4},
    "rlmrec-gen, frozen": {
        "contrastive": "rlmrec-gen", "semantic": "frozen", "mask_equal": False, "mask_share": 0.4, "table_optimizer": "adam",
    },
    "darec": {"contrastive": "darec", "side": "both", "block": 5, "centers": 3},
    "darec, frozen": {"contrastive": "darec", "semantic": "frozen", "centers": 2, "table_optimizer": "adam"},
}  # fmt: skip
RUNS = [
    *[(case, "row-wise", workers) for case in CASES for workers in (1, 3)],
    *[pytest.param(case, "row-wise", 2, marks=pytest.mark.slow) for case in CASES],
    ("both", "table-wise", 3), ("frozen", "table-wise", 2), ("frozen, adam", "table-wise", 3),
    ("frozen, adagrad", "column-wise", 2), ("frozen, adam", "column-wise", 3),
]  # fmt: skip


def run_of(log: Path, case: str, sharding: Any = "row-wise", **changes: Any) -> Run:
    usual: dict[str, Any] = {"learning_rate": 0.01, "table_learning_rate": 0.05, "hidden": 6}
    usual |= {} if case.startswith("darec") else {"temperature": 0.3}
    graph = {"model": "lightgcn", "layers": 2} if case.startswith("rlmrec-gen") else {}
    dim = 4 if case.startswith(("rlmrec", "darec")) else align_cases.WIDTH
    collab = Collab(dim=dim, init_std=0.4, l2=0.05, **graph)
    return Run(Align(**usual | CASES[case]), collab, log, Tables(sharding=sharding), **changes)


@pytest.fixture(scope="module")
def twins():
    """Each case's twin, made once."""
    return {}


def close(found: list[dict], run: Run, twins: dict, case: str) -> None:
    if case not in twins:
        twins[case] = Twin(run)
    twin = twins[case]
    assert run.output is not None
    for worker in found:
        np.testing.assert_allclose(worker["losses"], twin.losses[run.start_at :], rtol=2e-5)
    for worker in found[1:]:
        assert worker["measured"] == (None, None)
    for measured, theirs in zip(found[0]["measured"], twin.measured, strict=True):
        ours = {name: value for name, value in measured.items() if name != "users"}
        ours |= {f"{name} of users": value for name, value in measured.get("users", {}).items()}
        if run.start_from is None or measured is found[0]["measured"][1]:
            assert ours == pytest.approx(theirs, rel=1e-3)
    for name, rows in twin.tables.items():
        saved = SavedTable(run.output / "tables", name).read(0, len(rows))
        np.testing.assert_allclose(saved, rows, err_msg=name, **CLOSE)
        if name in ("semantic", "profile"):
            first = align_cases.distilled if name == "semantic" else align_cases.profiled
            frozen = run.settings.semantic == "frozen"
            assert np.array_equal(saved, first(0, len(rows))) is frozen
    weights = load_file(run.output / "projection.safetensors")
    for name, weight in twin.dense.items():
        np.testing.assert_allclose(weights[name.removeprefix("projection.")], weight, err_msg=name, **CLOSE)


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "sharding", "workers"), RUNS)
def test_any_number_of_workers_takes_the_steps_of_one_process(gloo, twins, log, tmp_path, case, sharding, workers):
    run = run_of(log, case, sharding, output=tmp_path)
    close(gloo.call(workers, align_cases.train, run), run, twins, case)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["frozen", "frozen, adam", "both, adam"])
def test_a_checkpoint_goes_on_with_other_workers_as_if_nothing_had_been(gloo, twins, log, tmp_path, case):
    """Frozen rows are not in it: they are read again from where they started."""
    run = run_of(log, case, checkpoint=tmp_path / "checkpoint", save_at=3)
    found = gloo.call(2, align_cases.train, run)
    frozen = run.settings.semantic == "frozen"
    for worker in found:
        assert worker["state"] == ["item_0", "user_0"] if frozen else ["item_0", "semantic_0", "user_0"]
        state = {line["table"]: line["optimizer bytes"] for line in worker["plan"]}
        assert state["item"] > 0 and (state["semantic"] == 0) is frozen
    resumed = replace(run, checkpoint=None, start_at=3, start_from=run.checkpoint, output=tmp_path / "output")
    close(gloo.call(3, align_cases.train, resumed), resumed, twins, case)


@pytest.mark.distributed
def test_the_ablation_without_alignment_leaves_the_distilled_vectors_as_they_are(gloo, log, tmp_path):
    """With a weight of 0 alone, the recipe's weight decay would wear them down."""
    table = reproduce.TABLES["sella-ml-1m"]
    config = parse([*table.recipes, *table.variants["without alignment"]])
    assert config.align.weight == 0 and not config.fuse.warm_start
    for semantic in ("frozen", "trained"):
        output = tmp_path / semantic
        gloo.call(
            1, align_cases.train, Run(replace(config.align, semantic=semantic), config.collab, log, output=output)
        )
        saved = SavedTable(output / "tables", "semantic").read(0, 13)
        assert np.array_equal(saved, align_cases.distilled(0, 13)) is (semantic == config.align.semantic)


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "workers"), [("both, adam", 2), ("frozen, sgd", 3), ("frozen, adam", 1)])
def test_no_distilled_vector_is_looked_up_to_score(gloo, log, case, workers):
    """What is asked for, and what tables give unasked: lookups by bags send one of every feature of a width."""
    run = run_of(log, case)
    run = replace(run, collab=replace(run.collab, dim=4))
    found = gloo.call(workers, align_cases.score, run)
    expected = align_cases.plain_scores(run)
    np.testing.assert_allclose(found[0]["scores"]["score"], expected, rtol=1e-5, atol=1e-6)
    for worker in found:
        assert set(worker["asked"]) == {"user", "item"} and set(worker["given"]) == {4}
    assert sum(worker["asked"]["item"] for worker in found) >= len(expected)


@pytest.mark.distributed
@pytest.mark.parametrize(("workers", "unread"), [(1, 0), (2, 1), (3, 0)])
def test_a_graph_that_one_worker_cannot_read_is_refused_by_all(gloo, log, workers, unread):
    """Before the others wait for it, to share out dense weights."""
    run = run_of(log, "rlmrec-gen")
    for told in gloo.call(workers, align_cases.refusal, run, unread):
        assert told.startswith("Cannot read the prepared log: ") and "gone.parquet" in told
