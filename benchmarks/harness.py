"""How a case is measured. A case is a YAML file of `cases/`; its sides are functions of `sides/`.

A side is a function (work, folder) that prepares and gives a callable, one repetition of the work, which returns

    units   how much it has done (rows, tokens, users, ...): speed is that over its seconds
    found   what it has found or counted, by name: numbers and lists of numbers; of `model FLOPs` and `peak FLOPs/s` the
            result has the utilisation: operations that the work asks for, over what the machine could do in that time

`work` is the case's section of that name. `folder` holds what the case's `inputs`, a function (work, folder) too, has written,
once for all sides. Each side is a process of its own (side.py), so its memory and CPU time are its own; one that waits takes
no time of the others'. A repetition of a side that stands on a GPU ends when the GPU is done.

    1. All sides are built. The first repetition of each is timed apart: it has in it whatever is made at first use.
    2. What the sides found in it is compared: what the case names under `same` must agree, to a part of the largest number that
       stands beside it, else nothing is timed.
    3. Rounds: each side repeats once, in turns (A B A B ...). Before each round a product of matrices and a copy, always the
       same, are timed; a round before which they took over 20% longer than at their best is left out as disturbed, and another
       one is taken, until there are as many as are wanted or twice as many were tried.
    4. Of the rounds that are left: each side's median speed, and the median, lowest and highest of the rounds' ratios, of speed
       and of work per CPU second, of the first side over each other one.

A side that has no memory left, or that the kernel kills, is a result: the others go on without it.
"""

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from environments import make_environment
from machine import facts
from threadpoolctl import threadpool_limits

from sellarec.training.launch import KEEP_FREED_MEMORY

HERE = Path(__file__).parent
CASES, RESULTS = HERE / "cases", HERE / "results"
PACKAGES = (
    "sellarec",
    "torch",
    "torchrec",
    "fbgemm-gpu",
    "transformers",
    "peft",
    "numpy",
    "pyarrow",
    "scikit-learn",
    "pandas",
)

DISTURBED = 1.2
"""How much longer than at its best the calibration takes before a round that is left out."""

CLOCKS = {"speed": "seconds", "per CPU second": "CPU seconds"}


class CaseError(Exception):
    """A case can't be read, set or measured. The message says it all."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a case.

    Attributes:
        function: MODULE.FUNCTION in `sides/`.
        packages: what an environment of its own holds, as pip takes it; empty: it runs in this one.
        worker: it runs with the variables that the launcher gives a collaborative model's workers on CPUs.
    """

    function: str
    packages: list[str] = field(default_factory=list)
    worker: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    """How often and in what surroundings.

    Attributes:
        rounds: undisturbed rounds that are waited for, in twice as many at most.
        threads: threads of each side.
        memory_gib: what a side may allocate (GiB).
    """

    rounds: int = 7
    threads: int = 1
    memory_gib: float = 12.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """A comparison.

    Attributes:
        what: what is compared, in a line.
        unit: what speed counts (rows, tokens, ...).
        work: settings of the sides.
        sides: by name; ratios are of the first over each other one.
        same: names of what all sides find that must agree, and to which relative tolerance.
        quick: settings of the quick form, laid over `work` and `run`.
        inputs: MODULE.FUNCTION that writes what sides read.
    """

    name: str
    what: str
    unit: str
    work: dict[str, Any]
    sides: dict[str, Side]
    same: dict[str, float]
    quick: dict[str, dict[str, Any]]
    inputs: str | None = None
    run: Run = field(default_factory=Run)


def case_names() -> list[str]:
    return sorted(path.stem for path in CASES.glob("*.yaml"))


def read_case(name: str) -> Case:
    """A case by its name or its file.

    Raises:
        CaseError: there is none, or it is no case.
    """
    path = Path(name) if name.endswith(".yaml") else CASES / f"{name}.yaml"
    if not path.is_file():
        raise CaseError(f"there is no case '{name}': give one of {', '.join(case_names())}, or a .yaml file")
    given = yaml.safe_load(path.read_text())
    try:
        sides = {side: Side(**found) for side, found in given.pop("sides").items()}
        return Case(name=path.stem, sides=sides, run=Run(**given.pop("run", {})), **given)
    except (TypeError, KeyError, AttributeError) as error:
        raise CaseError(f"{path} is no case: {error}") from error


