"""LightGCN (He et al., 2020): rows of users and items, smoothed over the graph of who liked what."""

from collections.abc import Callable

import torch
from torch import Tensor

from sellarec.collab.model import CollabModel, Sizes
from sellarec.config import Collab
from sellarec.training.task import INITIAL, Vectors


class Model(CollabModel):
    """A row E(0) becomes the mean of E(0) ... E(K), where E(k + 1) = D^-1/2 A D^-1/2 E(k) on the graph of train positives.

    A bias stays its row's own. `l2` is on E(0), as published.
    """

    reads = ("layers",)
    uses_graph = True

    def __init__(self, sizes: Sizes, settings: Collab) -> None:
        super().__init__(sizes, settings)
        self._layers = settings.layers

    def propagate(self, rows: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows of users and items [R, D] -> their smoothed rows [R, D]; `multiply` is the product with the graph's matrix."""
        columns = rows.shape[1] - self.has_biases
        layer = rows[:, :columns]
        total = layer
        for _ in range(self._layers):
            layer = multiply(layer)
            total = total + layer
        return torch.cat([total / (self._layers + 1), rows[:, columns:]], dim=1)

    def squared_norms(self, vectors: Vectors) -> Tensor:
        initial = {name.removeprefix(INITIAL): found for name, found in vectors.items() if name.startswith(INITIAL)}
        return super().squared_norms(initial)
