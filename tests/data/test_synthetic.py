import gzip
import json
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sellarec.data.raw import Dropped
from sellarec.data.synthetic import (
    CATEGORIES,
    GROWTH,
    ITEM_SPREAD,
    RATING_COUNTS,
    USER_SPREAD,
    Synthetic,
    block_table,
    blocks,
    categories,
    degree_probabilities,
    draw_block,
    item_names,
    permutation,
    raw_files,
    spread_from_ones,
    synthetic_source,
    user_names,
    write_raw,
    write_raw_file,
)
from sellarec.errors import UserError

REVIEW_FIELDS = "rating, title, text, images, asin, parent_asin, user_id, timestamp, helpful_vote, verified_purchase"
META_FIELDS = (
    "main_category, title, average_rating, rating_number, features, description, price, images, videos, store, categories, "
    "details, parent_asin, bought_together"
)
SMALL = Synthetic(users=300, items=200, interactions=3_000, seed=5, block_rows=128)
LARGE = Synthetic(users=30_000, items=26_000, interactions=300_000, seed=1)
PINNED = ([82, 221, 172, 226], [22, 33, 35, 22], [3, 5, 4, 5])


def rows_of(settings: Synthetic) -> dict[str, np.ndarray]:
    drawn = [draw_block(settings, number) for number in range(len(blocks(settings)))]
    return {
        name: np.concatenate([getattr(rows, name) for rows in drawn]) for name in ("user", "item", "rating", "time")
    }


@pytest.fixture(scope="module")
def large() -> dict[str, np.ndarray]:
    return rows_of(LARGE)


def test_blocks_are_the_same_in_any_order():
    numbers = list(range(len(blocks(SMALL))))
    forwards = [block_table(SMALL, number) for number in numbers]
    for number in reversed(numbers):
        assert block_table(SMALL, number).equals(forwards[number])
    other = Synthetic(users=300, items=200, interactions=3_000, seed=6, block_rows=128)
    assert not block_table(other, 0).equals(forwards[0])


def test_the_same_rows_whatever_was_drawn_is_pinned():
    # These values are the definition of seed 5: a change of them changes every benchmark's data.
    rows = draw_block(SMALL, 7)
    assert (rows.user[:4].tolist(), rows.item[:4].tolist(), rows.rating[:4].tolist()) == PINNED


@pytest.mark.parametrize(
    "settings", [SMALL, Synthetic(users=7, items=1, interactions=7), Synthetic(users=1, items=9, interactions=9)]
)
def test_counts_are_met_exactly(settings):
    rows = rows_of(settings)
    assert len(rows["user"]) == settings.interactions
    assert sorted(set(rows["user"].tolist())) == list(range(settings.users))
    assert sorted(set(rows["item"].tolist())) == list(range(settings.items))


@given(users=st.integers(1, 60), items=st.integers(1, 60), more=st.integers(0, 500), block=st.integers(1, 40))
def test_every_user_and_item_occurs(users, items, more, block):
    most = users * items
    settings = Synthetic(users=users, items=items, interactions=min(max(users, items) + more, most), block_rows=block)
    rows = rows_of(settings)
    assert len(rows["user"]) == settings.interactions
    assert set(rows["user"].tolist()) == set(range(users))
    assert set(rows["item"].tolist()) == set(range(items))
    assert all(block.rows > 0 for block in blocks(settings))


@given(size=st.integers(1, 3_000), key=st.tuples(st.integers(0, 2**40), st.integers(0, 7)))
def test_permutation_is_a_bijection(size, key):
    assert sorted(permutation(np.arange(size), size, key).tolist()) == list(range(size))


@given(size=st.integers(1, 2**31 - 1), numbers=st.data())
def test_permutation_of_a_large_range(size, numbers):
    chosen = np.array(sorted(numbers.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=50))))
    found = permutation(chosen, size, (3, 1))
    assert found.min() >= 0 and found.max() < size and len(set(found.tolist())) == len(chosen)


def test_popularity_is_not_in_the_order_of_ids(large):
    degrees = np.bincount(large["user"])
    assert abs(np.corrcoef(np.argsort(np.argsort(degrees)), np.arange(len(degrees)))[0, 1]) < 0.02


@given(st.sets(st.integers(0, 2**31 - 1), min_size=1, max_size=200))
def test_names_are_distinct_and_of_amazons_form(numbers):
    chosen = np.array(sorted(numbers))
    users, items = user_names(chosen).to_pylist(), item_names(chosen).to_pylist()
    assert len(set(users)) == len(set(items)) == len(chosen)
    assert all(len(name) == 28 and name[0] == "A" and name.isascii() and name.isalnum() for name in users)
    assert all(len(name) == 10 and name.startswith("B0") and name.isascii() and name.isalnum() for name in items)


