"""The Amazon review data of the McAuley Lab, as published in 2014, 2018 and 2023."""

from __future__ import annotations

import ast
import functools
import html
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa

from sellarec.data.files import decoded, line_blocks, names_in
from sellarec.data.raw import ATTRIBUTES, SPLITS, Dropped, Part, Source
from sellarec.data.sources.tables import Columns, csv_header, csv_rows, interactions, json_rows
from sellarec.errors import UserError

Edition = Literal["2014", "2018", "2023"]

RATING_RANGE = (1.0, 5.0)
"""Stars a rating may have, both ends included."""

TEXT_CHARACTERS = 2000
"""What is known of an item in words is cut to this."""

MAX_LITERAL_CHARACTERS = 1 << 20
"""A line of the 2014 metadata, which are Python literals, is not parsed beyond this."""

ROWS_PER_TABLE = 20_000
"""Items of one table."""


@dataclass(frozen=True)
class _Form:
    """One of the forms in which an edition's interactions are published.

    Attributes:
        folders: where its files lie below the given path; "" is the path itself.
        files: split ("" where it has none) -> name of the file, {} for the category; it may have .gz after it.
        header: the columns of a CSV without a header.
    """

    folders: tuple[str, ...]
    files: dict[str, str]
    columns: Columns
    header: tuple[str, ...] | None = None


_SPLIT_FILES = {split: f"{{}}.{split}.csv" for split in SPLITS}
_JSON = Columns(user="reviewerID", item="asin", rating="overall", timestamp="unixReviewTime")
_RATINGS = Columns(user="user", item="item", rating="rating", timestamp="timestamp")
_CSV_2023 = Columns(user="user_id", item="parent_asin", rating="rating", timestamp="timestamp", time_unit="ms")

_FORMS: dict[Edition, dict[str, _Form]] = {
    "2014": {
        "reviews": _Form(("", "categoryFiles"), {"": "reviews_{}.json"}, _JSON),
        "5core": _Form(("", "categoryFiles"), {"": "reviews_{}_5.json"}, _JSON),
        "ratings": _Form(
            ("", "categoryFiles"), {"": "ratings_{}.csv"}, _RATINGS, ("user", "item", "rating", "timestamp")
        ),
    },
    "2018": {
        "reviews": _Form(("", "categoryFiles"), {"": "{}.json"}, replace(_JSON, features=("verified",))),
        "5core": _Form(("", "categoryFilesSmall"), {"": "{}_5.json"}, replace(_JSON, features=("verified",))),
        "ratings": _Form(("", "categoryFilesSmall"), {"": "{}.csv"}, _RATINGS, ("item", "user", "rating", "timestamp")),
    },
    "2023": {
        "reviews": _Form(
            ("", "review_categories", "raw/review_categories"),
            {"": "{}.jsonl"},
            replace(_CSV_2023, features=("verified_purchase",)),
        ),
        # In one folder without the published ones nothing tells the cores and the ways of splitting apart.
        "rating_only": _Form(("",), {"": "{}.csv"}, _CSV_2023),
        "split": _Form(("",), _SPLIT_FILES, _CSV_2023),
    }
    | {
        f"{core}/{name}": _Form(
            (f"{core}/{name}", f"benchmark/{core}/{name}"),
            {"": "{}.csv"} if name == "rating_only" else _SPLIT_FILES,
            _CSV_2023,
        )
        for core in ("0core", "5core")
        for name in ("rating_only", "last_out", "last_out_w_his", "timestamp", "timestamp_w_his")
    },
}

_META_FOLDERS: dict[Edition, tuple[str, ...]] = {
    "2014": ("", "categoryFiles"),
    "2018": ("", "metaFiles2", "metaFiles"),
    "2023": ("", "meta_categories", "raw/meta_categories"),
}


