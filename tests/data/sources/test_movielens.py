"""MovieLens as published: CSV files, their labels, and the line of whatever is wrong in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sellarec.data.prepare import prepare
from sellarec.data.sources import source_hashes
from sellarec.data.sources.movielens import read_movielens
from sellarec.errors import UserError

RATINGS = "userId,movieId,rating,timestamp\n1,10,4.0,100\n1,20,3.5,110\n2,10,5,105\n1,10,4.0,100\n2,30,0.5,120\n"
MOVIES = (
    "movieId,title,genres\n"
    "20,Heat (1995),Action|Crime\n"
    '10,"American President, The (1995)",Comedy\n'
    "40,Amélie (2001),(no genres listed)\n"
)


def write(folder: Path, ratings: str = RATINGS, movies: str = MOVIES) -> Path:
    (folder / "ratings.csv").write_text(ratings, encoding="utf-8")
    (folder / "movies.csv").write_text(movies, encoding="utf-8")
    return folder


def test_reads_ratings_and_movies(tmp_path):
    raw = read_movielens(write(tmp_path))
    assert raw.interactions.select(["user", "item", "label", "timestamp"]).to_pylist() == [
        {"user": 1, "item": 10, "label": 1, "timestamp": 100},
        {"user": 1, "item": 20, "label": 0, "timestamp": 110},
        {"user": 2, "item": 10, "label": 1, "timestamp": 105},
        {"user": 2, "item": 30, "label": 0, "timestamp": 120},
    ]
    assert raw.dropped["exact duplicate of an earlier row"] == 1
    assert raw.items.to_pydict() == {
        "external_id": [20, 10, 40],
        "title": ["Heat (1995)", "American President, The (1995)", "Amélie (2001)"],
        "text": ["Heat (1995). Action, Crime", "American President, The (1995). Comedy", "Amélie (2001)"],
    }
    assert raw.sources == source_hashes(tmp_path, "movielens")
    assert set(raw.sources) == {"ratings.csv", "movies.csv"}


def test_positive_rating_sets_the_labels(tmp_path):
    raw = read_movielens(write(tmp_path), positive_rating=3.5)
    assert raw.interactions["label"].to_pylist() == [1, 1, 1, 0]
    with pytest.raises(UserError, match=r"positive_rating is 6, but ratings go from 0\.5 to 5"):
        read_movielens(write(tmp_path), positive_rating=6)


def test_columns_may_stand_in_any_order_among_others_with_blank_lines(tmp_path):
    ratings = "\ufeffrating,note,movieId,timestamp,userId\r\n\r\n4.0,x,10,100,1\r\n\r\n"
    raw = read_movielens(write(tmp_path, ratings=ratings))
    assert raw.interactions.to_pylist() == [{"user": 1, "item": 10, "rating": 4.0, "timestamp": 100, "label": 1}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("abc,10,4.0,100", "its userId is not a whole number"),
        ("1,10,,100", "its rating is not a number"),
        ("1,10,nan,100", "its rating is not a number"),
        ("1,10,inf,100", "its rating is not a number"),
        ("1,10,4.0,yesterday", "its timestamp is not a whole number"),
        ("1,10,4.0,", "its timestamp is not a whole number"),
        ("1,1.5,4.0,100", "its movieId is not a whole number"),
        ("1,10,5.5,100", "its rating is not between 0.5 and 5"),
        ("1,10,-1,100", "its rating is not between 0.5 and 5"),
        ("1,10,4.0", "it has 4 values where the header has 5"),
        ("1,10,4.0,100,7", "it has 6 values where the header has 5"),
    ],
)
def test_a_bad_row_is_named_by_line_and_content(tmp_path, line, reason):
    # Lines: 1 header, 2 to 3 one row with a line break in quotes, 4 blank, 5 good, 6 the bad one, 7 bad as well.
    ratings = f'userId,movieId,rating,timestamp,note\n1,10,4.0,90,"a\nb"\n\n1,10,4.0,100,c\n{line},d\n{line},e\n'
    write(tmp_path, ratings=ratings)
    with pytest.raises(UserError) as refused:
        read_movielens(tmp_path)
    assert str(refused.value) == f"{tmp_path / 'ratings.csv'}, line 6: {reason}. The line reads: {line},d"


def test_the_first_bad_row_is_named_whatever_its_column(tmp_path):
    ratings = RATINGS + "1,10,7,100\nabc,10,4,100\n1,10,4,\n"
    with pytest.raises(UserError, match=r"line 7: its rating is not between .* The line reads: 1,10,7,100$"):
        read_movielens(write(tmp_path, ratings=ratings))


def test_a_cut_off_last_line(tmp_path):
    with pytest.raises(UserError, match=r"ratings\.csv, line 6: it has 2 values where the header has 4.*reads: 2,3$"):
        read_movielens(write(tmp_path, ratings=RATINGS[: -len("0,0.5,120\n")]))


def test_a_bad_movie(tmp_path):
    with pytest.raises(UserError, match=r"movies\.csv, line 5: its movieId is not a whole number"):
        read_movielens(write(tmp_path, movies=MOVIES + "x,Title,Drama\n"))


def test_a_missing_column(tmp_path):
    ratings = RATINGS.replace("timestamp", "time")
    with pytest.raises(UserError, match="lacks the column timestamp; found userId, movieId, rating, time"):
        read_movielens(write(tmp_path, ratings=ratings))


def test_an_empty_file(tmp_path):
    with pytest.raises(UserError, match="lacks the column userId, movieId, rating, timestamp; found an empty file"):
        read_movielens(write(tmp_path, ratings=""))


def test_a_file_in_another_encoding(tmp_path):
    write(tmp_path)
    (tmp_path / "movies.csv").write_bytes(MOVIES.encode("latin1"))
    with pytest.raises(UserError, match=r"movies\.csv is not a CSV file in UTF-8"):
        read_movielens(tmp_path)


def test_missing_paths(tmp_path):
    with pytest.raises(
        UserError, match=r"No such folder: .*nowhere\. Looked for a folder with ratings\.csv and movies"
    ):
        read_movielens(tmp_path / "nowhere")
    write(tmp_path)
    (tmp_path / "movies.csv").unlink()
    with pytest.raises(UserError, match=r"lacks movies\.csv\. .*found ratings\.csv"):
        read_movielens(tmp_path)


def test_too_few_rows_for_three_splits(tmp_path):
    ratings = "userId,movieId,rating,timestamp\n1,10,4.0,100\n"
    with pytest.raises(UserError, match=r"The valid split is empty: of 1 rows, 1, 0, 0 .*Split rule: by time"):
        prepare(read_movielens(write(tmp_path, ratings=ratings)), history_cap=5)


def test_the_published_small_dataset(sellarec_data):
    prepared = prepare(read_movielens(sellarec_data / "ml-latest-small"), history_cap=50)
    facts = prepared.facts
    assert sum(facts["rows"].values()) == 100_836
    assert (facts["users"], facts["items"], facts["items_without_title"]) == (610, 9_742, 0)
    assert facts["dates"]["train"][1] <= facts["dates"]["valid"][0]
    assert facts["dates"]["valid"][1] <= facts["dates"]["test"][0]
