"""What a run leaves and prints when a stage fails, and tells of several stages at the end. With workers: tests/end_to_end/."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small import small_log

from sellarec import ahead, pipeline
from sellarec.command_line import parse, parse_sweep
from sellarec.config import Align, Collab, Config, Data, Llm
from sellarec.errors import StageFailed, UserError, exit_status
from sellarec.run import Run
from sellarec.training.cluster import Cluster
from sellarec.tuning import sweep as tuning_sweep

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


@pytest.mark.parametrize(
    ("changes", "beside"),
    [
        ({}, {"auc": 0.72, "uauc": 0.6}),
        ({"align": Align(init="scratch", valid_rows=50)}, None),
        ({"collab": Collab(select_on="ndcg@10")}, None),
    ],
    ids=["same rows", "other rows", "ranking"],
)
def test_the_report_names_collab_beside_what_was_aligned_from_scratch(tmp_path, monkeypatch, changes, beside):
    """Of the state that it kept."""
    this = Run.of(Config(**{"name": "run", "workspace": str(tmp_path), "align": Align(init="scratch")} | changes))
    this.marks = dict.fromkeys(("prepare", "collab", "align", "evaluate"), "x")
    this.seconds = dict.fromkeys(this.marks, None)
    metrics = {"auc": 0.72, "uauc": 0.6}
    facts: dict[str, dict[str, Any]] = {
        "prepare": {},
        "collab": {"kept_step": 4, "evaluations": [[2, {"auc": 0.7, "uauc": 0.5}], [4, metrics]]},
        "align": {"alignment": {"valid": {"align": {"auc": 0.71, "uauc": 0.6}, "collab": None}}},
        "evaluate": {},
    }
    for stage, found in facts.items():
        this.artifact(stage).write_json("manifest.json", {"fingerprint": "x", "facts": found, "versions": {}})
    this.artifact("evaluate").write_json("results.json", [])
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(Run, "log", lambda self: SimpleNamespace(facts={"rows": {"valid": 100}}))
    monkeypatch.setattr("sellarec.evaluation.report.write_report", lambda **given: shown.extend(given["stages"]) or "")
    monkeypatch.setattr("sellarec.evaluation.results.format_table", lambda records: "")
    pipeline._finish(this)
    (align,) = (found["manifest"]["facts"]["alignment"] for found in shown if found["stage"] == "align")
    assert align["valid"] == {"align": {"auc": 0.71, "uauc": 0.6}, "collab": beside}


def test_a_name_belongs_to_the_settings_of_a_stage_that_has_left_a_checkpoint(tmp_path: Path) -> None:
    """One that was begun and refused has none, and may get other settings."""

    def of(*flags: str) -> Run:
        return Run.of(parse(["demo", "--name", "one", "--workspace", str(tmp_path / "w"), *flags]))

    this = of()
    this.marks = {"collab": "0" * 16}
    this.place.write_json("settings.json", pipeline._check_name(this, {}))
    pipeline._note_begun(this, "collab")
    other = of("--collab.dim", "8")
    pipeline._check_name(other, {})
    (this.artifact("collab").folder / "checkpoints/step-00000004").mkdir(parents=True)
    with pytest.raises(UserError, match=r"collab\.dim \d+ then, 8 now"):
        pipeline._check_name(other, {})
    pipeline._check_name(this, {})
    pipeline._check_name(of("--fuse.learning-rate", "0.5"), {})  # a later stage's


@pytest.mark.parametrize("job", ["run", "sweep"])
def test_a_cluster_is_checked_before_files_are_read(
    job: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hash of large files takes minutes. Nodes that an autoscaler adds cost more, so those are asked for afterwards."""
    found: list[UserError | Cluster] = [UserError("it is too small"), Cluster(local=False, gpus=False)]

    def join(*given: Any, **named: Any) -> Cluster:
        answer = found.pop(0)
        if isinstance(answer, UserError):
            raise answer
        return answer

    class Read(Exception):
        pass

    def read(*given: Any, **named: Any) -> None:
        raise Read

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for module in (pipeline, tuning_sweep):
        monkeypatch.setattr(module, "check_given_cluster", lambda workspace, autoscaler: None)
    monkeypatch.setattr("sellarec.run.connect", join)
    for name in ("u.data", "u.item"):
        (tmp_path / name).touch()
    flags = ["ml-100k", "--data", str(tmp_path), "--llm", str(models["llama"]), "--workspace", str(tmp_path / "w")]

    def start(*more: str) -> None:
        if job == "run":
            pipeline.run(Run.of(parse([*flags, *more])))
        else:
            tuning_sweep.sweep(parse_sweep([*flags, *more, "--stage", "adapt"]))

    with monkeypatch.context() as patched:
        for name in ("run.file_hash", "run.file_hashes", "language.llm.file_hash", "pipeline.open_trackers"):
            patched.setattr(f"sellarec.{name}", read)
        with pytest.raises(Read):
            start("--autoscaler", "True")
        assert len(found) == 2  # nothing was joined
        with pytest.raises(UserError, match="it is too small"):
            start()
        with pytest.raises(Read):
            start()
    found.append(UserError("no nodes came"))
    with pytest.raises(UserError, match="no nodes came"):
        start("--autoscaler", "True")