def open_amazon(
    path: str,
    edition: Edition,
    categories: tuple[str, ...],
    *,
    form: str | None = None,
    period: tuple[int, int] | None = None,
    noun: str = "product",
) -> Source:
    """Amazon's reviews or ratings of some categories, and their products' metadata.

    The files lie in the folder `path` itself or in the publisher's folders below it, each plain or gzipped (where both are
    there, the plain one is read). A product is a `parent_asin` in 2023 and an `asin` before. Of reviews only who rated
    what, when, how and whether the purchase was verified is read.

    Args:
        categories: as in the files' names ("Books", "Toys_and_Games").
        form: which of the published forms to read, where the folder holds several: "reviews"; in 2014 and 2018 also
            "5core" and "ratings"; in 2023 "0core/" or "5core/" with "rating_only", "last_out", "last_out_w_his",
            "timestamp" or "timestamp_w_his", or "rating_only" or "split" for such files in the folder itself.
        period: only interactions from the first time on and before the second (seconds since 1970).

    Raises:
        UserError: a missing or damaged file, several forms and none named, or a form or category that doesn't exist.
    """
    for category in categories:
        if not re.fullmatch(r"\w+", category):
            raise UserError(f"'{category}' is no category: give the name in the files' names, such as Toys_and_Games.")
    if not categories or len(set(categories)) < len(categories):
        given = ", ".join(categories) or "none"
        raise UserError(f"Give one or more --data.categories (Books, Video_Games, ...), each once, not {given}.")
    if period is not None and period[0] >= period[1]:
        raise UserError(f"The period from {period[0]} to {period[1]} (seconds since 1970) holds no time.")
    held = _names(
        path, {folder for one in _FORMS[edition].values() for folder in one.folders} | {*_META_FOLDERS[edition]}
    )
    name, files = _form(path, edition, categories, form, held)
    chosen = _FORMS[edition][name]
    meta = {
        category: _find(path, held, _META_FOLDERS[edition], f"meta_{category}.json", "l") for category in categories
    }
    absent = [
        f"meta_{category}.json{'l' if edition == '2023' else ''}" for category in categories if not meta[category]
    ]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)} (also with .gz). {_found(path, held)}")
    columns = _with_history(chosen, [file for _, _, file in files])
    return Source(
        interactions=tuple(
            Part(
                file,
                functools.partial(
                    _interactions, file, columns, chosen.header, category=category, split=split, period=period
                ),
            )
            for category, split, file in files
        ),
        items=tuple(Part(file, functools.partial(_items, file, edition)) for file in map(str, meta.values())),
        files=(*(file for _, _, file in files), *map(str, meta.values())),
        noun=noun,
        split_rule="the split as published (one file for each of train, valid and test)" if files[0][1] else None,
        features=("verified",) if columns.features else (),
        rating_range=RATING_RANGE,
    )


def _names(path: str, folders: set[str]) -> dict[str, set[str]]:
    """The names in those of the folders below `path` that are there."""
    found = {folder: names_in(_join(path, folder)) for folder in sorted(folders)}
    if found[""] is None:
        raise UserError(f"No such folder: {path}. Looked for a folder with the files of the Amazon review data.")
    return {folder: set(names) for folder, names in found.items() if names}


def _form(
    path: str, edition: Edition, categories: tuple[str, ...], wanted: str | None, held: dict[str, set[str]]
) -> tuple[str, list[tuple[str, str, str]]]:
    """The form to read, and its files: category, split and path."""
    forms = _FORMS[edition]
    if wanted is not None and wanted not in forms:
        raise UserError(f"The {edition} data have no form '{wanted}'; they have {', '.join(forms)}.")
    files: dict[str, list[tuple[str, str, str | None]]] = {}
    for name, form in forms.items():
        found = [
            (category, split, _find(path, held, form.folders, file.format(category)))
            for category in categories
            for split, file in form.files.items()
        ]
        if name == wanted or any(file for _, _, file in found):
            files[name] = found
    if wanted is not None:
        files = {wanted: files[wanted]}
    if not files:
        looked_for = ", ".join(form.files.get("", "{}.train.csv").format(categories[0]) for form in forms.values())
        raise UserError(
            f"{path} holds no interactions of {categories[0]} as published in {edition}. Looked for "
            f"{', '.join(dict.fromkeys(looked_for.split(', ')))} (also with .gz). {_found(path, held)}"
        )
    if len(files) > 1:
        raise UserError(f"{path} holds several forms of the {edition} data: {', '.join(files)}. Say which to read.")
    [(name, chosen)] = files.items()
    absent = [forms[name].files[split].format(category) for category, split, file in chosen if file is None]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)} (also with .gz). {_found(path, held)}")
    return name, [(category, split, str(file)) for category, split, file in chosen]


def _find(path: str, held: dict[str, set[str]], folders: tuple[str, ...], name: str, more: str = "") -> str | None:
    for folder in folders:
        for found in (name, f"{name}.gz", *([f"{name}{more}", f"{name}{more}.gz"] if more else [])):
            if found in held.get(folder, ()):
                return _join(path, folder, found)
    return None


def _join(*names: str) -> str:
    return "/".join(name.rstrip("/") for name in names if name)


def _found(path: str, held: dict[str, set[str]]) -> str:
    names = [_join(folder, name) for folder, found in held.items() for name in sorted(found)]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"Found {', '.join(names[:20]) or 'nothing'}{more}."


def _with_history(form: _Form, files: list[str]) -> Columns:
    """The form's columns, with the histories where its files have them."""
    if form.header is not None or not form.files.get("", "{}.csv").endswith(".csv"):
        return form.columns
    headers = {file: csv_header(file) for file in files}
    having = [file for file, names in headers.items() if "history" in names]
    if having and len(having) < len(files):
        other = next(file for file in files if file not in having)
        raise UserError(f"{having[0]} has a column history, but {other} has none: they are not of one published form.")
    return replace(form.columns, history="history") if having else form.columns


