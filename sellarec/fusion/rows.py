"""What the reading tasks do with rows for fusion; they don't load torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from sellarec.data.keys import uniform
from sellarec.language.prompts import NO_CODE, Prompts
from sellarec.training.stream import Prepare


def prepare(
    prompts: Prompts,
    histories: Prepare | None,
    rows: pa.Table,
    epoch: int,
    step: np.ndarray,
    answers: bool = False,
) -> pa.Table:
    """Makes prompts, which show what the whole history tells, then what the collaborative model reads of it (None: nothing)."""
    rows = prompts.prepare(rows, epoch, step, keep_history=histories is not None, answers=answers)
    return rows if histories is None else histories(rows, epoch, step)


@dataclass(frozen=True)
class CodedRows:
    """Makes prompts whose slots of users and items hold codes.

    A user or item without a train row has none, so its slot is left empty.

    Attributes:
        codes: by slot uint8 [R, G], the code of each user or item in groups of bits.
        answers: whether prompts go on with the answers of their labels.
        unseen: of each slot the share of rows in which it is left empty as if the user, or item, were unseen; drawn by
            (seed, epoch, row), apart for each slot.
        left_out: slots that are left empty in every row.
    """

    prompts: Prompts
    codes: Mapping[str, np.ndarray]
    answers: bool = False
    unseen: float = 0.0
    seed: int = 0
    left_out: Collection[str] = ()

    def prepare(self, rows: pa.Table, epoch: int, step: np.ndarray) -> pa.Table:
        """Rows with `row`, `label`, `history`, and of each slot the id and whether it is seen -> the same with their prompts."""
        found = {}
        for number, (slot, codes) in enumerate(sorted(self.codes.items())):
            there = rows[f"{slot}_seen"].to_numpy() & (slot not in self.left_out)
            if self.unseen:
                there &= uniform(rows["row"].to_numpy(), self.seed, epoch, number) >= self.unseen
            ids = np.where(there, rows[slot].to_numpy(), 0)  # one that is unseen may have no row
            found[slot] = np.where(there[:, None], codes[ids].astype(np.int64), NO_CODE)
        return self.prompts.prepare(rows, epoch, step, answers=self.answers, codes=found)
