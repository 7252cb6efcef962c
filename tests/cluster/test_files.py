"""The files of cluster/ against what reads them: the operator's schemas, Ray's of launcher files, linters; what a job sends."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


def strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as JSON schema; fields that it doesn't know are refused (`kubectl --validate=strict`)."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    if isinstance(made.get("properties"), dict) and "additionalProperties" not in made:
        made["additionalProperties"] = False
    return made


def schema_of(kuberay: Path, plural: str) -> dict[str, Any]:
    crd = yaml.load((kuberay / f"ray.io_{plural}.yaml").read_text(), Loader=yaml.CSafeLoader)
    return next(v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1")


def schema_of_claims(kuberay: Path) -> dict[str, Any]:
    """Of a PersistentVolumeClaim, by that of the claims which a pod may bring with it."""
    group = schema_of(kuberay, "rayclusters")["properties"]["spec"]["properties"]["workerGroupSpecs"]["items"]
    pod = group["properties"]["template"]["properties"]["spec"]["properties"]
    claim = pod["volumes"]["items"]["properties"]["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]
    kind = {"apiVersion": {"const": "v1"}, "kind": {"const": "PersistentVolumeClaim"}}
    return {"type": "object", "properties": {**kind, **claim}, "required": [*kind, "metadata", "spec"]}


def errors(manifest: Any, schema: dict[str, Any]) -> list[str]:
    schema["properties"]["metadata"] = {"type": "object", "additionalProperties": {}}
    validator = jsonschema.Draft202012Validator(strict(schema))
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(manifest)]


@pytest.fixture(scope="session")
def kuberay(sellarec_data: Path) -> Path:
    if not (sellarec_data / "kuberay").is_dir():
        pytest.skip("needs kuberay/, the operator's schemas, in SELLAREC_DATA")
    return sellarec_data / "kuberay"


KINDS = {"raycluster": "rayclusters", "rayjob": "rayjobs"}


@pytest.mark.parametrize("name", KINDS)
def test_manifests_fit_the_operators_schema(name: str, kuberay: Path) -> None:
    manifest = yaml.safe_load((CLUSTER / "kuberay" / f"{name}.yaml").read_text())
    assert errors(manifest, schema_of(kuberay, KINDS[name])) == []
    # and the schema does refuse: a field that it doesn't know, a wrong type
    manifest["spec"]["entrypiont"] = "x"
    manifest["spec"].get("rayClusterSpec", manifest["spec"])["workerGroupSpecs"][1]["maxReplicas"] = "8"
    found = errors(manifest, schema_of(kuberay, KINDS[name]))
    assert len(found) == 2 and all(any(name in error for error in found) for name in ("entrypiont", "maxReplicas"))


def test_the_volume_fits_kubernetes_schema(kuberay: Path) -> None:
    claim = yaml.safe_load((CLUSTER / "kuberay" / "storage.yaml").read_text())
    assert errors(claim, schema_of_claims(kuberay)) == []
    claim["spec"]["accessMode"] = claim["spec"].pop("accessModes")
    claim["kind"] = "PersistentVolume"
    claim["spec"]["resources"]["requests"]["storage"] = [100]
    found = errors(claim, schema_of_claims(kuberay))
    assert len(found) == 3 and all(any(name in error for error in found) for name in ("accessMode", "kind", "storage"))


def cluster_specs() -> Iterator[dict[str, Any]]:
    for name in KINDS:
        spec = yaml.safe_load((CLUSTER / "kuberay" / f"{name}.yaml").read_text())["spec"]
        yield spec.get("rayClusterSpec", spec)


def test_manifests_say_what_the_project_needs() -> None:
    """Token authentication, autoscaling with spot workers, the installed Ray, storage that all pods mount, at one path."""
    claim = yaml.safe_load((CLUSTER / "kuberay" / "storage.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for spec in cluster_specs():
        assert spec["authOptions"]["mode"] == "token"
        assert spec["enableInTreeAutoscaling"]
        assert spec["rayVersion"] == ray.__version__
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        spot = [group for group in spec["workerGroupSpecs"] if group["template"]["spec"].get("tolerations")]
        assert [group["groupName"] for group in spot] == ["spot"] and spot[0]["minReplicas"] == 0 < spot[0][
            "maxReplicas"
        ]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            (container,) = pod["containers"]
            assert container["volumeMounts"] == [{"name": "workspace", "mountPath": "/workspace"}]
            (volume,) = pod["volumes"]
            assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_a_job_that_is_stopped_has_time_for_a_checkpoint() -> None:
    """Each head that jobs are submitted to is told how long; Slurm's takes none (its driver runs in the batch step)."""
    for spec in cluster_specs():
        (container,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
        assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "120"} in container["env"]
    launcher = yaml.safe_load((CLUSTER / "launcher.yaml").read_text())
    assert "RAY_JOB_STOP_WAIT_TIME_S=120; " in launcher["head_start_ray_commands"][-1]
    assert "--include-dashboard=false" in (CLUSTER / "slurm.sbatch").read_text(), "so there is no jobs API"


