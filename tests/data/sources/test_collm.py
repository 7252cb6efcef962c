"""CoLLM's format: the published zip, loose pickles and Parquet give one and the same log."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sellarec.data.raw import SPLITS, Dropped, Part
from sellarec.data.sources.collm import open_collm
from sellarec.errors import UserError

COLUMNS = ["uid", "iid", "label", "timestamp", "his", "his_title", "title", "flag", "not_cold"]
ROWS = {
    "train": [
        (7, 1, 1, 100, [0], [""], "Heat (1995)", -1.0, 1),
        (7, 2, 0, 110, [0, 1], ["", "Heat (1995)"], "Casino (1995)", -1.0, 1),
        (9, 1, 1, 105, [0, 5], ["", "Babe (1995)"], "Heat (1995)", -1.0, 1),
    ],
    "valid": [(7, 2, 1, 200, [0, 1, 6], ["", "Heat (1995)", ""], "Casino (1995)", 0.0, 1)],
    "test": [(8, 3, 0, 300, [0], [""], "", 1.0, 0), (7, 1, 1, 290, [0, 1, 2], ["", "Heat (1995)", ""], "", 1.0, 1)],
}


def frames() -> dict[str, pd.DataFrame]:
    made = {split: pd.DataFrame(rows, columns=pd.Index(COLUMNS, dtype=object)) for split, rows in ROWS.items()}
    return {split: frame.astype({"title": object}) for split, frame in made.items()}


def write_zip(path: Path, tables: dict[str, pd.DataFrame], folder: str = "any/") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, frame in tables.items():
            archive.writestr(f"{folder}{split}_ood2.pkl", pickle.dumps(frame))
        archive.writestr(f"{folder}valid_small_ood2.pkl", b"not read")
    return path


def write_pickles(folder: Path, tables: dict[str, pd.DataFrame]) -> Path:
    for split, frame in tables.items():
        (folder / f"{split}_ood2.pkl").write_bytes(pickle.dumps(frame))
    return folder


def write_parquet(folder: Path, tables: dict[str, pd.DataFrame]) -> Path:
    for split, frame in tables.items():
        frame.to_parquet(folder / f"{split}_ood2.parquet")
    return folder


def read(parts: tuple[Part, ...], dropped: Dropped | None = None) -> pa.Table:
    """All rows of parts, each read as a task would: from its pickle."""
    dropped = dropped or Dropped("refuse")
    return pa.concat_tables([table for part in parts for table in pickle.loads(pickle.dumps(part)).read(dropped)])


def read_collm(path: Path, dropped: Dropped | None = None) -> pa.Table:
    return read(open_collm(str(path)).interactions, dropped)


def test_reads_rows_histories_and_titles(tmp_path):
    source = open_collm(str(write_zip(tmp_path / "books.zip", frames())), noun="book")
    assert source.noun == "book"
    assert [part.name.rsplit("/", 1)[-1] for part in source.interactions] == [f"{s}_ood2.pkl)" for s in SPLITS]
    rows = read(source.interactions)
    assert rows["history"].to_pylist() == [[], [1], [5], [1, 6], [], [1, 2]]
    assert rows["warm"].to_pylist() == [True, True, True, True, False, True]
    assert rows["split"].to_pylist() == ["train"] * 3 + ["valid"] + ["test"] * 2
    assert rows["timestamp"].to_pylist() == [100, 110, 105, 200, 300, 290]
    types = {"user": pa.int64(), "item": pa.int64(), "label": pa.int8(), "timestamp": pa.int64()}
    types |= {"split": pa.string(), "history": pa.list_(pa.int64()), "warm": pa.bool_()}
    assert dict(zip(rows.schema.names, rows.schema.types, strict=True)) == types
    # Item 5 is titled only by a history, item 3 and item 6 by nothing.
    titles = {1: "Heat (1995)", 2: "Casino (1995)", 3: None, 5: "Babe (1995)", 6: None}
    assert read(source.items).to_pydict() == {"item": list(titles), "title": list(titles.values())}


def test_tables_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr("sellarec.data.sources.collm.MAX_ROWS", 2)
    source = open_collm(str(write_zip(tmp_path / "books.zip", frames())))
    tables = [table for part in source.interactions for table in part.read(Dropped("refuse"))]
    assert [len(table) for table in tables] == [2, 1, 1, 2]
    assert pa.concat_tables(tables)["history"].to_pylist() == [[], [1], [5], [1, 6], [], [1, 2]]


@pytest.mark.parametrize("form", ["zip", "folder with zip", "pickles", "parquet"])
@pytest.mark.parametrize("as_uri", [False, True])
def test_every_form_gives_the_same_rows(tmp_path, form, as_uri):
    expected = open_collm(str(write_zip(tmp_path / "expected.zip", frames())))
    folder = tmp_path / "given"
    folder.mkdir()
    write = {
        "zip": lambda: write_zip(folder / "a.zip", frames(), folder=""),
        "folder with zip": lambda: write_zip(folder / "a.zip", frames()).parent,
        "pickles": lambda: write_pickles(folder, frames()),
        "parquet": lambda: write_parquet(folder, frames()),
    }
    path = write[form]()
    source = open_collm(path.as_uri() if as_uri else str(path))
    assert read(source.interactions).equals(read(expected.interactions))
    assert read(source.items).equals(read(expected.items))
    assert {Path(file).name for file in source.files} == {file.name for file in folder.iterdir()}


def test_a_missing_path_says_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"No such file or folder: .*nowhere.* Looked for CoLLM's zip"):
        read_collm(tmp_path / "nowhere")


def test_a_folder_without_the_files_lists_what_it_holds(tmp_path):
    (tmp_path / "train_ood2.pkl").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no data in CoLLM's format.*found train_ood2\.pkl"):
        read_collm(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file(tmp_path):
    path = write_zip(tmp_path / "a.zip", frames())
    path.chmod(0)
    with pytest.raises(UserError, match="Cannot read"):
        read_collm(path)


def test_several_zips_must_be_told_apart(tmp_path):
    write_zip(tmp_path / "a.zip", frames())
    write_zip(tmp_path / "b.zip", frames())
    with pytest.raises(UserError, match=r"several zips \(a\.zip, b\.zip\)"):
        read_collm(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_zip(tmp_path, share):
    path = write_zip(tmp_path / "a.zip", frames())
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match="truncated, damaged or no zip"):
        read_collm(path)


def test_a_damaged_zip(tmp_path):
    path = write_zip(tmp_path / "a.zip", frames())
    data = bytearray(path.read_bytes())
    data[200:220] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(UserError, match="truncated, damaged or no zip"):
        read_collm(path)


def test_a_zip_without_the_members_lists_what_it_holds(tmp_path):
    tables = frames()
    del tables["valid"]
    path = write_zip(tmp_path / "a.zip", tables)
    with pytest.raises(
        UserError, match=r"exactly one valid_ood2\.pkl, but holds 0; it holds any/train_ood2\.pkl, any/t"
    ):
        read_collm(path)


def test_a_truncated_pickle_names_the_member(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for split, frame in frames().items():
            archive.writestr(f"{split}_ood2.pkl", pickle.dumps(frame)[:-40])
    with pytest.raises(UserError, match=r"a\.zip \(train_ood2\.pkl\) is truncated"):
        read_collm(path)


def test_a_truncated_parquet(tmp_path):
    file = write_parquet(tmp_path, frames()) / "valid_ood2.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"Cannot read .*valid_ood2\.parquet as Parquet"):
        read_collm(tmp_path)


def test_a_missing_column(tmp_path):
    tables = frames()
    tables["test"] = tables["test"].drop(columns=["his", "not_cold"])
    with pytest.raises(UserError, match=r"test_ood2\.pkl lacks the column his, not_cold; it has uid, iid, label"):
        read_collm(write_pickles(tmp_path, tables))


def test_bad_rows_are_refused_with_their_place_or_dropped(tmp_path):
    tables = frames()
    tables["train"].loc[1, "label"] = 4
    tables["test"]["timestamp"] = [None, 290.0]
    path = write_pickles(tmp_path, tables)
    with pytest.raises(
        UserError, match=r"train_ood2\.pkl, row 1: the label must be 0 or 1\. It reads: .uid 7, .*label 4"
    ):
        read_collm(path)
    dropped = Dropped("drop")
    assert read_collm(path, dropped)["user"].to_pylist() == [7, 9, 7, 7]
    assert dropped.counts == {"the label must be 0 or 1": 1, "the timestamp is empty": 1}
    # Items are of the rows that stay; nothing is counted twice.
    assert read(open_collm(str(path)).items, dropped)["item"].to_pylist() == [1, 2, 5, 6]
    assert sum(dropped.counts.values()) == 2


def test_a_missing_value(tmp_path):
    tables = frames()
    tables["train"]["timestamp"] = [100.0, None, 110.0]
    with pytest.raises(UserError, match=r"train_ood2\.pkl, row 1: the timestamp is empty"):
        read_collm(write_pickles(tmp_path, tables))


def test_a_column_of_another_type(tmp_path):
    tables = frames()
    tables["train"]["uid"] = pd.Series(["a", "b", "c"], dtype=object)
    with pytest.raises(UserError, match=r"train_ood2\.pkl: the column uid is string, which is not int64"):
        read_collm(write_pickles(tmp_path, tables))


def test_titles_that_do_not_match_their_history(tmp_path):
    tables = frames()
    tables["train"].at[2, "his_title"] = [""]
    with pytest.raises(UserError, match=r"train_ood2\.pkl, row 2: the history has not as many titles as items"):
        read_collm(write_pickles(tmp_path, tables))


def test_an_empty_split_gives_no_rows(tmp_path):
    tables = frames()
    tables["valid"] = tables["valid"].iloc[:0]
    assert set(read_collm(write_pickles(tmp_path, tables))["split"].to_pylist()) == {"train", "test"}


def test_the_published_movielens_split(sellarec_data, tmp_path):
    published = sellarec_data / "collm-ml1m"
    source = open_collm(str(published / "ml-1m.zip"))
    log, items = read(source.interactions), read(source.items)
    by_split = {split: log.filter(pc.equal(log["split"], split)) for split in SPLITS}
    assert {split: rows.num_rows for split, rows in by_split.items()} == {
        "train": 33_891,
        "valid": 10_401,
        "test": 7_331,
    }
    positive_rate = {split: pc.mean(rows["label"]).as_py() for split, rows in by_split.items()}
    assert positive_rate == pytest.approx({"train": 0.53675, "valid": 0.52831, "test": 0.54536}, abs=1e-5)
    test = by_split["test"]
    assert pc.sum(pc.invert(test["warm"])).as_py() == 3_178
    assert pc.sum(pc.greater(pc.list_value_length(test["history"]), 0)).as_py() == 7_269
    assert len(pc.unique(log["user"])) == 838
    assert (items.num_rows, items["title"].null_count) == (3_255, 0)
    # What the source calls warm is what training has seen.
    for rows in by_split.values():
        seen = [pc.is_in(rows[name], by_split["train"][name].combine_chunks()) for name in ("user", "item")]
        assert rows["warm"].equals(pc.and_(*seen))
    # Every row's item is titled as the row says.
    titles = pq.read_table(published / "test_ood2.parquet", columns=["iid", "title"])
    found = items["title"].take(pc.index_in(titles["iid"], items["item"].combine_chunks()))
    assert found.to_pylist() == titles["title"].to_pylist()

    for split in SPLITS:
        (tmp_path / f"{split}_ood2.parquet").symlink_to(published / f"{split}_ood2.parquet")
    from_parquet = open_collm(str(tmp_path))
    assert read(from_parquet.interactions).equals(log)
    assert read(from_parquet.items).equals(items)


def test_an_empty_value_in_a_history_is_refused_with_its_row(tmp_path):
    for split, frame in frames().items():
        table = pa.Table.from_pandas(frame.drop(columns="his_title"), preserve_index=False)
        if split == "train":
            table = table.set_column(
                table.schema.get_field_index("his"), "his", pa.array([[0], [0, None], [0, 5]], pa.list_(pa.int64()))
            )
        pq.write_table(table, tmp_path / f"{split}_ood2.parquet")
    with pytest.raises(UserError, match="row 1: the history holds an empty value"):
        read_collm(tmp_path)
