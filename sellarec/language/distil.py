"""Stage distil: one semantic vector per item, a hidden state of the adapted model that reads the item's text; and of users, where
they are asked for, what it makes of a profile: the titles that the user liked (RLMRec, arXiv 2310.15950, has profiles written by
a language model).

Ray Data batch inference over the catalog; vectors stay float32. They are written a part at a time, and a distillation that was
killed goes on after the parts that stand.

Shapes: b texts, T tokens, H width of the model.
"""

import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import torch

from sellarec.artifacts import Place
from sellarec.config import Distil
from sellarec.data.log import Log
from sellarec.errors import UserError
from sellarec.language import llm as llms
from sellarec.language.prompts import SegmentTokenizer
from sellarec.language.scorer import base_model
from sellarec.training.dense import shard
from sellarec.training.progress import PROGRESS_SECONDS
from sellarec.training.table import RowReader

if TYPE_CHECKING:
    from sellarec.training.workers import Workers

BLOCK_ROWS = 4096
"""Items that an actor takes at a time, and sorts by length, at most."""

PARTS = 16
"""Files that a catalog's vectors are written to, where each so has FEWEST_ROWS to PART_ROWS items: a distillation that was
killed begins one of them anew."""

FEWEST_ROWS, PART_ROWS = 256, 65_536

PROFILES = "users"
"""Folder in the artifact for users' vectors, one after the other, and `users.parquet`: of which user each is."""

WRITTEN = "vectors.json"
"""File beside the vectors: of which fingerprint they are, how many parts and items are written, of how many of these the text was
cut, and the width."""


