"""SVD++ (Koren, 2008): matrix factorisation in which the items of a user's history add to the user's row."""

from torch import Tensor

from sellarec.collab.model import CollabModel, Sizes
from sellarec.config import Collab
from sellarec.training.table import Table
from sellarec.training.task import Batch, Vectors


class Model(CollabModel):
    """To a user's row is added the sum of the rows of the L items in the history, over the root of L.

    So an unseen user with a history isn't zero. What a history adds is learnt from nothing: an item that no training history
    holds adds nothing.
    """

    reads = ("history",)
    empty_history = "nothing is added to the user's row"

    def __init__(self, sizes: Sizes, settings: Collab) -> None:
        super().__init__(sizes, settings)
        self.history = settings.history
        self.tables = (*self.tables, Table("history", sizes.items, settings.dim, ("history",)))

    def user(self, batch: Batch, vectors: Vectors) -> Tensor:
        history = vectors["history"]
        return super().user(batch, vectors) + history.sum() / history.lengths.clamp(min=1).sqrt()[:, None]
