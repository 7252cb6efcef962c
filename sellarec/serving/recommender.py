"""An export in use: scores of users and items by the source's own ids, in one process, and what carried a score.

Rows of tables are read by id as they are asked for, so a table may be larger than memory; the titles and 17 bytes for each id
are held. Scores are made by stage fuse's task, as stage evaluate makes them.

Shapes: n pairs of a user and an item, I items of the catalog, H titles of a history.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import torch

from sellarec.alignment.align import PROJECTION
from sellarec.collab.rows import flat, lists
from sellarec.collab.task import build_collab
from sellarec.command_line import parse
from sellarec.data.files import file_hash
from sellarec.data.keys import keys_of
from sellarec.data.log import Log, read_log
from sellarec.errors import UserError
from sellarec.fusion.codes import CodesTask
from sellarec.fusion.fuse import FuseTask, build_fuse, made_by, represented, semantic_table, token_rows
from sellarec.language.adapt import TextTask, make_prompts
from sellarec.language.llm import ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS, LlmSource, adapter_hash, find_llm
from sellarec.training.stream import LEFT_OUT
from sellarec.training.table import Jagged, SavedTable
from sellarec.training.task import WORTH_SHARING, Batch, Vectors

TEMPLATE = "template.yaml"
EXPORT = "export.json"
"""File that says what an export is. It is written last."""

FORMAT = 4
"""Raised when an export is laid out otherwise."""

CATALOG, HISTORIES, MODEL = "catalog", "histories", "model"
"""Folders of an export: a log of users and items alone; users' last positives; the base model."""

UNKNOWN = -1
"""What stands for a user or item that the export doesn't have."""

Id = str | int
"""A user or item as the source names it; numbers are taken as their digits."""


@dataclass(frozen=True)
class Scores:
    """Scores of n pairs, and what was unknown.

    Attributes:
        scores: float32 [n], the log-odds of a positive.
        unknown_user, unknown_item: bool [n]: the export has no such id, so it counts as one without a row, history or title.
        unknown_history: int64 [n]: how many items of the history the export doesn't have; they are left out.
        titles_left_out: int64 [n]: how many more of its last titles (`prompt.history` at most) the prompt had no room for.
    """

    scores: np.ndarray
    unknown_user: np.ndarray
    unknown_item: np.ndarray
    unknown_history: np.ndarray
    titles_left_out: np.ndarray


class Ids:
    """Dense ids by the source's own, through 64-bit keys: 16 bytes an id."""

    def __init__(self, files: Sequence[Path]) -> None:
        keys = [keys_of(pq.read_table(file, columns=["external_id"])["external_id"].combine_chunks()) for file in files]
        found = np.concatenate(keys)
        self._order = np.argsort(found)
        self._keys = found[self._order]

    def find(self, ids: pa.Array) -> np.ndarray:
        """int64 [n], of strings [n]; UNKNOWN where there is no such id."""
        keys = keys_of(ids)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[place] == keys, self._order[place], UNKNOWN)


