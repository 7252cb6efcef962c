"""Matrix factorisation by signs (Zhang et al., "Text-like Encoding of Collaborative Information", BinLLM, ACL 2024)."""

from dataclasses import replace

from torch import Tensor

from sellarec.collab.model import CollabModel, Sizes
from sellarec.config import Collab
from sellarec.training.task import Batch, Vectors


class Model(CollabModel):
    """The signs of a user's row times those of an item's, each -1 or 1, without biases: codes that stage fuse can write as text.

    The published model makes a row's values by a linear layer, for users and for items, of those that a table holds; here the
    row itself holds them, which says as much. Its annealing, by which some columns stay tanh(x) in training, is left out.
    """

    ignores = ("biases", "plain_score")  # all rows have one length
    is_binary = True

    def __init__(self, sizes: Sizes, settings: Collab) -> None:
        super().__init__(sizes, replace(settings, biases=False))

    def represent_user(self, batch: Batch, vectors: Vectors) -> Tensor:
        return _signs(super().represent_user(batch, vectors))

    def represent_item(self, batch: Batch, vectors: Vectors) -> Tensor:
        return _signs(super().represent_item(batch, vectors))

    def as_represented(self, side: str, rows: Tensor) -> Tensor:
        return _signs(rows)

    def _parts(self, rows: Tensor, plain: bool) -> tuple[Tensor, Tensor]:
        # all have one length, by which they are divided as a number: it has no part in the gradient
        scale = 1.0 if self._scale is None else self._scale / self.dim**0.5
        return _signs(rows) * scale, rows.new_zeros(rows.shape[:-1])


def _signs(rows: Tensor) -> Tensor:
    """-1, 0 or 1, exactly so, with the gradient of tanh (straight-through). A masked row stays zeros."""
    soft = rows.tanh()
    return rows.sign() + (soft - soft.detach())
