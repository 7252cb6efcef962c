"""Mistakes of a user: one clear message, a non-zero exit, nothing already computed lost."""

import importlib.util
import os
import pickle
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import main_job
import pytest
import torch
from transformers import BertConfig, BloomConfig

from sellarec.errors import exit_status

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The main job in this process: exit status, and what it printed to stderr."""
    spec = importlib.util.spec_from_file_location("train_job", main_job.ROOT / "jobs" / "train.py")
    assert spec and spec.loader
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)

    def call(*arguments: str | Path, workspace: Path = tmp_path / "w") -> tuple[int, str]:
        capsys.readouterr()
        status = exit_status(job.main, [*map(str, arguments), "--workspace", str(workspace)])
        return status, capsys.readouterr().err

    return call


def refused(outcome: tuple[int, str], *words: str) -> None:
    """Status 2, one line that begins with `error:` and holds the words."""
    status, printed = outcome
    assert status == 2
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1, printed
    for word in words:
        assert word in printed, printed


def test_workers_that_follow_nodes_where_there_is_no_cluster(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    outcome = run("--min-workers", "1", "--workers", "2")
    refused(outcome, "min_workers is 1 and workers 2", "RAY_ADDRESS names no cluster", "leave min_workers out")
    outcome = run("--autoscaler", "True")
    refused(outcome, "autoscaler is True, but RAY_ADDRESS names no cluster", "leave it out")


@pytest.fixture
def movielens(tmp_path: Path) -> Path:
    folder = tmp_path / "ml"
    folder.mkdir()
    (folder / "movies.csv").write_text("movieId,title,genres\n1,Heat (1995),Crime\n2,Up (2009),Animation\n")
    rows = "".join(
        f"{user},{item},{3 + (user + item) % 3},{1000 + 10 * user + item}\n" for user in range(9) for item in (1, 2)
    )
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + rows)
    return folder


def test_data_that_is_not_there(run: Run, tmp_path: Path) -> None:
    refused(run("collm-ml-1m"), "--data")
    refused(run("collm-ml-1m", "--data", tmp_path / "nothing"), str(tmp_path / "nothing"))
    refused(run("ml-latest-small", "--data", tmp_path), "ratings.csv")


def test_truncated_zip(run: Run, tmp_path: Path) -> None:
    archive = tmp_path / "whole.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for split in ("train", "valid", "test"):
            file.writestr(f"ml/{split}_ood2.pkl", os.urandom(2000))
    cut = tmp_path / "cut.zip"
    cut.write_bytes(archive.read_bytes()[:3000])
    refused(run("collm-ml-1m", "--data", cut), "cut.zip")


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def test_pickle_that_would_run_code(run: Run, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    archive = tmp_path / "evil.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for split in ("train", "valid", "test"):
            file.writestr(f"ml/{split}_ood2.pkl", pickle.dumps(Attack(marker)))
    refused(run("collm-ml-1m", "--data", archive), "system", "without executing")
    assert not marker.exists()


def test_csv_lacking_a_column(run: Run, movielens: Path) -> None:
    (movielens / "ratings.csv").write_text("userId,movieId,timestamp\n1,1,5\n")
    refused(run("ml-latest-small", "--data", movielens), "rating", "ratings.csv")


def test_csv_with_an_unparsable_row(run: Run, movielens: Path) -> None:
    lines = (movielens / "ratings.csv").read_text().splitlines()
    lines[4] = "7,2,good,1200"
    (movielens / "ratings.csv").write_text("\n".join(lines) + "\n")
    refused(run("ml-latest-small", "--data", movielens), "line 5", "good")


def test_empty_split(run: Run, movielens: Path) -> None:
    (movielens / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,5,10\n1,2,3,11\n")
    refused(run("ml-latest-small", "--data", movielens), "split")


def test_rows_of_one_label(run: Run, movielens: Path) -> None:
    refused(run("ml-latest-small", "--data", movielens, "--data.positive-rating", "0.5"), "positives", "both labels")


def test_model_folder_without_weights_or_tokenizer(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    refused(run("--llm", folder), "config.json")
    (folder / "config.json").write_text("{}")
    refused(run("--llm", folder), "weights")
    (folder / "model.safetensors").write_bytes(b"")
    refused(run("--llm", folder), "tokenizer")


def test_a_model_that_is_no_causal_one_or_lacks_the_layers_to_adapt(
    run: Run, models: dict[str, Path], tmp_path: Path
) -> None:
    """Before any stage, though nobody knows yet how many rows there are."""
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = Path(shutil.copytree(models["gpt2"], tmp_path / "bert"))
    BertConfig(**small, intermediate_size=16, architectures=["BertForMaskedLM"]).save_pretrained(bert)
    refused(run("--llm", bert), "BertForMaskedLM, which is no causal language model")
    bloom = Path(shutil.copytree(models["gpt2"], tmp_path / "bloom"))
    BloomConfig(**small, architectures=["BloomForCausalLM"]).save_pretrained(bloom)
    refused(run("--llm", bloom), "bloom has no max_position_embeddings")
    refused(run("--llm", models["gpt2"]), "adapt.targets names down_proj", "c_attn, c_fc, c_proj, lm_head")
    refused(
        run("--adapt.targets", "c_attn"), "adapt.targets names c_attn", "layers of the embedded model are down_proj"
    )
    assert not list((tmp_path / "w").rglob("manifest.json"))


def test_more_workers_than_memory_holds(run: Run) -> None:
    refused(run("--workers", "4000"), "4000 workers x", "GiB", "lower --workers")


def test_more_workers_than_gpus(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On this machine, before any stage; with --device cpu their number is no matter."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused(run("demo"), "2 workers of 1 GPU each find 1 GPUs", "--workers 1", "--device cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(run("demo", "--device", "cuda"), "device is cuda, but there is no GPU")
    assert not list((tmp_path / "w").rglob("manifest.json"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused(run("demo", "--device", "cpu", "--stages", "collab"), "prepare", "--stages")


def test_a_sharding_that_is_not_offered(run: Run, tmp_path: Path) -> None:
    """Before any stage; with column-wise of any stage whose optimizer it can't be."""
    refused(run("--tables.sharding", "grid"), "tables.sharding is grid")
    refused(run("--tables.sharding", "data-parallel", "--stages", "collab"), "tables.sharding is data-parallel")
    by_columns = ("--tables.sharding", "column-wise")
    refused(
        run(*by_columns), "tables.sharding is column-wise and collab.table_optimizer rowwise-adagrad", "adagrad, sgd"
    )
    refused(run(*by_columns, "--collab.table-optimizer", "adagrad"), "align.table_optimizer rowwise-adagrad")
    assert not list((tmp_path / "w").rglob("manifest.json"))


