"""MovieLens as published, in all its formats, and the line of whatever is wrong in them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from sellarec.data.raw import Dropped, Part
from sellarec.data.sources import text
from sellarec.data.sources.movielens import DATASETS, GENRES, open_movielens
from sellarec.errors import UserError

RATINGS = "userId,movieId,rating,timestamp\n1,10,4.0,100\n1,20,3.5,110\n2,10,5,105\n2,30,0.5,120\n"
MOVIES = (
    "movieId,title,genres\n"
    "20,Heat (1995),Action|Crime\n"
    '10,"American President, The (1995)",Comedy\n'
    "40,Amélie (2001),(no genres listed)\n"
)
FLAGS = "|0" * len(GENRES)


def read(parts: Sequence[Part], dropped: Dropped | None = None) -> pa.Table:
    """All rows of parts, each read as a task would: from its pickle."""
    dropped = dropped or Dropped("refuse")
    return pa.concat_tables([table for part in parts for table in pickle.loads(pickle.dumps(part)).read(dropped)])


def write(folder: Path, ratings: str = RATINGS, movies: str = MOVIES, **others: str) -> str:
    for name, content in {"ratings": ratings, "movies": movies, **others}.items():
        (folder / f"{name}.csv").write_text(content, encoding="utf-8", newline="")
    return str(folder)


def write_1m(folder: Path, ratings: str = "1::1193::5::978300760\n6040::1::3::956704191\n") -> str:
    (folder / "ratings.dat").write_text(ratings)
    (folder / "movies.dat").write_bytes("1193::Misérables, Les (1995)::Drama|Musical\n".encode("latin-1"))
    (folder / "users.dat").write_text("1::F::1::10::48067\n6040::M::25::6::11106-1234\n")
    return str(folder)


def zipped(folder: Path, path: Path, top: str = "ml/") -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        if top:
            archive.mkdir(top)
        for file in sorted(folder.iterdir()):
            archive.write(file, top + file.name)
    return str(path)


def pairs(*named: tuple[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in named]


def test_reads_ratings_movies_and_links(tmp_path):
    links = "movieId,imdbId,tmdbId\n10,0112346,9087\n20,0113277,\n99,0000001,1\n"
    source = open_movielens(write(tmp_path, links=links), "ml-25m")
    rows = read(source.interactions)
    assert rows.schema == pa.schema(
        {"user": pa.int64(), "item": pa.int64(), "rating": pa.float32(), "timestamp": pa.int64()}
    )
    assert rows.to_pylist()[1] == {"user": 1, "item": 20, "rating": 3.5, "timestamp": 110}
    assert rows.num_rows == 4
    dropped = Dropped("refuse")
    assert read(source.items, dropped).to_pylist() == [
        {
            "item": 20,
            "title": "Heat (1995)",
            "text": "Heat (1995). Action, Crime",
            "attributes": pairs(("genre", "Action"), ("genre", "Crime"), ("year", "1995")),
            "links": pairs(("imdb", "0113277")),
        },
        {
            "item": 10,
            "title": "American President, The (1995)",
            "text": "American President, The (1995). Comedy",
            "attributes": pairs(("genre", "Comedy"), ("year", "1995")),
            "links": pairs(("imdb", "0112346"), ("tmdb", "9087")),
        },
        {
            "item": 40,
            "title": "Amélie (2001)",
            "text": "Amélie (2001)",
            "attributes": pairs(("year", "2001")),
            "links": [],
        },
    ]
    assert sum(dropped.counts.values()) == 1 and "links.csv" in next(iter(dropped.counts))
    assert [Path(file).name for file in source.files] == ["ratings.csv", "movies.csv", "links.csv"]
    assert (source.noun, source.rating_range, source.users) == ("movie", (0.5, 5.0), ())


def test_titles_are_kept_and_only_a_year_at_their_end_counts(tmp_path):
    titles = [
        "(1941) (1979)",
        "Babylon 5",
        "Fawlty Towers (1975-1979)",
        "2001: A Space Odyssey (1968) ",
        "M\x01\x85 (1999)",
    ]
    movies = "movieId,title,genres\n" + "".join(f"{n},{title},Drama\n" for n, title in enumerate(titles))
    found = read(open_movielens(write(tmp_path, movies=movies), "ml-20m").items)
    assert found["title"].to_pylist() == titles
    years = [[pair["value"] for pair in row if pair["name"] == "year"] for row in found["attributes"].to_pylist()]
    assert years == [["1979"], [], [], ["1968"], ["1999"]]


def test_empty_titles_and_line_breaks_in_quotes(tmp_path):
    movies = 'movieId,title,genres\n-1,,Drama\n2,"Two\r\nlines ""so""",\n3,"",(no genres listed)\n'
    found = read(open_movielens(write(tmp_path, movies=movies), "ml-32m").items)
    assert found["item"].to_pylist() == [-1, 2, 3]
    assert found["title"].to_pylist() == [None, 'Two\r\nlines "so"', None]
    assert found["text"].to_pylist() == ["Drama", 'Two\r\nlines "so"', None]


