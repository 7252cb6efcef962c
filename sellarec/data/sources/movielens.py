"""MovieLens as GroupLens publishes it: the folder, or the zip itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from sellarec.data.raw import Dropped, Part, Source
from sellarec.data.sources.text import (
    Layout,
    Rows,
    TextFile,
    attributes,
    files_at,
    null_where_empty,
    numbers,
    outside,
    quoted_rows,
    range_name,
    ranges,
    rows,
    seconds,
    sliced,
    wanted_files,
    whole_numbers,
    without_bad,
)
from sellarec.errors import UserError

GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""What the flags of ml-100k's u.item stand for, in their order (its u.genre)."""

NO_GENRES = ("(no genres listed)", "unknown")
"""What stands for a movie of no genre."""

LINKS = "links.csv"


@dataclass(frozen=True)
class _Form:
    """One of the formats.

    Attributes:
        ratings: the rating files that there may be: the first of these sets that is there is read.
        rating_columns: user, movie, rating and time.
        item_layout: None: CSV with quotes.
        users: the file of users; () where there is none.
    """

    ratings: tuple[tuple[str, ...], ...]
    rating_layout: Layout
    rating_columns: tuple[str, str, str, str]
    movies: str
    item_layout: Layout | None
    users: str | None = None
    user_layout: Layout | None = None
    lowest: float = 0.5


_CSV_COLUMNS = ("userId", "movieId", "rating", "timestamp")
_COLUMNS = ("user id", "movie id", "rating", "timestamp")

_CSV = _Form((("ratings.csv",),), Layout(","), _CSV_COLUMNS, "movies.csv", None)

_FORMS = {
    "ml-100k": _Form(
        (("u.data",), ("u1.base", "u1.test")),
        Layout("\t", _COLUMNS),
        _COLUMNS,
        "u.item",
        Layout("|", ("movie id", "title", "release", "video release", "url", *GENRES), "latin-1"),
        "u.user",
        Layout("|", ("user id", "age", "gender", "occupation", "zip")),
        lowest=1,
    ),
    "ml-1m": _Form(
        (("ratings.dat",),),
        Layout("::", _COLUMNS),
        _COLUMNS,
        "movies.dat",
        Layout("::", ("movie id", "title", "genres"), "latin-1"),
        "users.dat",
        Layout("::", ("user id", "gender", "age", "occupation", "zip")),
        lowest=1,
    ),
    "ml-10m": _Form(
        (("ratings.dat",),),
        Layout("::", _COLUMNS),
        _COLUMNS,
        "movies.dat",
        Layout("::", ("movie id", "title", "genres")),
    ),
    "ml-latest-small": _CSV,
    "ml-20m": _CSV,
    "ml-25m": _CSV,
    "ml-32m": _CSV,
}

DATASETS = tuple(_FORMS)


def open_movielens(path: str, dataset: str, *, noun: str = "movie") -> Source:
    """MovieLens: ratings with their times, titles and genres of movies, and what is published of users.

    Ids are int64. An item's attributes are "genre" (repeated) and "year", where its title ends in one; titles stay as they
    were published. Users have the attributes "gender", "age", "occupation" and "zip" as they were published (in ml-1m age
    and occupation are codes), where users.dat or u.user is there; links.csv, where it is there, gives links "imdb" and "tmdb".
    Ratings outside the dataset's range are bad rows. Of ml-100k u.data is read or, without it, u1.base and u1.test as one log.

    Args:
        path: the unpacked folder, or the published zip; a path or URI.
        dataset: one of DATASETS.

    Raises:
        UserError: no such dataset, folder or zip; a file is missing; or, when parts are read, a file is damaged, in another
            encoding, empty or lacks a column, or a row is bad and bad rows are refused.
    """
    form = _FORMS.get(dataset)
    if form is None:
        raise UserError(f"No MovieLens dataset {dataset!r}. There are {', '.join(DATASETS)}.")
    sets = form.ratings
    looked_for = f"{dataset}: {' or '.join(' and '.join(names) for names in sets)}, and {form.movies}"
    found = files_at(path, looked_for)
    names = next((names for names in sets if set(names) <= set(found)), sets[0])
    *ratings, movies = wanted_files(found, (*names, form.movies), path, looked_for)
    links = found.get(LINKS) if form is _CSV else None
    users = found.get(form.users) if form.users else None
    read = [*ratings, movies, *(file for file in (links, users) if file)]
    return Source(
        interactions=tuple(
            Part(range_name(file, *piece), functools.partial(_read_ratings, file, dataset, *piece))
            for file in ratings
            for piece in ranges(file)
        ),
        items=(Part(movies.name, functools.partial(_read_movies, movies, links, dataset)),),
        users=(Part(users.name, functools.partial(_read_users, users, dataset)),) if users else (),
        files=tuple(dict.fromkeys(file.path for file in read)),
        noun=noun,
        rating_range=(form.lowest, 5.0),
    )


