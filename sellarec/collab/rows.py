"""What the reading tasks do with rows for a collaborative model: cut histories, make targets of sequences, draw negatives.

These tasks don't load torch. Shapes: b rows, L items of a history, n targets, N negatives of a target, I items.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from sellarec.collab.negatives import Negatives
from sellarec.errors import UserError


@dataclass(frozen=True)
class Rows:
    """Makes rows ready for a model.

    Attributes:
        history: items of a history that are kept, the most recent ones; 0 leaves histories out.
        seen: bool [I], which items the train split has: others are left out of histories (sequences are of the train split).
        sequences: rows are sequences, in which every item after the first is a target.
        negatives: what draws them; None draws none.
        corrects: whether a loss corrects for how likely each row's own were drawn.
    """

    history: int
    seen: np.ndarray
    sequences: bool = False
    negatives: Negatives | None = None
    corrects: bool = False

    def prepare(self, rows: pa.Table, epoch: int, step: np.ndarray) -> pa.Table:
        """Rows with `row`, `item` and, where they are read, `history` -> the same with

        history: list<int64>, the last of its seen items; left out where the model reads none.
        targets: list<int64>, for sequences: the item that follows each of the history's.
        log_q: the logarithm of how likely a target is drawn as a negative; float32, for sequences list<float32>.
        negative, negative_log_q: list<int64> and list<float32>, N for each target (`Negatives.draw`).
        log_rest: where they are corrected for, `Negatives.log_rest` for each target; float32, for sequences list<float32>.

        Raises:
            UserError: an item, or one of a history, that the catalog doesn't have.
        """
        values, lengths = np.zeros(0, np.int64), np.zeros(len(rows), np.int64)
        self._check(rows, "item", rows["item"].to_numpy(), np.ones(len(rows), np.int64))
        if "history" in rows.column_names:
            values, lengths = flat(rows["history"])
            self._check(rows, "history", values, lengths)
            rows = rows.drop_columns(["history"])
        targets, number = rows["item"].to_numpy(), np.ones(len(rows), np.int64)
        liked = with_item(values, lengths, targets)
        if self.sequences:
            sequence, number = last(liked, lengths + 1, self.history + 1)
            starts = np.concatenate([[0], np.cumsum(number)])
            is_target = np.ones(len(sequence), bool)
            is_target[starts[:-1]] = False
            is_input = np.ones(len(sequence), bool)
            is_input[starts[1:] - 1] = False
            number = number - 1
            targets = sequence[is_target]
            rows = rows.append_column("history", lists(sequence[is_input], number))
            rows = rows.append_column("targets", lists(targets, number))
        elif self.history:
            kept = self.seen[values]
            row = np.repeat(np.arange(len(lengths)), lengths)
            read, number_read = values[kept], np.bincount(row[kept], minlength=len(lengths))
            rows = rows.append_column("history", lists(*last(read, number_read, self.history)))
        if self.negatives is not None:
            log_q = self.negatives.log_q[targets]
            rows = rows.append_column("log_q", lists(log_q, number) if self.sequences else pa.array(log_q))
            drawn = self.negatives.draw(rows["row"].to_numpy(), number, (liked, lengths + 1), epoch)
            if drawn is not None:
                for name, found in zip(("negative", "negative_log_q"), drawn, strict=True):
                    rows = rows.append_column(name, lists(found, number * self.negatives.number))
                if self.corrects:
                    rest = np.repeat(self.negatives.log_rest((liked, lengths + 1)), number)
                    rows = rows.append_column("log_rest", lists(rest, number) if self.sequences else pa.array(rest))
        return rows

    def _check(self, rows: pa.Table, name: str, items: np.ndarray, lengths: np.ndarray) -> None:
        """Refuse items of rows, as many of each as `lengths` says, that the catalog doesn't have."""
        bad = np.flatnonzero((items < 0) | (items >= len(self.seen)))
        if len(bad):
            row = rows["row"][int(np.searchsorted(np.cumsum(lengths), bad[0], side="right"))]
            raise UserError(
                f"{name} is {items[bad[0]]} in row {row} of the log, but table item has the ids 0 to {len(self.seen) - 1}: "
                "prepare the data again"
            )


def flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists -> their values one after the other, and int64 [b] lengths."""
    whole = column.combine_chunks()
    return whole.flatten().to_numpy(), np.diff(whole.offsets.to_numpy()).astype(np.int64)


def lists(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values))


def last(values: np.ndarray, lengths: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The last `most` values of each list, and how many they are."""
    ends = np.cumsum(lengths)
    from_end = np.repeat(ends, lengths) - np.arange(len(values))
    return values[from_end <= most], np.minimum(lengths, most)


def with_item(values: np.ndarray, lengths: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Each list with one item more at its end."""
    out = np.empty(len(values) + len(items), np.int64)
    ends = np.cumsum(lengths + 1) - 1
    is_item = np.zeros(len(out), bool)
    is_item[ends] = True
    out[is_item], out[~is_item] = items, values
    return out