def test_the_launchers_file_fits_rays_schema() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    launcher = yaml.safe_load((CLUSTER / "launcher.yaml").read_text())
    assert list(jsonschema.Draft7Validator(schema).iter_errors(launcher)) == []
    # as `ray up` does: defaults filled in, rules beyond the schema
    validate_config(prepare_config(copy.deepcopy(launcher)))
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config({**copy.deepcopy(launcher), "head_node_type": "heads"}))
    assert all("RAY_AUTH_MODE=token" in launcher[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    launcher["provider"]["kind"] = launcher["provider"].pop("type")
    assert list(jsonschema.Draft7Validator(schema).iter_errors(launcher))


def lint(*command: str | Path) -> str:
    folder = Path(sys.executable).parent  # the linters are packages of the `dev` extra
    done = subprocess.run([folder / command[0], *command[1:]], capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""


def test_the_slurm_script_and_the_dockerfile_pass_their_linters(tmp_path: Path) -> None:
    assert lint("shellcheck", CLUSTER / "slurm.sbatch") == ""
    assert lint("hadolint", CLUSTER / "Dockerfile") == ""
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp && apt-get install x\n")
    assert "DL3006" in lint("hadolint", tmp_path / "Dockerfile")


def test_what_the_dockerfile_copies_is_there_and_reaches_docker() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    for line in (CLUSTER / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source.partition('/')[0]}" in ignored, source


def test_the_dockerfiles_first_copies_make_a_package(tmp_path: Path) -> None:
    """The environment is made before the rest of the code is copied: what setuptools and the check of versions read is there."""
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    for line in dockerfile[: dockerfile.index("RUN PIP_NO_CACHE_DIR=1 DEVICE=")].splitlines():
        if line.startswith("COPY "):
            *sources, target = line.split()[1:]
            for source in sources:
                into = tmp_path / target if target.endswith("/") or target == "." else (tmp_path / target).parent
                into.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-r", ROOT / source, into], check=True)
    code = "from sellarec.environment import check_environment; import sellarec; check_environment(); print(sellarec.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": "."}
    )
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stderr
    project = (tmp_path / "pyproject.toml").read_text()
    for name in re.findall(r'^readme = "(.*)"|^license-files = \["(.*)"\]', project, re.MULTILINE):
        assert (tmp_path / next(filter(None, name))).is_file()
    assert (tmp_path / "requirements" / "cpu.txt").is_file() and (tmp_path / "packaging" / "environment.sh").is_file()


def test_slurm_script_refuses_where_there_is_no_environment(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", CLUSTER / "slurm.sbatch"],
        capture_output=True,
        text=True,
        env={"SLURM_SUBMIT_DIR": str(tmp_path), "PATH": "/bin:/usr/bin"},
    )
    assert done.returncode == 2 and f"no environment at {tmp_path}/.venv" in done.stderr


def package_size(*flags: str | Path, status: int = 0) -> tuple[str, str]:
    command = [sys.executable, CLUSTER / "package_size.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_a_job_brings_no_environment() -> None:
    """Dependencies are in the image: a job that installed some would do so on every node, each time."""
    assert list(yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())) == ["excludes"]


def test_a_job_sends_code_alone(tmp_path: Path) -> None:
    for name in (
        "sellarec/a.py",
        "jobs/train.py",
        "runs/x/manifest.json",
        "tests/test_a.py",
        ".venv/lib/torch.so",
        "data/ratings.parquet",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    printed, _ = package_size(tmp_path)
    assert "sellarec/a.py" in printed and "jobs/train.py" in printed
    for left_out in ("runs", "tests", "torch.so", "parquet"):
        assert left_out not in printed


def test_a_package_that_is_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(bytes(range(256)) * 4096 * 2)
    _, error = package_size(tmp_path, "--limit", "0.001", status=2)
    assert error.splitlines()[-1].startswith(f"error: the package of {tmp_path} is") and "runtime_env.yaml" in error


def test_the_project_itself_is_small() -> None:
    package_size(ROOT, "--limit", "5")
