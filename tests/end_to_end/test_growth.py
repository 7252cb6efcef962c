"""A log that is prepared first, trained on as it is, extended and trained on further; the model that is left, ranked with."""

import csv
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import main_job
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sellarec.config import Collab
from sellarec.data.log import Log, read_log
from sellarec.evaluation.queries import queries, write_candidates
from sellarec.training.stream import Order, prepared, row_groups
from sellarec.training.table import SavedTable, Table, initial_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SEED, BATCH, STEPS = 3, 16, 2
USERS, ITEMS = 40, 60
DIM = 8


def write_rows(path: Path, count: int) -> None:
    """The first rows of a log in which new users and items turn up as time goes on."""
    generator = np.random.default_rng(0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "label", "timestamp"])
        for at in range(count):
            share = 0.5 + 0.5 * at / 600
            user, item = (int(generator.integers(0, share * most)) for most in (USERS, ITEMS))
            writer.writerow([f"u{user}", f"i{item}", int(generator.random() < 0.7), 1_600_000_000 + at])


def job(name: str, *arguments: str | Path) -> None:
    command = [sys.executable, str(main_job.ROOT / "jobs" / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=main_job.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Both logs, and the artifact that was trained on each."""
    folder = tmp_path_factory.mktemp("growth")
    logs, artifacts, printed = [], [], []
    for number, count in enumerate((400, 600)):
        write_rows(folder / f"{number}.csv", count)
        log = folder / f"log-{number}"
        columns = ["--data.columns.label", "label", "--data.columns.timestamp", "timestamp"]
        extends = ["--init-from", logs[-1]] if logs else []
        job("prepare.py", "tables", "--path", folder / f"{number}.csv", *columns, *extends, "--out", log)
        further = ["--collab.init-from", artifacts[-1]] if artifacts else []
        flags = ["--workers", "2", "--seed", SEED, "--collab.dim", DIM, "--collab.batch", BATCH, "--collab.l2", "0"]
        flags += ["--collab.max-steps", STEPS if artifacts else "30", "--name", f"run-{number}", *further]
        where = ["--data", log, "--workspace", folder / "w", "--stages", "prepare,collab"]
        printed.append(main_job.train("log", *where, *map(str, flags), log=folder / f"{number}.log"))
        logs.append(log)
        artifacts.append(main_job.artifact(folder / "w", f"run-{number}", "collab"))
    return SimpleNamespace(folder=folder, logs=logs, artifacts=artifacts, printed=printed)


def test_a_prepared_log_is_taken_as_it_is(grown: SimpleNamespace) -> None:
    given = read_log(grown.logs[1])
    taken = read_log(main_job.artifact(grown.folder / "w", "run-1", "prepare"))
    assert taken.facts == given.facts
    for split in ("train", "valid", "test"):
        assert taken.split(split).equals(given.split(split))
    assert taken.items().equals(given.items()) and taken.users().equals(given.users())


def test_ids_go_on(grown: SimpleNamespace) -> None:
    first, second = map(read_log, grown.logs)
    for name in ("users", "items"):
        ids = [getattr(log, name)(["external_id"])["external_id"].to_pylist() for log in (first, second)]
        assert len(ids[0]) < len(ids[1]) and ids[1][: len(ids[0])] == ids[0]


def test_rows_that_no_gradient_reached_are_the_earlier_models_and_new_ones_fresh(grown: SimpleNamespace) -> None:
    log, settings = read_log(grown.logs[1]), Collab(dim=DIM)
    order = Order(tuple(row_groups([str(path) for path in log.split_paths("train")])), BATCH, SEED)
    pieces = order.pieces(0, STEPS)
    parts = [part for piece in pieces for part in prepared(order, piece, ("row", "user", "item"), None)]
    rows = pa.concat_tables(parts)
    assert len(rows) == BATCH * STEPS
    assert main_job.read_json(grown.artifacts[1] / "training.json")["kept_step"] == STEPS
    for name, number in (("user", log.facts["users"]), ("item", log.facts["items"])):
        before, after = (SavedTable(artifact / "tables", name) for artifact in grown.artifacts)
        old = before.facts["rows"]
        assert 0 < old < number == after.facts["rows"]
        fresh = initial_rows(Table(name, number, DIM, (name,), init_std=settings.init_std), SEED, 0, number)
        start = np.concatenate([before.read(0, old), fresh[old:]])
        touched = np.isin(np.arange(number), rows[name].to_numpy())
        assert touched[:old].any() and not touched[:old].all() and not touched[old:].all()
        moved = (after.read(0, number) != start).any(1)
        assert (moved == touched).all()
        assert (start[:old] != fresh[:old]).any(1).sum() > old // 2, "the first model learnt"


def test_rows_start_from_vectors_of_a_file_and_another_file_is_another_run(grown: SimpleNamespace) -> None:
    """Items' rows that no gradient reached are the file's; another file, or none, under the same name is refused."""
    folder, log = grown.folder, read_log(grown.logs[1])
    ids = log.items(["external_id"])["external_id"].to_pylist()
    vectors = np.arange(len(ids) * (DIM - 1), dtype=np.float32).reshape(len(ids), -1) / 1000
    pq.write_table(pa.table({"id": ids[::-1], "vector": list(vectors[::-1])}), folder / "items.parquet")
    pq.write_table(pa.table({"id": ids, "vector": list(vectors + 1)}), folder / "others.parquet")
    users = log.users(["external_id"])["external_id"].to_pylist()
    of_users = np.ones((len(users), DIM - 1), np.float32)
    pq.write_table(pa.table({"id": users, "vector": list(of_users)}), folder / "users.parquet")
    common = [
        "log",
        "--data",
        grown.logs[1],
        "--workspace",
        folder / "w",
        "--stages",
        "prepare,collab",
        "--name",
        "given",
    ]
    common += ["--collab.init-users", folder / "users.parquet"]  # some have no train row in this log
    common += ["--workers", "2", "--collab.dim", str(DIM), "--collab.batch", "4", "--collab.max-steps", "1"]
    printed = main_job.train(*common, "--collab.init-items", folder / "items.parquet", log=folder / "given.log")
    assert f"{len(ids)} of {len(ids)} items start from {folder / 'items.parquet'}" in printed
    rows = SavedTable(main_job.artifact(folder / "w", "given", "collab") / "tables", "item").read(0, len(ids))
    kept = (rows == np.pad(vectors, ((0, 0), (0, 1)))).all(1)
    assert len(ids) - 4 <= kept.sum() < len(ids)
    for other in ([], ["--collab.init-items", folder / "others.parquet"]):
        printed = main_job.train(*common, *other, log=folder / "refused.log", status=2)
        assert "collab.init_items" in printed and "choose another --name" in printed


# What is left, ranked with

NAME = "mf"
CUTOFFS = (5, 10, 20)


@pytest.fixture(scope="module")
def evaluated(grown: SimpleNamespace) -> Any:
    """Records by ranking and workers, each made when it is first asked for."""

    @cache
    def records(ranking: str, workers: int) -> list[dict[str, Any]]:
        out = grown.folder / f"{ranking}-{workers}.json".replace(":", "-")
        flags = ["--ranking", ranking, "--workers", workers, "--replicates", 20, "--batch", 7, "--seed", SEED]
        job("evaluate.py", "--artifact", grown.artifacts[1], "--data", grown.logs[1], "--out", out, *map(str, flags))
        assert [path.name for path in grown.folder.glob(".*")] == [], "nothing is left beside the records"
        return main_job.read_json(out)

    return records


def scores_of(grown: SimpleNamespace, log: Log, user: int, is_seen: bool) -> np.ndarray:
    """float64 [items]: a user's scores of the whole catalog, from the exported tables."""
    tables = {name: SavedTable(grown.artifacts[1] / "tables", name) for name in ("user", "item")}
    rows = {name: table.read(0, table.facts["rows"]).astype(np.float64) for name, table in tables.items()}
    items = rows["item"] * log.items(["seen"])["seen"].to_numpy()[:, None]
    own = rows["user"][user] * is_seen
    return items[:, :-1] @ own[:-1] + items[:, -1] + own[-1]


def plain(ranked: dict[int, list[int]], relevant: dict[int, list[int]]) -> dict[str, float]:
    """Means over users, by the definitions."""
    found: dict[str, list[float]] = {}
    for user, items in ranked.items():
        wanted = set(relevant[user])
        for k in CUTOFFS:
            ranks = [rank for rank, item in enumerate(items[:k], 1) if item in wanted]
            ideal = sum(1 / np.log2(1 + rank) for rank in range(1, min(k, len(wanted)) + 1))
            found.setdefault(f"hit@{k}", []).append(float(bool(ranks)))
            found.setdefault(f"recall@{k}", []).append(len(ranks) / len(wanted))
            found.setdefault(f"ndcg@{k}", []).append(sum(1 / np.log2(1 + rank) for rank in ranks) / ideal)
            found.setdefault(f"mrr@{k}", []).append(1 / ranks[0] if ranks else 0.0)
    return {name: float(np.mean(values)) for name, values in found.items()}


def best_first(scores: np.ndarray, items: list[int]) -> list[int]:
    return sorted(items, key=lambda item: (-scores[item], item))


RANKINGS = ["full", "candidates:20"]


@pytest.mark.parametrize("ranking", RANKINGS)
def test_rankings_are_those_of_the_exported_tables(grown: SimpleNamespace, evaluated: Any, ranking: str) -> None:
    log = read_log(grown.logs[1])
    whom = queries(log, "test").to_pylist()
    if ranking == "full":
        lists = {q["user"]: sorted(set(range(log.facts["items"])) - set(q["excluded"])) for q in whom}
    else:
        path = grown.folder / "candidates.parquet"
        write_candidates(log, "test", 20, SEED, path)
        lists = {q["user"]: [] for q in whom}
        for row in pq.read_table(path, columns=["user", "item"]).to_pylist():
            lists[row["user"]].append(row["item"])
    ranked = {q["user"]: best_first(scores_of(grown, log, q["user"], q["user_seen"]), lists[q["user"]]) for q in whom}
    expected = plain(ranked, {q["user"]: q["relevant"] for q in whom})
    records = evaluated(ranking, 2)
    found = {record["metric"]: record["value"] for record in records if record["protocol"] != "pointwise"}
    assert found == pytest.approx(expected, rel=1e-9) and len(whom) > 10
    assert {record["model"] for record in records} == {NAME}
    assert {r["count"] for r in records if r["protocol"] != "pointwise"} == {len(whom)}
    assert {r["metric"] for r in records if r["protocol"] == "pointwise"} == {"auc", "uauc"}


@pytest.mark.parametrize("ranking", RANKINGS)
def test_the_number_of_workers_changes_no_ranking(evaluated: Any, ranking: str) -> None:
    one, other = (
        [{**r, "value": pytest.approx(r["value"]), "low": None, "high": None} for r in evaluated(ranking, 1)],
        [{**r, "low": None, "high": None} for r in evaluated(ranking, 2)],
    )
    assert other == one
