"""The tables of results that jobs/reproduce.py makes."""

import subprocess
import sys
from pathlib import Path

import pytest

from sellarec.config import parse

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "jobs"))
import reproduce  # noqa: E402


@pytest.mark.parametrize("name", reproduce.TABLES)
def test_the_recipes_of_a_table_go_together(name: str) -> None:
    config = parse([*reproduce.TABLES[name].recipes, "--seed", "1", "--stages", "prepare,collab"])
    assert config.stages == ("prepare", "collab")


def record(seed: int, metric: str, value: float | None, rows: str = "all") -> dict:
    return {"model": "mf", "seed": seed, "metric": metric, "value": value, "rows": rows}


def test_means_and_deviations_are_over_the_seeds_of_all_rows() -> None:
    records = [record(1, "auc", 0.7), record(2, "auc", 0.8), record(1, "auc", 0.1, "warm"), record(1, "uauc", 0.6)]
    records.append(record(2, "uauc", None))
    _, auc, uauc = reproduce.over_seeds(records).splitlines()
    assert auc.split() == ["mf", "auc", "0.7500", "0.0707", "2"]
    assert uauc.split() == ["mf", "uauc", "0.6000", "n/a", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "the table comes first"), (["moon"], "not moon"), (["collm-mf", "--seed", "3"], "--seed is given")],
)
def test_mistakes_are_told(arguments: list[str], message: str) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "reproduce.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr
