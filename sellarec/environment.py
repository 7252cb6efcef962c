"""Whether this Python environment can run the project, and the facts of it for a bug report.

Only the standard library is imported here, so that the check costs milliseconds and runs where nothing else does.
"""

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from sellarec.errors import UserError

PYTHON = (3, 11)
# The versions that belong together: fbgemm 1.8 is built against torch 2.13. The same pins stand in pyproject.toml.
TORCH = "2.13"
TORCHREC = "1.8"
FBGEMM = "1.8"

FIX = "run `make env` in the project's root (or, in an environment of your own, pip install -r requirements/cpu.txt)"
# For damage that the versions don't show, which `make env` alone would not notice.
FIX_FROM_SCRATCH = "run `make clean env` in the project's root"

PACKAGES = (
    "torch",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "ray",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "pyarrow",
    "numpy",
    "pandas",
)
VARIABLE_PREFIXES = ("RAY_", "SELLAREC_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "TOKENIZERS_PARALLELISM",
)
SECRET = re.compile(r"token|key|secret|password|passwd|credential", re.IGNORECASE)


def check_environment() -> None:
    """Refuse an interpreter or versions of torch, torchrec and fbgemm that don't belong together.

    Reads the metadata of the installed distributions and imports none of them (milliseconds).

    Raises:
        UserError: one line with the versions found, the versions needed and the command that mends it.
    """
    if sys.version_info[:2] != PYTHON:
        found, needed = (f"{major}.{minor}" for major, minor in (sys.version_info[:2], PYTHON))
        raise UserError(f"this is Python {found} ({sys.executable}), SeLLa-Rec needs Python {needed}: {FIX}")

    torch, torchrec = _installed_version("torch"), _installed_version("torchrec")
    cuda_kernels, cpu_kernels = _installed_version("fbgemm-gpu"), _installed_version("fbgemm-gpu-cpu")
    if cuda_kernels is not None and cuda_kernels.endswith("+cpu"):
        cuda_kernels = None  # the empty stand-in for it, packaging/fbgemm-gpu-cpu-shim
    if cuda_kernels is not None and cpu_kernels is not None:
        raise UserError(
            f"fbgemm-gpu {cuda_kernels} and fbgemm-gpu-cpu {cpu_kernels} are both installed "
            f"and overwrite each other's files: uninstall both, then {FIX}"
        )
    fbgemm = cuda_kernels or cpu_kernels
    versions = {"torch": torch, "torchrec": torchrec, "fbgemm-gpu-cpu" if cpu_kernels else "fbgemm-gpu": fbgemm}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        raise UserError(f"not installed for {sys.executable}: {', '.join(missing)}: {FIX}")
    if not all(
        _in_series(version, series)
        for version, series in zip(versions.values(), (TORCH, TORCHREC, FBGEMM), strict=True)
    ):
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        raise UserError(
            f"the installed {listed} don't belong together; "
            f"SeLLa-Rec needs torch {TORCH}.*, torchrec {TORCHREC}.*, fbgemm {FBGEMM}.*: {FIX}"
        )
    # Builds without a local tag (PyPI's) don't tell what they are for; torch itself is asked in `check_description`.
    if "+cpu" in str(torch) and cuda_kernels is not None:
        raise UserError(
            f"torch {torch} is a CPU build, fbgemm-gpu {cuda_kernels} a CUDA build: uninstall fbgemm-gpu, then {FIX}"
        )
    if "+cu" in str(torch) and cpu_kernels is not None:
        raise UserError(
            f"torch {torch} is a CUDA build, fbgemm-gpu-cpu {cpu_kernels} a CPU build: uninstall it, then {FIX}"
        )


def describe_environment() -> dict:
    """Return the facts for a bug report, ready for JSON: machine, versions, what torch and fbgemm can do, variables.

    Torch and fbgemm are loaded in a process of their own (seconds), since a wrong library can take the process with it.
    Memory is in GiB. Values of variables that could hold a secret are left out.
    """
    return {
        "sellarec": _describe_checkout(),
        "python": {"version": platform.python_version(), "executable": sys.executable, "prefix": sys.prefix},
        "machine": _describe_machine(),
        "packages": {name: _installed_version(name) for name in PACKAGES},
        **_probe_in_process(),
        "variables": describe_variables(dict(os.environ)),
    }


