"""What is told of workers that failed: the cause in a line, and all that they have printed."""

import re
from pathlib import Path

from sellarec.artifacts import Place
from sellarec.preflight import living_nodes

_LOST_PEER = re.compile(r"connection (closed|reset|refused)|gloo/transport|NCCL|broken pipe", re.IGNORECASE)
"""How a worker's failure reads that only follows from another's."""

LOG_BYTES = 1 << 20
"""Of what a process has printed, the last so many bytes are kept after a failure."""

LOG_SECONDS = 30.0
"""How long nodes may take to write that down."""


def cause_of(error: BaseException) -> str:
    """What went wrong on the workers: the last line of each one's failure, of those that say the same the first.

    A worker whose peer has gone fails too, with a word of the connection; such failures are left out where others are.
    """
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return last_line(error)
    by_line: dict[str, int] = {}
    for rank, failure in sorted(failures.items()):
        by_line.setdefault(last_line(failure), rank)
    own = {line: rank for line, rank in by_line.items() if not _LOST_PEER.search(line)}
    return "; ".join(f"worker {rank}: {line}" for line, rank in (own or by_line).items())


def last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def keep_logs(place: Place) -> list[str]:
    """Copy what this job's processes have printed on all living nodes, its workers' last words among them, to NODE/FILE in a
    place that they all see.

    Returns: the nodes of which not all came, and why.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes, job, copy = (
        living_nodes(also_leaving=True),
        ray.get_runtime_context().get_job_id(),
        ray.remote(num_cpus=0)(_copy_logs),
    )
    copied = [
        copy.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
            place / node.name, job
        )
        for node in nodes
    ]
    ray.wait(copied, num_returns=len(copied), timeout=LOG_SECONDS)
    failures = []
    for node, reference in zip(nodes, copied, strict=True):
        try:
            ray.get(reference, timeout=0.1)
        except ray.exceptions.RayError as error:
            failures.append(f"{node}: {last_line(error)}")
    return failures


def _copy_logs(place: Place, job: str) -> None:
    """Copy this node's part of a job's logs. Ray writes a file for each of a process's two streams, heads it with the job, and
    says in lines that begin with a colon what runs in it; files in which nothing else stands are left out."""
    import ray

    for file in sorted(Path(ray._private.worker._global_node.get_session_dir_path(), "logs").glob("worker-*")):
        head = f":job_id:{job}\n".encode()
        with open(file, "rb") as stream:
            if stream.read(len(head)) != head:
                continue
            stream.seek(max(len(head), file.stat().st_size - LOG_BYTES))
            text = stream.read().decode(errors="replace")
        if any(line and not line.startswith(":") for line in text.splitlines()):
            place.write_text(file.name, text)
