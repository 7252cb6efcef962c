"""What the tests of whole runs share."""

import main_job
import pytest


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> main_job.Runs:
    return main_job.Runs(tmp_path_factory.mktemp("runs"))