def test_user_degrees_follow_the_stated_distribution(large):
    degrees = np.bincount(large["user"])
    values = np.arange(1, degrees.max() + 1)
    stated = np.cumsum(degree_probabilities(values, LARGE.interactions / LARGE.users, USER_SPREAD))
    observed = np.searchsorted(np.sort(degrees), values, side="right") / len(degrees)
    # 1.95 / sqrt(n) is the 99.9% bound of the KS distance; degrees of a fixed total vary less.
    assert np.abs(stated - observed).max() < 1.95 / np.sqrt(len(degrees))


def test_item_degrees_follow_the_stated_distribution_in_a_category(large):
    category = max(categories(LARGE), key=lambda one: one.items)
    degrees = np.bincount(large["item"])[category.first_item : category.first_item + category.items]
    assert degrees.sum() == category.rows
    values = np.arange(1, degrees.max() + 1)
    stated = np.cumsum(degree_probabilities(values, category.rows / category.items, ITEM_SPREAD))
    observed = np.searchsorted(np.sort(degrees), values, side="right") / len(degrees)
    assert np.abs(stated - observed).max() < 1.95 / np.sqrt(len(degrees))


def test_probabilities_add_up_and_have_the_mean():
    values = np.arange(1, 8_000)
    found = degree_probabilities(values, 4.0, 1.2)
    assert found.sum() == pytest.approx(1, abs=1e-6)
    assert values @ found == pytest.approx(4, rel=1e-3)
    assert degree_probabilities(np.array([1]), 3.0, 1e-9)[0] == pytest.approx(np.exp(-2))


def test_spreads_are_those_of_the_published_totals():
    assert spread_from_ones(80.74 / 20.36, 0.519) == pytest.approx(USER_SPREAD, abs=1e-3)
    assert spread_from_ones(80.74 / 8.21, 0.433) == pytest.approx(ITEM_SPREAD, abs=1e-3)


def test_categories_have_the_published_proportions():
    settings = Synthetic(users=54_510_000, items=48_190_000, interactions=571_540_000)
    found = categories(settings)
    assert [one.name for one in found] == list(CATEGORIES)
    assert sum(one.items for one in found) == settings.items and sum(one.rows for one in found) == settings.interactions
    for one in found:
        items, ratings = CATEGORIES[one.name]
        assert one.items == pytest.approx(items, rel=0.02)
        assert one.rows == pytest.approx(ratings, rel=0.02)


def test_ratings_and_times_have_the_stated_distribution(large):
    shares = np.bincount(large["rating"], minlength=6)[1:] / LARGE.interactions
    assert shares == pytest.approx(np.array(RATING_COUNTS) / sum(RATING_COUNTS), abs=0.005)
    first, last = datetime(1996, 5, 1, tzinfo=UTC), datetime(2023, 10, 1, tzinfo=UTC)
    assert large["time"].min() >= first.timestamp() * 1000 and large["time"].max() < last.timestamp() * 1000
    until_2018 = datetime(2018, 11, 1, tzinfo=UTC).timestamp() * 1000
    assert (large["time"] < until_2018).mean() == pytest.approx(GROWTH[-2][1] / GROWTH[-1][1], abs=0.005)
    assert (np.diff(large["time"]) < 0).any()  # as in the raw files, rows are not in the order of time


def test_source_gives_the_rows_and_items_of_its_parts():
    source = synthetic_source(SMALL)
    dropped = Dropped("refuse")
    # Any order of the parts, any process: each stands for itself.
    rows = pa.concat_tables([pa.concat_tables(part.read(dropped)) for part in reversed(source.interactions)])
    items = pa.concat_tables([table for part in source.items for table in part.read(dropped)])
    assert rows.num_rows == SMALL.interactions and rows.schema.names == [
        "user",
        "item",
        "rating",
        "timestamp",
        "domain",
    ]
    assert rows.schema.field("rating").type == pa.float32() and rows.schema.field("timestamp").type == pa.int64()
    assert items["item"].to_pylist() == item_names(np.arange(SMALL.items)).to_pylist()
    assert set(rows["item"].to_pylist()) == set(items["item"].to_pylist())
    assert items["title"].null_count == 0 and all(len(title.split()) > 4 for title in items["title"].to_pylist())
    assert items["attributes"][0].as_py()[0] == {"name": "category", "value": "Amazon Fashion"}
    domains = Counter(rows["domain"].to_pylist())
    assert domains == {one.name: one.rows for one in categories(SMALL)}
    assert not dropped.counts and source.files == ()


def test_raw_files_read_as_amazons_are_the_same_source(tmp_path):
    from sellarec.data.sources.amazon import open_amazon

    for name in raw_files(SMALL):
        write_raw_file(SMALL, tmp_path, name)
    read = open_amazon(str(tmp_path / "raw"), "2023", tuple(one.name for one in categories(SMALL)), form="reviews")
    made = synthetic_source(SMALL)
    for one, other in ((read.interactions, made.interactions), (read.items, made.items)):
        first, second = (
            pa.concat_tables([t for part in x for t in part.read(Dropped("refuse"))]) for x in (one, other)
        )
        assert first.select(second.schema.names).cast(second.schema).to_pylist() == second.to_pylist()


