"""What a sweep leaves: its tables, plots and TensorBoard's view."""

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from sellarec.artifacts import Place
from sellarec.tuning.results import Row, format_rows, write_results
from sellarec.tuning.space import Domain

SPACE = [
    Domain("align.temperature", "loguniform", (0.05, 1.0)),
    Domain("align.hidden", "randint", (8, 64)),
    Domain("fuse.tokens", "choice", (("user", "item"), ("item",))),
    Domain("align.max_steps", "choice", (None, 10)),
]


def settings(temperature: float, tokens: tuple[str, ...], steps: int | None) -> dict:
    return {"align.temperature": temperature, "align.hidden": 16, "fuse.tokens": tokens, "align.max_steps": steps}


ROWS = [
    Row(
        trial=1,
        settings=settings(0.1, ("user", "item"), None),
        status="finished",
        value=0.72,
        kept={"auc": 0.72, "uauc": None},
        evaluations=[[5, {"auc": 0.6, "uauc": None}], [10, {"auc": 0.72, "uauc": None}]],
        seconds=12.5,
        artifact="align-0123456789abcdef",
        cause=None,
    ),
    Row(2, settings(0.2, ("item",), 10), "stopped", 0.55, None, [[5, {"auc": 0.55, "uauc": 0.5}]], 3.0, None, None),
    Row(3, settings(0.9, ("item",), 10), "failed", None, None, [], None, None, "the loss is not finite"),
]


def test_tables_hold_every_trial(tmp_path: Path) -> None:
    write_results(Place.of(str(tmp_path)), ROWS, SPACE, "align", "auc")
    found = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert [row["status"] for row in found] == ["finished", "stopped", "failed"]
    assert [row["fuse.tokens"] for row in found] == ["user item", "item", "item"]
    assert [row["align.max_steps"] for row in found] == [None, 10, 10]
    assert found[0]["valid auc"] == 0.72 and found[0]["evaluations"][1] == {"step": 10, "auc": 0.72, "uauc": None}
    assert found[2]["cause"] == "the loss is not finite" and found[2]["value"] is None
    with open(tmp_path / "trials.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["trial"] for line in lines] == ["1", "2", "3"]
    assert [step["auc"] for step in json.loads(lines[0]["evaluations"])] == [0.6, 0.72]


def test_a_plot_for_each_setting(tmp_path: Path) -> None:
    write_results(Place.of(str(tmp_path)), ROWS, SPACE, "align", "auc")
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {domain.name for domain in SPACE}
    text = (tmp_path / "plots/align.temperature.svg").read_text()
    for words in ("align.temperature", "AUC of align on the valid split", "finished (1)", "stopped (1)"):
        assert words in text
    assert "user item" in (tmp_path / "plots/fuse.tokens.svg").read_text()


def test_tensorboard_has_curves_and_hyperparameters_of_the_last_writing(tmp_path: Path) -> None:
    for rows in ([ROWS[1]], ROWS):
        write_results(Place.of(str(tmp_path)), rows, SPACE, "align", "auc")
    assert {path.name for path in (tmp_path / "tensorboard/trials").iterdir()} == {"trial-001", "trial-002"}
    events = EventAccumulator(str(tmp_path / "tensorboard/trials/trial-001"))
    events.Reload()
    assert [round(event.value, 4) for event in events.Scalars("align/valid AUC")] == [0.6, 0.72]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert started.hparams["align.temperature"].number_value == 0.1
    assert started.hparams["fuse.tokens"].string_value == "user item"


def test_a_table_for_the_terminal() -> None:
    lines = format_rows(ROWS, SPACE, "auc").splitlines()
    assert lines[0].split() == ["trial", "valid", "AUC", *(domain.name for domain in SPACE), "seconds"]
    assert lines[1].split() == ["1", "0.7200", "0.1", "16", "user", "item", "None", "12"]
    assert lines[3].split()[1] == "–"