def test_unwritable_workspace(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(run(workspace=tmp_path / "file" / "w"), "can't be written to", "--workspace")


def test_unknown_names(run: Run) -> None:
    refused(run("collm-ml-1"), "collm-ml-1m")
    refused(run("--stages", "prepare,fuze"), "fuse")


def test_a_stage_whose_input_does_not_stand(run: Run) -> None:
    refused(run("--stages", "collab"), "prepare", "--stages")


def test_a_mistake_loses_nothing_and_claims_no_name(run: Run, tmp_path: Path) -> None:
    assert run("--stages", "prepare")[0] == 0
    manifests = list((tmp_path / "w/artifacts").rglob("manifest.json"))
    assert len(manifests) == 1
    refused(run("--llm", tmp_path / "no-model", "--name", "other"), "no-model")
    assert list((tmp_path / "w/artifacts").rglob("manifest.json")) == manifests
    assert not (tmp_path / "w/runs/other").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system takes root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine doesn't let a small file system be mounted")
    yield folder  # type: ignore[misc]
    subprocess.run(["umount", folder], check=True)


def test_full_disk(run: Run, small_disk: Path) -> None:
    refused(run("--stages", "prepare", workspace=small_disk / "w"), "full", "--workspace")
    assert not list(small_disk.rglob("manifest.json"))


@pytest.mark.ray
@pytest.mark.slow
def test_disk_that_gets_full_in_a_stage_with_workers(small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    recipe = main_job.write_recipe(tmp_path)
    workspace = small_disk / "w"
    arguments = ["demo", recipe, "--workspace", workspace, "--stages", "prepare,collab", "--collab.dim", "1024"]
    arguments += ["--storage-timeout", "3"]
    printed = main_job.train(*arguments, log=tmp_path / "log", status=2)
    assert printed.splitlines()[-1].startswith(f"error: the disk behind {workspace} is full")
    assert [path.parent.name.split("-")[0] for path in workspace.rglob("manifest.json")] == ["prepare"]


@pytest.mark.ray
@pytest.mark.slow
def test_loss_that_is_not_finite(tmp_path: Path) -> None:
    recipe = main_job.write_recipe(tmp_path)
    arguments = ["demo", recipe, "--workspace", tmp_path / "w", "--stages", "prepare,collab"]
    flags = ["--collab.table-learning-rate", "1e30", "--collab.l2", "1"]
    printed = main_job.train(*arguments, *flags, log=tmp_path / "log", status=2)
    assert "error: stage collab, step" in printed.splitlines()[-1]
    assert "not finite" in printed.splitlines()[-1]
    artifacts = [path.parent.name for path in tmp_path.rglob("manifest.json")]
    assert len(artifacts) == 1 and artifacts[0].startswith("prepare-")


@pytest.mark.ray
def test_a_context_too_short_for_the_prompt_is_refused_before_training(tmp_path: Path) -> None:
    """No step is taken, and nothing of the stage stands."""
    recipe = main_job.write_recipe(tmp_path)
    printed = main_job.train(
        recipe, "--workspace", tmp_path / "w", "--pretrain.context", "20", log=tmp_path / "log", status=2
    )
    assert "the compact prompt needs" in printed and "the model's context 20" in printed, printed
    assert "pretrain  step" not in printed and "starting 2 workers" not in printed, printed
    assert not list((tmp_path / "w" / "artifacts").glob("pretrain-*/manifest.json"))
