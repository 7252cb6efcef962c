"""CSV, TSV, JSON lines and Parquet by a mapping of their columns: the same rows, and what is wrong in them by its place."""

from __future__ import annotations

import gzip
import json
import pickle
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sellarec.data.raw import Dropped, Part, Source
from sellarec.data.sources import tables
from sellarec.data.sources.tables import Columns, open_tables
from sellarec.errors import UserError

MAPPED = Columns(user="visitor", item="sku", rating="stars", timestamp="at", label="liked", features=("device",))
ROWS = [
    {"visitor": "u1", "sku": "7", "stars": 4.5, "at": 1_493_683_200, "liked": 1, "device": "phone", "note": "a, b"},
    {"visitor": "u2", "sku": "x9", "stars": None, "at": None, "liked": 0, "device": None, "note": 'say "hi"\nagain'},
    {"visitor": "ü3", "sku": "7", "stars": 1, "at": 631_152_000, "liked": 1, "device": "pc", "note": ""},
]
EXPECTED = {
    "user": ["u1", "u2", "ü3"],
    "item": ["7", "x9", "7"],
    "rating": [4.5, None, 1.0],
    "timestamp": [1_493_683_200, None, 631_152_000],
    "label": [1, 0, 1],
    "device": ["phone", None, "pc"],
}


def as_csv(rows: list[dict], delimiter: str = ",") -> str:
    def quoted(value: object) -> str:
        text = "" if value is None else str(value)
        return '"' + text.replace('"', '""') + '"' if set(text) & set(f'"\n{delimiter}') else text

    lines = [delimiter.join(rows[0])] + [delimiter.join(map(quoted, row.values())) for row in rows]
    return "\n".join(lines) + "\n"


def as_json(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, rows: list[dict]) -> Path:
    plain = path.name.removesuffix(".gz")
    if plain.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    text = as_json(rows) if plain.endswith(".jsonl") else as_csv(rows, "\t" if plain.endswith(".tsv") else ",")
    path.write_bytes(gzip.compress(text.encode()) if plain != path.name else text.encode())
    return path


def table(parts: tuple[Part, ...], bad_rows: str = "refuse") -> tuple[pa.Table, dict[str, int]]:
    dropped = Dropped(bad_rows)  # type: ignore[arg-type]
    return pa.concat_tables([table for part in parts for table in part.read(dropped)]), dict(dropped.counts)


def rows_of(source: Source, bad_rows: str = "refuse") -> tuple[dict, dict[str, int]]:
    found, counts = table(source.interactions, bad_rows)
    return found.to_pydict(), counts


