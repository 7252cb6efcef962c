"""A causal language model as a scorer of prompts: logits at the deciding position, or where there is a target, nowhere else.

Shapes: b rows, T prompt tokens, H width of the model, V vocabulary, n positions with a target.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sellarec.language.llm import decoder_layers

LOGIT_BYTES = 64 << 20
"""Logits that the loss over tokens holds at once, about, of each of the few tensors of their size."""

NO_TARGET = -100
"""Stands where a position has no token to predict."""


class PromptScorer(nn.Module):
    """`llm` read at the last position of left-padded prompts."""

    def __init__(self, llm: nn.Module) -> None:
        super().__init__()
        self.llm = llm

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
    ) -> Tensor:
        """Logits [b, V], float32, of the token that follows each prompt; with `targets` their losses [b] instead.

        Both are made in the forward pass, for which FSDP2 has gathered the output layer's weights.

        Args:
            tokens: int64 [b, T], left-padded.
            mask: bool [b, T], False where padded.
            slots: positions int64 [b] by name, whose input embeddings are replaced.
            vectors: float [b, H] by the same names: what they are replaced by.
            targets: int64 [b, T], the token to predict at each position, or NO_TARGET.
        """
        tokens, mask, padding = trim(tokens, mask)
        embedded = self.llm.get_input_embeddings()(tokens)
        if slots:
            names = list(slots)
            index = torch.stack([slots[name] - padding for name in names], dim=1)
            values = torch.stack([vectors[name].to(embedded.dtype) for name in names], dim=1)
            embedded = embedded.scatter(1, index[:, :, None].expand(-1, -1, embedded.shape[2]), values)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        given = {
            "inputs_embeds": embedded, "attention_mask": mask.long(), "position_ids": positions, "use_cache": False
        }  # fmt: skip
        if targets is None:
            return self.llm(**given, logits_to_keep=1).logits[:, -1].float()
        model = base_model(self.llm)
        hidden = model.base_model(**given).last_hidden_state
        return token_losses(model.get_output_embeddings(), hidden, targets[:, padding:])


def token_losses(output: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over the vocabulary, float32 [b], summed over each row's targets.

    Some positions at a time, whose logits are made again in the backward pass: [b, T, V] is never held, and no logits are made
    where there is no target.

    Args:
        output: the output layer, H -> V.
        hidden: float [b, T, H], the last hidden states.
        targets: int64 [b, T], NO_TARGET where there is none.
    """
    row, at = (targets != NO_TARGET).nonzero(as_tuple=True)
    hidden, wanted = hidden[row, at], targets[row, at]

    def losses(some: Tensor, of_them: Tensor) -> Tensor:
        return F.cross_entropy(output(some).float(), of_them, reduction="none")

    size = max(1, LOGIT_BYTES // (4 * output.weight.shape[0]))
    found = [
        checkpoint(losses, some, of_them, use_reentrant=False)
        for some, of_them in zip(hidden.split(size), wanted.split(size), strict=True)
    ]
    return torch.zeros(len(targets), device=hidden.device).index_add(0, row, torch.cat(found))


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


def trim(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Cut the columns that are padding in every row; also returns how many were cut."""
    padding = int((~mask.any(0)).sum())
    return tokens[:, padding:], mask[:, padding:], padding


def base_model(llm: nn.Module) -> nn.Module:
    """The Hugging Face model below an adapter, or the model itself."""
    return llm.get_base_model() if hasattr(llm, "get_base_model") else llm
