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

from sellarec.data.prepare import prepare
from sellarec.data.raw import SPLITS
from sellarec.data.sources import source_hashes
from sellarec.data.sources.collm import read_collm
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


def test_reads_rows_histories_and_titles(tmp_path):
    raw = read_collm(write_zip(tmp_path / "books.zip", frames()), noun="book")
    assert raw.noun == "book"
    assert raw.interactions["history"].to_pylist() == [[], [1], [5], [1, 6], [], [1, 2]]
    assert raw.interactions["warm"].to_pylist() == [True, True, True, True, False, True]
    assert raw.interactions["split"].to_pylist() == ["train"] * 3 + ["valid"] + ["test"] * 2
    assert raw.items.to_pydict()["external_id"] == [1, 2, 3, 5, 6]
    # Item 5 is titled only by a history, item 3 and item 6 by nothing.
    assert raw.items.to_pydict()["title"] == ["Heat (1995)", "Casino (1995)", "", "Babe (1995)", ""]


def test_prepared_rows_are_in_time_order_and_untitled_items_are_counted(tmp_path):
    prepared = prepare(read_collm(write_zip(tmp_path / "a.zip", frames())), history_cap=10)
    assert prepared.facts["items_without_title"] == 2
    assert prepared.interactions["train"]["timestamp"].to_pylist() == [100, 105, 110]
    assert prepared.interactions["test"]["timestamp"].to_pylist() == [290, 300]
    assert prepared.facts["cold"] == {"valid": 0, "test": 1}


@pytest.mark.parametrize("form", ["zip", "folder with zip", "pickles", "parquet"])
def test_every_form_gives_the_same_rows(tmp_path, form):
    expected = read_collm(write_zip(tmp_path / "expected.zip", frames()))
    folder = tmp_path / "given"
    folder.mkdir()
    write = {
        "zip": lambda: write_zip(folder / "a.zip", frames(), folder=""),
        "folder with zip": lambda: write_zip(folder / "a.zip", frames()).parent,
        "pickles": lambda: write_pickles(folder, frames()),
        "parquet": lambda: write_parquet(folder, frames()),
    }
    path = write[form]()
    raw = read_collm(path)
    assert raw.interactions.equals(expected.interactions)
    assert raw.items.equals(expected.items)
    assert raw.sources == source_hashes(path, "collm")
    assert set(raw.sources) == {file.name for file in folder.iterdir()}


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


def test_a_label_that_is_no_label(tmp_path):
    tables = frames()
    tables["train"].loc[1, "label"] = 4
    with pytest.raises(UserError, match=r"train_ood2\.pkl: the label must be 0 or 1, but row 1 has 4"):
        read_collm(write_pickles(tmp_path, tables))


def test_a_missing_value(tmp_path):
    tables = frames()
    tables["train"]["timestamp"] = [100.0, None, 110.0]
    with pytest.raises(
        UserError, match=r"train_ood2\.pkl: the column timestamp has 1 empty values, the first in row 1"
    ):
        read_collm(write_pickles(tmp_path, tables))


def test_a_column_of_another_type(tmp_path):
    tables = frames()
    tables["train"]["uid"] = pd.Series(["a", "b", "c"], dtype=object)
    with pytest.raises(UserError, match=r"train_ood2\.pkl: the column uid is string, which is not int64"):
        read_collm(write_pickles(tmp_path, tables))


def test_titles_that_do_not_match_their_history(tmp_path):
    tables = frames()
    tables["train"].at[2, "his_title"] = [""]
    with pytest.raises(UserError, match=r"train_ood2\.pkl: row 2 has a history of 2 items, but titles for 1"):
        read_collm(write_pickles(tmp_path, tables))


def test_an_empty_split(tmp_path):
    tables = frames()
    tables["valid"] = tables["valid"].iloc[:0]
    with pytest.raises(UserError, match=r"The valid split is empty: of 5 rows, 3, 0, 2 .*Split rule: the split as pub"):
        prepare(read_collm(write_pickles(tmp_path, tables)), history_cap=5)


def test_the_published_movielens_split(sellarec_data, tmp_path):
    published = sellarec_data / "collm-ml1m"
    raw = read_collm(published / "ml-1m.zip")
    prepared = prepare(raw, history_cap=50)
    facts, log = prepared.facts, prepared.interactions
    assert facts["rows"] == {"train": 33_891, "valid": 10_401, "test": 7_331}
    positive_rate = {split: facts["positives"][split] / facts["rows"][split] for split in SPLITS}
    assert positive_rate == pytest.approx({"train": 0.53675, "valid": 0.52831, "test": 0.54536}, abs=1e-5)
    assert facts["cold"]["test"] == 3_178
    assert pc.sum(pc.greater(log["test"]["history_length"], 0)).as_py() == 7_269
    assert (facts["users"], facts["items"], facts["items_without_title"]) == (838, 3_255, 0)
    # What the source calls warm is what training has seen.
    for split in SPLITS:
        assert log[split]["warm"].equals(pc.and_(log[split]["user_seen"], log[split]["item_seen"]))
    # Every row's item is titled as the row says.
    titles = pq.read_table(published / "test_ood2.parquet", columns=["iid", "title"])
    external = prepared.items["external_id"].cast(pa.int64())
    found = prepared.items["title"].take(pc.index_in(titles["iid"], external))
    assert found.to_pylist() == titles["title"].to_pylist()

    for split in SPLITS:
        (tmp_path / f"{split}_ood2.parquet").symlink_to(published / f"{split}_ood2.parquet")
    from_parquet = prepare(read_collm(tmp_path), history_cap=50)
    for split in SPLITS:
        assert from_parquet.interactions[split].equals(log[split])
    assert from_parquet.items.equals(prepared.items)
    assert from_parquet.users.equals(prepared.users)


def test_an_empty_value_in_a_history_is_refused_with_its_row(tmp_path):
    for split, frame in frames().items():
        table = pa.Table.from_pandas(frame.drop(columns="his_title"), preserve_index=False)
        if split == "train":
            table = table.set_column(
                table.schema.get_field_index("his"), "his", pa.array([[0], [0, None], [0, 5]], pa.list_(pa.int64()))
            )
        pq.write_table(table, tmp_path / f"{split}_ood2.parquet")
    with pytest.raises(UserError, match="history of row 1 holds an empty value"):
        read_collm(tmp_path)
