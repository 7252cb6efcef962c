import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sellarec.data.describe import as_page, as_text, describe, example_rows, summary
from sellarec.data.raw import ATTRIBUTES
from sellarec.errors import UserError

INTERACTIONS = pa.schema(
    [
        ("row", pa.int64()), ("user", pa.int64()), ("item", pa.int64()), ("label", pa.int8()), ("rating", pa.float32()),
        ("timestamp", pa.int64()), ("history", pa.list_(pa.int64())), ("history_length", pa.int32()),
        ("user_seen", pa.bool_()), ("item_seen", pa.bool_()), ("warm", pa.bool_()), ("expected", pa.float32()),
        ("domain", pa.int32()),
    ]
)  # fmt: skip


DOMAINS = ["Video_Games", "Books"]


def row(number, user, item, rating, date, history, seen=(True, True), domain="Books"):
    time = None if date is None else int(datetime.fromisoformat(date).replace(tzinfo=UTC).timestamp())
    return {
        "row": number, "user": user, "item": item, "label": int(rating is None or rating >= 4), "rating": rating,
        "timestamp": time, "history": history, "history_length": len(history), "user_seen": seen[0], "item_seen": seen[1],
        "warm": all(seen), "expected": None, "domain": None if domain is None else DOMAINS.index(domain),
    }  # fmt: skip


ROWS = {
    "train": [
        row(0, 0, 0, 5.0, "2020-01-05", []),
        row(1, 0, 1, 2.0, "2020-01-20", [0]),
        row(2, 1, 0, 4.0, "2020-03-01", []),
        row(3, 0, 2, 5.0, "2020-03-02", [0], domain="Video_Games"),
        row(4, 1, 2, None, None, [0], domain="Video_Games"),
    ],
    "valid": [row(5, 0, 2, 1.0, "2021-06-01", [0, 2], domain="Video_Games")],  # no cold row
    "test": [
        row(6, 2, 0, 4.0, "2022-01-01", [], seen=(False, True)),
        row(7, 1, 3, 3.0, "2022-02-01", [0, 2], seen=(True, False), domain=None),
        row(8, 1, 1, 5.0, "2022-02-02", [0, 2]),
    ],
}
TITLES = ["the harbor sea", "golden anchor and tide", 'lunar "orbit" <b>space</b>', "detective alibi crime"]


@pytest.fixture
def log(tmp_path) -> Path:
    return write_log(tmp_path / "log", ROWS)


def write_log(folder: Path, rows: dict) -> Path:
    for name, found in rows.items():
        place = folder / "interactions" / name
        place.mkdir(parents=True)
        table = pa.Table.from_pylist(found, INTERACTIONS)
        half = table.num_rows // 2  # two files, several row groups
        pq.write_table(table.slice(0, half), place / "part-00000.parquet", row_group_size=1)
        pq.write_table(table.slice(half), place / "part-00001.parquet", row_group_size=2)
    (folder / "items").mkdir()
    items = {
        "item": pa.array(range(4), pa.int64()),
        "external_id": pa.array([f"i{n}" for n in range(4)]),
        "title": pa.array(TITLES),
        "text": pa.array(TITLES),
        "attributes": pa.array([[]] * 4, ATTRIBUTES),
        "links": pa.array([[]] * 4, ATTRIBUTES),
    }
    pq.write_table(pa.table(items), folder / "items" / "part-00000.parquet")
    facts = {
        "users": 4, "items": 4, "rows": {name: len(found) for name, found in rows.items()}, "noun": "product",
        "dropped": {"repeated user and item": 2, "the rating is not a number": 1200}, "label_rule": "rating of 4 and more",
        "split_rule": "by time", "warm_rule": "user and item occur in train", "history_cap": 50, "sources": {"a.csv": "00ff"},
        "features": {"domain": DOMAINS},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(facts))
    return folder


def test_counts_are_those_of_the_rows(log):
    found = describe(log)
    train, valid, test = (found.splits[name] for name in ("train", "valid", "test"))
    assert [split.rows for split in (train, valid, test)] == [5, 1, 3]
    assert (train.positives, train.warm, train.warm_positives, train.seen_users, train.seen_items) == (4, 5, 4, 5, 5)
    assert (valid.positives, valid.warm, valid.warm_positives) == (0, 1, 0)
    assert (test.positives, test.warm, test.warm_positives, test.seen_users, test.seen_items) == (2, 1, 1, 2, 2)
    assert train.months == {(2020, 1): 2, (2020, 3): 2} and train.undated == 1
    assert train.ratings == {5.0: 2, 2.0: 1, 4.0: 1, None: 1}
    assert test.histories == {0: 1, 2: 2}
    assert train.features == {"domain": {"Books": 3, "Video_Games": 2}}
    assert test.features == {"domain": {"Books": 2, None: 1}}
    assert found.user_degrees == {0: 1, 1: 1, 4: 2}
    assert found.item_degrees == {1: 1, 2: 1, 3: 2}


def test_text_says_the_first_facts(log):
    found = describe(log)
    lines = summary(found)
    assert lines["users"] == "4, rows each: median 1, mean 2.2, at most 4; 44.4% of all belong to the most frequent 1%"
    assert lines["interactions"] == "9, 56.2% of all pairs"
    assert lines["dropped"] == "2 rows: repeated user and item; 1,200 rows: the rating is not a number"
    assert lines["history"] == "33.3% of the rows have none, median 1"
    assert lines["ratings"] == "1: 12.5%, 2: 12.5%, 3: 12.5%, 4: 25.0%, 5: 37.5%"
    assert lines["domain"] == "3 values, most often Books (55.6%)"
    text = as_text(found)
    assert re.search(r"train +5 +80.0% +100.0% +100.0% +100.0% +2020-01 to 2020-03, 1 rows undated", text)
    assert re.search(r"test +3 +66.7% +33.3% +66.7% +66.7% +2022-01 to 2022-02", text)


