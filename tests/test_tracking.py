"""Trackers: what MLflow and W&B have of a run, each as the package itself writes it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sellarec.artifacts import Place
from sellarec.command_line import parse, parse_sweep
from sellarec.errors import UserError
from sellarec.tracking import check_trackers, open_trackers

SETTINGS = {f"setting.{number}": number for number in range(130)}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "w").mkdir()
    return Place.of(str(tmp_path / "w" / "run"))


def workspace_of(place: Place) -> Place:
    return Place.of(str(place.folder.parent))


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """MLflow on a database of its own."""
    package = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    package.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield package
    package.set_tracking_uri(None)


def test_tensorboard_alone_by_default(place: Place) -> None:
    (tensorboard,) = open_trackers((), workspace_of(place), place, "run", {}, print)
    assert not (place.folder / "tensorboard").exists()  # before there is a number
    tensorboard.scalars("collab", 3, {"loss": 0.5})
    tensorboard.close(failed=False)
    (found,) = EventAccumulator(str(place.folder / "tensorboard")).Reload().Scalars("collab/loss")
    assert (found.step, found.value) == (3, 0.5)


def test_tensorboard_makes_no_folder_where_the_workspace_is_out_of_sight(place: Place) -> None:
    """Points are lost until it is back, which is told once each time."""
    told: list[str] = []
    (tensorboard,) = open_trackers((), workspace_of(place), place, "run", {}, told.append)
    workspace = place.folder.parent
    away = workspace.with_name("away")
    workspace.rename(away)
    for step in (1, 2):
        tensorboard.scalars("collab", step, {"loss": 0.5})
    assert not workspace.exists() and len(told) == 1 and "storage is away" in told[0]
    away.rename(workspace)
    tensorboard.scalars("collab", 3, {"loss": 0.25})
    tensorboard.close(failed=False)
    (found,) = EventAccumulator(str(place.folder / "tensorboard")).Reload().Scalars("collab/loss")
    assert (found.step, found.value) == (3, 0.25)


def test_mlflow_has_settings_numbers_and_results_and_goes_on_in_its_run(place: Place, mlflow: Any) -> None:
    for step, failed in ((1, True), (2, False)):
        tensorboard, tracker = open_trackers(("mlflow",), workspace_of(place), place, "demo", SETTINGS, print)
        tracker.scalars("collab", step, {"loss": step / 4, "data wait (%), most": 7.0})
        tracker.summary({"sella-rec/all auc": 0.75})
        tracker.close(failed)
        tensorboard.close(failed)
        experiment = mlflow.MlflowClient().get_experiment_by_name("sellarec")
        (run,) = mlflow.MlflowClient().search_runs([experiment.experiment_id])
        assert run.info.status == ("FAILED" if failed else "FINISHED")
    assert run.info.run_name == "demo"
    assert run.data.params == {name: str(value) for name, value in SETTINGS.items()}
    assert run.data.metrics == {"collab/loss": 0.5, "collab/data wait percent most": 7.0, "sella-rec/all auc": 0.75}
    losses = mlflow.MlflowClient().get_metric_history(run.info.run_id, "collab/loss")
    assert [(metric.step, metric.value) for metric in losses] == [(1, 0.25), (2, 0.5)]


def test_mlflow_that_stops_answering_costs_no_run(place: Place, mlflow: Any) -> None:
    said: list[str] = []
    _, tracker = open_trackers(("mlflow",), workspace_of(place), place, "demo", {}, said.append)
    mlflow.MlflowClient().delete_run(tracker.id)  # the server takes no more of it
    tracker.scalars("collab", 1, {"loss": 1.0})
    tracker.scalars("collab", 2, {"loss": 1.0})  # it is left alone meanwhile
    tracker.close(failed=False)
    assert len(said) == 3
    assert "mlflow takes no numbers" in said[0]
    assert "2 times" in said[1]
    assert "not told that the run ended" in said[2]


def test_wandb_writes_offline_and_goes_on_in_its_run(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    place.folder.mkdir()
    for step in (1, 2):
        tensorboard, tracker = open_trackers(("wandb",), workspace_of(place), place, "demo", {"collab.dim": 16}, print)
        tracker.scalars("collab", step, {"loss": 0.53125 * step})
        tracker.summary({"sella-rec/all auc": 0.71875})
        tracker.close(failed=False)
        tensorboard.close(failed=False)
        ids.append(place.read_json("trackers.json")["wandb"])
    assert ids[0] == ids[1]
    needed = {b"collab/loss", b"0.53125", b"1.0625", b"sella-rec/all auc", b"0.71875", b"collab.dim"}
    left, end = needed, time.monotonic() + 30
    while left and time.monotonic() < end:  # its own process writes the end of a file a moment after the run's
        # a folder is named by the second, and by a number more where there is one of that
        files = (place.folder / "wandb").glob(f"offline-run-*-{ids[0]}*/run-{ids[0]}.wandb")
        found = b"".join(file.read_bytes() for file in files)
        left = {words for words in needed if words not in found}
        time.sleep(0.05)
    assert not left


def test_a_tracker_that_cannot_begin_is_a_users_mistake(place: Place, mlflow: Any) -> None:
    mlflow.set_tracking_uri("nonsense://nowhere")
    with pytest.raises(UserError, match=r"trackers has mlflow, which can't begin a run: .*nonsense"):
        open_trackers(("mlflow",), workspace_of(place), place, "demo", {}, print)


def test_a_missing_package_and_a_sweep_are_refused() -> None:
    with pytest.raises(UserError, match="trackers has no_such_package, which is not installed"):
        check_trackers(("no_such_package",))
    pytest.importorskip("mlflow")
    assert parse(["demo", "--trackers", "mlflow"]).trackers == ("mlflow",)
    with pytest.raises(UserError, match="trackers is mlflow, but a sweep"):
        parse_sweep(["demo", "--trackers", "mlflow"])
