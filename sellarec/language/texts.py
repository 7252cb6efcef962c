"""The catalog's texts in tokens, for pre-training.

They are made in the tasks that read rows, which load neither torch nor transformers.
"""

import zlib
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Lines:
    """One line of each text, with its start and end token.

    Of a text of several lines a step reads one, drawn by (text, step): sequences are short, so there are many steps.

    Args:
        tokenizer: of the `tokenizers` library; puts the start token before a text.
        end: the end token, as text.
        context: longest sequence (tokens); what is beyond is cut.
    """

    def __init__(self, tokenizer: "Tokenizer", end: str, context: int) -> None:
        self._tokenizer, self._end, self._context = tokenizer, end, context

    def prepare(self, rows: pa.Table, epoch: int, step: np.ndarray) -> pa.Table:
        """A column `tokens` (list<int32>) instead of `text`."""
        lines = [_line(text, int(at)) for text, at in zip(rows["text"].to_pylist(), step, strict=True)]
        tokens = [ids[: self._context] for ids in self._whole(lines)]
        return rows.drop_columns(["text"]).append_column("tokens", pa.array(tokens, pa.list_(pa.int32())))

    def cut(self, texts: list[str]) -> tuple[int, int]:
        """How many lines some texts have, and how many of them are longer than the context."""
        found = self._whole([line for text in texts for line in text.split("\n")])
        return len(found), sum(len(ids) > self._context for ids in found)

    def _whole(self, lines: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch([line + self._end for line in lines])]


def _line(text: str, step: int) -> str:
    lines = text.split("\n")
    return lines[np.random.default_rng([zlib.crc32(text.encode()), step]).integers(len(lines))]