def resolve(
    name: str,
    overrides: Mapping[str, str],
    quick: bool = False,
    device: str | None = None,
    sides: Sequence[str] | None = None,
) -> Case:
    """A case with its quick form and `key=value` settings laid over it.

    Args:
        overrides: by dotted name, `work.batch`, `run.rounds` or `same.losses`, the value as YAML writes it.
        device: where sides compute, for cases that have `work.device`.
        sides: those of the case that are measured; None: all.

    Raises:
        CaseError: an unknown case, setting or side, or a value of another type.
    """
    case = read_case(name)
    if sides is not None:
        unknown = [side for side in sides if side not in case.sides]
        if unknown:
            raise CaseError(f"{case.name} has no side '{unknown[0]}': it has {', '.join(case.sides)}")
        case = dataclasses.replace(case, sides={side: of for side, of in case.sides.items() if side in sides})
    settings = {"work": dict(case.work), "run": dataclasses.asdict(case.run), "same": dict(case.same)}
    if quick:
        for section, values in case.quick.items():
            for key, value in values.items():
                _set(case, settings, f"{section}.{key}", value)
    if device is not None:
        if "device" not in case.work:
            raise CaseError(f"--device is {device}, but {name} runs on the CPU alone: it has no setting work.device")
        settings["work"]["device"] = device
    for key, text in overrides.items():
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise CaseError(f"{key}={text}: this is no value as YAML writes it") from error
        _set(case, settings, key, value)
    run = Run(**settings["run"])
    if min(run.rounds, run.threads, run.memory_gib) <= 0:
        raise CaseError(
            f"{name}: run.rounds, run.threads and run.memory_gib must be above 0, they are {settings['run']}"
        )
    return dataclasses.replace(case, work=settings["work"], run=run, same=settings["same"])


def _set(case: Case, settings: dict[str, dict[str, Any]], key: str, value: Any) -> None:
    known = {f"{section}.{name}": found for section, values in settings.items() for name, found in values.items()}
    if key not in known:
        raise CaseError(f"{case.name} has no setting '{key}': it has {', '.join(known)}")
    default = known[key]
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if default is not None and type(value) is not type(default):
        raise CaseError(
            f"{case.name}: {key} is {default!r} by default, and can't be {value!r}, which is of another type"
        )
    section, _, name = key.partition(".")
    settings[section][name] = value


