"""RecBole's atomic files: what is read of which column, and the line of what is wrong in them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from sellarec.data.raw import Dropped, Part
from sellarec.data.sources import text
from sellarec.data.sources.recbole import open_recbole
from sellarec.errors import UserError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n186\ta-b\t3.5\t8.9e8\n"
ITEM = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\tprice:float\tpicture:float_seq\n"
    '242\tKolya "K"\t1996\tComedy  Drama\t1.5\t0.1 0.2\n'
    "a-b\t\t\t\t\t\n"
)
USER = "user_id:token\tage:token\tgender:token\n196\t49\tM\n"


def read(parts: Sequence[Part], dropped: Dropped | None = None) -> pa.Table:
    dropped = dropped or Dropped("refuse")
    return pa.concat_tables([table for part in parts for table in pickle.loads(pickle.dumps(part)).read(dropped)])


def write(folder: Path, name: str = "ml", **files: str) -> str:
    for end, content in files.items():
        (folder / f"{name}.{end}").write_text(content, encoding="utf-8", newline="")
    return str(folder)


def pairs(*named: tuple[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in named]


def test_reads_interactions_items_and_users(tmp_path):
    source = open_recbole(write(tmp_path, inter=INTER, item=ITEM, user=USER), noun="movie")
    assert read(source.interactions).to_pylist() == [
        {"user": "196", "item": "242", "rating": 3.0, "timestamp": 881250949},
        {"user": "186", "item": "a-b", "rating": 3.5, "timestamp": 890000000},
    ]
    assert read(source.items).to_pylist() == [
        {
            "item": "242",
            "title": 'Kolya "K"',
            "attributes": pairs(("release_year", "1996"), ("class", "Comedy"), ("class", "Drama"), ("price", "1.5")),
        },
        {"item": "a-b", "title": None, "attributes": []},
    ]
    assert read(source.users).to_pylist() == [{"user": "196", "attributes": pairs(("age", "49"), ("gender", "M"))}]
    assert [Path(file).name for file in source.files] == ["ml.inter", "ml.item", "ml.user"]
    assert (source.noun, source.features, source.label_rule) == ("movie", (), None)


def test_labels_features_and_unknown_ratings(tmp_path):
    inter = (
        "label:float\titem_id:token\tdevice:token\tuser_id:token\treview:token_seq\trating:float\tdwell:float\n"
        "1.0\ti\tphone\tu\tso good\t\t3.5\n0\ti\t\tu\t\t4\t\n"
    )
    source = open_recbole(write(tmp_path, inter=inter))
    rows = read(source.interactions)
    assert rows.to_pylist() == [
        {"user": "u", "item": "i", "label": 1, "device": "phone", "rating": None},
        {"user": "u", "item": "i", "label": 0, "device": "", "rating": 4.0},
    ]
    assert (rows["label"].type, rows["rating"].type) == (pa.int8(), pa.float32())
    assert source.features == ("device",)
    assert source.label_rule == "the label as published"
    assert (source.items, source.users) == ((), ())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("\t1\t3\t5\t1", "the user_id is empty"),
        (" \t1\t3\t5\t1", "the user_id is empty"),
        ("1\t\t3\t5\t1", "the item_id is empty"),
        ("1\t1\tnan\t5\t1", "the rating is not a number"),
        ("1\t1\tthree\t5\t1", "the rating is not a number"),
        ("1\t1\t1e39\t5\t1", "the rating is not a number"),
        ("1\t1\t3\tnow\t1", "the timestamp is not a number"),
        ("1\t1\t3\t1.6e12\t1", "the timestamp is not in seconds since 1970 (it would lie after the year 9999)"),
        ("1\t1\t3\t5\t2", "the label is neither 0 nor 1"),
        ("1\t1\t3\t5\t", "the label is not a number"),
        ("1\t1\t3\t5", "it does not have 5 values"),
    ],
)
def test_bad_rows(tmp_path, line, reason):
    first = "user_id:token\titem_id:token\trating:float\ttimestamp:float\tlabel:float\n1\t1\t+3.\t\t1\n"
    source = open_recbole(write(tmp_path, inter=f"{first}\r\n{line}\r\n-2\t10000000000000000000000\t.5\t-1\t0\r\n"))
    with pytest.raises(UserError) as refused:
        read(source.interactions)
    assert str(refused.value).startswith(f"{tmp_path / 'ml.inter'}, line 4: {reason}. It reads: {line!r}.")
    dropped = Dropped("drop")
    assert read(source.interactions, dropped).to_pylist() == [
        {"user": "1", "item": "1", "rating": 3.0, "timestamp": None, "label": 1},
        {"user": "-2", "item": "1" + "0" * 22, "rating": 0.5, "timestamp": -1, "label": 0},
    ]
    assert dropped.counts == {reason: 1}


def test_a_bad_item(tmp_path):
    source = open_recbole(write(tmp_path, inter=INTER, item=ITEM + "\tx\t\t\t\t\n", user=USER + "1\t2\n"))
    with pytest.raises(UserError, match=r"ml\.item, line 4: the item_id is empty"):
        read(source.items)
    with pytest.raises(UserError, match=r"ml\.user, line 3: it does not have 3 values"):
        read(source.users)
    assert read(source.items, Dropped("drop")).num_rows == 2


@pytest.mark.parametrize(
    ("inter", "message"),
    [
        ("", r"ml\.inter is empty"),
        ("user_id:token\trating:float\n", r"ml\.inter lacks the column item_id; its first line has user_id, rating"),
        ("user_id\titem_id\n", "has the column 'user_id', which is not FIELD:TYPE"),
        ("user_id:token,item_id:token\n", "'user_id:token,item_id:token'|lacks the column"),
        ("user_id:token\titem_id:word\n", "has the column 'item_id:word'"),
        ("user_id:token\titem_id:float\n", "the column item_id is of the type float, but must be token"),
        ("user_id:token\titem_id:token\trating:token\n", "the column rating is of the type token, but must be float"),
        ("user_id:token\titem_id:token\titem_id:token\n", "has the column item_id twice"),
        ("user_id:token\titem_id:token\tsplit:token\n", "can't be called split. Rename it"),
    ],
)
def test_a_wrong_first_line(tmp_path, inter, message):
    with pytest.raises(UserError, match=message):
        open_recbole(write(tmp_path, inter=inter))


def test_several_titles_or_one_of_numbers(tmp_path):
    write(tmp_path, inter=INTER, item="item_id:token\ttitle:token_seq\tname:token\n")
    with pytest.raises(UserError, match=r"ml\.item has several columns that may hold the title: title, name\. Rename"):
        open_recbole(str(tmp_path))
    write(tmp_path, item="item_id:token\ttitle:float\n")
    with pytest.raises(UserError, match="the column title is of the type float"):
        open_recbole(str(tmp_path))
    write(tmp_path, item="item_id:token\tgenre:token_seq\nx\ta b\n")
    assert read(open_recbole(str(tmp_path)).items).to_pylist() == [
        {"item": "x", "title": None, "attributes": pairs(("genre", "a"), ("genre", "b"))}
    ]


def test_another_encoding(tmp_path):
    write(tmp_path, inter=INTER)
    (tmp_path / "ml.item").write_bytes((ITEM + "é\té\t\t\t\t\n").encode("latin-1"))
    with pytest.raises(UserError, match=r"ml\.item, line 4: not in UTF-8"):
        read(open_recbole(str(tmp_path)).items, Dropped("drop"))


def test_one_of_several_datasets_and_zips(tmp_path):
    with pytest.raises(UserError, match=r"holds no file NAME\.inter\. Looked for RecBole's"):
        open_recbole(str(tmp_path))
    write(tmp_path, inter=INTER, item=ITEM)
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        for end in ("inter", "item"):
            archive.write(tmp_path / f"ml.{end}", f"ml/ml.{end}")
    packed = open_recbole(str(tmp_path / "ml.zip"))
    assert read(packed.interactions).num_rows == 2 and read(packed.items).num_rows == 2
    write(tmp_path, name="other", inter=INTER.split("\n")[0])
    with pytest.raises(UserError, match=r"several files NAME\.inter: ml\.inter, other\.inter\. Give the path"):
        open_recbole(str(tmp_path))
    source = open_recbole(str(tmp_path / "ml.inter"))
    assert [Path(file).name for file in source.files] == ["ml.inter", "ml.item"]
    assert read(source.interactions) == read(packed.interactions)
    (tmp_path / "ml.zip").write_bytes((tmp_path / "ml.zip").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"ml\.zip is cut short, damaged or no zip"):
        open_recbole(str(tmp_path / "ml.zip"))


def test_large_files_are_read_in_ranges(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "SPLIT_BYTES", 50)
    monkeypatch.setattr(text, "CHUNK_BYTES", 16)
    rows = "".join(f"u{n}\ti{n}\t{n}\t{n}\n" for n in range(30))
    source = open_recbole(write(tmp_path, inter=INTER.split("\n")[0] + "\n" + rows))
    assert len(source.interactions) > 5
    assert read(source.interactions)["user"].to_pylist() == [f"u{n}" for n in range(30)]


def test_published_ratings_in_this_format(sellarec_data, tmp_path):
    """MovieLens-100K, written as RecBole publishes it."""
    lines = [
        line
        for name in ("u1.base", "u1.test")
        for line in (sellarec_data / "ml-100k" / "original" / name).read_text().splitlines()
    ]
    source = open_recbole(write(tmp_path, inter=INTER.split("\n")[0] + "\n" + "\n".join(lines) + "\n"))
    rows = read(source.interactions)
    assert (rows.num_rows, len(set(rows["user"].to_pylist())), len(set(rows["item"].to_pylist()))) == (
        100_000,
        943,
        1_682,
    )
    assert rows["rating"].null_count == rows["timestamp"].null_count == 0