class Recommender:
    """A trained SeLLa-Rec recommender; `sellarec.load` gives one.

    Args:
        folder: the export.
        log: its catalog.
        task: stage fuse's task, whose prompts know one title more than the catalog has: that of an unknown item, an empty one,
            as items without a title have it.
        text_task: the text-only task on the same language model, with the same adapter.
        chunk: pairs whose rows are looked up at once.
        micro_batch: pairs that go through the language model at once.
        dtype: compute type, as `llm.dtype`.
    """

    def __init__(
        self,
        folder: Path,
        log: Log,
        task: FuseTask | CodesTask,
        text_task: TextTask,
        chunk: int,
        micro_batch: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._folder, self._task, self._text_task = folder, task, text_task
        self._chunk, self._micro_batch, self._device = chunk, micro_batch, device
        self.users, self.items = Ids(log.paths("users")), Ids(log.paths("items"))
        self._seen = {
            "user": log.users(["seen"])["seen"].to_numpy(),
            "item": log.items(["seen"])["seen"].to_numpy(),
        }
        self._tables = {
            feature: SavedTable(folder / "tables", table.name) for table in task.tables for feature in table.features
        }
        task.model.to(device).eval()
        # not buffers, as FSDP2: rounded rotary frequencies would be other positions
        for weight in task.model.parameters():
            weight.data = weight.data.to(dtype)

    def score(
        self, users: Sequence[Id], items: Sequence[Id], histories: Sequence[Sequence[Id]] | None = None
    ) -> Scores:
        """Scores of pairs (users[k], items[k]).

        An id that the export doesn't have is scored as the stages treat a user or item without a train row, and flagged.

        Args:
            histories: of each pair the items that the user liked, the most recent one last; None takes each user's last
                positives as the export has them.

        Raises:
            UserError: the lengths differ, or no histories are given and the export has none.
        """
        user, item, (values, lengths) = self._find(users, items, histories)
        row = np.repeat(np.arange(len(lengths)), lengths)
        scores, left_out = self.score_rows(user, item, lists(values, lengths))
        return Scores(
            scores=scores,
            unknown_user=user == UNKNOWN,
            unknown_item=item == UNKNOWN,
            unknown_history=np.bincount(row[values == UNKNOWN], minlength=len(lengths)),
            titles_left_out=left_out,
        )

    def score_rows(self, user: np.ndarray, item: np.ndarray, histories: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n]: the scores of dense ids int64 [n] and lists of them, UNKNOWN where the export has none; and int64 [n]: how
        many titles of the histories their prompts had no room for."""
        return self._score(self._task, user, item, histories)

    def _score_of(self, task: FuseTask | TextTask, user: np.ndarray, item: np.ndarray, history: pa.ListArray) -> float:
        """Of a single pair."""
        return float(self._score(task, user, item, history)[0][0])

    def explain(self, user: Id, item: Id, history: Sequence[Id] | None = None) -> dict[str, Any]:
        """How much each soft token, or code, carried the score of a pair.

        A token is replaced by the one that a row of zeros gives, a code by none, which is what stands for a user or item without
        a row; what the score loses by that is its part. The parts of tokens that tell the same don't add up to the score.

        Returns:
            score: the log-odds; tokens: by name (of those in the prompt), what the score loses without it; collab: the
            collaborative model's score in it (`fuse.collab_score`), or None; text_only: the score of the export's language model,
            with the adapter that the score itself is made with, on the prompt without soft tokens. Where stage fuse trained
            that adapter it knows such prompts from stage adapt alone, and isn't the model "text-only" of the results;
            unknown_user and unknown_item.
        """
        users, items, found = self._find([user], [item], None if history is None else [history])
        shown = lists(*found)
        score, collab = self._score_of(self._task, users, items, shown), None
        parts = {}
        for name in self._task.tokens:
            with self._task.without(name):
                parts[name] = score - self._score_of(self._task, users, items, shown)
        if isinstance(self._task, FuseTask) and self._task.model.adds_collab:
            with self._task.without_collab_score():
                collab = score - self._score_of(self._task, users, items, shown)
        return {
            "score": score,
            "tokens": parts,
            "collab": collab,
            "text_only": self._score_of(self._text_task, users, items, shown),
            "unknown_user": bool(users[0] == UNKNOWN),
            "unknown_item": bool(items[0] == UNKNOWN),
        }

    def _find(
        self, users: Sequence[Id], items: Sequence[Id], histories: Sequence[Sequence[Id]] | None
    ) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Dense ids of n users and n items, and of their histories' items one after the other, with how many each has."""
        user_ids, item_ids = _strings(users, "users"), _strings(items, "items")
        for history in [] if histories is None else [histories, *histories]:
            _refuse_text(history, "histories")
        if len(users) != len(items) or (histories is not None and len(histories) != len(users)):
            given = "" if histories is None else f", {len(histories)} histories"
            raise UserError(f"{len(users)} users, {len(items)} items{given}: as many of each are needed")
        user, item = self.users.find(user_ids), self.items.find(item_ids)
        if histories is None:
            return user, item, self._last_positives(user)
        values = self.items.find(_strings([one for history in histories for one in history], "histories"))
        return user, item, (values, np.array([len(history) for history in histories], np.int64))

    @torch.no_grad()
    def _score(
        self, task: FuseTask | TextTask, user: np.ndarray, item: np.ndarray, histories: pa.ListArray
    ) -> tuple[np.ndarray, np.ndarray]:
        values, lengths = flat(pa.chunked_array([histories]))
        known = values != UNKNOWN
        of = np.repeat(np.arange(len(lengths)), lengths)
        rows = pa.table(
            {
                "row": np.arange(len(user)),
                "user": np.where(user == UNKNOWN, len(self._seen["user"]), user),
                "item": np.where(item == UNKNOWN, len(self._seen["item"]), item),
                "label": np.zeros(len(user), np.int8),
                "history": lists(values[known], np.bincount(of[known], minlength=len(lengths))),
                "user_seen": _seen(self._seen["user"], user),
                "item_seen": _seen(self._seen["item"], item),
                "weight": np.ones(len(user), np.float32),
            }
        )
        scores, left_out = np.empty(len(user), np.float32), np.empty(len(user), np.int64)
        for start in range(0, len(rows), self._chunk):
            part = rows.slice(start, self._chunk)
            assert task.prepare_to_score is not None
            part = task.prepare_to_score(part, 0, np.zeros(len(part), np.int64))
            # by length, so that little is padded
            part = part.take(np.argsort(pc.list_value_length(part["tokens"]).to_numpy(), kind="stable"))
            arranged, shared, alone = task.share(part, self._micro_batch)
            part = arranged if shared <= WORTH_SHARING * alone else part
            batch = task.collate(part, None)
            batch, vectors = self._to_device(batch), self._to_device(self._look_up(task.lookups(batch)))
            found = []
            for first in range(0, len(part), self._micro_batch):
                some = slice(first, min(first + self._micro_batch, len(part)))
                found.append(
                    task.score(
                        task.model,
                        {name: value[some] for name, value in batch.items()},
                        {name: value[some] for name, value in vectors.items()},
                    )
                )
            row = part["row"].to_numpy()
            scores[row] = torch.cat(found).float().cpu().numpy()
            left_out[row] = part[LEFT_OUT].to_numpy()
        return scores, left_out

    def _look_up(self, ids: Batch) -> Vectors:
        """By feature the rows of ids; zeros for those that the table doesn't have."""
        found: Vectors = {}
        for name, asked in ids.items():
            table = self._tables[name]
            wanted = (asked.values if isinstance(asked, Jagged) else asked).numpy()
            facts = table.facts
            known = wanted < facts["rows"]
            rows = np.zeros((len(wanted), facts["columns"]), np.float32)
            rows[known] = table.rows(wanted[known])
            vectors = torch.from_numpy(rows)
            found[name] = Jagged(vectors, asked.lengths) if isinstance(asked, Jagged) else vectors
        return found

    def _to_device(self, found: dict[str, Any]) -> dict[str, Any]:
        return {name: value.to(self._device) for name, value in found.items()}

    def _last_positives(self, user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each of n users the items of the last positives one after the other, and int64 [n], how many they are."""
        folder = self._folder / HISTORIES
        if not folder.is_dir():
            raise UserError(f"{self._folder} was written without histories: give the histories of the users to score")
        wanted, place = np.unique(user, return_inverse=True)
        column = pyarrow.dataset.field("user")
        known = wanted[wanted != UNKNOWN]
        low, high = (int(known[0]), int(known[-1])) if len(known) else (0, -1)
        # the bounds skip row groups by their statistics
        table = pyarrow.dataset.dataset(folder, format="parquet").to_table(
            filter=(column >= low) & (column <= high) & column.isin(wanted)
        )
        by_user = dict(zip(table["user"].to_pylist(), table["item"].to_pylist(), strict=True))
        empty: list[int] = []
        found = [np.array(by_user.get(one, empty), np.int64) for one in wanted.tolist()]
        shown = [found[at] for at in place]
        return np.concatenate([*shown, np.zeros(0, np.int64)]), np.array([len(one) for one in shown], np.int64)


def read_export(folder: Path, llm: str | None, device: str | None) -> Recommender:
    """See `sellarec.load`."""
    try:
        facts = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no whole export: its {EXPORT} can't be read ({error}); jobs/export.py makes one of a finished run"
        ) from error
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {device}, but this process sees no GPU: leave it out, or give 'cpu'")
    if facts["format"] != FORMAT:
        raise UserError(
            f"{folder} is an export of format {facts['format']}, but this version of sellarec reads {FORMAT}: export again"
        )
    _check_files(folder, facts["files"])
    template = ["--prompt.template", str(folder / TEMPLATE)] if (folder / TEMPLATE).is_file() else []
    config = parse([str(folder / "config.yaml"), *template], program="sellarec.load")
    source = replace(_base_model(folder, facts["base_model"], llm), storage=config.llm.storage)
    log = read_log(folder / CATALOG)
    titles, noun = [*log.items(["title"])["title"].to_pylist(), ""], log.facts["noun"]
    made, collab = made_by(config.fuse).get("projections"), None
    if config.fuse.tokens:
        rows = token_rows(config.fuse, config.collab, source)
        collab = build_collab(log, rows, folder, represented=represented(config.fuse))
    task = build_fuse(
        source=source,
        titles=titles,
        prompt=config.prompt,
        noun=noun,
        adapter=_adapter(folder, facts["adapter"]),
        collab=collab,
        semantic=semantic_table(folder / "tables", config.fuse),
        hidden=config.align.hidden,
        projection=folder / PROJECTION if made == "align" else None,
        trained=folder / PROJECTION if made == "fuse" else None,
        settings=config.fuse,
        seed=config.seed,
        language_weight=facts["language_weight"],
        layers=config.align.layers,
    )
    adapted = (task.model.scorer if isinstance(task, FuseTask) else task.model).llm
    text = make_prompts(source.folder(), titles, config.prompt, noun, adapted, "text", config.adapt.loss)
    text_task = TextTask(source, adapted, text)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, config.llm.dtype)
    return Recommender(folder, log, task, text_task, config.evaluate.batch, config.evaluate.micro_batch, dtype, where)


def _base_model(folder: Path, facts: dict[str, Any], llm: str | None) -> LlmSource:
    """The language model that the adapter and the projections belong to.

    Raises:
        UserError: it isn't found, or another one lies there.
    """
    if facts["copied"]:
        if llm is not None:
            raise UserError(f"llm is {llm}, but {folder} holds its base model itself: leave llm out")
        if find_llm(str(folder / MODEL), None).identity != facts["files"]:
            raise UserError(f"{folder / MODEL} isn't the base model that was exported: its files differ; export again")
        return LlmSource(str(folder / MODEL), None, facts["identity"])
    if facts["revision"] is not None:
        if llm is not None:
            raise UserError(
                f"llm is {llm}, but the base model of {folder} is {facts['identity']} of the Hugging Face hub: leave llm out"
            )
        return LlmSource(facts["name"], facts["revision"], facts["identity"])
    source = find_llm(llm or facts["name"], None)
    if source.identity != facts["identity"]:
        raise UserError(
            f"{source.name} isn't the base model that {folder} was made with ({facts['name']}): its files differ; name that "
            "model's folder with llm=..."
        )
    return source


def _adapter(folder: Path, exported: str | None) -> Path | None:
    """The folder of an export's adapter; None where all weights of the base model were tuned.

    Args:
        exported: its hash when it was exported.

    Raises:
        UserError: it isn't there, or another one is.
    """
    if exported is None:
        return None
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / ADAPTER / name).is_file():
            raise UserError(f"{folder / ADAPTER / name} is not there; export again")
    if adapter_hash(folder / ADAPTER) != exported:
        raise UserError(f"{folder / ADAPTER} is not the adapter that was exported: its content differs; export again")
    return folder / ADAPTER


def _check_files(folder: Path, exported: dict[str, str]) -> None:
    """Raises UserError where files of an export, of which the hashes are given, aren't there, or others are."""
    for name, known in exported.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is not there; export again")
        if file_hash(str(file)) != known:
            raise UserError(f"{file} is not what was exported: its content differs; export again")


def _strings(ids: Sequence[Id], what: str) -> pa.Array:
    """Raises UserError where it is a single text, or ids are neither strings nor whole numbers: 17.0 is not '17'."""
    _refuse_text(ids, what)
    for one in ids:
        if isinstance(one, bool) or not isinstance(one, (str, int, np.integer)):
            raise UserError(f"{what} has {one!r}, which is no id: ids are strings or whole numbers, as in the source")
    return pa.array([str(one) for one in ids], pa.string())


def _refuse_text(ids: Sequence[Any], what: str) -> None:
    """A text is a sequence too, of its characters, which aren't meant."""
    if isinstance(ids, str):
        raise UserError(f"{what}: {ids!r} stands where a list belongs: give [{ids!r}]")


def _seen(seen: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """bool [n]: whether dense ids int64 [n] have a train row; unknown ones have none."""
    found = np.zeros(len(ids), bool)
    known = ids != UNKNOWN
    found[known] = seen[ids[known]]
    return found