FORMS = ["a.csv", "a.csv.gz", "a.tsv", "a.jsonl", "a.jsonl.gz", "a.parquet"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(tmp_path, form):
    source = open_tables(str(write(tmp_path / form, ROWS)), MAPPED, noun="thing")
    found, counts = table(source.interactions)
    assert found.to_pydict() == EXPECTED
    types = {"user": pa.string(), "item": pa.string(), "rating": pa.float32(), "timestamp": pa.int64()}
    types |= {"label": pa.int8(), "device": pa.string()}
    assert dict(zip(found.schema.names, found.schema.types, strict=True)) == types
    assert counts == {}
    assert source.features == ("device",)
    assert source.noun == "thing"
    assert source.label_rule == "the column liked as it is given"
    assert source.files == (str(tmp_path / form),)


@pytest.mark.parametrize("form", FORMS)
def test_many_rows_in_small_blocks(tmp_path, monkeypatch, form):
    many = [ROWS[i % 3] | {"at": 1_400_000_000 + i} for i in range(2000)]
    write(tmp_path / form, many)
    monkeypatch.setattr("sellarec.data.files.BLOCK_BYTES", 1000)
    monkeypatch.setattr("sellarec.data.files.PIECE_BYTES", 100)
    monkeypatch.setattr(tables, "MAX_ROWS", 100)
    found, _ = rows_of(open_tables(str(tmp_path / form), MAPPED))
    assert found["timestamp"] == [row["at"] for row in many]
    assert found["user"] == [row["visitor"] for row in many]


def test_parts_are_picklable_and_a_folder_is_read_in_order(tmp_path):
    for number, row in enumerate(ROWS):
        write(tmp_path / f"part-{number}.csv", [row])
    (tmp_path / "README.md").write_text("not a table")
    (tmp_path / "_SUCCESS").write_text("")
    source = pickle.loads(pickle.dumps(open_tables(f"{tmp_path}/", MAPPED)))
    assert [part.name for part in source.interactions] == [str(tmp_path / f"part-{n}.csv") for n in range(3)]
    assert rows_of(source)[0] == EXPECTED
    uri = open_tables(tmp_path.as_uri(), MAPPED)
    assert rows_of(uri)[0] == EXPECTED


def test_row_groups_are_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS_PER_PART", 4)
    rows = [{"visitor": i, "sku": i * 2, "x": 1} for i in range(9)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    source = open_tables(str(tmp_path / "a.parquet"), Columns(user="visitor", item="sku"))
    assert [part.name.split(", ")[1] for part in source.interactions] == [
        "row groups 0 to 1",
        "row groups 2 to 3",
        "row groups 4 to 4",
    ]
    found, _ = table(source.interactions)
    assert found["user"].to_pylist() == list(range(9))
    assert found.schema.field("user").type == found.schema.field("item").type == pa.int64()


def test_ids_are_strings_unless_all_files_have_numbers(tmp_path):
    mapped = Columns(user="visitor", item="sku")
    write(tmp_path / "a.parquet", [{"visitor": 1, "sku": 2}])
    write(tmp_path / "items.csv", [{"sku": "2", "name": "Heat"}])
    source = open_tables(
        str(tmp_path / "a.parquet"),
        mapped,
        items=str(tmp_path / "items.csv"),
        item_columns=Columns("sku", title="name"),
    )
    assert rows_of(source)[0] == {"user": [1], "item": ["2"]}
    assert table(source.items)[0].to_pydict() == {"item": ["2"], "title": ["Heat"]}
    write(tmp_path / "b.jsonl", [{"visitor": 1, "sku": 2}, {"visitor": "1", "sku": "02"}])
    assert rows_of(open_tables(str(tmp_path / "b.jsonl"), mapped))[0] == {"user": ["1", "1"], "item": ["2", "02"]}


@pytest.mark.parametrize("form", FORMS)
def test_items_with_titles_texts_and_attributes(tmp_path, form):
    write(tmp_path / "log.csv", ROWS)
    described = [
        {"id": "7", "name": "Heat (1995)", "about": "Cops, robbers", "genre": "crime", "price": 3},
        {"id": "x9", "name": "", "about": None, "genre": None, "price": 4},
        {"id": "7", "name": "again", "about": "", "genre": "", "price": None},
    ]
    (tmp_path / "items").mkdir()
    write(tmp_path / "items" / form, described)
    source = open_tables(
        str(tmp_path / "log.csv"),
        MAPPED,
        items=str(tmp_path / "items"),
        item_columns=Columns("id", title="name", text="about", features=("genre", "price")),
    )
    found = table(source.items)[0].to_pydict()
    assert found["item"] == ["7", "x9"]
    assert found["title"] == ["Heat (1995)", None]
    assert found["text"] == ["Cops, robbers", None]
    assert found["attributes"] == [
        [{"name": "genre", "value": "crime"}, {"name": "price", "value": "3"}],
        [{"name": "price", "value": "4"}],
    ]
    assert source.files == (str(tmp_path / "log.csv"), str(tmp_path / "items" / form))


def test_titles_in_the_interactions(tmp_path):
    write(tmp_path / "a.csv", [row | {"name": name} for row, name in zip(ROWS, ["Heat", "Babe", "later"], strict=True)])
    source = open_tables(str(tmp_path / "a.csv"), Columns(user="visitor", item="sku", title="name"))
    assert table(source.items)[0].to_pydict() == {"item": ["7", "x9"], "title": ["Heat", "Babe"]}
    assert open_tables(str(tmp_path / "a.csv"), MAPPED).items == ()


@pytest.mark.parametrize(
    ("unit", "given", "expected"),
    [
        ("s", ["978300760", "978300760.9", ""], [978300760, 978300760, None]),
        ("ms", ["978300760999"], [978300760]),
        ("us", ["978300760000001"], [978300760]),
        ("ns", ["1493683199999999999"], [1493683199]),
        ("iso", ["2001-01-01", "2001-01-01T00:00:01.9Z", "2001-01-01 01:00:00+01:00"], [978307200, 978307201, 978307200]),
    ],
)  # fmt: skip
def test_units_of_time(tmp_path, unit, given, expected):
    write(tmp_path / "a.csv", [{"u": "1", "i": "2", "t": time} for time in given])
    mapped = Columns(user="u", item="i", timestamp="t", time_unit=unit)
    assert rows_of(open_tables(str(tmp_path / "a.csv"), mapped))[0]["timestamp"] == expected


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_by_their_type_need_no_unit(tmp_path, unit):
    times = pa.array([datetime(2001, 1, 1, tzinfo=UTC), None]).cast(pa.timestamp(unit, "UTC"))
    pq.write_table(pa.table({"u": [1, 2], "i": [1, 2], "t": times}), tmp_path / "a.parquet")
    for time_unit in ("s", "ms", "iso"):
        mapped = Columns(user="u", item="i", timestamp="t", time_unit=time_unit)
        assert rows_of(open_tables(str(tmp_path / "a.parquet"), mapped))[0]["timestamp"] == [978307200, None]


BAD = [
    ({"visitor": ""}, "the visitor is empty"),
    ({"sku": " "}, "the sku is empty"),
    ({"stars": "good"}, "the stars is not a number"),
    ({"stars": "NaN"}, "the stars is not a number"),
    ({"stars": "7"}, "the stars is not between 1 and 5"),
    ({"at": "yesterday"}, "the at is not a number"),
    ({"at": "1493683200000"}, r"the at is outside 1990 to 2100 as seconds: milliseconds\?"),
    ({"at": "12"}, "the at is outside 1990 to 2100 as seconds"),
    ({"liked": "2"}, "the liked is not 0 or 1"),
    ({"liked": ""}, "the liked is not 0 or 1"),
]


@pytest.mark.parametrize(("change", "reason"), BAD)
@pytest.mark.parametrize("form", ["a.csv", "a.jsonl", "a.parquet"])
def test_bad_rows(tmp_path, form, change, reason):
    text = [{name: None if value is None else str(value) for name, value in row.items()} for row in ROWS]
    write(tmp_path / form, [text[0], text[2], text[0] | change, text[2]])
    source = open_tables(str(tmp_path / form), MAPPED, rating_range=(1, 5))
    place = "row 3" if form == "a.parquet" else r"line [34]"
    with pytest.raises(UserError, match=rf"{form}, {place}: {reason}\. It reads: .*phone.*Mend it"):
        rows_of(source)
    found, counts = rows_of(source, "drop")
    assert found["user"] == ["u1", "ü3", "ü3"]
    assert list(counts.values()) == [1]


def test_a_rating_may_lack_only_where_there_is_a_label(tmp_path):
    write(tmp_path / "a.csv", [{"u": "1", "i": "2", "r": "5", "l": "1"}, {"u": "1", "i": "3", "r": "", "l": "0"}])
    with pytest.raises(UserError, match=r"a\.csv, line 3: the r is not a number\. It reads: '1,3,,0'"):
        rows_of(open_tables(str(tmp_path / "a.csv"), Columns(user="u", item="i", rating="r")))
    found, _ = rows_of(open_tables(str(tmp_path / "a.csv"), Columns(user="u", item="i", rating="r", label="l")))
    assert found["rating"] == [5.0, None]


def test_splits_domains_and_histories(tmp_path):
    rows = [
        {"u": "1", "i": "2", "s": "train", "d": "Books", "h": " 5 6 "},
        {"u": "1", "i": "3", "s": "test", "d": "", "h": ""},
    ]
    mapped = Columns(user="u", item="i", split="s", domain="d", history="h")
    write(tmp_path / "a.csv", [*rows, rows[0] | {"s": "dev"}])
    source = open_tables(str(tmp_path / "a.csv"), mapped)
    found, counts = rows_of(source, "drop")
    assert found["split"] == ["train", "test"]
    assert found["domain"] == ["Books", None]
    assert found["history"] == [["5", "6"], []]
    assert counts == {"the s is not train, valid or test": 1}
    assert source.split_rule == "the column s as it is given"


def test_lines_are_counted_over_blank_ones_and_quotes(tmp_path):
    (tmp_path / "a.csv").write_text('\nu,i,n\r\n\r\n1,2,"a\nb ""c"""\r\n3,4,d\n\n5,6\n7,8,"e\n,"\n,9,f\n')
    source = open_tables(str(tmp_path / "a.csv"), Columns(user="u", item="i"))
    with pytest.raises(UserError, match=r"a\.csv, line 8: it does not have 3 values\. It reads: '5,6'"):
        rows_of(source)
    found, counts = rows_of(source, "drop")
    assert found["user"] == ["1", "3", "7"]
    assert counts == {"it does not have 3 values": 1, "the u is empty": 1}
    (tmp_path / "a.csv").write_text('u,i,n\n1,2,"a\nb"\n,9,"x\ny"\n')
    with pytest.raises(UserError, match=r"a\.csv, line 4: the u is empty\. It reads: ',9,\"x\\ny\"'"):
        rows_of(source)


def test_a_quote_that_is_never_closed(tmp_path):
    (tmp_path / "a.csv").write_text('u,i\n1,"a"\n2,"b\n3,c\n4,"d"\n')
    source = open_tables(str(tmp_path / "a.csv"), Columns(user="u", item="i"))
    with pytest.raises(UserError, match=r"a\.csv, line 3: a quote is never closed. It reads: .*2,"):
        rows_of(source, "drop")
    (tmp_path / "a.csv").write_text('u,i\n1,19" rack\n2,b\n')
    assert rows_of(source)[0]["item"] == ['19" rack', "b"]


def test_json_lines_that_cannot_be_read(tmp_path):
    good = [json.dumps({"u": i, "i": "é" if i % 2 else "b", "other": [1, {"a": "\U0001f600"}]}) for i in range(200)]
    bad = ['{"u": 1, "i": "cut', "[1]", "7", '{"u": 1, "i": "\\ud83d"}', '{"u": 1, "i": "x" "y"}']
    fine = ['{"u": 1, "i": "nan elsewhere", "other": NaN}', '{"u": 1, "i": "\\ud83d\\ude00"}', "", "  "]
    source_lines = good[:100] + bad[:3] + good[100:] + fine + bad[3:]
    (tmp_path / "a.jsonl").write_text("\n".join(source_lines))
    source = open_tables(str(tmp_path / "a.jsonl"), Columns(user="u", item="i"))
    with pytest.raises(UserError, match=r"a\.jsonl, line 101: the line is not a whole JSON object. It reads: .*cut'"):
        rows_of(source)
    found, counts = rows_of(source, "drop")
    assert found["user"] == [str(i) for i in range(200)] + ["1", "1"]
    assert found["item"][-2:] == ["nan elsewhere", "\U0001f600"]
    assert counts == {
        "the line is not a whole JSON object": 4,
        "a value has half of a character (a lone surrogate)": 1,
    }


def test_a_bad_value_behind_an_unreadable_line_keeps_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"u": 1, "i": 2}\n\n{"u": 1, \n{"u": 1, "i": null}\n')
    source = open_tables(str(tmp_path / "a.jsonl"), Columns(user="u", item="i"))
    found, counts = rows_of(source, "drop")
    assert found["item"] == ["2"]
    assert counts == {"the line is not a whole JSON object": 1, "the i is empty": 1}
    (tmp_path / "a.jsonl").write_text('{"u": 1, "i": 2}\n\n{"u": 1, "x": NaN, "i": 3}\n{"u": 1, "i": null}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 4: the i is empty\. It reads: '{\"u\": 1, \"i\": null}'"):
        rows_of(source)


@pytest.mark.parametrize("form", ["a.csv", "a.tsv.gz", "a.jsonl", "a.parquet"])
def test_a_missing_column_names_those_that_are_there(tmp_path, form):
    write(tmp_path / form, ROWS)
    with pytest.raises(
        UserError, match=r"a\..* lacks the column SKU_; found visitor, sku, stars, .*note\. Is it sku\?"
    ):
        open_tables(str(tmp_path / form), Columns(user="visitor", item="SKU_"))


def test_a_column_twice(tmp_path):
    (tmp_path / "a.csv").write_text("u,i,u\n1,2,3\n")
    with pytest.raises(UserError, match=r"a\.csv has the column u twice"):
        open_tables(str(tmp_path / "a.csv"), Columns(user="u", item="i"))


def test_a_column_of_lists(tmp_path):
    pq.write_table(pa.table({"u": [[1]], "i": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"the column u is list<.*>, but must hold one value a row"):
        open_tables(str(tmp_path / "a.parquet"), Columns(user="u", item="i"))


def test_mappings_that_cannot_be(tmp_path):
    write(tmp_path / "a.csv", ROWS)
    path = str(tmp_path / "a.csv")
    with pytest.raises(UserError, match="names none for the user"):
        open_tables(path, Columns("sku"))
    with pytest.raises(UserError, match="belong together"):
        open_tables(path, MAPPED, items=path)
    with pytest.raises(UserError, match="has user, rating, which belong to interactions"):
        open_tables(path, MAPPED, items=path, item_columns=Columns("sku", user="visitor", rating="stars"))


def test_what_is_no_table(tmp_path):
    with pytest.raises(UserError, match=r"No such file or folder: .*nowhere"):
        open_tables(str(tmp_path / "nowhere"), MAPPED)
    with pytest.raises(UserError, match=r"holds no tables.*found nothing"):
        open_tables(str(tmp_path), MAPPED)
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(UserError, match=r"What kind of table is .*a\.xlsx\?"):
        open_tables(str(tmp_path / "a.xlsx"), MAPPED)
    write(tmp_path / "a.csv", ROWS)
    write(tmp_path / "b.jsonl", ROWS)
    with pytest.raises(UserError, match=r"several kinds: a\.csv \(1 \.csv\), b\.jsonl \(1 \.jsonl\)"):
        open_tables(str(tmp_path), MAPPED)


@pytest.mark.parametrize("form", ["a.csv", "a.jsonl"])
def test_empty_files_and_wrong_encodings(tmp_path, form):
    path = tmp_path / form
    path.write_bytes(b"")
    with pytest.raises(UserError, match=f"{form} "):
        open_tables(str(path), MAPPED)
    write(path, ROWS)
    source = open_tables(str(path), MAPPED)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=f"{form} is empty"):
        rows_of(source)
    plain = "visitor,sku,stars,at,liked,device\n" if form == "a.csv" else ""
    line = "ü,1,,,1,x\n" if form == "a.csv" else '{"visitor": "ü", "sku": 1, "liked": 1}\n'
    path.write_bytes((plain + line.replace("ü", "u") + line).encode("latin-1"))
    number = 3 if form == "a.csv" else 2
    for bad_rows in ("refuse", "drop"):
        with pytest.raises(UserError, match=rf"{form}, line {number}: not utf-8"):
            rows_of(source, bad_rows)


def test_damaged_files(tmp_path):
    whole = write(tmp_path / "a.csv.gz", [ROWS[0] | {"note": str(i)} for i in range(3000)])
    source = open_tables(str(whole), MAPPED)
    whole.write_bytes(whole.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"a\.csv\.gz is cut short or damaged after line"):
        rows_of(source, "drop")
    file = write(tmp_path / "b.parquet", ROWS)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"Cannot read .*b\.parquet as Parquet"):
        open_tables(str(file), MAPPED)