def test_columns_may_stand_in_any_order_among_others_with_blank_lines(tmp_path):
    ratings = "\ufeff\r\nrating,note,movieId,timestamp,userId\r\n\r\n4.0,x,10,100,1\r\n\r\n"
    rows = read(open_movielens(write(tmp_path, ratings=ratings), "ml-latest-small").interactions)
    assert rows.to_pylist() == [{"user": 1, "item": 10, "rating": 4.0, "timestamp": 100}]


def test_reads_ml_1m(tmp_path):
    source = open_movielens(write_1m(tmp_path), "ml-1m")
    assert read(source.interactions).to_pylist() == [
        {"user": 1, "item": 1193, "rating": 5.0, "timestamp": 978300760},
        {"user": 6040, "item": 1, "rating": 3.0, "timestamp": 956704191},
    ]
    assert read(source.items).to_pylist() == [
        {
            "item": 1193,
            "title": "Misérables, Les (1995)",
            "text": "Misérables, Les (1995). Drama, Musical",
            "attributes": pairs(("genre", "Drama"), ("genre", "Musical"), ("year", "1995")),
        }
    ]
    assert read(source.users).to_pylist()[1] == {
        "user": 6040,
        "attributes": pairs(("gender", "M"), ("age", "25"), ("occupation", "6"), ("zip", "11106-1234")),
    }
    assert source.rating_range == (1, 5)


