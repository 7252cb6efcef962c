"""Matrix factorisation (Koren et al., 2009), with and without biases and the constant."""

from sellarec.collab.model import CollabModel


class Model(CollabModel):
    """A user's row times an item's row."""
