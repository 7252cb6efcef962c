"""Published train.txt and test.txt, with and without the lists of ids."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sellarec.data.raw import Dropped, Part
from sellarec.data.sources import text
from sellarec.data.sources.lightgcn import open_lightgcn
from sellarec.errors import UserError

TRAIN, TEST = "0 3 1\n1 1\n2\n3 \n", "0 2\r\n\r\n4 \t0  3 \r\n"
ITEMS = "org_id remap_id freebase_id\nB0 0 m.0a\nB1 1 m.0b\nB2 2 m.0c\nB3 3 m.0d\n"
USERS = "org_id remap_id\nann 0\nbob 1\ncid 2\ndan 3\neve 4\n"


def read(parts: Sequence[Part], dropped: Dropped | None = None) -> pa.Table:
    dropped = dropped or Dropped("refuse")
    return pa.concat_tables([table for part in parts for table in pickle.loads(pickle.dumps(part)).read(dropped)])


def write(folder: Path, train: str = TRAIN, test: str = TEST, **lists: str) -> str:
    for name, content in {"train": train, "test": test, **lists}.items():
        (folder / f"{name}.txt").write_text(content, newline="")
    return str(folder)


def test_reads_numbers(tmp_path):
    source = open_lightgcn(write(tmp_path))
    dropped = Dropped("refuse")
    rows = read(source.interactions, dropped)
    assert rows.schema == pa.schema({"user": pa.int64(), "item": pa.int64(), "label": pa.int8(), "split": pa.string()})
    assert [tuple(row.values()) for row in rows.to_pylist()] == [
        (0, 3, 1, "train"), (0, 1, 1, "train"), (1, 1, 1, "train"), (0, 2, 1, "test"), (4, 0, 1, "test"), (4, 3, 1, "test"),
    ]  # fmt: skip
    assert dropped.counts == {"a user without items": 2}
    assert (source.items, source.users, source.noun) == ((), (), "item")
    assert "positives only" in str(source.label_rule) and "as published" in str(source.split_rule)


def test_reads_original_ids_and_links(tmp_path):
    source = open_lightgcn(write(tmp_path, item_list=ITEMS, user_list=USERS), noun="book")
    rows = read(source.interactions)
    assert rows["user"].to_pylist() == ["ann", "ann", "bob", "ann", "eve", "eve"]
    assert rows["item"].to_pylist() == ["B3", "B1", "B1", "B2", "B0", "B3"]
    assert read(source.items).to_pylist()[3] == {
        "item": "B3",
        "title": None,
        "links": [{"name": "freebase", "value": "m.0d"}],
    }
    assert read(source.users)["user"].to_pylist() == ["ann", "bob", "cid", "dan", "eve"]
    assert [Path(file).name for file in source.files] == ["train.txt", "test.txt", "item_list.txt", "user_list.txt"]
    write(tmp_path, item_list=ITEMS.replace(" freebase_id", "").replace(" m.0", " ").replace(" a", ""))
    write(tmp_path, item_list="org_id remap_id\nB0 0\nB1 1\nB2 2\nB3 3\n")
    assert read(source.items).column_names == ["item", "title"]
    assert read(source.interactions) == rows


@pytest.mark.parametrize(
    ("line", "reason", "shown", "count"),
    [
        ("7 1 x", "the item is not a whole number (of 64 bits at most)", "7 … x", 1),
        ("7 1 1.5", "the item is not a whole number (of 64 bits at most)", "7 … 1.5", 1),
        (
            "7 9223372036854775808 1",
            "the item is not a whole number (of 64 bits at most)",
            "7 … 9223372036854775808",
            1,
        ),
        ("u 1 2", "the user is not a whole number (of 64 bits at most)", "u … 1", 2),
    ],
)
def test_bad_rows(tmp_path, line, reason, shown, count):
    source = open_lightgcn(write(tmp_path, train=f"0 1\n\n{line}\n-8 -9\n"))
    with pytest.raises(UserError) as refused:
        read(source.interactions)
    assert str(refused.value).startswith(f"{tmp_path / 'train.txt'}, line 3: {reason}. It reads: {shown!r}.")
    dropped = Dropped("drop")
    rows = read(source.interactions[:1], dropped)
    assert rows.num_rows == 4 - count
    assert (rows["user"].to_pylist()[-1], rows["item"].to_pylist()[-1]) == (-8, -9)
    assert dropped.counts == {reason: count}


def test_ids_that_are_not_in_their_list(tmp_path):
    write(tmp_path, train="0 1 9\n9 1 2\n", item_list=ITEMS, user_list=USERS)
    source = open_lightgcn(str(tmp_path))
    with pytest.raises(UserError, match=r"train\.txt, line 1: the item is not in item_list\.txt\. It reads: '0 … 9'"):
        read(source.interactions)
    dropped = Dropped("drop")
    assert read(source.interactions[:1], dropped).num_rows == 1
    assert dropped.counts == {"the item is not in item_list.txt": 1, "the user is not in user_list.txt": 2}


def test_bad_lines_of_a_list(tmp_path):
    write(tmp_path, item_list=ITEMS + "B4 four m.0e\nB5 5\n 6 m.0f\n")
    source = open_lightgcn(str(tmp_path))
    with pytest.raises(UserError, match=r"item_list\.txt, line 6: the remap_id is not a whole number"):
        read(source.items)
    dropped = Dropped("drop")
    assert read(source.items, dropped).num_rows == 4
    assert sorted(dropped.counts.values()) == [1, 1, 1]
    write(tmp_path, item_list="item remap_id\na 0\n")
    for parts in (source.items, source.interactions):
        with pytest.raises(
            UserError, match=r"item_list\.txt lacks the column org_id; its first line has item, remap_id"
        ):
            read(parts, Dropped("drop"))


@pytest.mark.parametrize("mode", ["refuse", "drop"])
def test_damaged_files(tmp_path, mode):
    def fails(pattern: str) -> None:
        with pytest.raises(UserError, match=pattern):
            read(open_lightgcn(str(tmp_path)).interactions, Dropped(mode))

    fails(r"lacks train\.txt and test\.txt")
    write(tmp_path, train="")
    fails(r"train\.txt is empty")
    write(tmp_path, item_list="")
    fails(r"item_list\.txt is empty")
    (tmp_path / "item_list.txt").unlink()
    (tmp_path / "test.txt").write_bytes(b"0 1\n1 \xe9\n")
    fails(r"test\.txt, line 2: not in UTF-8")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("gowalla/train.txt", TRAIN)
        archive.writestr("gowalla/test.txt", TEST)
    assert read(open_lightgcn(str(tmp_path / "a.zip")).interactions).num_rows == 6
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:60])
    with pytest.raises(UserError, match=r"a\.zip is cut short, damaged or no zip"):
        open_lightgcn(str(tmp_path / "a.zip"))


def test_large_files_are_read_in_ranges(tmp_path, monkeypatch):
    expected = read(open_lightgcn(write(tmp_path, train="".join(f"{n} {n} {n + 1}\n" for n in range(50)))).interactions)
    monkeypatch.setattr(text, "SPLIT_BYTES", 20)
    monkeypatch.setattr(text, "CHUNK_BYTES", 6)
    source = open_lightgcn(str(tmp_path))
    assert len(source.interactions) > 10
    assert read(source.interactions) == expected


def lines(table: pa.Table) -> str:
    """The rows as published: a line per user."""
    users, items = table["user"].to_numpy(), table["item"].to_numpy()
    starts = np.flatnonzero(np.diff(users, prepend=-1))
    return "".join(
        f"{users[part[0]]} {' '.join(map(str, items[part]))}\n" for part in np.split(np.arange(len(users)), starts[1:])
    )


@pytest.mark.parametrize(
    ("folder", "name", "train", "test", "users", "items"),
    [
        ("lightgcn-gowalla", "gowalla", 810_128, 217_242, 29_858, 40_981),
        ("kgat-amazon-book", "ab", 652_514, 193_920, 70_679, 24_915),
    ],
)
def test_published_splits(sellarec_data, tmp_path, folder, name, train, test, users, items):
    files = {
        split: lines(pq.read_table(sellarec_data / folder / f"{name}_{split}.parquet")) for split in ("train", "test")
    }
    if name == "ab":
        listed = pq.read_table(sellarec_data / folder / "ab_items.parquet").to_pylist()
        files["item_list"] = "org_id remap_id freebase_id\n" + "".join(
            f"{row['org_id']} {row['remap_id']} {row['freebase_id']}\n" for row in listed
        )
    source = open_lightgcn(write(tmp_path, **files))
    rows = read(source.interactions)
    counts = {row["values"]: row["counts"] for row in pc.value_counts(rows["split"]).to_pylist()}
    assert counts == {"train": train, "test": test}
    assert (pc.count_distinct(rows["user"]).as_py(), pc.count_distinct(rows["item"]).as_py()) == (users, items)
    if name == "ab":
        found = read(source.items)
        assert found.num_rows == items
        assert found["item"][0].as_py() == "0553092626"
        assert found["links"][0].as_py() == [{"name": "freebase", "value": "m.045wq1q"}]