def test_reads_ml_10m(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::122::5::838985046\n1::185::0.5::838983525\n")
    (tmp_path / "movies.dat").write_text("122::Étoile: a: b\t\x1f (1992)::Comedy|IMAX\n", encoding="utf-8")
    source = open_movielens(str(tmp_path), "ml-10m")
    assert read(source.interactions)["rating"].to_pylist() == [5.0, 0.5]
    assert read(source.items)["title"].to_pylist() == ["Étoile: a: b\t\x1f (1992)"]


def test_reads_ml_100k(tmp_path):
    (tmp_path / "u.data").write_text("196\t242\t3\t881250949\n")
    (tmp_path / "u1.base").write_text("not read")
    (tmp_path / "u.item").write_bytes(
        "242|Kolya \xe9 (1996)|24-Jan-1997||http://x|0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        "267|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n".encode("latin-1")
    )
    (tmp_path / "u.user").write_text("196|49|M|writer|55105\n")
    source = open_movielens(str(tmp_path), "ml-100k")
    assert read(source.interactions).to_pylist() == [{"user": 196, "item": 242, "rating": 3.0, "timestamp": 881250949}]
    movies = read(source.items)
    assert movies["text"].to_pylist() == ["Kolya é (1996). Comedy", "unknown"]
    assert movies["attributes"].to_pylist() == [pairs(("genre", "Comedy"), ("year", "1996")), []]
    assert read(source.users).to_pylist() == [
        {"user": 196, "attributes": pairs(("gender", "M"), ("age", "49"), ("occupation", "writer"), ("zip", "55105"))}
    ]
    (tmp_path / "u.item").write_text(f"1|T|||{FLAGS[:-1]}2\n")
    with pytest.raises(UserError, match=r"u\.item, line 1: a genre's flag is neither 0 nor 1"):
        read(source.items)


@pytest.mark.parametrize("top", ["", "ml-20m/"])
def test_the_zip_gives_the_same_as_the_folder(tmp_path, top):
    (tmp_path / "in").mkdir()
    folder = write(tmp_path / "in")
    archive = zipped(Path(folder), tmp_path / "a.zip", top)
    plain, packed = open_movielens(folder, "ml-20m"), open_movielens(archive, "ml-20m")
    assert read(packed.interactions) == read(plain.interactions)
    assert read(packed.items) == read(plain.items)
    assert packed.files == (archive,)
    write(tmp_path / "in", ratings=RATINGS + "x,1,1,1\n")
    zipped(Path(folder), tmp_path / "a.zip", top)
    with pytest.raises(UserError, match=r"a\.zip \(.*ratings\.csv\), line 6: the userId is not a whole number"):
        read(open_movielens(archive, "ml-20m").interactions)


@pytest.mark.parametrize("size", [1, 5, 8, 13, 31, 40, 1000])
def test_ranges_of_a_large_file_hold_each_line_once(tmp_path, monkeypatch, size):
    monkeypatch.setattr(text, "SPLIT_BYTES", size)
    monkeypatch.setattr(text, "CHUNK_BYTES", 7)
    lines = "".join(f"{user},{user * 7},3.5,{user}\n" for user in range(40)).rstrip("\n")
    source = open_movielens(write(tmp_path, ratings=f"userId,movieId,rating,timestamp\n{lines}"), "ml-32m")
    assert len(source.interactions) == -(-(tmp_path / "ratings.csv").stat().st_size // size)
    assert len({part.name for part in source.interactions}) == len(source.interactions)
    assert read(source.interactions)["user"].to_pylist() == list(range(40))
    write(tmp_path, ratings=f"userId,movieId,rating,timestamp\n{lines.replace('30,210', '30,zwei')}")
    with pytest.raises(UserError, match=r"line 32: the movieId is not a whole number.*'30,zwei,3\.5,30'"):
        read(source.interactions)


@pytest.mark.parametrize("header", ["userId,movieId,rating,timestamp", "\n\n\nuserId,movieId,rating,timestamp"])
def test_small_blocks_give_the_same_rows_and_lines(tmp_path, monkeypatch, header):
    monkeypatch.setattr(text, "CHUNK_BYTES", 3)
    source = open_movielens(write(tmp_path, ratings=f"{header}\n1,2,3.5,4\n\n5,6,1,7\n8,9,1,x"), "ml-32m")
    dropped = Dropped("drop")
    assert read(source.interactions, dropped)["user"].to_pylist() == [1, 5]
    with pytest.raises(UserError, match=rf"line {header.count(chr(10)) + 5}: the timestamp is not a whole number"):
        read(source.interactions)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("abc,10,4.0,100", "the userId is not a whole number (of 64 bits at most)"),
        (",10,4.0,100", "the userId is not a whole number (of 64 bits at most)"),
        ("9223372036854775808,10,4.0,100", "the userId is not a whole number (of 64 bits at most)"),
        ("1,1.5,4.0,100", "the movieId is not a whole number (of 64 bits at most)"),
        ("1,0x10,4.0,100", "the movieId is not a whole number (of 64 bits at most)"),
        ("1,10,,100", "the rating is not a number"),
        ("1,10,nan,100", "the rating is not a number"),
        ("1,10,NaN,100", "the rating is not a number"),
        ("1,10,inf,100", "the rating is not a number"),
        ("1,10,1e999,100", "the rating is not a number"),
        ("1,10, 4,100", "the rating is not a number"),
        ("1,10,5.5,100", "the rating is not between 0.5 and 5"),
        ("1,10,-1,100", "the rating is not between 0.5 and 5"),
        ("1,10,4.0,yesterday", "the timestamp is not a whole number (of 64 bits at most)"),
        ("1,10,4.0,", "the timestamp is not a whole number (of 64 bits at most)"),
        (
            "1,10,4.0,1588888888000",
            "the timestamp is not in seconds since 1970 (it would lie after the year 9999)",
        ),
        ("1,10,4.0", "it does not have 4 values"),
        ("1,10,4.0,100,7", "it does not have 4 values"),
    ],
)
def test_a_bad_row_is_named_by_line_and_content_or_dropped_and_counted(tmp_path, line, reason):
    # Lines: 1 header, 2 good, 3 blank, 4 the bad one, 5 good, 6 bad as well.
    ratings = f"userId,movieId,rating,timestamp\n1,10,4.0,90\n\n{line}\n2,10,4.0,100\n{line}\n"
    source = open_movielens(write(tmp_path, ratings=ratings), "ml-latest-small")
    with pytest.raises(UserError) as refused:
        read(source.interactions)
    assert str(refused.value).startswith(f"{tmp_path / 'ratings.csv'}, line 4: {reason}. It reads: {line!r}.")
    dropped = Dropped("drop")
    assert read(source.interactions, dropped)["user"].to_pylist() == [1, 2]
    assert dropped.counts == {reason: 2}