@pytest.mark.parametrize("compress", [False, True])
def test_raw_files_have_the_published_fields_and_the_same_rows(tmp_path, compress):
    expected: dict[str, list[dict]] = {name: [] for name in CATEGORIES}
    for number in range(len(blocks(SMALL))):
        table = block_table(SMALL, number)
        expected[table["domain"][0].as_py()] += table.select(["user", "item", "rating", "timestamp"]).to_pylist()
    described = {
        row["item"]: row
        for part in synthetic_source(SMALL).items
        for t in part.read(Dropped("refuse"))
        for row in t.to_pylist()
    }
    for name, (kind, position) in raw_files(SMALL, compress).items():
        assert write_raw_file(SMALL, tmp_path, name, compress) == (tmp_path / name).stat().st_size
        content = (tmp_path / name).read_bytes()
        lines = [json.loads(line) for line in (gzip.decompress(content) if compress else content).decode().splitlines()]
        category = categories(SMALL)[position]
        if kind == "reviews":
            assert name == f"raw/review_categories/{category.name}.jsonl{'.gz' if compress else ''}"
            assert all(", ".join(line) == REVIEW_FIELDS for line in lines)
            found = [
                {
                    "user": r["user_id"],
                    "item": r["parent_asin"],
                    "rating": r["rating"],
                    "timestamp": r["timestamp"] // 1000,
                }
                for r in lines
            ]
            assert found == expected[category.name]
        else:
            assert all(", ".join(line) == META_FIELDS for line in lines)
            assert [line["parent_asin"] for line in lines] == [
                item for item in described if item in {line["parent_asin"] for line in lines}
            ]
            assert all(described[line["parent_asin"]]["title"] == line["title"] for line in lines)
            assert len(lines) == category.items and all(p is None or p > 0 for p in (line["price"] for line in lines))


def test_a_raw_file_is_whole_or_not_there(tmp_path, monkeypatch):
    def broken(settings, category):
        yield b"{}\n"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sellarec.data.synthetic._review_lines", broken)
    name = next(iter(raw_files(SMALL)))
    with pytest.raises(OSError, match="No space left"):
        write_raw_file(SMALL, tmp_path, name)
    assert list((tmp_path / name).parent.iterdir()) == []


def test_files_that_stand_are_not_written_over(tmp_path):
    name = next(iter(raw_files(SMALL)))
    write_raw_file(SMALL, tmp_path, name)
    with pytest.raises(UserError, match="stands already"):
        write_raw(SMALL, tmp_path)


@pytest.mark.ray
def test_raw_files_of_several_tasks_are_those_of_one(tmp_path):
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    told: dict[str, int] = {}
    try:
        written = write_raw(SMALL, tmp_path / "many", compress=True, on_file=told.__setitem__)
    finally:
        ray.shutdown()
    assert {str(path.relative_to(tmp_path / "many")) for path in written} == set(told) == set(raw_files(SMALL, True))
    for name in told:
        write_raw_file(SMALL, tmp_path / "one", name, compress=True)
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"users": 0}, "users is 0: at least 1"),
        ({"items": -3}, "items is -3: at least 1"),
        ({"interactions": 0}, "interactions is 0"),
        ({"users": 3_001}, "users is 3,001, but interactions only 3,000"),
        ({"items": 3_001}, "items is 3,001, but interactions only 3,000"),
        ({"users": 20, "items": 20}, "20 users and 20 items make no more than 400 pairs"),
        ({"interactions": 2**31}, "fewer than 2,147,483,648"),
        ({"seed": -1}, "seed is -1"),
        ({"user_spread": float("nan")}, "user_spread is nan"),
        ({"block_rows": 0}, "block_rows is 0"),
    ],
)
def test_numbers_that_make_no_data_are_refused(changed, message):
    with pytest.raises(UserError, match=message):
        Synthetic(**{"users": 100, "items": 100, "interactions": 3_000} | changed)


def run_job(*arguments: str) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "jobs" / "generate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def test_job_refuses_numbers_that_make_no_data(tmp_path):
    done = run_job("--users", "9", "--items", "5", "--interactions", "8", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "users is 9, but interactions only 8" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.ray
def test_job_writes_raw_files(tmp_path):
    numbers = ["--users", "60", "--items", "50", "--interactions", "400", "--seed", "3"]
    done = run_job(*numbers, "--out", str(tmp_path), "--gzip", "--raw-only")
    assert done.returncode == 0, done.stderr
    settings = Synthetic(users=60, items=50, interactions=400, seed=3)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.gz")} == set(raw_files(settings, True))
