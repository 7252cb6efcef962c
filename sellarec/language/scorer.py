"""A causal language model as a scorer of prompts: the logits at the deciding position, nowhere else.

Shapes: b rows, T prompt tokens, H width of the model, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from sellarec.language.llm import decoder_layers


class PromptScorer(nn.Module):
    """`llm` read at the last position of left-padded prompts."""

    def __init__(self, llm: nn.Module) -> None:
        super().__init__()
        self.llm = llm

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return decoder_layers(base_model(self.llm))

    def forward(self, tokens: Tensor, mask: Tensor, slots: dict[str, Tensor], vectors: dict[str, Tensor]) -> Tensor:
        """Logits [b, V], float32, of the token that follows each prompt.

        Args:
            tokens: int64 [b, T], left-padded.
            mask: bool [b, T], False where padded.
            slots: positions int64 [b] by name, whose input embeddings are replaced.
            vectors: float [b, H] by the same names: what they are replaced by.
        """
        tokens, mask, padding = trim(tokens, mask)
        embedded = self.llm.get_input_embeddings()(tokens)
        if slots:
            names = list(slots)
            index = torch.stack([slots[name] - padding for name in names], dim=1)
            values = torch.stack([vectors[name].to(embedded.dtype) for name in names], dim=1)
            embedded = embedded.scatter(1, index[:, :, None].expand(-1, -1, embedded.shape[2]), values)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        output = self.llm(
            inputs_embeds=embedded,
            attention_mask=mask.long(),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


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


def trim(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Cut the columns that are padding in every row; also returns how many were cut."""
    padding = int((~mask.any(0)).sum())
    return tokens[:, padding:], mask[:, padding:], padding


def base_model(llm: nn.Module) -> nn.Module:
    """The Hugging Face model below an adapter, or the model itself."""
    return llm.get_base_model() if hasattr(llm, "get_base_model") else llm