def test_the_first_bad_row_is_named_whatever_its_fault_and_a_row_counts_once(tmp_path):
    ratings = RATINGS + "1,10,7,100\nabc,10,nan,\n1,10\n1,10,nan,1\n"
    source = open_movielens(write(tmp_path, ratings=ratings), "ml-latest-small")
    with pytest.raises(UserError, match=r"line 6: the rating is not between .* It reads: '1,10,7,100'"):
        read(source.interactions)
    dropped = Dropped("drop")
    assert read(source.interactions, dropped).num_rows == 4
    assert sorted(dropped.counts.values()) == [1, 1, 1, 1]


def test_ids_at_the_ends_of_int64(tmp_path):
    low, high = -(2**63), 2**63 - 1
    source = open_movielens(write(tmp_path, ratings=f"{RATINGS}{low},{high},1,1\n-7,007,1,1\n"), "ml-25m")
    assert read(source.interactions).slice(4).select(["user", "item"]).to_pylist() == [
        {"user": low, "item": high},
        {"user": -7, "item": 7},
    ]


def test_half_stars_below_one_are_bad_where_ratings_start_at_one(tmp_path):
    source = open_movielens(write_1m(tmp_path, "1::2::0.5::3\n1:2:3:4\n1::2::3::4\n"), "ml-1m")
    dropped = Dropped("drop")
    assert read(source.interactions, dropped).num_rows == 1
    assert dropped.counts == {"the rating is not between 1 and 5": 1, "it does not have 4 values": 1}


def test_a_cut_off_last_line(tmp_path):
    source = open_movielens(write(tmp_path, ratings=RATINGS[: -len("0,0.5,120\n")]), "ml-latest-small")
    with pytest.raises(UserError, match=r"ratings\.csv, line 5: it does not have 4 values\. It reads: '2,3'"):
        read(source.interactions)


