"""The format GroupLens publishes MovieLens in: ratings.csv and movies.csv."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from sellarec.data.raw import Raw, file_hash
from sellarec.errors import UserError

RATINGS, MOVIES = "ratings.csv", "movies.csv"
RATING_COLUMNS = ("userId", "movieId", "rating", "timestamp")
MOVIE_COLUMNS = ("movieId", "title", "genres")
RATING_RANGE = (0.5, 5.0)
"""Stars a rating may have, both ends included."""

NO_GENRES = "(no genres listed)"
_SHOWN_CHARACTERS = 200

# Patterns rather than casts: with them every value that fails is known, and so is its row.
_INTEGER = r"^\d{1,18}$"
_NUMBER = r"^-?(\d{1,18}(\.\d*)?|\.\d+)$"


def find_files(path: Path) -> list[Path]:
    """Return ratings.csv and movies.csv of the folder `path`.

    Raises:
        UserError: one of them is not there.
    """
    looked_for = f"a folder with {RATINGS} and {MOVIES}"
    try:
        if not path.is_dir():
            raise UserError(f"No such folder: {path}. Looked for {looked_for}.")
        names = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Looked for {looked_for}.") from error
    absent = [name for name in (RATINGS, MOVIES) if name not in names]
    if absent:
        found = ", ".join(sorted(names)[:20]) or "nothing"
        raise UserError(f"{path} lacks {' and '.join(absent)}. Looked for {looked_for}; found {found}.")
    return [path / RATINGS, path / MOVIES]


def read_movielens(path: Path, *, positive_rating: float = 4.0, noun: str = "movie") -> Raw:
    """Read MovieLens as published; a row's label is 1 where its rating is at least `positive_rating` stars.

    Exact duplicates of a row, and later entries of a movie already listed, are left out and counted.

    Raises:
        UserError: a missing or damaged file, column or row, or a `positive_rating` outside the range of ratings.
    """
    low, high = RATING_RANGE
    if not low <= positive_rating <= high:
        raise UserError(f"data.positive_rating is {positive_rating:g}, but ratings go from {low:g} to {high:g}.")
    ratings_file, movies_file = find_files(path)
    rows, duplicates = _without_repeats(_ratings(ratings_file), ["user", "item", "rating", "timestamp"])
    items, repeated = _without_repeats(_movies(movies_file), ["external_id"])
    label = pc.greater_equal(rows["rating"], positive_rating).cast(pa.int8())
    return Raw(
        interactions=rows.append_column("label", label),
        items=items,
        noun=noun,
        label_rule=f"1 where the rating is at least {positive_rating:g}, else 0",
        sources={file.name: file_hash(file) for file in (ratings_file, movies_file)},
        dropped={"exact duplicate of an earlier row": duplicates, f"repeated entry in {MOVIES}": repeated},
    )


def _ratings(file: Path) -> pa.Table:
    table = _read_text(file, RATING_COLUMNS)
    wrong = {column: _unlike(table[column], _INTEGER) for column in ("userId", "movieId", "timestamp")}
    wrong["rating"] = _unlike(table["rating"], _NUMBER)
    rating = pc.if_else(wrong["rating"], None, table["rating"]).cast(pa.float64())
    low, high = RATING_RANGE
    outside = pc.or_(pc.less(rating, low), pc.greater(rating, high)).fill_null(False)
    _refuse_first(
        file,
        [
            *((wrong[column], f"its {column} is not a whole number") for column in ("userId", "movieId", "timestamp")),
            (wrong["rating"], "its rating is not a number"),
            (outside, f"its rating is not between {low:g} and {high:g}"),
        ],
    )
    return pa.table(
        {
            "user": table["userId"].cast(pa.int64()),
            "item": table["movieId"].cast(pa.int64()),
            "rating": rating.cast(pa.float32(), safe=False),
            "timestamp": table["timestamp"].cast(pa.int64()),
        }
    )


def _movies(file: Path) -> pa.Table:
    table = _read_text(file, MOVIE_COLUMNS)
    _refuse_first(file, [(_unlike(table["movieId"], _INTEGER), "its movieId is not a whole number")])
    title, genres = table["title"], table["genres"]
    described = pc.binary_join_element_wise(title, pc.replace_substring(genres, "|", ", "), ". ")
    plain = pc.or_(pc.equal(genres, ""), pc.equal(genres, NO_GENRES))
    return pa.table(
        {
            "external_id": table["movieId"].cast(pa.int64()),
            "title": title,
            "text": pc.if_else(plain, title, described),
        }
    )


def _read_text(file: Path, columns: tuple[str, ...]) -> pa.Table:
    """The CSV's `columns` as text, exactly as they stand in it."""
    bad_rows: list[pacsv.InvalidRow] = []

    def keep_bad_row(row: pacsv.InvalidRow) -> str:
        bad_rows.append(row)
        return "skip"  # reading goes on; the first of them is refused below

    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            header = next(csv.reader(lines), [])
        absent = [column for column in columns if column not in header]
        if absent:
            raise UserError(
                f"{file} lacks the column {', '.join(absent)}; found {', '.join(header) or 'an empty file'}."
            )
        table = pacsv.read_csv(
            file,
            read_options=pacsv.ReadOptions(use_threads=False),
            parse_options=pacsv.ParseOptions(invalid_row_handler=keep_bad_row),
            convert_options=pacsv.ConvertOptions(
                column_types={column: pa.string() for column in columns}, include_columns=list(columns)
            ),
        )
    except (UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise UserError(f"{file} is not a CSV file in UTF-8: {error}.") from error
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror or error}.") from error
    if bad_rows:
        row = bad_rows[0]
        _refuse(file, row.number, f"it has {row.actual_columns} values where the header has {row.expected_columns}")
    return table


def _unlike(column: pa.ChunkedArray, pattern: str) -> pa.ChunkedArray:
    return pc.invert(pc.match_substring_regex(column, pattern))


def _refuse_first(file: Path, checks: list[tuple[pa.ChunkedArray, str]]) -> None:
    """Refuse the file for the first of its rows that is true in one of `checks`, with that check's reason."""
    found = [(pc.index(wrong, True).as_py(), reason) for wrong, reason in checks]
    found = [(row, reason) for row, reason in found if row >= 0]
    if found:
        row, reason = min(found, key=lambda pair: pair[0])
        _refuse(file, row + 2, reason)  # the header is record 1


def _refuse(file: Path, record: int, reason: str) -> NoReturn:
    """Refuse the file for its `record`-th record, counted from 1 with the header and without blank lines."""
    count, is_inside_quotes, first_line, content = 0, False, 0, ""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not is_inside_quotes:
                if not line.strip("\r\n"):
                    continue
                if count == record:
                    break
                count, first_line, content = count + 1, number, line.rstrip("\r\n")
            is_inside_quotes ^= line.count('"') % 2 == 1
    shown = content if len(content) <= _SHOWN_CHARACTERS else content[:_SHOWN_CHARACTERS] + "…"
    raise UserError(f"{file}, line {first_line}: {reason}. The line reads: {shown}")


def _without_repeats(table: pa.Table, keys: list[str]) -> tuple[pa.Table, int]:
    """The first row of each distinct combination of `keys`, in order, and the number of rows left out."""
    position = pa.array(np.arange(table.num_rows))
    first = table.select(keys).append_column("position", position).group_by(keys).aggregate([("position", "min")])
    kept = np.sort(first["position_min"].to_numpy())
    return table.take(pa.array(kept)), table.num_rows - len(kept)
