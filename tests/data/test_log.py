"""The prepared log on disk."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import files_of, prepare_into, rules, source_of
from small import write_train

from sellarec.data.log import (
    INTERACTIONS,
    ITEMS,
    SEQUENCES,
    USERS,
    Log,
    copy_log,
    count_with_history,
    first_other_id,
    item_counts,
    read_log,
    write_manifest,
    write_sequences,
    write_with_history,
)
from sellarec.data.raw import SPLITS, Source
from sellarec.errors import UserError


def small_source(count: int) -> Source:
    index = np.arange(count)
    rows = {
        "user": index % 7,
        "item": index % 11,
        "label": pa.array(index % 2, pa.int8()),
        "timestamp": index,
        "rating": pa.array(index % 5 + 0.5, pa.float32()),
    }
    items = pa.table({"item": np.arange(12), "title": [f"Title {item}" for item in range(12)]})
    return source_of(pa.table(rows), items)


@pytest.fixture
def log(tmp_path) -> Log:
    return prepare_into(tmp_path / "log", small_source(40), rules(history_cap=3))


def test_tables_have_the_schemas_that_are_stated(log):
    log = pickle.loads(pickle.dumps(log))
    assert sum(len(log.split(split)) for split in SPLITS) == 40
    for split in SPLITS:
        assert log.split(split).schema.equals(INTERACTIONS)
        assert log.split(split, ["user", "label"]).column_names == ["user", "label"]
        assert all(pq.read_schema(path).equals(INTERACTIONS) for path in log.split_paths(split))
    assert log.items().schema.equals(ITEMS) and len(log.items()) == 12
    assert log.users().schema.equals(USERS) and len(log.users()) == 7
    assert log.users(["seen"]).column_names == ["seen"]
    sequences = pa.concat_tables([pq.ParquetFile(path).read() for path in log.paths("sequences")])
    assert sequences.schema.equals(SEQUENCES) and len(sequences) == 7


def test_categorical_features_follow_as_codes_that_the_facts_list(tmp_path):
    rows = {"user": [1, 2, 1, 2, 1], "item": [1, 2, 3, 4, 5], "timestamp": [1, 2, 3, 4, 5]}
    features = {"domain": ["Books", "null", "Books", None, "Games"], "verified": ["1", "0", "0", "0", None]}
    source = source_of(pa.table(rows | features), features=("verified",))
    log = prepare_into(tmp_path, source, rules(shares=(0.6, 0.2, 0.2)))
    assert log.facts["features"] == {"domain": ["Books", "Games", "null"], "verified": ["0", "1"]}
    codes = {name: [c for split in SPLITS for c in log.split(split)[name].to_pylist()] for name in features}
    assert codes == {"domain": [0, 2, 0, None, 1], "verified": [1, 0, 0, 0, None]}
    assert log.split("train").schema.equals(
        INTERACTIONS.append(pa.field("domain", pa.int32())).append(pa.field("verified", pa.int32()))
    )


def test_the_same_log_is_written_byte_for_byte(tmp_path):
    for name in ("a", "b"):
        prepare_into(tmp_path / name, small_source(40))
    assert len(files_of(tmp_path / "a")) == 8
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_row_groups_are_bounded(tmp_path):
    log = prepare_into(tmp_path, small_source(100_000))
    (path,) = log.split_paths("train")
    metadata = pq.ParquetFile(path).metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [65_536, 14_464]


def test_rows_of_a_split_are_in_time_order_over_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr("sellarec.data.prepare.PIECE_ROWS", 10)
    log = prepare_into(tmp_path, small_source(100))
    bounds = []
    for path in log.split_paths("train"):
        times = pq.ParquetFile(path).read(["timestamp"])["timestamp"].to_numpy()
        assert (np.diff(times) >= 0).all()
        bounds += [times[0], times[-1]]
    assert len(bounds) > 10 and bounds == sorted(bounds)


def test_no_log(tmp_path):
    with pytest.raises(UserError, match=r"holds no prepared log: cannot read manifest\.json"):
        read_log(tmp_path)


def test_damaged_log(log):
    log.split_paths("test")[0].write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"Cannot read the prepared log: .*Prepare the data again"):
        log.split("test")
    Path(log.directory / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        read_log(log.directory)


def test_an_unknown_split_is_a_programming_error(log):
    with pytest.raises(ValueError, match="no split 'dev'"):
        log.split("dev")


ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 1)), max_size=25)


@settings(max_examples=60)
@given(st.lists(ROWS, min_size=1, max_size=3), st.integers(1, 5), st.integers(2, 5))
def test_a_sequence_is_a_users_last_train_positives(tmp_path_factory, files, group, most):
    """However rows lie in files and row groups."""
    liked: dict[int, list[tuple[int, int]]] = {}
    row = 0
    for file in files:
        for user, item, label in file:
            if label:
                liked.setdefault(user, []).append((row, item))
            row += 1
    folder = tmp_path_factory.mktemp("sequences")
    log = write_train(folder, *([(*r, []) for r in file] for file in files), group=group)
    expected = [
        (found[-1][0], user, found[-1][1], [item for _, item in found[-most:-1]])
        for user, found in liked.items()
        if len(found) > 1
    ]
    if not expected:
        with pytest.raises(UserError, match="no user has two positives in the train split"):
            write_sequences(log, folder / "sequences.parquet", most)
        return
    write_sequences(log, folder / "sequences.parquet", most)
    found = pq.ParquetFile(folder / "sequences.parquet").read().to_pylist()
    assert [(r["row"], r["user"], r["item"], r["history"]) for r in found] == expected
    assert all(r["label"] == 1 and r["user_seen"] and r["item_seen"] for r in found)


@pytest.mark.parametrize("split", ["shares", "leave-one-out", "random"])
def test_sequences_are_made_of_train_positives_alone(tmp_path, split):
    generator = np.random.default_rng(0)
    index = np.arange(300)
    rows = pa.table(
        {
            "user": index % 6,
            "item": generator.permutation(300) % 150,
            "label": pa.array(index % 4 != 0, pa.int8()),
            "timestamp": index,
        }
    )
    log = prepare_into(tmp_path / "log", source_of(rows), rules(split=split, shares=(0.6, 0.2, 0.2), history_cap=100))
    write_sequences(log, tmp_path / "sequences.parquet", 101)
    train = log.split("train", ["user", "item", "label"]).to_pylist()
    liked = {(row["user"], row["item"]) for row in train if row["label"] == 1}
    found = pq.ParquetFile(tmp_path / "sequences.parquet").read().to_pylist()
    assert {row["user"] for row in found} == set(range(6))
    for row in found:
        assert {(row["user"], item) for item in [*row["history"], row["item"]]} <= liked


def test_items_are_counted_by_their_train_rows(tmp_path):
    log = write_train(tmp_path, [(0, 1, 1, []), (0, 1, 0, [1])], [(1, 3, 1, []), (1, 1, 1, [3])], group=1)
    assert item_counts(log).tolist() == [[0, 3, 0, 1], [0, 2, 0, 1]]


@pytest.mark.parametrize("linked", [True, False])
def test_a_log_is_copied_as_it_is(log, tmp_path, monkeypatch, linked):
    """With hard links or without; over what an interrupted copy left, which may be half of a file."""
    if not linked:

        def refuse(*_):
            raise OSError("another file system")

        monkeypatch.setattr("sellarec.data.log.os.link", refuse)
    before = {name: found for name, found in files_of(log.directory).items() if not name.startswith(".")}
    (part,) = log.paths("items")
    half = tmp_path / "copy" / "items" / part.name
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    for _ in range(2):
        copy_log(log, tmp_path / "copy")
    with pytest.raises(UserError, match="holds no prepared log"):
        read_log(tmp_path / "copy")
    write_manifest(tmp_path / "copy", log.facts)
    assert files_of(tmp_path / "copy") == before
    assert read_log(tmp_path / "copy").facts == log.facts
    assert (half.stat().st_ino == part.stat().st_ino) == linked


def write_users(folder: Path, parts: list[list[str]], group: int) -> Log:
    (folder / "users").mkdir(parents=True)
    for number, names in enumerate(parts):
        table = pa.table({"external_id": pa.array(names, pa.string())})
        pq.write_table(table, folder / "users" / f"part-{number}.parquet", row_group_size=group)
    return Log(folder, {})


@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.lists(st.integers(0, 2), max_size=12),
    st.lists(st.integers(0, 12), min_size=2, max_size=2),
    st.lists(st.integers(1, 4), min_size=2, max_size=2),
)
def test_the_first_other_id_is_found_however_logs_are_cut(tmp_path_factory, earlier, now, cuts, groups):
    """Into files and row groups; a log that has grown has all of the earlier one."""
    folder = tmp_path_factory.mktemp("ids")
    logs = []
    for name, ids, cut, group in zip(("earlier", "now"), (earlier, now), cuts, groups, strict=True):
        names = [f"u{number}" for number in ids]
        logs.append(write_users(folder / name, [names[:cut], names[cut:]], group))
    expected = next(
        (
            (number, f"u{theirs}", f"u{now[number]}" if number < len(now) else None)
            for number, theirs in enumerate(earlier)
            if number >= len(now) or now[number] != theirs
        ),
        None,
    )
    assert first_other_id(logs[1], logs[0], "user") == expected


def test_rows_with_a_history_alone_are_written_in_their_order(log, tmp_path, monkeypatch):
    """Whatever batches they are read in; as readers of the log take them."""
    monkeypatch.setattr("sellarec.data.log.ROW_GROUP_ROWS", 4)
    for split in SPLITS:
        rows = log.split(split)
        wanted = rows.filter(pa.compute.greater(pa.compute.list_value_length(rows["history"]), 0))
        write_with_history(log, split, tmp_path / "rows.parquet")
        found = pq.read_table(tmp_path / "rows.parquet")
        assert found.schema.equals(INTERACTIONS) and found.equals(wanted)
        assert count_with_history(log, split) == (len(wanted), sum(wanted["label"].to_pylist())) > (0, 0)
    assert len(log.split("train")) > count_with_history(log, "train")[0], "users' first rows"