def test_bad_movies_links_and_users(tmp_path):
    # Line 6 is the bad one: the row before it has a line break in quotes.
    movies = 'movieId,title,genres\n1,"a\nb",\n\n3,c,\nx,Title,Drama\n4,5\n'
    source = open_movielens(write(tmp_path, movies=movies, links="movieId,imdbId,tmdbId\n1,2,3\n"), "ml-25m")
    with pytest.raises(UserError, match=r"movies\.csv, line 6: the movieId is not a whole number.*reads: 'x,Title,Dr"):
        read(source.items)
    dropped = Dropped("drop")
    assert read(source.items, dropped)["item"].to_pylist() == [1, 3]
    assert sorted(dropped.counts.values()) == [1, 1]
    write(tmp_path, links="movieId,imdbId,tmdbId\n10,2,3\n10.5,2,3\n")
    with pytest.raises(UserError, match=r"links\.csv, line 3: the movieId is not a whole number"):
        read(source.items)
    write_1m(tmp_path)
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\nF::1::1::10::48067\n")
    with pytest.raises(UserError, match=r"users\.dat, line 2: the user id is not a whole number"):
        read(open_movielens(str(tmp_path), "ml-1m").users)


def test_quotes_that_never_end_or_end_within_a_value(tmp_path):
    source = open_movielens(write(tmp_path, movies=MOVIES + '50,"Seven (1995),Drama\n60,x,y\n'), "ml-25m")
    for mode in ("refuse", "drop"):
        with pytest.raises(UserError, match=r"movies\.csv, line 5: not CSV \(unexpected end of data\)"):
            read(source.items, Dropped(mode))
    write(tmp_path, movies=MOVIES + '50,"Seven" (1995),Drama\n')
    with pytest.raises(UserError, match=r"movies\.csv, line 5: not CSV"):
        read(source.items)


@pytest.mark.parametrize("mode", ["refuse", "drop"])
def test_a_missing_or_repeated_column_and_empty_files(tmp_path, mode):
    def fails(pattern: str) -> None:
        source = open_movielens(str(tmp_path), "ml-latest-small")
        with pytest.raises(UserError, match=pattern):
            read(source.items, Dropped(mode))
            read(source.interactions, Dropped(mode))

    write(tmp_path, ratings=RATINGS.replace("timestamp", "time"))
    fails(r"ratings\.csv lacks the column timestamp; its first line has userId, movieId, rating, time")
    write(tmp_path, ratings=RATINGS.replace("timestamp", "rating"))
    fails(r"ratings\.csv lacks the column timestamp")
    write(tmp_path, ratings=RATINGS.replace("timestamp", "timestamp,rating"))
    fails(r"ratings\.csv has the column rating twice")
    write(tmp_path, ratings="")
    fails(r"ratings\.csv is empty")
    write(tmp_path, movies="")
    fails(r"movies\.csv is empty")
    write(tmp_path, movies=MOVIES.replace("genres", "kind"))
    fails(r"movies\.csv lacks the column genres")


@pytest.mark.parametrize("name", ["ratings.dat", "movies.dat", "users.dat"])
def test_an_empty_file_without_header(tmp_path, name):
    write_1m(tmp_path)
    (tmp_path / name).write_text("")
    source = open_movielens(str(tmp_path), "ml-1m")
    with pytest.raises(UserError, match=rf"{name} is empty"):
        read([*source.interactions, *source.items, *source.users])


def test_a_header_alone_is_no_rows(tmp_path):
    source = open_movielens(write(tmp_path, ratings=RATINGS.split("\n")[0]), "ml-25m")
    assert list(source.interactions[0].read(Dropped("refuse"))) == []


