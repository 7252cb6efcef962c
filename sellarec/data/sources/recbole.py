"""RecBole's atomic files: NAME.inter, NAME.item and NAME.user."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from sellarec.data.raw import Dropped, Part, Source
from sellarec.data.sources.text import (
    Layout,
    TextFile,
    attributes,
    empty,
    header,
    null_where_empty,
    numbers,
    only_file,
    range_name,
    ranges,
    rows,
    seconds,
    sliced,
    without_bad,
)
from sellarec.errors import UserError

TITLES = ("title", "movie_title", "item_name", "name")
"""The columns of NAME.item that may hold titles."""

TYPES = ("token", "token_seq", "float", "float_seq")

_NUMBERS = ("rating", "timestamp", "label")
_IDS = {"user_id": "token", "item_id": "token"}
_INTER_TYPES = _IDS | dict.fromkeys(_NUMBERS, "float")
_TAKEN = ("user", "item", "split", "history", "warm", "expected", "domain")
_LAYOUT = Layout("\t")


def open_recbole(path: str, *, noun: str = "item") -> Source:
    """A dataset in RecBole's atomic files, tab-separated in UTF-8, each column named `field:type` in the first line.

    Ids are strings, as they stand there; quotes are characters like any other.

    - NAME.inter must have user_id and item_id (token); rating, timestamp and label (float) are read where they are there
      (an empty rating or timestamp is unknown; a label is 0 or 1; fractions of seconds are cut off). Its other token
      columns become `features`; its other float, token_seq and float_seq columns aren't read.
    - NAME.item, where there is one, must have item_id. The title is the column title, movie_title, item_name or name
      (token or token_seq, the words as they stand); more than one of these is refused, without one titles are unknown.
      Every other column becomes an attribute, a token_seq's words (parted by spaces) repeated; float_seq columns aren't read.
    - NAME.user, where there is one, must have user_id; attributes likewise.

    Args:
        path: the folder, a zip of it, or the .inter file of one of several datasets in a folder; a path or URI.

    Raises:
        UserError: there is no .inter file, or several; a first line is not as above; or, when parts are read, a file is
            damaged, not in UTF-8 or empty, or a row is bad and bad rows are refused.
    """
    found, name = only_file(path, ".inter", "RecBole's NAME.inter, and NAME.item and NAME.user where there are any")
    inter, item, user = found[f"{name}.inter"], found.get(f"{name}.item"), found.get(f"{name}.user")
    fields = _fields(inter, tuple(_IDS), _INTER_TYPES)
    features = tuple(
        field for field, kind in fields.items()
        if kind == "token" and field not in _IDS
    )  # fmt: skip
    for field in features:
        if field in _TAKEN:
            raise UserError(f"{inter.name}: a column of features can't be called {field}. Rename it in the first line.")
    items: tuple[Part, ...] = ()
    users: tuple[Part, ...] = ()
    if item:
        title = _title(item, _fields(item, ("item_id",), _IDS))
        items = (Part(item.name, functools.partial(_read_described, item, "item", title)),)
    if user:
        _fields(user, ("user_id",), _IDS)
        users = (Part(user.name, functools.partial(_read_described, user, "user", None)),)
    return Source(
        interactions=tuple(
            Part(range_name(inter, *piece), functools.partial(_read_interactions, inter, *piece))
            for piece in ranges(inter)
        ),
        items=items,
        users=users,
        files=tuple(dict.fromkeys(file.path for file in (inter, item, user) if file)),
        noun=noun,
        features=features,
        label_rule="the label as published" if "label" in fields else None,
    )


def _fields(file: TextFile, wanted: tuple[str, ...], types: dict[str, str]) -> dict[str, str]:
    """The fields of a file in their order, each with its type.

    Args:
        wanted: fields that must be there.
        types: types that fields must have where they are there.

    Raises:
        UserError: the first line isn't `field:type …`, or not as it must be.
    """
    fields: dict[str, str] = {}
    for column in header(file, _LAYOUT):
        field, _, kind = column.rpartition(":")
        if not field or kind not in TYPES:
            raise UserError(
                f"{file.name}: its first line has the column {column!r}, which is not FIELD:TYPE with one of the types "
                f"{', '.join(TYPES)}, with tabs between the columns."
            )
        if field in fields:
            raise UserError(f"{file.name} has the column {field} twice.")
        fields[field] = kind
    absent = [field for field in wanted if field not in fields]
    if absent:
        raise UserError(f"{file.name} lacks the column {', '.join(absent)}; its first line has {', '.join(fields)}.")
    for field, kind in types.items():
        if fields.get(field, kind) != kind:
            raise UserError(f"{file.name}: the column {field} is of the type {fields[field]}, but must be {kind}.")
    return fields


def _title(file: TextFile, fields: dict[str, str]) -> str | None:
    titles = [field for field in TITLES if field in fields]
    if len(titles) > 1:
        raise UserError(
            f"{file.name} has several columns that may hold the title: {', '.join(titles)}. Rename all but one of them."
        )
    if titles and fields[titles[0]] not in ("token", "token_seq"):
        raise UserError(
            f"{file.name}: the column {titles[0]} is of the type {fields[titles[0]]}, but must be token_seq."
        )
    return titles[0] if titles else None


def _read_interactions(file: TextFile, start: int, end: int | None, dropped: Dropped) -> Iterator[pa.Table]:
    fields = _fields(file, tuple(_IDS), _INTER_TYPES)
    read = {field: f"{field}:{kind}" for field, kind in fields.items() if kind == "token" or field in _NUMBERS}
    for found in rows(file, _LAYOUT, list(read.values()), start, end):
        texts = {field: found.columns[column] for field, column in read.items()}
        users, items = texts.pop("user_id"), texts.pop("item_id")
        columns = {"user": users, "item": items}
        checks = [empty(users, "user_id"), empty(items, "item_id")]
        for field, values in texts.items():
            if field not in _NUMBERS:
                columns[field] = values
                continue
            known, bad = numbers(values, field, may_lack=field != "label")
            checks.append(bad)
            if field == "rating":
                columns[field] = known.cast(pa.float32())
            elif field == "timestamp":
                columns[field], late = seconds(known, field)
                checks.append(late)
            else:
                wrong = pc.invert(pc.is_in(known, pa.array([0.0, 1.0])))
                checks.append((wrong, "the label is neither 0 nor 1"))
                columns[field] = pc.if_else(wrong, 0, known).cast(pa.int8())
        yield from sliced(without_bad(found, pa.table(columns), checks, dropped))


def _read_described(file: TextFile, what: str, title: str | None, dropped: Dropped) -> Iterator[pa.Table]:
    """What is known of items (`what` is "item") or users."""
    key = f"{what}_id"
    fields = _fields(file, (key,), _IDS)
    read = {field: f"{field}:{kind}" for field, kind in fields.items() if kind != "float_seq"}
    for found in rows(file, _LAYOUT, list(read.values())):
        texts = {field: found.columns[column] for field, column in read.items()}
        ids = texts.pop(key)
        columns = {what: ids}
        if what == "item":
            columns["title"] = null_where_empty(texts.pop(title)) if title else pa.nulls(len(ids), pa.string())
        named = [
            (field, pc.split_pattern(values, " ") if fields[field] == "token_seq" else values)
            for field, values in texts.items()
        ]
        columns["attributes"] = attributes(named, len(ids))
        yield from sliced(without_bad(found, pa.table(columns), [empty(ids, key)], dropped))