def check_description(description: dict) -> None:
    """Refuse an environment whose torch or fbgemm did not load, or are builds for different devices.

    Raises:
        UserError: one line with what went wrong in loading and the command that mends it.
    """
    torch, fbgemm = description["torch"], description["fbgemm"]
    if not torch["loads"]:
        raise UserError(f"torch can't be imported ({torch['error']}): {FIX_FROM_SCRATCH}")
    if not fbgemm["loads"] and torch["cuda_build"] is not None and not torch["cuda_available"]:
        raise UserError(
            f"fbgemm's libraries don't load ({fbgemm['error']}); they are a build for CUDA {torch['cuda_build']}, "
            "which needs the NVIDIA driver: install the driver, or run `make env DEVICE=cpu`"
        )
    if not fbgemm["loads"]:
        raise UserError(f"fbgemm's libraries don't load ({fbgemm['error']}): {FIX_FROM_SCRATCH}")
    if (torch["cuda_build"] is None) != (fbgemm["variant"] == "cpu"):
        build = "a CPU build" if torch["cuda_build"] is None else f"a build for CUDA {torch['cuda_build']}"
        raise UserError(f"torch is {build}, fbgemm a build for '{fbgemm['variant']}': {FIX_FROM_SCRATCH}")


def describe_variables(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that change how a run behaves; a value that may be a secret becomes "(set, not shown)"."""
    chosen = {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(VARIABLE_PREFIXES) or name in VARIABLES
    }
    return {
        name: "(set, not shown)" if SECRET.search(name) or SECRET.search(value) or "@" in value else value
        for name, value in chosen.items()
    }


def probe() -> None:
    """Load torch, then fbgemm, and print one JSON line of facts after each; runs in a process of its own."""
    import torch
    import torch.distributed as distributed

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(f"{properties.name}, {_gib(properties.total_memory)} GiB")
    facts = {
        "loads": True,
        "cuda_build": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
        "devices": devices,
        "threads": torch.get_num_threads(),
        "gloo": distributed.is_available() and distributed.is_gloo_available(),
        "nccl": distributed.is_available() and distributed.is_nccl_available(),
    }
    print(json.dumps({"torch": facts}), flush=True)

    import fbgemm_gpu

    # An operator that torchrec calls in each step: registered and run, not only loaded.
    offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([2, 3]))
    if offsets.tolist() != [0, 2, 5]:
        raise RuntimeError(f"fbgemm's cumsum of [2, 3] is {offsets.tolist()}, not [0, 2, 5]")
    print(json.dumps({"fbgemm": {"loads": True, "variant": fbgemm_gpu.__variant__}}), flush=True)


def _probe_in_process() -> dict[str, dict]:
    # sys.path is handed on, so that the child sees the same packages as this process whatever script it runs.
    code = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from sellarec.environment import probe; probe()"
    child = subprocess.run([sys.executable, "-c", code, json.dumps(sys.path)], capture_output=True, text=True)
    facts: dict[str, dict] = {}
    for line in child.stdout.splitlines():
        if line.startswith(('{"torch"', '{"fbgemm"')):
            facts.update(json.loads(line))
    # Without the facts of one, the process ended in loading that one.
    # The first error in its output is the cause (the missing symbol), later ones only say that it stopped them.
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()] or ["no message"]
    error = next((line for line in lines if re.match(r"[\w.]*Error: ", line)), lines[-1])
    if child.returncode < 0:
        error = f"ended by signal {-child.returncode}"
    facts.setdefault("torch", {"loads": False, "error": error})
    facts.setdefault("fbgemm", {"loads": False, "error": error})
    return facts


def _describe_checkout() -> dict:
    package = Path(__file__).resolve().parent
    commit, changed = None, None
    # A virtual environment may lie inside some other project's checkout, whose commit says nothing here.
    if (package.parent / ".git").exists():
        commit = _git(package.parent, "rev-parse", "HEAD")
        status = _git(package.parent, "status", "--porcelain")
        changed = None if status is None else bool(status)
    return {
        "version": _installed_version("sellarec"),
        "location": str(package),
        "commit": commit,
        "uncommitted_changes": changed,
    }


def _describe_machine() -> dict:
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "memory_limit_gib": _memory_limit(),
        "shared_memory_gib": _gib(_size("/dev/shm")),
    }


def _memory_limit() -> float | None:
    # A container's own limit, which the machine's memory doesn't show.
    file = Path("/sys/fs/cgroup/memory.max")
    text = file.read_text().strip() if file.is_file() else "max"
    return None if text == "max" else _gib(int(text))


def _size(folder: str) -> int | None:
    if not os.path.isdir(folder):
        return None
    facts = os.statvfs(folder)
    return facts.f_frsize * facts.f_blocks


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**30, 1)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _in_series(version: str | None, series: str) -> bool:
    return version is not None and re.match(rf"{re.escape(series)}(\.|\+|$)", version) is not None