def _interactions(
    file: str,
    columns: Columns,
    header: tuple[str, ...] | None,
    dropped: Dropped,
    *,
    category: str,
    split: str,
    period: tuple[int, int] | None,
) -> Iterator[pa.Table]:
    wanted = columns.names(("user", "item", "rating", "timestamp", "history"))
    is_csv = file.removesuffix(".gz").endswith(".csv")
    rows = csv_rows(file, wanted, names=header) if is_csv else json_rows(file, wanted, dropped)
    for table in interactions(rows, columns, dropped, is_complete=True, rating_range=RATING_RANGE, period=period):
        constants = {"domain": category} | ({"split": split} if split else {})
        for name, value in constants.items():
            table = table.append_column(name, pa.repeat(value, table.num_rows))
        yield table.rename_columns(dict.fromkeys(columns.features, "verified")) if columns.features else table


def _items(file: str, edition: Edition, dropped: Dropped) -> Iterator[pa.Table]:
    """The items of a metadata file: title, all that is known in words, and category, brand or store, and price."""
    parse, key = (
        (_literal, "asin") if edition == "2014" else (json.loads, "parent_asin" if edition == "2023" else "asin")
    )
    made: list[dict[str, Any]] = []
    for first, block in line_blocks(file):
        for number, line in enumerate(decoded(file, first, block).split("\n"), first):
            if line.strip():
                item = _described(f"{file}, line {number}", line, parse, key, dropped)
                made += [item] if item else []
        while len(made) >= ROWS_PER_TABLE:
            yield _item_table(made[:ROWS_PER_TABLE])
            made = made[ROWS_PER_TABLE:]
    if made:
        yield _item_table(made)


def _literal(line: str) -> Any:
    if len(line) > MAX_LITERAL_CHARACTERS:
        raise ValueError(f"longer than {MAX_LITERAL_CHARACTERS:,} characters")
    return ast.literal_eval(line.strip())


def _item_table(made: list[dict[str, Any]]) -> pa.Table:
    schema = {"item": pa.string(), "title": pa.string(), "text": pa.string(), "attributes": ATTRIBUTES}
    return pa.table({name: pa.array([item[name] for item in made], kind) for name, kind in schema.items()})


def _described(where: str, line: str, parse: Callable[[str], Any], key: str, dropped: Dropped) -> dict[str, Any] | None:
    try:
        found = parse(line)
    # Nested too deep for Python's parser it is a MemoryError.
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        found = None
    if not isinstance(found, dict):
        kind = "Python dict" if parse is _literal else "JSON object"
        dropped.bad(where, f"the line is not a whole {kind}", line)
        return None
    item = found.get(key)
    if not isinstance(item, str) or not item.strip():
        dropped.bad(where, f"the {key} is empty", line)
        return None
    title = _words(found.get("title"))
    if "getTime" in title:  # a script of the product's page that the publisher's parser took for the title (2018)
        title = ""
    maker = _words(found.get("store")) or _words(found.get("brand"))
    levels = list(dict.fromkeys(filter(None, map(_level, _flat(found.get("categories") or found.get("category"))))))
    levels = levels or list(filter(None, [_words(found.get("main_category"))]))
    details = [_words(value) for name in ("features", "feature", "description") for value in _flat(found.get(name))]
    sentences = [title, f"By {maker}" if maker else "", ", ".join(levels), *details]
    text = _cut(" ".join(s if s.endswith((".", "!", "?")) else f"{s}." for s in sentences if s))
    price = _price(found.get("price"))
    pairs = [("category", level) for level in levels]
    pairs += [("store" if found.get("store") else "brand", maker)] if maker else []
    pairs += [("price", price)] if price else []
    return {"item": item, "title": title or None, "text": text or None, "attributes": pairs}


def _flat(value: Any) -> list[Any]:
    """The strings in a value, which may be a list of them or (the categories of 2014) of lists of them."""
    if isinstance(value, list | tuple):
        return [inner for each in value for inner in _flat(each)]
    return [value]


def _words(value: Any) -> str:
    """A text without the marks and entities of HTML, and half characters; "" for what is no text."""
    if not isinstance(value, str):
        return ""
    plain = html.unescape(re.sub(r"<[^>]*>", " ", value)) if "<" in value or "&" in value else value
    return " ".join(plain.encode("utf-8", "ignore").decode().split())


def _level(value: Any) -> str:
    """A level of a category; "" for the remnants of HTML that stand among them in 2018."""
    return "" if not isinstance(value, str) or "</" in value else _words(value)


def _price(value: Any) -> str:
    """A price as it is given, without the dollar sign; "" for other things that stand there (page scripts, "None")."""
    found = re.fullmatch(r"\$?\s*([0-9][0-9,]*(\.[0-9]+)?)", str(value).strip())
    return found[1].replace(",", "") if found else ""


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_CHARACTERS else text[:TEXT_CHARACTERS].rsplit(" ", 1)[0]