class Process:
    """A side that takes commands."""

    def __init__(self, side: Side, python: Path, run: Run, folder: Path) -> None:
        threads = (
            "OMP_NUM_THREADS",
            "MKL_NUM_THREADS",
            "OPENBLAS_NUM_THREADS",
            "POLARS_MAX_THREADS",
            "RAYON_NUM_THREADS",
        )
        variables = {**dict.fromkeys(threads, str(run.threads)), "TOKENIZERS_PARALLELISM": "false"}
        if side.worker:
            variables |= KEEP_FREED_MEMORY
        self._errors = folder / f"{side.function}.txt"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [python, HERE / "side.py", side.function], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, env={**os.environ, **variables},
            )  # fmt: skip

    def ask(self, command: Any) -> dict[str, Any]:
        """The answer; `out of memory` in it where there was none left, or the kernel has killed the process.

        Raises:
            CaseError: the side has failed otherwise.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            if status == -9:
                return {"out of memory": "the kernel has killed the process"}
            raise CaseError(f"the process ended with status {status}\n{self._errors.read_text()[-4000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise CaseError(answer["error"])
        return answer

    def end(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


@functools.cache
def _calibration() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """A matrix and a block, each with what takes the outcome: fresh pages would be timed otherwise."""
    matrix, block = np.full((1024, 1024), 0.5, np.float32), np.zeros(32 << 20, np.float32)
    return (matrix, matrix.copy()), (block, block.copy())


def calibrate(threads: int) -> float:
    """Seconds of a fixed piece of work: a product of matrices and a copy of 128 MiB, three times, with so many threads."""
    (matrix, product), (block, copy) = _calibration()
    with threadpool_limits(threads):
        start = time.perf_counter()
        for _ in range(3):
            np.matmul(matrix, matrix, out=product)
            np.copyto(copy, block)
        return time.perf_counter() - start


def measure(case: Case, environments: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Carry out a case; gives the result, as JSON takes it.

    Args:
        environments: folder for peers' environments.

    Raises:
        CaseError: a side has failed for another reason than memory, or the sides don't do the same.
    """
    start, load = time.perf_counter(), os.getloadavg()
    processes: dict[str, Process] = {}
    lost: dict[str, str] = {}
    answers: dict[str, dict[str, Any]] = {}
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        given = {"work": case.work, "folder": folder, "memory_gib": case.run.memory_gib}

        def ask(name: str, process: Process, command: Any) -> dict[str, Any] | None:
            try:
                answer = process.ask(command)
            except CaseError as error:
                raise CaseError(f"{case.name}, {name}: {error}") from error
            if "out of memory" not in answer:
                return answer
            lost[name] = answer["out of memory"]
            say(f"{case.name}, {name}: out of memory")
            process.end()
            return None

        try:
            if case.inputs is not None:
                inputs = Side(function=case.inputs)
                processes["inputs"] = Process(inputs, Path(sys.executable), case.run, Path(folder))
                if ask("inputs", processes["inputs"], given) is None:
                    raise CaseError(
                        f"{case.name}: its inputs can't be made in {case.run.memory_gib} GiB (run.memory_gib)"
                    )
                processes.pop("inputs").end()
            for name, side in case.sides.items():
                python = Path(sys.executable)
                if side.packages:
                    python = _python_of(environments / f"{case.name}-{name}".replace(" ", "-"), side)
                processes[name] = Process(side, python, case.run, Path(folder))
                built = ask(name, processes[name], given)
                if built and (first := ask(name, processes[name], "repeat")):
                    answers[name] = {"seconds to build": built["seconds"], "first": first}
            _compare(case, {name: answer["first"]["found"] for name, answer in answers.items()})
            while len(_calm(rounds)) < case.run.rounds and len(rounds) < 2 * case.run.rounds:
                one: dict[str, Any] = {"calibration seconds": calibrate(case.run.threads)}
                for name, process in processes.items():
                    if name not in lost and (answer := ask(name, process, "repeat")):
                        one[name] = {key: value for key, value in answer.items() if key != "found"}  # the first tells
                rounds.append(one)
        finally:
            for process in processes.values():
                process.end()
    return {
        "case": case.name,
        "what": case.what,
        "unit": case.unit,
        "settings": {"work": case.work, "run": dataclasses.asdict(case.run), "same": case.same},
        "packages of sides": {name: side.packages for name, side in case.sides.items() if side.packages},
        "machine": facts(PACKAGES),
        "load average before": load,
        "seconds": time.perf_counter() - start,
        **summary(list(case.sides), answers, rounds, lost),
        "rounds": rounds,
    }


def _python_of(folder: Path, side: Side) -> Path:
    try:
        return make_environment(folder, side.packages)
    except subprocess.CalledProcessError as error:
        raise CaseError(f"pip can't install {', '.join(side.packages)} in {folder}: {error}") from error


def _compare(case: Case, found: dict[str, dict[str, Any]]) -> None:
    """Refuse sides that don't do the same work."""
    for what, tolerance in case.same.items():
        values = {name: of_side.get(what) for name, of_side in found.items()}
        missing = [name for name, value in values.items() if value is None]
        if missing:
            raise CaseError(f"{case.name}: {', '.join(missing)} found no '{what}', which all sides must agree in")
        for name, value in values.items():
            first, reference = next(iter(values.items()))
            if np.shape(value) != np.shape(reference) or _apart(value, reference) > tolerance:
                raise CaseError(
                    f"{case.name}: the sides don't do the same work: {what} is {reference} of {first} and {value} of {name}, "
                    f"more than {tolerance:g} of it apart"
                )


