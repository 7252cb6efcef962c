"""The Amazon data in the three published forms: their files, fields, orders of columns and units of time."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from sellarec.data.raw import ATTRIBUTES, Dropped, Part, Source
from sellarec.data.sources.amazon import TEXT_CHARACTERS, open_amazon
from sellarec.errors import UserError

REVIEWS_2023 = [
    {
        "rating": 5.0,
        "title": "Such a lovely scent but not overpowering.",
        "text": "This spray is really nice. \U0001f600<br />",
        "images": [],
        "asin": "B00YQ6X8EO",
        "parent_asin": "B00YQ6X8EX",
        "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ",
        "timestamp": 1588687728923,
        "helpful_vote": 0,
        "verified_purchase": True,
    },
    {
        "rating": 4.0,
        "title": "Works great",
        "text": "smells\n“good”",
        "images": [{"small_image_url": "https://m/a.jpg", "attachment_type": "IMAGE"}],
        "asin": "B081TJ8YS3",
        "parent_asin": "B081TJ8YS3",
        "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INR",
        "timestamp": 1493683200000,
        "helpful_vote": 1,
        "verified_purchase": False,
    },
]
META_2023 = [
    {
        "main_category": "All Beauty",
        "title": "Howard LC0008 Leather Conditioner &amp; Cleaner",
        "average_rating": 4.8,
        "rating_number": 10,
        "features": ["Cleans leather", "Made in the USA!"],
        "description": ["A <b>conditioner</b> for leather"],
        "price": 12.99,
        "images": [{"thumb": "https://m/b.jpg", "hi_res": None}],
        "videos": [],
        "store": "Howard Products",
        "categories": ["Beauty", "Leather Care"],
        "details": {"Package Dimensions": "7.1 x 5.5 x 3 inches"},
        "parent_asin": "B00YQ6X8EX",
        "bought_together": None,
    },
    {
        "main_category": "All Beauty",
        "title": "",
        "features": [],
        "description": [],
        "price": None,
        "store": None,
        "categories": [],
        "details": {},
        "parent_asin": "B081TJ8YS3",
    },
]
REVIEWS_2018 = [
    {
        "overall": 5.0,
        "vote": "2",
        "verified": True,
        "reviewTime": "05 2, 2017",
        "reviewerID": "A2SUAM1J3GNN3B",
        "asin": "0000013714",
        "style": {"Format:": " Hardcover"},
        "reviewerName": "J. McDonald",
        "reviewText": "I bought this for my husband.",
        "summary": "Heavenly Highway Hymns",
        "unixReviewTime": 1493683200,
    }
]
META_2018 = [
    {
        "category": ["Books", "Hymns", "</span></span></span>"],
        "tech1": "",
        "description": ["Songs", "for all"],
        "title": "Heavenly Highway Hymns",
        "also_buy": ["B0000"],
        "brand": "Stamps",
        "feature": [],
        "price": "$1,049.95",
        "asin": "0000013714",
    },
    {
        "category": [],
        "title": "var aPageStart = (new Date()).getTime();\nvar ue_t0=ue_t0||+new Date();",
        "price": ".a-box-inner{background-color:#fff}",
        "asin": "0000013715",
    },
]
REVIEWS_2014 = [
    {
        "reviewerID": "A2SUAM1J3GNN3B",
        "asin": "0000013714",
        "reviewerName": "J. McDonald",
        "helpful": [2, 3],
        "reviewText": "I bought this.",
        "overall": 5.0,
        "summary": "Heavenly",
        "unixReviewTime": 1252800000,
        "reviewTime": "09 13, 2009",
    }
]
META_2014 = (
    "{'asin': '0000031852', 'title': \"Girls Ballet Tutu 'Zebra'\", 'price': 3.17, 'imUrl': 'http://e/a.jpg', "
    "'related': {'also_bought': ['B00JHONN1S']}, 'salesRank': {'Toys & Games': 211836}, 'brand': 'Coxlures', "
    "'categories': [['Sports & Outdoors', 'Other Sports'], ['Sports & Outdoors', 'Dance']]}\n"
)


def write(path: Path, content: str | list[dict]) -> Path:
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def published_2023(folder: Path) -> Path:
    write(folder / "raw/review_categories/All_Beauty.jsonl.gz", REVIEWS_2023)
    write(folder / "raw/meta_categories/meta_All_Beauty.jsonl.gz", META_2023)
    return folder


def table(parts: tuple[Part, ...], bad_rows: str = "refuse") -> tuple[pa.Table, dict[str, int]]:
    dropped = Dropped(bad_rows)  # type: ignore[arg-type]
    return pa.concat_tables([table for part in parts for table in part.read(dropped)]), dict(dropped.counts)


def rows(source: Source, bad_rows: str = "refuse") -> list[dict]:
    return table(source.interactions, bad_rows)[0].to_pylist()


EXPECTED_2023 = [
    {
        "user": "AGKHLEW2SOWHNMFQIJGBECAF7INQ",
        "item": "B00YQ6X8EX",
        "rating": 5.0,
        "timestamp": 1588687728,
        "verified": "true",
        "domain": "All_Beauty",
    },
    {
        "user": "AGKHLEW2SOWHNMFQIJGBECAF7INR",
        "item": "B081TJ8YS3",
        "rating": 4.0,
        "timestamp": 1493683200,
        "verified": "false",
        "domain": "All_Beauty",
    },
]


def test_reviews_of_2023(tmp_path):
    source = open_amazon(str(published_2023(tmp_path)), "2023", ("All_Beauty",))
    found, counts = table(pickle.loads(pickle.dumps(source)).interactions)
    assert found.to_pylist() == EXPECTED_2023
    assert found.schema.field("rating").type == pa.float32()
    assert found.schema.field("timestamp").type == pa.int64()
    assert counts == {}
    assert (source.noun, source.features, source.rating_range) == ("product", ("verified",), (1.0, 5.0))
    assert source.split_rule is None
    assert [Path(file).name for file in source.files] == ["All_Beauty.jsonl.gz", "meta_All_Beauty.jsonl.gz"]


def test_metadata_of_2023(tmp_path):
    source = open_amazon(str(published_2023(tmp_path)), "2023", ("All_Beauty",))
    found, _ = table(source.items)
    assert found.schema.field("attributes").type == ATTRIBUTES
    assert found.to_pylist() == [
        {
            "item": "B00YQ6X8EX",
            "title": "Howard LC0008 Leather Conditioner & Cleaner",
            "text": "Howard LC0008 Leather Conditioner & Cleaner. By Howard Products. Beauty, Leather Care. "
            "Cleans leather. Made in the USA! A conditioner for leather.",
            "attributes": [
                {"name": "category", "value": "Beauty"},
                {"name": "category", "value": "Leather Care"},
                {"name": "store", "value": "Howard Products"},
                {"name": "price", "value": "12.99"},
            ],
        },
        {
            "item": "B081TJ8YS3",
            "title": None,
            "text": "All Beauty.",
            "attributes": [{"name": "category", "value": "All Beauty"}],
        },
    ]


def test_files_in_one_folder_or_by_uri(tmp_path):
    write(tmp_path / "All_Beauty.jsonl", REVIEWS_2023)
    write(tmp_path / "meta_All_Beauty.jsonl", META_2023)
    for path in (str(tmp_path), f"{tmp_path}/", tmp_path.as_uri()):
        assert rows(open_amazon(path, "2023", ("All_Beauty",))) == EXPECTED_2023


def test_several_categories(tmp_path):
    published_2023(tmp_path)
    write(tmp_path / "raw/review_categories/Toys_and_Games.jsonl", REVIEWS_2023[:1])
    write(tmp_path / "raw/meta_categories/meta_Toys_and_Games.jsonl.gz", META_2023)
    source = open_amazon(str(tmp_path), "2023", ("Toys_and_Games", "All_Beauty"))
    assert [row["domain"] for row in rows(source)] == ["Toys_and_Games", "All_Beauty", "All_Beauty"]
    assert len(source.interactions) == len(source.items) == 2


CSV_2023 = (
    "user_id,parent_asin,rating,timestamp\nAGKA,B00V6R3R3S,5.0,1452647102000\nAGKA,B00PA7VMD2,3.0,1452648690000\n"
)


@pytest.mark.parametrize(
    "name", ["benchmark/5core/rating_only/Books.csv.gz", "0core/rating_only/Books.csv", "Books.csv"]
)
def test_ratings_of_2023(tmp_path, name):
    write(tmp_path / name, CSV_2023)
    write(tmp_path / "meta_Books.jsonl", META_2023)
    source = open_amazon(str(tmp_path), "2023", ("Books",), noun="book")
    assert rows(source) == [
        {"user": "AGKA", "item": "B00V6R3R3S", "rating": 5.0, "timestamp": 1452647102, "domain": "Books"},
        {"user": "AGKA", "item": "B00PA7VMD2", "rating": 3.0, "timestamp": 1452648690, "domain": "Books"},
    ]
    assert (source.features, source.noun) == ((), "book")


@pytest.mark.parametrize("folder", ["benchmark/5core/last_out_w_his", "0core/timestamp_w_his", "."])
def test_splits_of_2023_with_histories(tmp_path, folder):
    histories = {"train": "", "valid": "B1", "test": "B1 B2"}
    for number, (split, history) in enumerate(histories.items(), 1):
        text = f"user_id,parent_asin,rating,timestamp,history\nA1,B{number},5.0,145264710{number}000,{history}\n"
        write(tmp_path / folder / f"Books.{split}.csv.gz", text)
    write(tmp_path / "meta_categories/meta_Books.jsonl.gz", META_2023)
    source = open_amazon(str(tmp_path), "2023", ("Books",))
    found = rows(source)
    assert [row["split"] for row in found] == ["train", "valid", "test"]
    assert [row["history"] for row in found] == [[], ["B1"], ["B1", "B2"]]
    assert [row["item"] for row in found] == ["B1", "B2", "B3"]
    assert source.split_rule == "the split as published (one file for each of train, valid and test)"
    write(tmp_path / folder / "Books.valid.csv.gz", CSV_2023)
    with pytest.raises(UserError, match=r"Books\.train\.csv\.gz has a column history, but .*valid.* has none"):
        open_amazon(str(tmp_path), "2023", ("Books",))


def test_splits_without_histories(tmp_path):
    for split in ("train", "valid", "test"):
        write(tmp_path / f"5core/last_out/Books.{split}.csv", CSV_2023)
    write(tmp_path / "meta_Books.jsonl", META_2023)
    found, _ = table(open_amazon(str(tmp_path), "2023", ("Books",)).interactions)
    assert found.schema.names == ["user", "item", "rating", "timestamp", "domain", "split"]
    (tmp_path / "5core/last_out/Books.test.csv").unlink()
    with pytest.raises(UserError, match=r"lacks Books\.test\.csv \(also with \.gz\)\. Found .*5core/last"):
        open_amazon(str(tmp_path), "2023", ("Books",))


def test_several_forms_must_be_told_apart(tmp_path):
    published_2023(tmp_path)
    write(tmp_path / "benchmark/5core/rating_only/All_Beauty.csv", CSV_2023)
    with pytest.raises(UserError, match=r"several forms of the 2023 data: reviews, 5core/rating_only\. Say which"):
        open_amazon(str(tmp_path), "2023", ("All_Beauty",))
    found = rows(open_amazon(str(tmp_path), "2023", ("All_Beauty",), form="5core/rating_only"))
    assert [row["user"] for row in found] == ["AGKA", "AGKA"]
    with pytest.raises(UserError, match="no form '5core'; they have reviews, "):
        open_amazon(str(tmp_path), "2023", ("All_Beauty",), form="5core")


EXPECTED_2018 = {"user": "A2SUAM1J3GNN3B", "item": "0000013714", "rating": 5.0, "timestamp": 1493683200}


@pytest.mark.parametrize(
    ("name", "content", "more"),
    [
        ("Books.json.gz", REVIEWS_2018, {"verified": "true"}),
        ("categoryFiles/Books.json.gz", REVIEWS_2018, {"verified": "true"}),
        ("categoryFilesSmall/Books_5.json.gz", REVIEWS_2018, {"verified": "true"}),
        ("categoryFilesSmall/Books.csv", "0000013714,A2SUAM1J3GNN3B,5.0,1493683200\n", {}),
    ],
)
def test_the_forms_of_2018(tmp_path, name, content, more):
    write(tmp_path / name, content)
    write(tmp_path / "metaFiles2/meta_Books.json.gz", META_2018)
    source = open_amazon(str(tmp_path), "2018", ("Books",))
    assert rows(source) == [EXPECTED_2018 | more | {"domain": "Books"}]
    first, second = table(source.items)[0].to_pylist()
    assert first["text"] == "Heavenly Highway Hymns. By Stamps. Books, Hymns. Songs. for all."
    assert first["attributes"] == [
        {"name": "category", "value": "Books"},
        {"name": "category", "value": "Hymns"},
        {"name": "brand", "value": "Stamps"},
        {"name": "price", "value": "1049.95"},
    ]
    assert second == {"item": "0000013715", "title": None, "text": None, "attributes": []}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("reviews_Books.json.gz", REVIEWS_2014),
        ("categoryFiles/reviews_Books_5.json.gz", REVIEWS_2014),
        ("ratings_Books.csv", "A2SUAM1J3GNN3B,0000013714,5.0,1252800000\n"),
    ],
)
def test_the_forms_of_2014(tmp_path, name, content):
    write(tmp_path / name, content)
    write(tmp_path / "meta_Books.json.gz", META_2014)
    source = open_amazon(str(tmp_path), "2014", ("Books",))
    assert rows(source) == [EXPECTED_2018 | {"timestamp": 1252800000, "domain": "Books"}]
    [item] = table(source.items)[0].to_pylist()
    assert item["title"] == "Girls Ballet Tutu 'Zebra'"
    assert item["text"] == "Girls Ballet Tutu 'Zebra'. By Coxlures. Sports & Outdoors, Other Sports, Dance."
    assert {"name": "price", "value": "3.17"} in item["attributes"]


LITERALS = [
    "__import__('os').getcwd()",
    "{'asin': open('/etc/passwd').read()}",
    "{'asin': '1', ",
    "(" * 5000,
    "['asin']",
]


@pytest.mark.parametrize("line", [*LITERALS, "{'asin': '1'}" + " " * (1 << 20) + "#"])
def test_nothing_in_the_metadata_of_2014_is_executed(tmp_path, line):
    write(tmp_path / "ratings_Books.csv", "A,1,5.0,1252800000\n")
    write(tmp_path / "meta_Books.json.gz", META_2014 + line + "\n" + META_2014)
    source = open_amazon(str(tmp_path), "2014", ("Books",))
    with pytest.raises(
        UserError, match=r"meta_Books\.json\.gz, line 2: the line is not a whole Python dict\. It reads"
    ):
        table(source.items)
    found, counts = table(source.items, "drop")
    assert found.num_rows == 2
    assert counts == {"the line is not a whole Python dict": 1}


def test_long_texts_are_cut_between_words(tmp_path):
    published_2023(tmp_path)
    long = META_2023[0] | {"description": ["word " * 1000]}
    write(tmp_path / "raw/meta_categories/meta_All_Beauty.jsonl.gz", [long])
    text = table(open_amazon(str(tmp_path), "2023", ("All_Beauty",)).items)[0]["text"][0].as_py()
    assert TEXT_CHARACTERS - 5 <= len(text) <= TEXT_CHARACTERS
    assert text.endswith(" word")


def test_only_a_period(tmp_path):
    published_2023(tmp_path)
    source = open_amazon(str(tmp_path), "2023", ("All_Beauty",), period=(1493683200, 1588687728))
    found, counts = table(source.interactions)
    assert found["timestamp"].to_pylist() == [1493683200]
    assert counts == {"not 2017-05-02 or later and before 2020-05-05 14:08:48": 1}
    with pytest.raises(UserError, match="holds no time"):
        open_amazon(str(tmp_path), "2023", ("All_Beauty",), period=(2, 2))


BAD = [
    ({"rating": None}, "the rating is not a number"),
    ({"rating": float("nan")}, "the rating is not a number"),
    ({"rating": "five"}, "the rating is not a number"),
    ({"rating": 0.0}, "the rating is not between 1 and 5"),
    ({"timestamp": None}, "the timestamp is empty"),
    ({"timestamp": 1588687728}, "the timestamp is outside 1990 to 2100 as milliseconds: seconds?"),
    ({"timestamp": -1}, "the timestamp is outside 1990 to 2100 as milliseconds"),
    ({"parent_asin": ""}, "the parent_asin is empty"),
    ({"user_id": None}, "the user_id is empty"),
]


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_bad_reviews(tmp_path, change, reason):
    published_2023(tmp_path)
    bad = {name: value for name, value in (REVIEWS_2023[0] | change).items() if value is not None}
    write(tmp_path / "raw/review_categories/All_Beauty.jsonl.gz", [REVIEWS_2023[0], bad, REVIEWS_2023[1]])
    source = open_amazon(str(tmp_path), "2023", ("All_Beauty",))
    with pytest.raises(UserError) as refused:
        rows(source)
    assert f"All_Beauty.jsonl.gz, line 2: {reason}. It reads: '{{" in str(refused.value)
    found, counts = table(source.interactions, "drop")
    assert found.to_pylist() == EXPECTED_2023
    assert counts == {reason: 1}


def test_bad_ratings(tmp_path):
    lines = ["A1,0001,5.0,1252800000", "A2,0002,5.0", "A3,0003,NaN,1252800000", "A4,,5.0,1252800000", "A5,0005,5.0,"]
    write(tmp_path / "ratings_Books.csv", "\n".join(lines) + "\n")
    write(tmp_path / "meta_Books.json.gz", META_2014)
    source = open_amazon(str(tmp_path), "2014", ("Books",))
    with pytest.raises(
        UserError, match=r"ratings_Books\.csv, line 2: it does not have 4 values\. It reads: 'A2,0002,5\.0'"
    ):
        rows(source)
    found, counts = table(source.interactions, "drop")
    assert found["user"].to_pylist() == ["A1"]
    assert sum(counts.values()) == 4


def test_a_cut_last_line(tmp_path):
    published_2023(tmp_path)
    whole = "".join(json.dumps(row) + "\n" for row in REVIEWS_2023)
    write(tmp_path / "raw/review_categories/All_Beauty.jsonl.gz", whole[:-40])
    source = open_amazon(str(tmp_path), "2023", ("All_Beauty",))
    with pytest.raises(UserError, match=r"line 2: the line is not a whole JSON object\. It reads: '{\"rating\": 4\.0"):
        rows(source)
    assert rows(source, "drop") == EXPECTED_2023[:1]


@pytest.mark.parametrize("bad_rows", ["refuse", "drop"])
@pytest.mark.parametrize("which", ["review_categories/All_Beauty", "meta_categories/meta_All_Beauty"])
def test_structural_damage_is_always_refused(tmp_path, bad_rows, which):
    path = published_2023(tmp_path) / f"raw/{which}.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    source = open_amazon(str(tmp_path), "2023", ("All_Beauty",))
    parts = source.items if "meta" in which else source.interactions
    with pytest.raises(UserError, match=r"All_Beauty\.jsonl\.gz is cut short or damaged after line"):
        table(parts, bad_rows)
    row = '{"parent_asin": "1", "user_id": "2", "rating": 1, "timestamp": 1588687728923, "title": "%s"}\n'
    path.write_bytes(gzip.compress((row % "a" + row % "é").encode("latin-1")))
    with pytest.raises(UserError, match=r"All_Beauty\.jsonl\.gz, line 2: not utf-8"):
        table(parts, bad_rows)


def test_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="No such folder"):
        open_amazon(str(tmp_path / "nowhere"), "2023", ("Books",))
    with pytest.raises(
        UserError, match=r"Looked for Books\.jsonl, .*Books\.train\.csv \(also with \.gz\)\. Found nothing"
    ):
        open_amazon(str(tmp_path), "2023", ("Books",))
    published_2023(tmp_path)
    with pytest.raises(UserError, match=r"no interactions of All_Beauty as published in 2014"):
        open_amazon(str(tmp_path), "2014", ("All_Beauty",))
    with pytest.raises(UserError, match=r"lacks Books\.jsonl \(also"):
        open_amazon(str(tmp_path), "2023", ("All_Beauty", "Books"))
    write(tmp_path / "raw/review_categories/Books.jsonl", REVIEWS_2023)
    with pytest.raises(UserError, match=r"lacks meta_Books\.jsonl \(also"):
        open_amazon(str(tmp_path), "2023", ("All_Beauty", "Books"))
    for categories in ((), ("Books", "Books"), ("../Books",)):
        with pytest.raises(UserError, match="categor"):
            open_amazon(str(tmp_path), "2023", categories)
