"""The recipe collm-amazon-book, on a small file in Amazon 2018's format: its published rule, and the counts it insists on."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sellarec.data.log import read_log

ROOT = Path(__file__).parents[2]


def reviews() -> list[dict]:
    """25 users x 25 items in 2017, and what the rule leaves out: too few rows, other years.

    `few` and `rare` have 20 rows, one too few; `just` has 21.
    """
    pairs = [(f"u{u}", f"i{i}") for u in range(25) for i in range(25)]
    pairs += [("few", f"i{i}") for i in range(20)]
    pairs += [(f"u{u}", "rare") for u in range(20)]
    pairs += [("just", f"i{i}") for i in range(21)]
    dated = []
    for number, (user, item) in enumerate(pairs):
        date = datetime(2017, 1, 1, tzinfo=UTC) + timedelta(days=number * 7 % 365)
        dated.append((user, item, date, [5.0, 4.0, 1.0][number % 3]))
    for year in (2016, 2018):
        dated += [("few", f"i{i}", datetime(year, 1, 1, tzinfo=UTC), 5.0) for i in range(20, 25)]
    return [
        {
            "overall": stars,
            "verified": True,
            "reviewTime": date.strftime("%m %d, %Y"),
            "reviewerID": user,
            "asin": item,
            "unixReviewTime": int(date.timestamp()),
        }
        for user, item, date, stars in dated
    ]


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    described = [{"asin": f"i{i}", "title": f"Book {i}"} for i in range(25)]
    for name, rows in (("Books_5", reviews()), ("meta_Books", described)):
        with gzip.open(folder / f"{name}.json.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def prepare(books: Path, out: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "jobs" / "prepare.py"), "collm-amazon-book", "--path", books, "--out", out]
    return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)


def test_the_published_rule(books: Path, tmp_path: Path) -> None:
    done = prepare(books, tmp_path / "log", "--data.expected", "None")
    assert done.returncode == 0, done.stderr
    log = read_log(tmp_path / "log")
    kept = [
        row
        for row in reviews()
        if row["reviewTime"].endswith("2017") and row["reviewerID"] != "few" and row["asin"] != "rare"
    ]
    assert len(kept) == 25 * 25 + 21
    users = dict(enumerate(log.users()["external_id"].to_pylist()))
    items = dict(enumerate(log.items()["external_id"].to_pylist()))
    assert set(users.values()) == {row["reviewerID"] for row in kept} and len(items) == 25
    periods = {"train": ("01-01", "11-30"), "valid": ("12-01", "12-16"), "test": ("12-17", "12-31")}
    for split, (first, last) in periods.items():
        rows = log.split(split)
        found = sorted(
            (users[user], items[item], label, timestamp)
            for user, item, label, timestamp in zip(
                *(rows[name].to_pylist() for name in ("user", "item", "label", "timestamp")), strict=True
            )
        )
        meant = sorted(
            (row["reviewerID"], row["asin"], int(row["overall"] == 5.0), row["unixReviewTime"])
            for row in kept
            if first <= datetime.fromtimestamp(row["unixReviewTime"], UTC).strftime("%m-%d") <= last
        )
        assert found == meant and meant, split


def test_other_counts_than_the_published_ones_are_refused(books: Path, tmp_path: Path) -> None:
    refused = prepare(books, tmp_path / "log")
    assert refused.returncode != 0
    (line,) = refused.stderr.strip().splitlines()
    assert "train rows, not 727,463" in line and "25 items, not 34,153" in line and "--data.expected None" in line
    assert not (tmp_path / "log" / "manifest.json").exists()
