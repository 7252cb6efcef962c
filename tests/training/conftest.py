"""What tests of several workers share."""

from collections.abc import Iterator

import pytest
import torch
from gloo_workers import Gloo


@pytest.fixture(scope="session")
def gloo(tmp_path_factory) -> Iterator[Gloo]:
    torch.set_num_threads(1)
    gloo = Gloo(tmp_path_factory.mktemp("gloo"))
    yield gloo
    gloo.end()
