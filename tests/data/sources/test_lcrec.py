"""LC-Rec's JSON files, and what is wrong in them."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sellarec.data.raw import Dropped, Part
from sellarec.data.sources import lcrec
from sellarec.data.sources.lcrec import open_lcrec
from sellarec.errors import UserError

INTER = {"0": [2, 0, 2], "1": [], "x": ["0", 1]}
ITEMS = {
    "0": {"title": "Pens", "description": "Write.", "brand": "Bic", "categories": "Arts, Crafts & Sewing,Pens"},
    "1": {"title": "", "description": ["One.", "Two."], "categories": ["Toys", "Games, old"]},
    "2": {"title": "Ctrl\x01\n", "description": None},
}
INDEX = {"0": ["<a_1>", "<b_2>"], "7": ["<a_3>"]}


def read(parts: Sequence[Part], dropped: Dropped | None = None) -> pa.Table:
    dropped = dropped or Dropped("refuse")
    return pa.concat_tables([table for part in parts for table in pickle.loads(pickle.dumps(part)).read(dropped)])


def write(folder: Path, name: str = "Games", **files: Any) -> str:
    for end, content in ({"inter": INTER, "item": ITEMS} | files).items():
        content = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.{end}.json").write_text(content, encoding="utf-8")
    return str(folder)


def pairs(*named: tuple[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in named]


def test_reads_sequences_in_their_order_and_items(tmp_path):
    source = open_lcrec(write(tmp_path, index=INDEX), noun="product")
    dropped = Dropped("refuse")
    rows = read(source.interactions, dropped)
    assert rows.to_pylist() == [
        {"user": user, "item": item, "timestamp": None, "label": 1}
        for user, item in [("0", "2"), ("0", "0"), ("0", "2"), ("x", "0"), ("x", "1")]
    ]
    assert rows["timestamp"].type == pa.int64() and rows["label"].type == pa.int8()
    assert dropped.counts == {"a user without items": 1}
    assert read(source.items).to_pylist() == [
        {
            "item": "0",
            "title": "Pens",
            "text": "Pens. Bic. Arts, Crafts & Sewing, Pens. Write.",
            "attributes": pairs(
                ("brand", "Bic"),
                ("category", "Arts, Crafts & Sewing"),
                ("category", "Pens"),
                ("index", "<a_1>"),
                ("index", "<b_2>"),
            ),
        },
        {
            "item": "1",
            "title": None,
            "text": "Toys, Games, old. One. Two.",
            "attributes": pairs(("category", "Toys"), ("category", "Games, old")),
        },
        {"item": "2", "title": "Ctrl\x01\n", "text": "Ctrl\x01\n", "attributes": []},
        {"item": "7", "title": None, "text": None, "attributes": pairs(("index", "<a_3>"))},
    ]
    assert [Path(file).name for file in source.files] == ["Games.inter.json", "Games.item.json", "Games.index.json"]
    assert source.noun == "product" and "positives only" in str(source.label_rule)


def test_tables_are_small_whatever_a_user_has(tmp_path, monkeypatch):
    monkeypatch.setattr(lcrec, "MAX_ROWS", 3)
    source = open_lcrec(write(tmp_path, inter={str(user): list(range(user)) for user in range(6)}))
    tables = list(source.interactions[0].read(Dropped("refuse")))
    assert len(tables) > 2
    expected = [str(user) for user in range(6) for _ in range(user)]
    assert pa.concat_tables(tables)["user"].to_pylist() == expected


@pytest.mark.parametrize(
    ("inter", "where", "reason", "rows"),
    [
        ({"0": [1, None, 2]}, "user '0', position 1", "the item is neither a text nor a whole number", 2),
        ({"0": [1.5, 2]}, "user '0', position 0", "the item is neither a text nor a whole number", 1),
        ({"0": [True, 2]}, "user '0', position 0", "the item is neither a text nor a whole number", 1),
        ({"0": ["", -2]}, "user '0', position 0", "the item is neither a text nor a whole number", 1),
        ('{"0": ["\\ud800", 2]}', "user '0', position 0", "the item is neither a text nor a whole number", 1),
        ({"0": "1 2", "1": [10**30]}, "user '0'", "the items are no list", 1),
        ({" ": [1], "1": [2]}, "user ' '", "the user's id is empty or no text", 1),
    ],
)
def test_bad_sequences(tmp_path, inter, where, reason, rows):
    source = open_lcrec(write(tmp_path, inter=inter))
    with pytest.raises(
        UserError, match=rf"^{re.escape(str(tmp_path))}/Games\.inter\.json, {where}: {reason}\. It reads"
    ):
        read(source.interactions)
    dropped = Dropped("drop")
    assert read(source.interactions, dropped).num_rows == rows
    assert dropped.counts == {reason: 1}


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        ({"0": []}, "the item is no JSON object"),
        ({"0": {"title": 5}}, "the title is no text"),
        ({"0": {"title": ["a", "b"]}}, "the title is no text"),
        ('{"0": {"title": "half \\ud83d"}}', "the title is no text"),
        ('{"0": {"title": NaN}}', "the title is no text"),
        ({"0": {"title": "a", "brand": {}}}, "the brand is no text"),
        ({"": {"title": "a"}}, "the item's id is empty or no text"),
    ],
)
def test_bad_items(tmp_path, items, reason):
    source = open_lcrec(write(tmp_path, item=items))
    with pytest.raises(UserError, match=rf"Games\.item\.json, item '0?': {reason}\. It reads"):
        read(source.items)
    dropped = Dropped("drop")
    assert list(source.items[0].read(dropped)) == []
    assert dropped.counts == {reason: 1}


def test_a_bad_index_leaves_the_item(tmp_path):
    source = open_lcrec(write(tmp_path, index={"0": "<a_1>", "1": [1]}))
    with pytest.raises(UserError, match=r"Games\.index\.json, item '0': the index is no list of texts"):
        read(source.items)
    dropped = Dropped("drop")
    assert read(source.items, dropped).num_rows == 3
    assert dropped.counts == {"the index is no list of texts": 2}


@pytest.mark.parametrize(
    ("inter", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ('{"0": [1, 2],\n "1": [3', r"line 2, column \d+: not JSON, or cut short .*It reads there: .*\[3'"),
        ("[1, 2]", "holds a JSON list, but must hold an object by id"),
        ('{"0": [1], "1": [2], "0": [3]}', "the key '0' occurs more than once"),
        ("[" * 100_000, "can't be read as JSON|not JSON"),
        ('{"0": [' + "1" * 5000 + "]}", "can't be read as JSON"),
    ],
)
@pytest.mark.parametrize("mode", ["refuse", "drop"])
def test_damaged_json(tmp_path, inter, message, mode):
    source = open_lcrec(write(tmp_path, inter=inter))
    with pytest.raises(UserError, match=rf"Games\.inter\.json.*{message}"):
        read(source.interactions, Dropped(mode))


def test_another_encoding(tmp_path):
    source = open_lcrec(write(tmp_path))
    (tmp_path / "Games.item.json").write_bytes('{"0":\n {"title": "é"}}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"Games\.item\.json, line 2: not in UTF-8"):
        read(source.items)
    (tmp_path / "Games.item.json").write_bytes('\ufeff{"0":\n {"title": "é"}}'.encode())
    assert read(source.items)["title"].to_pylist() == ["é"]


def test_missing_several_and_packed_files(tmp_path):
    with pytest.raises(UserError, match=r"holds no file NAME\.inter\.json\. Looked for LC-Rec's"):
        open_lcrec(str(tmp_path))
    write(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for end in ("inter", "item"):
            archive.write(tmp_path / f"Games.{end}.json", f"Games/Games.{end}.json")
    packed = open_lcrec(str(tmp_path / "a.zip"))
    assert read(packed.interactions) == read(open_lcrec(str(tmp_path)).interactions)
    write(tmp_path, name="Arts")
    with pytest.raises(UserError, match=r"several files NAME\.inter\.json: Arts\.inter\.json, Games\.inter\.json"):
        open_lcrec(str(tmp_path))
    assert read(open_lcrec(str(tmp_path / "Arts.inter.json")).items).num_rows == 3
    (tmp_path / "Arts.item.json").unlink()
    with pytest.raises(UserError, match=r"lacks Arts\.item\.json"):
        open_lcrec(str(tmp_path / "Arts.inter.json"))
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:-40])
    with pytest.raises(UserError, match=r"a\.zip is cut short, damaged or no zip"):
        open_lcrec(str(tmp_path / "a.zip"))


def test_published_games(sellarec_data, tmp_path):
    rows = pq.read_table(sellarec_data / "lcrec" / "Games_interactions.parquet")
    items = pq.read_table(sellarec_data / "lcrec" / "Games_items.parquet").to_pylist()
    sequences: dict[str, list[int]] = defaultdict(list)
    for user, item in zip(rows["user"].to_pylist(), rows["item"].to_pylist(), strict=True):
        sequences[str(user)].append(item)
    described = {str(row["item"]): {"title": row["title"] or ""} for row in items}
    index = {str(row["item"]): re.findall("<[^>]*>", row["index"]) for row in items}
    source = open_lcrec(write(tmp_path, inter=sequences, item=described, index=index))
    found, titled = read(source.interactions), read(source.items)
    assert (found.num_rows, len(set(found["user"].to_pylist()))) == (452_989, 50_546)
    assert (titled.num_rows, titled.num_rows - titled["title"].null_count) == (16_859, 16_845)
    assert found["item"].to_pylist() == [str(item) for item in rows["item"].to_pylist()]
    assert all(len(row) == 4 for row in titled["attributes"].to_pylist())