def _read_ratings(file: TextFile, dataset: str, start: int, end: int | None, dropped: Dropped) -> Iterator[pa.Table]:
    form = _FORMS[dataset]
    user, movie, rating, timestamp = form.rating_columns
    for found in rows(file, form.rating_layout, form.rating_columns, start, end):
        users, bad_user = whole_numbers(found.columns[user], user)
        movies, bad_movie = whole_numbers(found.columns[movie], movie)
        stars, bad_stars = numbers(found.columns[rating], rating)
        times, bad_time = whole_numbers(found.columns[timestamp], timestamp)
        times, no_time = seconds(times, timestamp)
        table = pa.table({"user": users, "item": movies, "rating": stars.cast(pa.float32()), "timestamp": times})
        checks = [bad_user, bad_movie, bad_stars, outside(stars, form.lowest, 5.0, rating), bad_time, no_time]
        yield from sliced(without_bad(found, table, checks, dropped))


def _read_movies(file: TextFile, links: TextFile | None, dataset: str, dropped: Dropped) -> Iterator[pa.Table]:
    layout = _FORMS[dataset].item_layout
    linked = _links(links, dropped) if links else None
    seen: list[pa.Array] = []
    if layout is None:
        read = quoted_rows(file, ("movieId", "title", "genres"))
    else:
        assert layout.columns
        read = rows(file, layout, layout.columns)
    for found in read:
        name = "movieId" if layout is None else "movie id"
        movies, bad_movie = whole_numbers(found.columns[name], name)
        genres, bad_genres = _genres(found)
        table = _described(movies, found.columns["title"], genres)
        if linked:
            at = pc.index_in(movies, linked["item"])
            pairs = [(catalog, linked[catalog].take(at)) for catalog in ("imdb", "tmdb")]
            table = table.append_column("links", attributes(pairs, len(movies)))
            seen.append(movies)
        yield from sliced(without_bad(found, table, [bad_movie, *bad_genres], dropped))
    if linked:
        known = pc.is_in(linked["item"], pa.concat_arrays([pa.array([], pa.int64()), *seen]))
        dropped.leave_out(f"a line of {LINKS} whose movie is not in {file.name}", pc.sum(pc.invert(known)).as_py() or 0)


def _genres(found: Rows) -> tuple[pa.Array, list[tuple[pa.Array, str]]]:
    """The genres of each movie, joined with |, and the checks of them."""
    if "genres" in found.columns:
        return found.columns["genres"], []
    flags = [found.columns[genre] for genre in GENRES]
    wrong = functools.reduce(pc.or_, [pc.invert(pc.is_in(flag, pa.array(["0", "1"]))) for flag in flags])
    set_flags = zip(*(pc.equal(flag, "1").to_pylist() for flag in flags), strict=True)
    joined = ["|".join(genre for genre, is_set in zip(GENRES, row, strict=True) if is_set) for row in set_flags]
    return pa.array(joined, pa.string()), [(wrong, "a genre's flag is neither 0 nor 1")]


def _described(movies: pa.Array, titles: pa.Array, genres: pa.Array) -> pa.Table:
    genres = pc.if_else(pc.is_in(genres, pa.array(NO_GENRES)), "", genres)
    listed = null_where_empty(pc.replace_substring(genres, "|", ", "))
    titles = null_where_empty(titles)
    years = pc.struct_field(pc.extract_regex(titles, r"\((?P<year>[0-9]{4})\)\s*\z"), "year")
    return pa.table(
        {
            "item": movies,
            "title": titles,
            # Null where either is null; then the one that isn't, if any.
            "text": pc.coalesce(pc.binary_join_element_wise(titles, listed, ". "), titles, listed),
            "attributes": attributes([("genre", pc.split_pattern(genres, "|")), ("year", years)], len(movies)),
        }
    )


def _links(file: TextFile, dropped: Dropped) -> dict[str, pa.Array]:
    tables = []
    for found in quoted_rows(file, ("movieId", "imdbId", "tmdbId")):
        movies, bad_movie = whole_numbers(found.columns["movieId"], "movieId")
        table = pa.table({"item": movies, "imdb": found.columns["imdbId"], "tmdb": found.columns["tmdbId"]})
        tables.append(without_bad(found, table, [bad_movie], dropped))
    names = {"item": pa.int64(), "imdb": pa.string(), "tmdb": pa.string()}
    table = pa.concat_tables([pa.schema(names).empty_table(), *tables])
    return {name: pa.concat_arrays(table[name].chunks) for name in names}


def _read_users(file: TextFile, dataset: str, dropped: Dropped) -> Iterator[pa.Table]:
    layout = _FORMS[dataset].user_layout
    assert layout and layout.columns
    known = ("gender", "age", "occupation", "zip")
    for found in rows(file, layout, layout.columns):
        users, bad_user = whole_numbers(found.columns["user id"], "user id")
        described = attributes([(name, found.columns[name]) for name in known], len(users))
        table = pa.table({"user": users, "attributes": described})
        yield from sliced(without_bad(found, table, [bad_user], dropped))
