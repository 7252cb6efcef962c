"""What the reading tasks do with rows for fusion; they don't load torch."""

import numpy as np
import pyarrow as pa

from sellarec.language.prompts import Prompts
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