class ItemEncoder:
    """The adapted model as an encoder: texts in, vectors out.

    Args:
        device: where it computes. A GPU that is seen need not be this process's: with too few for all workers, Ray hides none.
        threads: of this process; None leaves them as they are.
        workers: that are to hold the model together (`share`), each a part on its device, instead of this process the whole: all
            encode equally many texts.

    Attributes:
        decoder: the model without its output layer.
    """

    def __init__(
        self,
        source: llms.LlmSource,
        adapter: Path | None,
        noun: str,
        settings: Distil,
        device: str = "cpu",
        threads: int | None = None,
        workers: "Workers | None" = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        folder = source.folder()
        model = llms.with_adapter(llms.load_model(folder, source.storage), adapter)
        self.decoder, self._layers = base_model(model).base_model, llms.decoder_layers(base_model(model))
        # transformers' output_hidden_states keeps all of them, and none of a sharded model
        place, self._read = settings.layer % (len(self._layers) + 1), list[torch.Tensor]()
        self._reads = self._layers[place] if place < len(self._layers) else None
        if self._reads is not None:
            self._reads.register_forward_pre_hook(self._keep_input, with_kwargs=True)
        if workers is None:
            self._device = torch.device(device)
            llms.compute_in(model, torch.float32)
            model.to(self._device)
        else:
            self._device = workers.device
        self.decoder.eval()
        self._segmenter = SegmentTokenizer(llms.load_tokenizer(folder))
        self._noun, self._settings = noun, settings
        self._limit = min(settings.max_tokens, llms.context_length(model.config))

    def share(self) -> None:
        """Share the model out over the workers; all call it, before anything else."""
        shard(self.decoder, self._layers, self._device, torch.float32)

    def encode(self, texts: list[str]) -> np.ndarray:
        """float32 [b, H]."""
        return self.vectors(self.tokens(texts)[0])

    def tokens(self, texts: list[str]) -> tuple[list[list[int]], np.ndarray]:
        """Token ids of texts in their prompts, as many as are read, and bool [b], which were cut for that."""
        form, noun = self._settings.prompt, self._noun
        read = [form.format(noun=noun, Noun=noun.capitalize(), text=text) for text in texts]
        whole = self._segmenter.openings(
            read
        )  # what a tokenizer may put behind a text would be the last token of some alone
        return [tokens[: self._limit] for tokens in whole], np.array([len(tokens) > self._limit for tokens in whole])

    def vectors(self, ids: list[list[int]]) -> np.ndarray:
        """float32 [b, H]. Texts go through the model in the order of their lengths, so that little is padded."""
        order = np.argsort([len(tokens) for tokens in ids], kind="stable")
        vectors: np.ndarray | None = None
        for start in range(0, len(ids), self._settings.micro_batch):
            some = order[start : start + self._settings.micro_batch]
            found = self._states([ids[place] for place in some])
            if vectors is None:
                vectors = np.empty((len(ids), found.shape[1]), np.float32)
            vectors[some] = found
        assert vectors is not None
        return vectors

    @torch.no_grad()
    def _states(self, ids: list[list[int]]) -> np.ndarray:
        """[b, H], of b texts in tokens."""
        longest = max(len(tokens) for tokens in ids)
        tokens = torch.zeros(len(ids), longest, dtype=torch.long)
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for row, text in enumerate(ids):
            tokens[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        tokens, mask = tokens.to(self._device), mask.to(self._device)
        output = self.decoder(input_ids=tokens, attention_mask=mask, use_cache=False)
        states = output.last_hidden_state if self._reads is None else self._read.pop()
        return pool(states.float(), mask, self._settings.pooling).cpu().numpy()

    def _keep_input(self, layer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._read.append(arguments[0] if arguments else named["hidden_states"])


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: Literal["last", "mean"]) -> torch.Tensor:
    """float [b, T, H], and int64 [b, T], 1 where there is a token and 0 after them -> [b, H]."""
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    return (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


class Actor:
    """An encoder that takes blocks of Ray Data, and tells the board how far the catalog is."""

    def __init__(self, board: Any, catalog: int, *encoder: Any) -> None:
        self._encoder = ItemEncoder(*encoder)
        self._board, self._catalog, self._told = board, catalog, time.monotonic()

    def __call__(self, items: pa.Table) -> pa.Table:
        """Columns item, text -> item, vector (fixed-size list of H float32), cut (whether not all of the text was read)."""
        if time.monotonic() - self._told > PROGRESS_SECONDS:
            self._told = time.monotonic()
            # blocks are encoded nearly in order, so the first item of this one tells how far the catalog is
            self._board.put.remote({"stage": "distil", "done": items["item"][0].as_py(), "items": self._catalog})
        ids, cut = self._encoder.tokens(items["text"].to_pylist())
        return written_vectors(items["item"], self._encoder.vectors(ids), cut)


def written_vectors(items: pa.ChunkedArray, vectors: np.ndarray, cut: np.ndarray) -> pa.Table:
    """Columns item, vector (fixed-size list of H float32) and cut (whether not all of the text was read), of float32 [b, H]."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    return pa.table({"item": items, "vector": lists, "cut": cut})


def distil(
    items: list[str],
    settings: Distil,
    source: llms.LlmSource,
    adapter: Path | None,
    noun: str,
    workers: int,
    gpus: bool,
    output: Place,
    mark: str,
    board: Any,
    threads: int | None = None,
    part_rows: int | None = None,
) -> None:
    """Encode the catalog with `workers` actors and write `vectors/part-*.parquet`, in item order.

    Parts that stand already under the same fingerprint are kept, and the items after them are encoded.

    Args:
        items: the log's files of items, in order.
        gpus: whether each actor takes one; else they compute on CPUs, whatever this machine has.
        mark: fingerprint of the stage, which stands for the model, the adapter, the items and the settings.
        board: actor that takes progress records.
        threads: of each actor; None leaves them as they are.
        part_rows: items of a part; None: see PARTS.

    Raises:
        RuntimeError: a vector is not finite, or the items aren't exactly those of the catalog.
    """  # fmt: skip
    import ray.data
    from ray.data.expressions import col

    catalog, written = items_in(items), what_stands(output, mark)
    first, part_rows = written["items"], part_rows or rows_of_part(catalog)
    block_rows = min(part_rows, BLOCK_ROWS)
    if first < catalog:
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        device = "cuda" if gpus else "cpu"
        vectors = (
            ray.data.read_parquet(items, columns=["item", settings.text])
            .rename_columns(["item", "text"])
            .filter(expr=col("item") >= first)
            .repartition(max(1, -(-(catalog - first) // block_rows)))
            .map_batches(
                Actor,
                fn_constructor_args=(board, catalog, source, adapter, noun, settings, device, threads),
                batch_size=block_rows,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_gpus=1 if gpus else None,
            )
        )
        for table in vectors.iter_batches(batch_size=part_rows, batch_format="pyarrow"):
            written = write_part(table, written, output)
    if written["items"] != catalog:
        raise RuntimeError(f"distil: {written['items']} items have vectors, but the catalog has {catalog}")


def items_in(files: list[str]) -> int:
    return sum(pq.read_metadata(path).num_rows for path in files)


def rows_of_part(catalog: int) -> int:
    """Items of a part of so large a catalog, see PARTS."""
    return min(max(-(-catalog // PARTS), FEWEST_ROWS), PART_ROWS)


def what_stands(output: Place, mark: str) -> dict[str, Any]:
    """What WRITTEN holds, where it is of this fingerprint; else nothing stands, and what lies there, of nothing that is known, is
    deleted."""
    written = output.read_json(WRITTEN)
    if written is not None and written["fingerprint"] == mark:
        return written
    output.delete("vectors")
    return {"fingerprint": mark, "parts": 0, "items": 0, "texts_cut": 0, "width": 0}


def write_profiles(log: Log, most: int, texts: Path, users: Path) -> None:
    """Write profiles of the users that liked an item with a title in train, by their ids. Of a user no more titles are held than
    the profile has.

    Args:
        most: titles of a profile at most, the most recent ones, which come last.
        texts: file of `item` int64, the profile's number from 0 on, and `text`.
        users: file of `user` int64, in the same order.

    Raises:
        UserError: there are none.
    """
    titles = pl.scan_parquet(log.paths("items")).select("item", "title").filter(pl.col("title") != "")
    positives = pl.scan_parquet(log.split_paths("train")).filter(pl.col("label") == 1).select("user", "item")
    positives = positives.join(titles.select("item"), on="item", how="semi", maintain_order="left")
    liked = positives.group_by("user", maintain_order=True).agg(pl.col("item").tail(most)).sort("user").explode("item")
    named = liked.join(titles, on="item", how="left", maintain_order="left").group_by("user", maintain_order=True)
    found = named.agg(pl.col("title").str.join("; ").alias("text")).collect()
    if not len(found):
        raise UserError(
            "align.user_vectors is profile, but no user has liked an item with a title in the train split, so there is no "
            "profile: take --align.user-vectors liked, or give items titles"
        )
    found.select("user").write_parquet(users)
    found.select("text").with_row_index("item").with_columns(pl.col("item").cast(pl.Int64)).write_parquet(texts)


def read_profiles(folder: Path, mark: str) -> RowReader:
    """The vectors of users in a stage's artifact: `read(start, stop)` gives float32 [stop - start, H], zeros where there is none.

    Args:
        mark: the fingerprint that they should have.

    Raises:
        UserError: as SavedVectors.
    """
    vectors = SavedVectors(folder / PROFILES, mark)
    return partial(_rows_of_users, vectors, users_with_profiles(folder))


def users_with_profiles(folder: Path) -> np.ndarray:
    """int64, sorted: the users whose profiles' vectors a stage's artifact has."""
    return pq.read_table(folder / PROFILES / "users.parquet")["user"].to_numpy()


def _rows_of_users(vectors: "SavedVectors", known: np.ndarray, start: int, stop: int) -> np.ndarray:
    first, last = np.searchsorted(known, [start, stop])
    found = np.zeros((stop - start, vectors.width), np.float32)
    if first < last:
        found[known[first:last] - start] = vectors.read(int(first), int(last))
    return found


def write_part(table: pa.Table, written: dict[str, Any], output: Place) -> dict[str, Any]:
    """Write the next part whole, and then that it is there; gives what is written now."""
    done, width = written["items"], table.schema.field("vector").type.list_size
    if not np.array_equal(table["item"].to_numpy(), np.arange(done, done + len(table))):
        raise RuntimeError(f"distil: items {done} to {done + len(table)} came back in another order")
    flat = table["vector"].combine_chunks().flatten().to_numpy()
    if not np.isfinite(flat).all():
        bad = done + int(np.flatnonzero(~np.isfinite(flat).reshape(-1, width).all(1))[0])
        raise RuntimeError(f"distil: the vector of item {bad} is not finite")
    with (output / "vectors").writing() as folder:
        name = f"part-{written['parts']:05d}.parquet"
        # a name that no reader takes, until it is whole
        pq.write_table(table.drop_columns(["cut"]), folder / f".{name}")
        (folder / f".{name}").replace(folder / name)
    cut = written["texts_cut"] + int(table["cut"].to_numpy().sum())
    written = {**written, "parts": written["parts"] + 1, "items": done + len(table), "texts_cut": cut, "width": width}
    output.write_json(WRITTEN, written)
    return written


class SavedVectors:
    """Distilled vectors of an artifact: `read(start, stop)` gives float32 [stop - start, H].

    Args:
        folder: the artifact's.
        mark: the fingerprint that they should have.

    Raises:
        UserError: the vectors are of another fingerprint, that is of another model, adapter or catalog, not all there, or
            damaged.
    """

    def __init__(self, folder: Path, mark: str) -> None:
        self._folder = folder / "vectors"
        if not (folder / WRITTEN).is_file():
            raise UserError(f"{folder} holds no {WRITTEN}: delete it, and run stage distil again")
        written = json.loads((folder / WRITTEN).read_text())
        try:
            dataset = pyarrow.dataset.dataset(self._folder)
            self.width: int = dataset.schema.field("vector").type.list_size
            found = {"fingerprint": written["fingerprint"], "items": dataset.count_rows(), "width": self.width}
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"the vectors in {folder} can't be read ({str(error).splitlines()[0]}): delete it, and run stage distil again"
            ) from error
        if found != {"fingerprint": mark, "items": written["items"], "width": written["width"]}:
            raise UserError(
                f"{folder} should hold {written['items']} vectors of {written['width']} numbers and of fingerprint {mark}, but "
                f"holds {found['items']} of {found['width']} and of {found['fingerprint']}: delete it, and run stage distil again"
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        field = pyarrow.dataset.field("item")
        table = pyarrow.dataset.dataset(self._folder).to_table(filter=(field >= start) & (field < stop)).sort_by("item")
        return table["vector"].combine_chunks().flatten().to_numpy().reshape(stop - start, self.width)