def test_files_in_another_encoding(tmp_path):
    write(tmp_path)
    (tmp_path / "movies.csv").write_bytes(MOVIES.encode("latin-1"))
    with pytest.raises(UserError, match=r"movies\.csv, line 4: not in UTF-8 \(.*: b'40,Am\\xe9lie"):
        read(open_movielens(str(tmp_path), "ml-25m").items)
    (tmp_path / "ratings.csv").write_bytes(RATINGS.encode("utf-16"))
    with pytest.raises(UserError, match=r"ratings\.csv, line 1: not in UTF-8"):
        read(open_movielens(str(tmp_path), "ml-25m").interactions)
    write_1m(tmp_path)
    (tmp_path / "movies.dat").write_text("1::A::B\n2::Misérables, Les (1995)::Drama\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"movies\.dat, line 2: in UTF-8, but the file was published in Latin-1"):
        read(open_movielens(str(tmp_path), "ml-1m").items)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"No such file or folder: .*nowhere\. Looked for ml-1m: ratings\.dat, and"):
        open_movielens(str(tmp_path / "nowhere"), "ml-1m")
    write(tmp_path)
    (tmp_path / "movies.csv").unlink()
    with pytest.raises(UserError, match=r"lacks movies\.csv\. .*found ratings\.csv"):
        open_movielens(str(tmp_path), "ml-25m")
    with pytest.raises(
        UserError, match=r"lacks u\.data and u\.item\. Looked for ml-100k: u\.data or u1\.base and u1\.t"
    ):
        open_movielens(str(tmp_path), "ml-100k")
    with pytest.raises(UserError, match=r"No MovieLens dataset 'ml-2m'\. There are ml-100k, "):
        open_movielens(str(tmp_path), "ml-2m")
    assert len(DATASETS) == 7


def test_a_damaged_zip(tmp_path):
    (tmp_path / "in").mkdir()
    # Numbers that hardly pack: the damage lies after many lines.
    lines = "".join(f"{n * n * 7919 % 1000003},{n * 104729 % 999983},3.5,{n * n}\n" for n in range(60_000))
    path = Path(zipped(Path(write(tmp_path / "in", "userId,movieId,rating,timestamp\n" + lines)), tmp_path / "a.zip"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.zip is cut short, damaged or no zip"):
        open_movielens(str(path), "ml-25m")
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.zip is cut short, damaged or no zip"):
        open_movielens(str(path), "ml-25m")
    damaged = bytearray(whole)
    damaged[len(whole) * 2 // 3] ^= 0xFF
    path.write_bytes(bytes(damaged))
    source = open_movielens(str(path), "ml-25m")
    for mode in ("refuse", "drop"):
        with pytest.raises(
            UserError, match=r"a\.zip \(ml/ratings\.csv\) is cut short.*|.*a\.zip .*ratings\.csv\), line"
        ):
            read(source.interactions, Dropped(mode))


def test_a_zip_with_a_file_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/ratings.csv", RATINGS)
        archive.writestr("b/ratings.csv", RATINGS)
    with pytest.raises(UserError, match=r"holds ratings\.csv twice: a/ratings\.csv and b/ratings\.csv"):
        open_movielens(str(tmp_path / "a.zip"), "ml-25m")


def test_the_published_small_dataset(sellarec_data):
    source = open_movielens(str(sellarec_data / "ml-latest-small"), "ml-latest-small")
    rows, movies = read(source.interactions), read(source.items)
    assert (rows.num_rows, pc.count_distinct(rows["user"]).as_py()) == (100_836, 610)
    assert (pc.count_distinct(rows["item"]).as_py(), movies.num_rows) == (9_724, 9_742)
    assert movies["title"].null_count == 0


def test_the_published_100k(sellarec_data):
    source = open_movielens(str(sellarec_data / "ml-100k" / "original"), "ml-100k")
    rows, movies = read(source.interactions), read(source.items)
    assert (rows.num_rows, movies.num_rows) == (100_000, 1_682)
    assert (pc.count_distinct(rows["user"]).as_py(), pc.count_distinct(rows["item"]).as_py()) == (943, 1_682)


def test_the_published_movies_and_users_of_1m(sellarec_data, tmp_path):
    for name in ("movies.dat", "users.dat"):
        (tmp_path / name).write_bytes((sellarec_data / "ml-1m" / name).read_bytes())
    (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\n")
    source = open_movielens(str(tmp_path), "ml-1m")
    movies, users = read(source.items), read(source.users)
    assert (movies.num_rows, users.num_rows) == (3_883, 6_040)
    assert pc.sum(pc.match_substring(movies["title"], "é")).as_py() > 10
    # Every title of ml-1m ends in a year.
    assert all(row[-1]["name"] == "year" for row in movies["attributes"].to_pylist())