def _apart(value: Any, reference: Any) -> float:
    """The largest difference of numbers, over the largest of the reference; infinite where one is not finite."""
    most, difference = np.abs(reference).max(), np.abs(np.subtract(value, reference)).max()
    found = float(difference / most if most else difference)
    return found if np.isfinite(found) else np.inf


def _calm(rounds: list[dict]) -> list[dict]:
    best = min((one["calibration seconds"] for one in rounds), default=0.0)
    return [one for one in rounds if one["calibration seconds"] <= DISTURBED * best]


def summary(names: list[str], answers: dict[str, dict], rounds: list[dict], lost: dict[str, str]) -> dict[str, Any]:
    """What rounds come to: of the sides, and of the first over each other one."""
    calm = _calm(rounds)
    sides: dict[str, Any] = {}
    for name in names:
        if name in lost:
            sides[name] = {"out of memory": lost[name]}
            continue
        taken = [one[name] for one in calm]
        first, everything = answers[name]["first"], [one[name] for one in rounds]
        peak = max(one["peak resident bytes"] for one in (first, *everything))
        sides[name] = {
            "seconds to build": answers[name]["seconds to build"],
            "first seconds": first["seconds"],
            "seconds": statistics.median(one["seconds"] for one in taken),
            "units/s": statistics.median(one["units"] / one["seconds"] for one in taken),
            "units per CPU second": statistics.median(one["units"] / one["CPU seconds"] for one in taken),
            "resident bytes before": first["resident bytes before"],
            "peak resident bytes": peak,
            "bytes above": peak - first["resident bytes before"],
            "found": first["found"],
        }
        sides[name] |= {key: everything[-1][key] for key in ("GPU", "GPU peak bytes") if key in first}
        if "model FLOPs" in first["found"]:
            # of one machine: the highest that any side has measured
            peak_flops = max(answer["first"]["found"]["peak FLOPs/s"] for answer in answers.values())
            sides[name]["utilisation"] = first["found"]["model FLOPs"] / sides[name]["seconds"] / peak_flops
    ours, *others = names
    ratios: dict[str, Any] = {}
    for other in others:
        if ours in lost or other in lost:
            continue
        ratios[other] = {}
        for name, clock in CLOCKS.items():
            speeds = [[one[side]["units"] / one[side][clock] for side in (ours, other)] for one in calm]
            found = [mine / theirs for mine, theirs in speeds]
            ratios[other][name] = {"median": statistics.median(found), "lowest": min(found), "highest": max(found)}
    return {"rounds kept": len(calm), "sides": sides, "ratios": ratios}


def in_words(result: dict[str, Any]) -> str:
    """A result in some lines."""
    unit = result["unit"]
    kept = f"{result['rounds kept']} of {len(result['rounds'])} rounds"
    lines = [f"{result['case']} ({kept}, {result['settings']['run']['threads']} threads a side): {result['what']}"]
    for name, side in result["sides"].items():
        if "out of memory" in side:
            lines.append(f"    {name:<24} out of memory ({side['out of memory'].splitlines()[0]})")
            continue
        lines.append(
            f"    {name:<24} {side['units/s']:>14,.0f} {unit}/s, {side['units per CPU second']:,.0f} a CPU second, first "
            f"repetition {side['first seconds']:.2f} s, then {side['seconds']:.3f} s; {side['bytes above'] / 2**20:,.0f} MiB"
            + (f"; {side['utilisation']:.1%} of the peak of products" if "utilisation" in side else "")
        )
    first = next(iter(result["sides"]))
    for name, ratio in result["ratios"].items():
        speed, cpu = (ratio[key] for key in CLOCKS)
        lines.append(
            f"    {first} over {name}: {speed['median']:.2f} times as fast [{speed['lowest']:.2f}, {speed['highest']:.2f}], per "
            f"CPU second {cpu['median']:.2f} [{cpu['lowest']:.2f}, {cpu['highest']:.2f}]"
        )
    return "\n".join(lines)


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
