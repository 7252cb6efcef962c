"""Tables that start from vectors of a file, found by the source's own ids of users or items.

Shapes: R rows of a table, D columns.
"""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from sellarec.data.log import Log
from sellarec.errors import UserError
from sellarec.training.table import Table, index, initial_rows


def write_table(log: Log, table: Table, path: str, has_biases: bool, seed: int, folder: Path) -> int:
    """Write a whole table, of which the rows that the file has start from its vectors, and the others fresh.

    It is written as `SavedTable` reads it, as many rows at a time as a part of the log describes. The file is read once for each.

    Args:
        table: "user" or "item" of a model.
        path: a local Parquet file of `id` (as the log's source has it, text or whole numbers) and `vector` (a list of
            numbers), all of the table's width, or of one column fewer, which leaves out the bias.
        has_biases: whether the last column is a bias: it starts from 0 where vectors leave it out.
        seed: of fresh rows.

    Returns:
        How many rows start from the file.

    Raises:
        UserError: the file can't be read, or has not these columns; an id is null or there twice; a vector is of another width
            or not finite; or no id is one of the log's.
    """
    vectors, width = _vectors(path, table, has_biases)
    folder.mkdir(parents=True, exist_ok=True)
    written, known = [], 0
    for file in log.paths(f"{table.name}s"):
        ids = pl.read_parquet(file, columns=[table.name, "external_id"])
        start, stop = ids[table.name][0], ids[table.name][-1] + 1
        rows = initial_rows(table, seed, start, stop)
        found = ids.lazy().join(vectors, left_on="external_id", right_on="id").collect(engine="streaming")
        values = found["vector"].explode(empty_as_null=False).to_numpy().reshape(len(found), width)
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            raise UserError(f"{path}: the vector of {table.name} '{found['external_id'][int(bad[0])]}' is not finite")
        place = found[table.name].to_numpy() - start
        rows[place, :width], rows[place, width:] = values, 0
        known += len(found)
        name = f"{table.name}-{start:012d}-{0:06d}.safetensors"
        save_file({"rows": rows}, folder / name)
        extent = {"start": start, "rows": stop - start, "column": 0, "columns": table.dim}
        written.append({"table": table.name, "file": name, **extent})
    if not known:
        mine, theirs = ids["external_id"][0], vectors.select("id").head(1).collect()["id"][0]
        raise UserError(
            f"{path} has no vector of any {table.name} of the log: its ids are such as '{theirs}', the log's such as '{mine}'"
        )
    (folder / f"{table.name}.json").write_text(json.dumps(index(table, written)))
    return known


def _vectors(path: str, table: Table, has_biases: bool) -> tuple[pl.LazyFrame, int]:
    """The file's ids, as text, and vectors, checked but for what a vector holds; and the vectors' width."""
    try:
        schema = pq.read_schema(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as Parquet: {error}") from error
    if not {"id", "vector"} <= set(schema.names):
        raise UserError(f"{path} has the columns {', '.join(schema.names)}, but id and vector are needed")
    ids, lists = schema.field("id").type, schema.field("vector").type
    if not (pa.types.is_string(ids) or pa.types.is_large_string(ids) or pa.types.is_integer(ids)):
        raise UserError(
            f"{path}: id is of type {ids}, but text or whole numbers are needed, as the log's source has them"
        )
    is_list = pa.types.is_list(lists) or pa.types.is_large_list(lists) or pa.types.is_fixed_size_list(lists)
    if not is_list or not (pa.types.is_floating(lists.value_type) or pa.types.is_integer(lists.value_type)):
        raise UserError(f"{path}: vector is of type {lists}, but a list of numbers is needed")
    vectors = pl.scan_parquet(path).select(
        pl.col("id").cast(pl.String), pl.col("vector").cast(pl.List(pl.Float32), strict=False)
    )
    facts = vectors.select(
        rows=pl.len(),
        ids=pl.col("id").n_unique(),
        nulls=pl.col("id").null_count() + pl.col("vector").null_count(),
        narrowest=pl.col("vector").list.len().min(),
        widest=pl.col("vector").list.len().max(),
    ).collect(engine="streaming").row(0, named=True)  # fmt: skip
    if not facts["rows"]:
        raise UserError(f"{path} has no rows")
    if facts["nulls"]:
        raise UserError(f"{path}: {facts['nulls']} ids or vectors are null")
    if facts["ids"] < facts["rows"]:
        raise UserError(f"{path} has {facts['rows']} rows, but only {facts['ids']} ids: each may stand there once")
    widths = {table.dim, table.dim - has_biases}
    if facts["narrowest"] != facts["widest"] or facts["widest"] not in widths:
        raise UserError(
            f"{path}: vectors are {facts['narrowest']} to {facts['widest']} wide, but rows of table {table.name} are "
            f"{table.dim} wide{', the bias included' if has_biases else ''}: {' or '.join(map(str, sorted(widths)))} is needed"
        )
    return vectors, facts["widest"]
