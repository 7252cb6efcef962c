"""SeLLa-Rec: recommendation with a language model that has been given collaborative knowledge."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from sellarec.serving.recommender import Recommender


def load(path: "str | Path", llm: str | None = None, device: str | None = None) -> "Recommender":
    """The recommender that `jobs/export.py` wrote into a folder, ready to score. Neither Ray nor process groups are started.

    Args:
        path: the export's folder.
        llm: folder of the base model, where the export doesn't hold it and it no longer lies where the export says.
        device: as torch names it; None takes a GPU where there is one.

    Raises:
        UserError: the folder holds no whole export, or the base model isn't found or is another one.
    """
    from pathlib import Path

    from sellarec.serving.recommender import read_export

    return read_export(Path(path), llm, device)
