"""What a run leaves and prints when a stage fails. With workers: tests/end_to_end/test_faults.py."""

from pathlib import Path

import pytest

from sellarec import pipeline
from sellarec.command_line import parse
from sellarec.errors import StageFailed, exit_status
from sellarec.run import Run
from sellarec.training.cluster import Cluster

CAUSE = "stage collab failed, also when it was taken up again: worker 1: RuntimeError: it broke"


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose first stage fails."""

    def fail(this: Run, stage: str) -> None:
        this.cluster = Cluster(local=True, gpus=False)
        raise StageFailed(CAUSE)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(pipeline, "_stage", fail)
    return Run.of(parse(["demo", "--device", "cpu", "--name", "one", "--workspace", str(tmp_path / "w")]))


def test_the_cause_is_the_last_line_that_is_printed(
    failing: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """After where the traceback and the workers' logs are, with the nodes of which some are missing."""
    monkeypatch.setattr(pipeline, "keep_logs", lambda place: ["worker-1 (10.0.0.1): WorkerCrashedError"])
    assert exit_status(lambda arguments: pipeline.run(failing), []) == 1
    out, err = capfd.readouterr()
    assert err == f"error: {CAUSE}\n"
    logs, missing, log = out.splitlines()[-3:]
    assert logs.endswith(f"what workers have printed is in {failing.place}/logs")
    assert missing.endswith(
        "could not be copied, which Ray keeps in its session folder: worker-1 (10.0.0.1): WorkerCrashedError"
    )
    assert log.endswith(f"the traceback is in {failing.place}/error.log")
    assert CAUSE in (failing.place.folder / "error.log").read_text()


def test_logs_that_cannot_be_copied_do_not_hide_the_cause(
    failing: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(place: object) -> list[str]:
        raise OSError("no storage")

    monkeypatch.setattr(pipeline, "keep_logs", fail)
    assert exit_status(lambda arguments: pipeline.run(failing), []) == 1
    out, err = capfd.readouterr()
    assert err == f"error: {CAUSE}\n" and "could not be copied" in out and "OSError: no storage" in out
    assert "what workers have printed is in" not in out
