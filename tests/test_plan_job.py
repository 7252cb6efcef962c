"""jobs/plan.py as a user runs it: a plan that fits, one that doesn't, GPUs that this machine doesn't have."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Qwen2Config

from sellarec.errors import UserError

ROOT = Path(__file__).parents[1]


def plan(*flags: str, status: int = 0) -> tuple[str, str]:
    """What is printed to stdout, and to stderr."""
    command = [sys.executable, str(ROOT / "jobs" / "plan.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_a_plan_that_fits():
    """Of 1,001 and 10 rows by 3 workers: blocks of 334 and 4, each row 32 floats and one of its optimizer."""
    flags = ["--workers", "3", "--users", "1001", "--items", "10", "--dim", "32", "--memory-per-worker", "0.5"]
    printed, _ = plan(*flags)
    lines = printed.splitlines()
    assert lines[1].split()[:7] == ["user", "1,001", "32", "float32", "row-wise", "334", "32"]
    assert lines[2].split()[:7] == ["item", "10", "32", "float32", "row-wise", "4", "32"]
    assert f"worker 0 holds most: 0.000 GiB ({338 * 33 * 4:,} bytes)" in printed
    assert lines[-1] == "fits: each worker has room for 0.5 GiB"


def test_a_plan_by_columns():
    """Of 44 columns by 3 workers 16, 16 and 12, each with its optimizer's state."""
    flags = ["--workers", "3", "--users", "1001", "--items", "10", "--dim", "44", "--memory-per-worker", "0.5"]
    printed, _ = plan(*flags, "--tables.sharding", "column-wise", "--table-optimizer", "adagrad")
    assert printed.splitlines()[1].split()[:7] == ["user", "1,001", "44", "float32", "column-wise", "1,001", "16"]
    assert f"worker 0 holds most: 0.000 GiB ({1011 * 2 * 16 * 4:,} bytes)" in printed


def test_a_plan_that_does_not_fit_ends_with_2_and_the_arithmetic():
    flags = ["--workers", "2", "--users", "100000000", "--items", "500", "--dim", "64", "--memory-per-worker", "1"]
    printed, error = plan(*flags, status=2)
    assert "24.215 GiB in all" in printed and "fits" not in printed
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    sums = "user 50,000,000 rows x 260 bytes + item 250 rows x 260 bytes"
    assert f"worker 0 of 2 would hold 12.11 GiB of tables ({sums}), but each worker has room for 1.00 GiB" in error
    # halved by half the type and an optimizer without a state, on more workers
    smaller = ["--tables.dtype", "float16", "--table-optimizer", "sgd", "--workers", "16"]
    assert "fits" in plan(*flags, *smaller)[0]


def test_torchrecs_planner_plans_for_16_gpus_that_are_not_there():
    flags = ["--workers", "16", "--device", "cuda", "--users", "1000000", "--items", "50", "--dim", "64"]
    flags += ["--tables.sharding", "auto", "--tables.placement", "uvm-caching"]
    printed, _ = plan(*flags, "--memory-per-worker", "40")
    assert "16 workers (cuda, uvm-caching, rowwise-adagrad): 0.242 GiB in all" in printed and "fits" in printed
    printed, error = plan(*flags, status=2)
    assert "holds most" in printed and "--memory-per-worker" in error


def test_mistakes_are_refused_before_any_plan():
    for flags, said in (
        (["--dim", "30"], "dim is 30"),
        (["--tables.dtype", "bfloat16"], "kernels for CPUs have not"),
        (["--tables.sharding", "column-wise"], "table_optimizer rowwise-adagrad"),
        (["--tables.sharding", "grid"], "tables.sharding is grid"),
        (["--tables.sharding", "data-parallel"], "tables.sharding is data-parallel"),
    ):
        printed, error = plan("--workers", "2", "--users", "10", "--items", "10", *flags, status=2)
        assert not printed and said in error


@pytest.fixture
def config_of_a_model(tmp_path) -> Path:
    """A config.json alone: Qwen2-7B's shape."""
    config = Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False, max_position_embeddings=32768, architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    return tmp_path / "config.json"


def plan_here(capsys: pytest.CaptureFixture, *flags: str) -> str:
    """What is printed in this process, which has loaded what a plan takes."""
    runpy.run_path(str(ROOT / "jobs" / "plan.py"))["main"](list(flags))
    return capsys.readouterr().out


def test_auto_fits_where_one_table_is_nearly_all(capsys):
    """The room is that of row-wise, of which table-wise would take twice."""
    flags = ["--workers", "2", "--users", "100000000", "--items", "1000", "--dim", "64", "--memory-per-worker", "20"]
    printed = plan_here(capsys, *flags, "--tables.sharding", "auto")
    assert printed.splitlines()[1].split()[4:6] == ["row-wise", "50,000,000"]
    assert "holds most: 12.107 GiB" in printed and "fits: each worker has room for 20.0 GiB" in printed
    with pytest.raises(UserError, match=r"worker 0 of 2 would hold 24.21 GiB .* row-wise \(12.11 GiB\)"):
        plan_here(capsys, *flags, "--tables.sharding", "table-wise")


