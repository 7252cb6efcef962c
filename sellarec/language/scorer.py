"""A causal language model as a scorer of prompts: logits at the deciding position, or where there is a target, nowhere else.

Prompts that begin alike are read in two passes: what they begin with once, then what follows in each, by the keys and values of
its beginning.

Shapes: b rows, T prompt tokens, H width of the model, V vocabulary, n positions with a target.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sellarec.language.llm import decoder_layers, has_full_attention, logits_of

LOGIT_BYTES = 64 << 20
"""Logits that the loss over tokens holds at once, about, of each of the few tensors of their size."""

NO_TARGET = -100
"""Stands where a position has no token to predict."""


class PromptScorer(nn.Module):
    """`llm` read at the last position of left-padded prompts.

    Args:
        answers: the tokens (of the vocabulary) whose logits alone are made there, in float32 whatever the model computes in, as
            logits that were rounded to bfloat16 leave most pairs of prompts alike; None: those of the whole vocabulary.
    """

    def __init__(self, llm: nn.Module, answers: Sequence[int] | None = None) -> None:
        super().__init__()
        self.llm = llm
        self.answers = answers
        self.shares = has_full_attention(base_model(llm))
        output = base_model(llm).get_output_embeddings()
        if type(output) is nn.Linear:  # with an adapter on it, it makes all logits, in the type of computing
            output.forward = partial(_chosen_logits, output)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return decoder_layers(base_model(self.llm))

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor,
        slots: dict[str, Tensor],
        vectors: dict[str, Tensor],
        targets: Tensor | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Logits [b, V], float32, of the token that follows each prompt, or (`answers`) [b, number of them]; with `targets` their
        losses [b] instead.

        Both are made in the forward pass, for which FSDP2 has gathered the output layer's weights.

        Args:
            tokens: int64 [b, T], left-padded.
            mask: bool [b, T], False where padded.
            slots: positions int64 [b] by name, whose input embeddings are replaced.
            vectors: float [b, H] by the same names: what they are replaced by.
            targets: int64 [b, T], the token to predict at each position, or NO_TARGET.
            prefix: without targets: int64 [b], the number of each row's prefix, and int64 [b], its tokens (1 or more, and fewer
                than the row's). Rows with one number have equal tokens and vectors there. None: nothing is shared.
        """
        tokens, mask, padding = trim(tokens, mask)
        embedded = self.llm.get_input_embeddings()(tokens)
        if slots:
            names = list(slots)
            index = torch.stack([slots[name] - padding for name in names], dim=1)
            values = torch.stack([vectors[name].to(embedded.dtype) for name in names], dim=1)
            embedded = embedded.scatter(1, index[:, :, None].expand(-1, -1, embedded.shape[2]), values)
        if prefix is not None:
            return self._after_prefixes(embedded, mask.sum(1), *prefix)
        given = {
            "inputs_embeds": embedded, "attention_mask": mask.long(), "position_ids": positions(mask), "use_cache": False
        }  # fmt: skip
        if targets is None:
            return self._last_logits(**given)
        model = base_model(self.llm)
        return token_losses(model, model.base_model(**given), targets[:, padding:])

    def _after_prefixes(self, embedded: Tensor, lengths: Tensor, prefix: Tensor, prefix_tokens: Tensor) -> Tensor:
        """Logits as `forward` gives them, in two passes whatever is shared: layers that are sharded over workers are
        gathered equally often on each.

        Args:
            embedded: [b, T, H], left-padded.
            lengths: int64 [b], tokens of each row.
        """
        from transformers import DynamicCache

        numbers, group = prefix.unique(return_inverse=True)
        rows = torch.arange(len(prefix), device=prefix.device)
        first = rows.new_full((len(numbers),), len(rows)).scatter_reduce(0, group, rows, "amin")
        read, follow = prefix_tokens[first], lengths - prefix_tokens
        column = torch.arange(int(read.max()), device=prefix.device) - int(read.max())
        prefix_mask = column >= -read[:, None]
        start = embedded.shape[1] - lengths[first] + read  # where the prefix ends
        at = (start[:, None] + column).clamp(min=0)
        cache = DynamicCache(config=base_model(self.llm).config)
        base_model(self.llm).base_model(
            inputs_embeds=embedded[first[:, None], at],
            attention_mask=prefix_mask.long(),
            position_ids=positions(prefix_mask),
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_select_indices(group)
        longest = int(follow.max())
        column = torch.arange(longest, device=prefix.device) - longest
        mask = torch.cat([prefix_mask[group], column >= -follow[:, None]], dim=1)
        return self._last_logits(
            inputs_embeds=embedded[:, -longest:],
            attention_mask=mask.long(),
            position_ids=positions(mask)[:, -longest:],
            past_key_values=cache,
            use_cache=True,
        )

    def _last_logits(self, **given: Any) -> Tensor:
        """float32 [b, V], or of `answers`; what a model does to its logits beside, as to cap them, it does to these."""
        chosen = _CHOSEN.set(None if self.answers is None else list(self.answers))
        try:
            logits = self.llm(**given, logits_to_keep=1).logits[:, -1].float()
        finally:
            _CHOSEN.reset(chosen)
        if self.answers is None or logits.shape[1] == len(self.answers):
            return logits
        return logits[:, list(self.answers)]

    @contextmanager
    def all_logits(self) -> Iterator[None]:
        """Logits that are made in it are those of the whole vocabulary, as the model gives them."""
        kept, self.answers = self.answers, None
        try:
            yield
        finally:
            self.answers = kept


_CHOSEN: ContextVar[list[int] | None] = ContextVar("chosen", default=None)
"""The tokens whose logits alone are asked for, by the thread that asks."""


def _chosen_logits(output: nn.Linear, hidden: Tensor) -> Tensor:
    """What an output layer makes of last hidden states [..., H]: float32 logits of the tokens that are asked for, else all."""
    chosen = _CHOSEN.get()
    if chosen is None:
        return F.linear(hidden, output.weight, output.bias)
    bias = None if output.bias is None else output.bias[chosen].float()
    return F.linear(hidden.float(), output.weight[chosen].float(), bias)


def token_losses(model: nn.Module, found: Any, targets: Tensor) -> Tensor:
    """Cross-entropy over the vocabulary, float32 [b], summed over each row's targets.

    Some positions at a time, whose logits are made again in the backward pass: [b, T, V] is never held, and no logits are made
    where there is no target.

    Args:
        model: the causal model.
        found: what its decoder has given, with the last hidden states [b, T, H].
        targets: int64 [b, T], NO_TARGET where there is none.
    """
    row, at = (targets != NO_TARGET).nonzero(as_tuple=True)
    hidden, wanted = found.last_hidden_state[row, at], targets[row, at]

    def losses(some: Tensor, of_them: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(model, found, some).float(), of_them, reduction="none")

    size = max(1, LOGIT_BYTES // (4 * model.get_output_embeddings().weight.shape[0]))
    of_each = [
        checkpoint(losses, some, of_them, use_reentrant=False)
        for some, of_them in zip(hidden.split(size), wanted.split(size), strict=True)
    ]
    return torch.zeros(len(targets), device=hidden.device).index_add(0, row, torch.cat(of_each))


def left_padded(rows: pa.Table) -> dict[str, Tensor]:
    """Rows of tokens as tensors.

    Args:
        rows: b rows with `tokens` (lists), and `{slot}_position` where they have slots.

    Returns:
        tokens int64 [b, T] (0 where padded), mask bool [b, T] (False where padded), and `{slot}_position` int64 [b], now
        counted with the padding.
    """
    lists = rows["tokens"].combine_chunks()
    lengths = np.diff(lists.offsets.to_numpy())
    longest = int(lengths.max(initial=0))
    mask = np.arange(longest) >= longest - lengths[:, None]
    tokens = np.zeros(mask.shape, np.int64)
    tokens[mask] = lists.flatten().to_numpy()
    positions = {
        name: rows[name].to_numpy() + longest - lengths for name in rows.column_names if name.endswith("_position")
    }
    return {name: torch.from_numpy(value) for name, value in {"tokens": tokens, "mask": mask, **positions}.items()}


def next_tokens(batch: dict[str, Tensor], answer: Tensor | None) -> Tensor:
    """The token that follows at each position, int64 [b, T], NO_TARGET where it isn't to be predicted.

    Padding and slots, whose tokens stand for nothing, are never to be predicted.

    Args:
        batch: as `left_padded` gives it, of prompts with their answers.
        answer: int64 [b]: only the last so many tokens are to be predicted; None: all.
    """
    tokens, mask = batch["tokens"], batch["mask"]
    length = tokens.shape[1]
    wanted = mask.clone()
    wanted[:, 1:] &= mask[:, :-1]
    wanted[:, 0] = False
    for name, at in batch.items():
        if name.endswith("_position"):
            wanted[torch.arange(len(tokens)), at] = False
    if answer is not None:
        wanted &= torch.arange(length) >= length - answer[:, None]
    following = torch.where(wanted, tokens, NO_TARGET)
    return torch.cat([following[:, 1:], torch.full_like(following[:, :1], NO_TARGET)], dim=1)


def share_prefixes(
    model: PromptScorer, rows: pa.Table, size: int, same: Sequence[str] = ()
) -> tuple[pa.Table, float, int]:
    """Rows to score in an order in which those that begin alike go through the model together, as often as that can be.

    A prompt's prefix is what stands before its first part that the candidate fills. Where the model has layers that read only
    some of the keys and values before a position (a sliding window), nothing is shared.

    Args:
        rows: b rows with `tokens`, `prefix_tokens` and positions of slots, by length.
        size: rows of a micro-batch.
        same: columns by which the vectors of slots in a prefix are told apart.

    Returns:
        The rows with `prefix` (int64, the same number for those with one prefix), micro-batches to be cut of them in their
        order; how many tokens, padding included, they make the model read (infinitely many where they can't share, so that no
        worker does), and how many the given rows do without it.
    """
    lists = rows["tokens"].combine_chunks()
    offsets, tokens = lists.offsets.to_numpy(), lists.values.to_numpy()
    lengths = np.diff(offsets)
    alone = _padded(lengths, size)
    # a prompt's last token is read by itself: its logits are asked for
    prefix_tokens = np.minimum(rows["prefix_tokens"].to_numpy(), lengths - 1)
    if prefix_tokens.min(initial=1) < 1 or not model.shares:
        return rows, math.inf, alone
    ends = zip(offsets[:-1].tolist(), (offsets[:-1] + prefix_tokens).tolist(), strict=True)
    begins = [tokens[start:end].tobytes() for start, end in ends]
    keys = [tuple(tuple(v) if isinstance(v, list) else v for v in rows[name].to_pylist()) for name in same]
    numbers: dict[tuple, int] = {}
    prefix = np.array([numbers.setdefault(key, len(numbers)) for key in zip(begins, *keys, strict=True)], np.int64)
    place = rows.column_names.index("prefix_tokens")
    rows = rows.set_column(place, "prefix_tokens", pa.array(prefix_tokens)).append_column("prefix", pa.array(prefix))
    order = np.argsort(prefix, kind="stable")
    prefix, read, follow = prefix[order], prefix_tokens[order], (lengths - prefix_tokens)[order]
    shared = _padded(follow, size)
    for start in range(0, len(prefix), size):
        part = slice(start, start + size)
        shared += len(np.unique(prefix[part])) * int(read[part].max())
    return rows.take(order), shared, alone


def _padded(lengths: np.ndarray, size: int) -> int:
    """Tokens and padding of micro-batches of `size`."""
    parts = (lengths[start : start + size] for start in range(0, len(lengths), size))
    return sum(len(part) * int(part.max()) for part in parts)


def prefixes_of(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """What `PromptScorer` takes of rows that `share_prefixes` arranged; None of others."""
    return (batch["prefix"], batch["prefix_tokens"]) if "prefix" in batch else None


def positions(mask: Tensor) -> Tensor:
    """Position ids of tokens, int64 [b, T]; padding has some."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def trim(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Cut the columns that are padding in every row; also returns how many were cut."""
    padding = int((~mask.any(0)).sum())
    return tokens[:, padding:], mask[:, padding:], padding


def base_model(llm: nn.Module) -> nn.Module:
    """The Hugging Face model below an adapter, or the model itself."""
    return llm.get_base_model() if hasattr(llm, "get_base_model") else llm
