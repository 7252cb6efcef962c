"""Stage fuse with users and items as text: codes of bits in the prompt, and no soft tokens (BinLLM, ACL 2024); or with neither
(TALLRec, arXiv 2305.00447), the prompts of stage adapt.

Shapes: R rows of a table, D columns, one bit each, G groups of bits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from sellarec.config import Fuse, Prompt
from sellarec.fusion.rows import CodedRows
from sellarec.language import llm as llms
from sellarec.language.adapt import TextTask, make_prompts
from sellarec.language.prompts import CODE_BITS, Coded, Prompts
from sellarec.training.stream import Prepare
from sellarec.training.table import Table, initial_rows

ROWS_AT_ONCE = 1 << 16
"""Rows whose codes are taken at once: of the rest of a table the codes alone are held."""


class CodesTask(TextTask):
    """Yes or no from a prompt that names user and item by their codes.

    It is stage adapt's task on longer prompts: its adapter is trained on. The rows whose signs are the codes stay as they are, so
    a code is the same in every process, whatever their number.

    Args:
        codes: by slot uint8 [R, G], of `codes_of`.
    """

    def __init__(
        self,
        source: llms.LlmSource,
        model: nn.Module,
        prompts: Prompts,
        codes: dict[str, np.ndarray],
        settings: Fuse,
        seed: int,
    ) -> None:
        super().__init__(source, model, prompts, settings.loss)
        self.tokens, self._settings = tuple(codes), settings
        self.columns = ("row", "label", "history", "user", "item", "user_seen", "item_seen")
        self._to_score = CodedRows(prompts, codes)
        trained_on = replace(
            self._to_score, answers=settings.loss != "answer", unseen=settings.unseen_dropout, seed=seed
        )
        self.prepare = trained_on.prepare

    @property
    def prepare_to_score(self) -> Prepare:
        return self._to_score.prepare

    @contextmanager
    def without(self, token: str) -> Iterator[None]:
        """Scores of rows that are prepared in it have an empty slot in the place of a code."""
        kept, self._to_score = self._to_score, replace(self._to_score, left_out=(token,))
        try:
            yield
        finally:
            self._to_score = kept

    def facts(self) -> dict[str, Any]:
        named = {"tokens": list(self.tokens), "trained": list(self._settings.train), "code": self._settings.code}
        return {**super().facts(), **named}


def build_codes(
    source: llms.LlmSource,
    titles: list[str],
    prompt: Prompt,
    noun: str,
    adapter: Path | None,
    tables: Sequence[Table],
    settings: Fuse,
    seed: int,
) -> CodesTask:
    """The task of training an adapter on codes, or (TALLRec) on texts without any, or of scoring with one.

    Args:
        tables: those of the collaborative model, of which the rows' signs are the codes.
    """
    folder = source.folder()
    model = llms.load_model(folder, source.storage, source.attention)
    if settings.loss != "answer":
        llms.check_logits(model)
    codes = {table.name: codes_of(table) for table in tables}
    kind, coded = ("fused", coded_as(settings, tables[0].dim)) if tables else ("text", None)
    prompts = make_prompts(folder, titles, prompt, noun, model, kind, settings.loss, tuple(codes), coded)
    adapted = llms.with_adapter(model, adapter, trains="adapter" in settings.train)
    return CodesTask(source, adapted, prompts, codes, settings, seed)


def codes_of(table: Table) -> np.ndarray:
    """uint8 [R, G]: the signs of a table's rows, a positive value as 1, eight to a number, the first one highest."""
    found = np.empty((table.rows, table.dim // CODE_BITS), np.uint8)
    for start in range(0, table.rows, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, table.rows)
        found[start:stop] = np.packbits(initial_rows(table, 0, start, stop) > 0, axis=1)
    return found


def coded_as(settings: Fuse, dim: int) -> Coded | None:
    """How users and items, of `dim` columns, stand as text in the prompts of stage fuse; None where they don't."""
    return Coded(settings.code, dim // CODE_BITS) if settings.represent == "codes" else None
