"""The environment check and the bug report, run as a user runs them, on real and on invented installations."""

import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from sellarec import environment
from sellarec.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FITTING = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0+cpu", "fbgemm-gpu-cpu": "1.8.0"}


def install_metadata(folder: Path, versions: dict[str, str]) -> Path:
    """Write the metadata that pip would leave for these versions."""
    for name, version in versions.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def check_with_only(folder: Path) -> str:
    """The check's message, or "", in an interpreter that sees only the standard library, the project and `folder`."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(folder)!r}]\n"
        "from sellarec.environment import check_environment\n"
        "from sellarec.errors import UserError\n"
        "try: check_environment()\n"
        "except UserError as error: print(error)\n"
    )
    # -S: no site-packages. It also shows that the check needs none of them.
    child = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    return child.stdout


def test_report_says_what_to_do_where_the_project_is_not_installed() -> None:
    report = subprocess.run([sys.executable, "-S", "jobs/env.py"], cwd=ROOT, capture_output=True, text=True)
    assert report.returncode == 1
    assert report.stderr.count("\n") == 1
    assert "sellarec is not installed" in report.stderr and "make env" in report.stderr


def run_report(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder) for folder in (path, ROOT) if folder)}
    command = [sys.executable, "jobs/env.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)


def test_versions_that_belong_together_pass(tmp_path: Path) -> None:
    assert check_with_only(install_metadata(tmp_path, FITTING)) == ""


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"torch": "2.12.1+cpu"}, ["torch 2.12.1+cpu", "torchrec 1.8.0", "don't belong together", "torch 2.13.*"]),
        ({"torch": "2.130.0"}, ["torch 2.130.0", "don't belong together"]),
        ({"torchrec": "1.9.2"}, ["torchrec 1.9.2", "torchrec 1.8.*"]),
        ({"fbgemm-gpu-cpu": "1.9.0"}, ["fbgemm-gpu-cpu 1.9.0", "fbgemm 1.8.*"]),
        ({"fbgemm-gpu": "1.8.0"}, ["fbgemm-gpu 1.8.0 and fbgemm-gpu-cpu 1.8.0 are both installed"]),
        (
            {"fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": None},
            ["torch 2.13.0+cpu is a CPU build", "fbgemm-gpu 1.8.0 a CUDA build"],
        ),
        ({"torch": "2.13.0+cu130"}, ["torch 2.13.0+cu130 is a CUDA build", "fbgemm-gpu-cpu 1.8.0 a CPU build"]),
        ({"torchrec": None}, ["not installed", "torchrec"]),
        ({"fbgemm-gpu": "1.8.0+cpu", "fbgemm-gpu-cpu": None}, ["not installed", "fbgemm-gpu"]),
    ],
)
def test_other_versions_are_refused_in_one_line(
    tmp_path: Path, changed: dict[str, str | None], expected: list[str]
) -> None:
    versions = {name: version for name, version in {**FITTING, **changed}.items() if version is not None}
    message = check_with_only(install_metadata(tmp_path, versions))
    assert message.count("\n") == 1
    assert all(part in message for part in [*expected, "make env"]), message


@pytest.mark.parametrize("torch", ["2.13.0", "2.13.0+cu130"])
def test_cuda_builds_pass(tmp_path: Path, torch: str) -> None:
    assert (
        check_with_only(install_metadata(tmp_path, {"torch": torch, "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"})) == ""
    )


def test_another_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PYTHON", (3, 10))
    with pytest.raises(UserError, match=r"this is Python 3\.11 .* needs Python 3\.10: .*make env"):
        environment.check_environment()


def test_the_check_takes_milliseconds() -> None:
    environment.check_environment()
    start = time.perf_counter()
    environment.check_environment()
    assert time.perf_counter() - start < 0.5  # about 5 ms; the bound leaves room for a busy machine


def test_pins_are_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {"torch": environment.TORCH, "torchrec": environment.TORCHREC, "fbgemm-gpu": environment.FBGEMM}
    for name, series in pins.items():
        assert f"{name}=={series}.*" in project["dependencies"]
    python = environment.PYTHON
    assert project["requires-python"] == f">={python[0]}.{python[1]},<{python[0]}.{python[1] + 1}"
    shim = tomllib.loads((ROOT / "packaging/fbgemm-gpu-cpu-shim/pyproject.toml").read_text())["project"]
    kernels = shim["version"].removesuffix("+cpu")
    assert kernels.startswith(environment.FBGEMM + ".")
    assert shim["dependencies"] == [f"fbgemm-gpu-cpu=={kernels}"]
    cuda = (ROOT / "requirements/cuda.txt").read_text().splitlines()
    assert f"fbgemm-gpu=={kernels}" in cuda
    (torch,) = [line.removeprefix("torch==") for line in cuda if line.startswith("torch==")]
    assert torch.startswith(environment.TORCH + ".")
    assert f"torch=={torch}+cpu" in (ROOT / "requirements/cpu.txt").read_text().splitlines()


def test_secrets_are_not_shown() -> None:
    shown = environment.describe_variables(
        {
            "RAY_AUTH_MODE": "disabled",
            "RAY_AUTH_TOKEN": "hunter2",
            "SELLAREC_SECRET": "hunter2",
            "RAY_JOB_CONFIG": '{"env_vars": {"WANDB_API_KEY": "hunter2"}}',
            "RAY_STORAGE": "https://user:hunter2@host/bucket",
            "OMP_NUM_THREADS": "1",
            "HOME": "/home/user",
        }
    )
    assert "hunter2" not in json.dumps(shown)
    assert shown["RAY_AUTH_MODE"] == "disabled"
    assert shown["OMP_NUM_THREADS"] == "1"
    assert shown["RAY_AUTH_TOKEN"] == "(set, not shown)"
    assert "HOME" not in shown


def test_report_of_this_environment() -> None:
    report = run_report("--json")
    assert report.returncode == 0, report.stderr
    facts = json.loads(report.stdout)
    assert facts["torch"]["loads"] and facts["torch"]["gloo"]
    assert facts["fbgemm"]["loads"]
    assert facts["packages"]["torchrec"].startswith("1.8.")
    assert facts["machine"]["cpus"] >= 1 and facts["machine"]["memory_gib"] > 0


@pytest.mark.parametrize(
    ("fbgemm", "expected"),
    [
        ("import pathlib, torch\ntorch.ops.load_library(pathlib.Path(__file__).with_name('broken.so'))", "broken.so"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11"),
    ],
    ids=["library that can't be loaded", "library that takes the process with it"],
)
def test_fbgemm_that_does_not_load_is_named(tmp_path: Path, fbgemm: str, expected: str) -> None:
    package = tmp_path / "fbgemm_gpu"
    package.mkdir()
    (package / "__init__.py").write_text(fbgemm)
    (package / "broken.so").write_text("not a library")
    report = run_report(path=tmp_path)
    assert report.returncode == 1
    last = report.stderr.strip().splitlines()
    assert len(last) == 1, report.stderr
    assert "fbgemm's libraries don't load" in last[0] and expected in last[0] and "make clean env" in last[0]
    assert "torchrec" in report.stdout  # the facts come all the same


@pytest.mark.parametrize(
    ("torch", "fbgemm", "expected"),
    [
        (
            {"cuda_build": "13.0", "cuda_available": False},
            {"loads": False, "error": "no libnvidia-ml.so.1"},
            "DEVICE=cpu",
        ),
        (
            {"cuda_build": "13.0", "cuda_available": True},
            {"loads": True, "variant": "cpu"},
            "torch is a build for CUDA",
        ),
        ({"cuda_build": None, "cuda_available": False}, {"loads": True, "variant": "cuda"}, "torch is a CPU build"),
        ({"loads": False, "error": "no libcudart.so.13"}, {"loads": False, "error": ""}, "torch can't be imported"),
    ],
)
def test_builds_that_cannot_work_are_refused(torch: dict, fbgemm: dict, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        environment.check_description({"torch": {"loads": True, **torch}, "fbgemm": fbgemm})


@pytest.mark.parametrize("available", [True, False])  # False: a node without a GPU on a GPU cluster's image
def test_cuda_builds_that_load_are_accepted(available: bool) -> None:
    torch = {"loads": True, "cuda_build": "13.0", "cuda_available": available}
    environment.check_description({"torch": torch, "fbgemm": {"loads": True, "variant": "cuda"}})


def test_report_ends_with_the_fix_where_versions_do_not_fit(tmp_path: Path) -> None:
    report = run_report(path=install_metadata(tmp_path, {"fbgemm-gpu-cpu": "1.9.0"}))
    assert report.returncode == 1
    assert "fbgemm-gpu-cpu 1.9.0" in report.stderr and "make env" in report.stderr
    assert report.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DEVICE": "tpu"}, "DEVICE is 'tpu': choose cpu or cuda"),
        ({"PYTHON": "{folder}/python"}, "Python 3.11 is needed ({folder}/python is 3.12)"),
        ({"PYTHON": "{folder}/none"}, "Python 3.11 is needed ({folder}/none is missing)"),
    ],
)
def test_setting_up_refuses_in_one_line(tmp_path: Path, variables: dict[str, str], expected: str) -> None:
    (tmp_path / "packaging").mkdir()
    (tmp_path / "requirements").mkdir()
    for file in ("packaging/environment.sh", "requirements/cpu.txt", "pyproject.toml", "Makefile"):
        (tmp_path / file).write_text((ROOT / file).read_text())
    (tmp_path / "packaging/environment.sh").chmod(0o755)
    shim = tmp_path / "packaging/fbgemm-gpu-cpu-shim"
    shim.mkdir()
    (shim / "pyproject.toml").write_text((ROOT / "packaging/fbgemm-gpu-cpu-shim/pyproject.toml").read_text())
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 3.12\n")
    python.chmod(0o755)
    given = {"DEVICE": "cpu", **{name: value.format(folder=tmp_path) for name, value in variables.items()}}
    answer = subprocess.run(["make", "env"], cwd=tmp_path, env={**os.environ, **given}, capture_output=True, text=True)
    assert answer.returncode != 0
    assert expected.format(folder=tmp_path) in answer.stderr
    assert len([line for line in answer.stderr.splitlines() if not line.startswith("make")]) == 1
    assert not (tmp_path / ".venv").exists()