def test_rows_in_the_hosts_memory_are_told_apart_from_what_lies_on_the_gpu(capsys):
    """10 million rows of 256 bytes a worker; of a fifth of them a copy on the GPU."""
    flags = ["--workers", "4", "--users", "40000000", "--items", "100", "--dim", "64", "--device", "cuda"]
    flags += ["--tables.placement", "uvm-caching", "--memory-per-worker", "1"]
    printed = plan_here(capsys, *flags)
    device, host = 10_000_025 * (4 + 4 + 55), 10_000_025 * 256
    assert f"({device:,} bytes) on its GPU, and {host / 2**30:.3f} GiB ({host:,} bytes) in its host's memory" in printed
    assert "not checked without --host-memory-per-worker" in printed.splitlines()[-1]
    printed = plan_here(capsys, *flags, "--host-memory-per-worker", "3")
    assert printed.splitlines()[-1] == "fits: each worker has room for 1.0 GiB, and for 3.0 GiB in its host's memory"
    with pytest.raises(UserError, match=r"would hold 2.38 GiB of tables in its host's memory .*has room for 2.00 GiB"):
        plan_here(capsys, *flags, "--host-memory-per-worker", "2")
    with pytest.raises(UserError, match=r"would hold 0.59 GiB of tables \(.*has room for 0.50 GiB"):
        plan_here(capsys, *flags[:-1], "0.5")
    with pytest.raises(UserError, match=r"host_memory_per_worker is given, but tables.placement is device"):
        plan_here(capsys, *flags[:10], "--host-memory-per-worker", "2")


def test_a_language_model_is_planned_by_its_config_alone(config_of_a_model, capsys):
    flags = ["--workers", "4", "--users", "839", "--items", "3256", "--llm", str(config_of_a_model), "--rows", "33891"]
    flags += ["--recipe", "collm-ml-1m", "sella-official", "--mfu", "0.4", "--gpu", "H100"]
    printed = plan_here(capsys, *flags)
    assert "7,615,616,512 weights, 28 layers of width 3,584; 161,480,704 weights of the adapter" in printed
    for stage in ("adapt", "distil", "fuse", "evaluate"):
        assert f"{stage:<9} takes of each of 4 workers " in printed
    # users, items and distilled vectors, adam's state and gradient beside the rows
    sizes = [line.split()[:3] for line in printed.splitlines()[1:4]]
    assert sizes == [["user", "839", "256"], ["item", "3,256", "256"], ["semantic", "3,256", "3584"]]
    assert f"{(4095 * 256 + 3256 * 3584) * 16 / 2**30:.3f} GiB in all" in printed
    assert "adapt     254 steps, 32,512 prompts trained on" in printed and "of at most 768 tokens" in printed
    assert "\nH100 (79 GiB): " in printed and "A100" not in printed and "assumed: 40% of the peak" in printed


@pytest.mark.parametrize(
    ("recipe", "tables"),
    [
        ("collm-sasrec", [("item", "3,256", "64")]),  # users have no rows of their own
        ("collm-mf", [("user", "839", "256"), ("item", "3,256", "256")]),
        ("svdpp", [("user", "839", "32"), ("item", "3,256", "32"), ("history", "3,256", "32")]),
    ],
)
def test_a_plan_has_the_tables_of_a_recipes_model(tmp_path, capsys, recipe, tables):
    if recipe == "svdpp":
        (tmp_path / "svdpp.yaml").write_text("collab: {model: svdpp, biases: false}")
        recipe = str(tmp_path / "svdpp.yaml")
    printed = plan_here(capsys, "--workers", "4", "--users", "839", "--items", "3256", "--recipe", recipe)
    lines = [line.split()[:3] for line in printed.splitlines()[1:]]
    assert [tuple(line) for line in lines[: len(tables)]] == tables
    assert lines[len(tables)][:2] == ["4", "workers"]


def test_what_is_planned_of_a_language_model_needs_one_and_rows(config_of_a_model, capsys):
    table = ["--workers", "2", "--users", "10", "--items", "10"]
    for flags, said in (
        (["--rows", "5"], "rows is given, but llm is not"),
        (["--llm", str(config_of_a_model)], "give --rows"),
        (["--llm", str(config_of_a_model), "--rows", "5", "--mfu", "1.5"], "mfu is 1.5"),
        (
            ["--llm", str(config_of_a_model), "--recipe", "sella-official", "--dim", "32"],
            "dim is 32, but the recipes have 256",
        ),
    ):
        with pytest.raises(UserError, match=said):
            plan_here(capsys, *table, *flags)
