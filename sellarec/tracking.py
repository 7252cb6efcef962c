"""Where the numbers of a run go beside its folder: TensorBoard, and where they are asked for MLflow and Weights & Biases.

The trackers run in the driver. MLflow and W&B take their servers, keys and offline modes from their own environment
variables (MLFLOW_TRACKING_URI, WANDB_API_KEY, WANDB_MODE ...); a run that is taken up again goes on in the run it has there.
"""

import importlib.util
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sellarec.errors import UserError

if TYPE_CHECKING:
    from sellarec.artifacts import Place

PROJECT = "sellarec"
"""MLflow's experiment and W&B's project, where MLFLOW_EXPERIMENT_NAME and WANDB_PROJECT name no other."""

IDS = "trackers.json"
"""File of the run's folder: what MLflow and W&B call the run."""

PARAMETERS = 100
"""Parameters that an MLflow server takes at a time."""

SILENCE = 60.0
"""Seconds for which an MLflow server that did not answer is left alone."""


class Tracker(Protocol):
    """A place for the numbers of one run.

    scalars: numbers of a stage at one of its steps. summary: numbers of the whole run. close: the last call.
    """

    def scalars(self, stage: str, step: int, values: Mapping[str, float]) -> None: ...

    def summary(self, values: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError where a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers has {name}, which is not installed: pip install {name}, or leave it out")


def open_trackers(
    names: Sequence[str],
    workspace: "Place",
    place: "Place",
    run: str,
    settings: Mapping[str, Any],
    say: Callable[[str], None],
) -> list[Tracker]:
    """TensorBoard's event files in the run's folder (none where that is remote), and the trackers that are named.

    Args:
        names: of `mlflow`, `wandb`.
        workspace: a directory that has been made, for as long as its storage isn't away.
        place: the run's folder in it.
        run: its name.
        settings: its config, by dotted name.
        say: prints a line.

    Raises:
        UserError: a tracker can't begin a run, or go on in it.
    """
    ids = place.read_json(IDS) or {}
    trackers: list[Tracker] = [TensorBoard(workspace, place, say)] if place.is_local else []
    for name in names:
        try:
            if name == "mlflow":
                mlflow = MLflow(run, settings, ids.get(name), say)
                trackers.append(mlflow)
                ids[name] = mlflow.id
            else:
                wandb = WandB(run, settings, ids.get(name), place)
                trackers.append(wandb)
                ids[name] = wandb.id
        except Exception as error:  # whatever the two packages raise; no work has begun
            for tracker in trackers:
                tracker.close(failed=True)
            raise UserError(f"trackers has {name}, which can't begin a run: {error}") from error
        place.write_json(IDS, ids)
    return trackers


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder. Where storage fails, what was not written yet is lost, which is told,
    and what comes later goes into a new file: no training is broken off for its curves."""

    def __init__(self, workspace: "Place", place: "Place", say: Callable[[str], None]) -> None:
        self._workspace, self._folder, self._say = workspace, place.folder / "tensorboard", say
        self._writer: Any = None
        self._loses = False

    def scalars(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._workspace.reach()  # the writer would make another one in its place
                self._writer = SummaryWriter(str(self._folder))
            for name, value in values.items():
                self._writer.add_scalar(f"{stage}/{name}", value, step)
            self._loses = False
        except OSError as error:
            self._lose(error)

    def summary(self, values: Mapping[str, float]) -> None:
        """Nothing: the results are in files beside its own."""

    def close(self, failed: bool) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if not self._loses:
            self._say(f"TensorBoard's file can't be written, some points of its curves are lost: {error}")
        self._writer, self._loses = None, True


class MLflow:
    """A run of an MLflow experiment. A server that can't be reached while the run goes on costs numbers there, not the run."""

    def __init__(self, run: str, settings: Mapping[str, Any], known: str | None, say: Callable[[str], None]) -> None:
        # by default a call to a server that is away is tried again for minutes, and the run's messages wait behind it
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        import mlflow
        from mlflow.entities import Param

        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self._client, self._say, self._lost = mlflow.MlflowClient(), say, 0
        self._silent_until = 0.0
        if known is None:
            self.id = self._client.create_run(experiment.experiment_id, run_name=run).info.run_id
            parameters = [Param(name, str(value)) for name, value in settings.items()]
            for start in range(0, len(parameters), PARAMETERS):
                self._client.log_batch(self.id, params=parameters[start : start + PARAMETERS])
        else:
            self.id = known
            self._client.update_run(known, status="RUNNING")

    def scalars(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._log({f"{stage}/{name}": value for name, value in values.items()}, step)

    def summary(self, values: Mapping[str, float]) -> None:
        self._log(values, 0)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        if time.monotonic() < self._silent_until:
            self._lost += 1
            return
        now = int(time.time() * 1000)
        # letters, digits and _-. :/ are all that MLflow takes in a name
        names = {name: re.sub(r"[^\w\-. :/]", "", name.replace("(%)", "percent")) for name in values}
        try:
            self._client.log_batch(self.id, [Metric(names[name], value, now, step) for name, value in values.items()])
        except (MlflowException, OSError) as error:  # what requests raises is an OSError
            if self._lost == 0:
                self._say(f"mlflow takes no numbers; the run goes on, and tries again every {SILENCE:g} s: {error}")
            self._lost += 1
            self._silent_until = time.monotonic() + SILENCE

    def close(self, failed: bool) -> None:
        from mlflow.exceptions import MlflowException

        if self._lost:
            self._say(f"mlflow did not get the numbers of {self._lost} times; TensorBoard's files have them")
        try:
            self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")
        except (MlflowException, OSError) as error:
            self._say(f"mlflow was not told that the run ended: {error}")


class WandB:
    """A run of a W&B project; the package sends from a process of its own, and keeps what it can't send."""

    def __init__(self, run: str, settings: Mapping[str, Any], known: str | None, place: "Place") -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=run, id=known, resume="allow", config=dict(settings),
            dir=str(place.folder) if place.is_local else None, allow_val_change=True,
            settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self.id = self._run.id
        self._stages: set[str] = set()

    def scalars(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self._stages:  # each stage counts its steps from 1
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    def summary(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)
