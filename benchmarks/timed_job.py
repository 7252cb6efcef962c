"""jobs/train.py, whose workers write down when they did what: `python benchmarks/timed_job.py NOTES ARGUMENTS ...`.

Each worker appends lines of JSON to NOTES/PID.jsonl, with its `rank`, its `node` and the `time` (seconds since 1970):

    joined       the worker runs
    restoring    its process groups, model and tables stand; checkpoints are looked for
    restored     the state of a checkpoint is loaded
    saved        a checkpoint is written, of `step`
    step         a step was taken: how many there have been (`step`), and bytes that its TCP connections have sent so far

The arguments are those of jobs/train.py. Nothing else is another than there, but that workers given `--bind`, before NOTES, have
one core each.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def noting(folder: Path, here: Path, bind: bool) -> Callable[[dict[str, Any]], None]:
    """What Ray Train runs on each worker; this module is none that workers import, so all that it needs is in it.

    Args:
        here: folder of the benchmarks.
        bind: have each worker compute on one core, by rank.
    """

    def train_worker(config: dict[str, Any]) -> None:
        import os
        import sys
        import time

        import ray
        import ray.train

        from sellarec.training import loop
        from sellarec.training.checkpoints import Checkpoints
        from sellarec.training.engine import Engine

        sys.path[:0] = [str(here), str(here / "tables")]
        from traffic import wire_bytes

        about = {"rank": ray.train.get_context().get_world_rank(), "node": ray.get_runtime_context().get_node_id()}
        file = open(folder / f"{os.getpid()}.jsonl", "w", buffering=1)  # noqa: SIM115
        step_of, save_of = Engine.step, Checkpoints.save
        newest_of, load_of = Checkpoints.newest, Checkpoints.load

        def note(event: str, **more: Any) -> None:
            file.write(json.dumps({"event": event, "time": time.time(), **about, **more}) + "\n")

        def step(self: Engine, rows: Any, step: int, rate: float) -> float:
            loss = step_of(self, rows, step, rate)
            note("step", step=step + 1, sent=int(wire_bytes()[0]))
            return loss

        def save(self: Checkpoints, engine: Engine, position: dict[str, Any]) -> None:
            save_of(self, engine, position)
            note("saved", step=position["step"])

        def newest(self: Checkpoints) -> Any:
            note("restoring")
            return newest_of(self)

        def load(self: Checkpoints, engine: Engine, step: int) -> None:
            load_of(self, engine, step)
            note("restored", step=step)

        if bind:
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, [cores[about["rank"] % len(cores)]])
        note("joined")
        Engine.step, Checkpoints.save, Checkpoints.newest, Checkpoints.load = step, save, newest, load
        loop.train_worker(config)

    return train_worker


def read(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The notes so far, by process."""
    return {
        int(path.stem): [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for path in folder.glob("*.jsonl")
    }


if __name__ == "__main__":
    bind, notes, *arguments = sys.argv[1:] if sys.argv[1:2] == ["--bind"] else ["", *sys.argv[1:]]
    sys.path.insert(0, str(HERE.parent / "jobs"))
    from train import main

    from sellarec.errors import exit_status
    from sellarec.training import loop

    loop.train_worker = noting(Path(notes).absolute(), HERE.absolute(), bool(bind))
    sys.exit(exit_status(main, arguments))