def test_page_holds_numbers_figures_and_examples(log):
    examples = [vars(example) for example in example_rows(log, 1)]
    page = as_page(describe(log), examples)
    assert page.count("<svg ") == 6
    assert "http://" not in page.replace("http://www.w3.org/", "") and "<script" not in page and "<link" not in page
    assert "5 (100.0%)" in page and "0 (0.0%)" in page  # all of train is warm, none of it cold
    assert "lunar &#34;orbit&#34; &lt;b&gt;space&lt;/b&gt;" in page and "<b>space" not in page
    assert page == as_page(describe(log), examples)


def test_a_log_without_ratings_times_and_features(tmp_path):
    plain = {
        name: [one | {"rating": None, "timestamp": None, "domain": None} for one in found]
        for name, found in ROWS.items()
    }
    folder = write_log(tmp_path / "log", plain)
    for path in folder.glob("interactions/*/*.parquet"):
        pq.write_table(pq.ParquetFile(path).read().drop_columns(["domain"]), path)
    found = describe(folder)
    assert "ratings" not in summary(found) and found.splits["train"].undated == 5
    page = as_page(found, [])
    assert page.count("<svg ") == 4 and "Categorical features" not in page and "Examples" not in page


def test_an_empty_split_is_described(tmp_path):
    folder = write_log(tmp_path / "log", ROWS | {"valid": []})
    found = describe(folder)
    assert found.splits["valid"].rows == 0
    assert re.search(r"valid +0 +– +– +– +– +–", as_text(found))
    assert [example.split for example in example_rows(folder, 1)] == ["train", "test"]
    assert "valid" in as_page(found, [])


def test_examples_are_the_last_rows_in_words(log):
    last = example_rows(log, 2)
    assert [(one.split, one.items, one.label) for one in last] == [
        ("train", [2, 0], 1), ("train", [2, 0], 1), ("valid", [2, 0, 2], 0), ("test", [3, 0, 2], 0), ("test", [1, 0, 2], 1),
    ]  # fmt: skip
    assert last[-1].title == TITLES[1] and last[-1].history == [TITLES[0], TITLES[2]]
    assert len(example_rows(log, 50)) == 9 and example_rows(log, 0) == []


def test_rows_are_counted_batch_by_batch(log, monkeypatch):
    whole = describe(log)
    monkeypatch.setattr("sellarec.data.describe.BATCH_ROWS", 1)
    assert describe(log) == whole


def damage(log: Path, what: str) -> None:
    manifest = json.loads((log / "manifest.json").read_text())
    if what == "no manifest":
        (log / "manifest.json").unlink()
    elif what == "manifest of something else":
        (log / "manifest.json").write_text('{"stage": "align"}')
    elif what == "damaged manifest":
        (log / "manifest.json").write_text("{")
    elif what == "rows":
        (log / "manifest.json").write_text(json.dumps(manifest | {"rows": {"train": 4, "valid": 1, "test": 3}}))
    elif what == "users":
        (log / "manifest.json").write_text(json.dumps(manifest | {"users": 2}))
    elif what == "no split":
        for path in (log / "interactions" / "valid").iterdir():
            path.unlink()
        (log / "interactions" / "valid").rmdir()
    elif what == "damaged part":
        next((log / "interactions" / "valid").iterdir()).write_bytes(b"PAR1 nothing")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no manifest", "holds no prepared log: there is no manifest.json"),
        ("manifest of something else", "is no manifest of a prepared log: it has no users, items, rows"),
        ("damaged manifest", "manifest.json is damaged"),
        ("rows", "the train split in .* has 5 rows, but its manifest says 4"),
        ("users", "has user 2 to 2|has user 1 to 2|has user 0 to 2|numbered from 0"),
        ("no split", "has no valid split"),
        ("damaged part", "Cannot read .*valid"),
    ],
)
def test_what_is_no_log_is_refused(log, what, message):
    damage(log, what)
    with pytest.raises(UserError, match=message):
        describe(log)


def test_the_artifact_of_stage_prepare_is_a_log_too(log):
    expected = describe(log)
    facts = json.loads((log / "manifest.json").read_text())
    (log / "manifest.json").write_text(json.dumps({"stage": "prepare", "fingerprint": "00ff", "facts": facts}))
    assert describe(log) == expected


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        describe(tmp_path / "nowhere")


def run_job(*arguments: str) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, str(root / "jobs" / "describe.py"), *arguments], capture_output=True, text=True, cwd=root
    )


def test_job_shows_prompts_with_their_tokens(log, decoder, tmp_path):
    out = tmp_path / "page.html"
    done = run_job(str(log), "--out", str(out), "--llm", str(decoder), "--examples", "1")
    assert done.returncode == 0, done.stderr
    page = out.read_text()
    assert "golden anchor and tide" in page and ("Answer:" in page or "Good?" in page)
    tokens = [int(count) for count in re.findall(r"label [01], (\d+) tokens", page)]
    assert len(tokens) == 3 and min(tokens) > 10 and np.ptp(tokens) > 0


def test_job_refuses_what_is_no_log(tmp_path):
    done = run_job(str(tmp_path))
    assert done.returncode == 2 and "holds no prepared log" in done.stderr and "Traceback" not in done.stderr