def test_no_nodes_are_asked_for_where_no_stage_is_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def join(*given: Any, **named: Any) -> Cluster:
        raise UserError("no nodes came")

    world = ["--data.world.users", "50", "--data.world.items", "40", "--data.world.interactions", "800"]
    flags = ["demo", *world, "--stages", "prepare", "--workspace", str(tmp_path)]
    pipeline.run(Run.of(parse(flags)))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(pipeline, "check_given_cluster", lambda workspace, autoscaler: None)
    monkeypatch.setattr("sellarec.run.connect", join)
    pipeline.run(Run.of(parse([*flags, "--autoscaler", "True"])))
    with pytest.raises(UserError, match="no nodes came"):
        pipeline.run(Run.of(parse([*flags, "--autoscaler", "True", "--data.split-seed", "9", "--name", "other"])))


@pytest.mark.parametrize(
    ("expected", "told_before"), [((90, 10, 10, 9, 9), "prepare"), (None, "adapt")], ids=["known rows", "unknown rows"]
)
def test_costs_are_told_before_the_first_stage_or_once_the_rows_are_known(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    expected: tuple[int, int, int, int, int] | None,
    told_before: str,
) -> None:
    """Of a given language model, and in any case before the first of its stages; once only."""
    printed: dict[str, str] = {}

    class Started(Exception):
        pass

    def stage(this: Run, name: str) -> None:
        printed[name] = capsys.readouterr().out
        if name != "prepare":
            raise Started
        this.artifact(name).write_json("manifest.json", {"fingerprint": this.marks[name]})

    def connect(this: Run) -> None:
        this.cluster = Cluster(local=True, gpus=False)

    facts = {"users": 9, "items": 9, "noun": "movie", "positives": {"train": 40, "valid": 4}}
    facts["rows"] = {"train": 90, "valid": 10, "test": 10}
    log = replace(small_log(tmp_path / "log", 9, 9, np.ones(9, bool)), facts=facts)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(Run, "log", lambda self: log)
    monkeypatch.setattr(Run, "connect", connect)
    monkeypatch.setattr(pipeline, "_stage", stage)
    monkeypatch.setattr(pipeline, "check_room", lambda workers: None)
    monkeypatch.setattr(ahead, "check_prompts", lambda *_: None)  # the log has no titles
    config = Config(
        name="run",
        workspace=str(tmp_path / "w"),
        llm=Llm(model=str(models["llama"])),
        data=Data(expected=expected),
        trackers=(),
    )
    with pytest.raises(Started):
        pipeline.run(Run.of(config))
    assert list(printed) == ["prepare", "adapt"]
    for name, told in printed.items():
        costs = [line.split("cost      ")[1] for line in told.splitlines() if "] cost      " in line]
        if name != told_before:
            assert not costs
            continue
        assert [line.split()[0] for line in costs[:4]] == ["adapt", "distil", "fuse", "evaluate"]
        assert any(" x H100: " in line for line in costs)
