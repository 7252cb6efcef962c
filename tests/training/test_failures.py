"""What is told of workers that failed."""

import os
import sys
from pathlib import Path

import pytest
import ray

from sellarec.artifacts import Place
from sellarec.training.cluster import connect
from sellarec.training.failures import keep_logs
from sellarec.training.progress import Console


@pytest.mark.ray
def test_what_workers_have_printed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that was killed too; processes in which nothing was printed, and other jobs', leave no file."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    @ray.remote(num_cpus=0, max_retries=0)
    def say(text: str, is_killed: bool) -> None:
        print(text, file=sys.stderr, flush=True)
        if is_killed:
            os.kill(os.getpid(), 9)

    @ray.remote(num_cpus=0)
    def forge() -> None:
        logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
        (logs / "worker-1-1-1.err").write_text(":job_id:02000000\nanother job's\n")

    connect(1, Console(), Place.of(str(tmp_path)), device="cpu")
    try:
        ray.get(forge.remote())
        ray.get(say.remote("all is well", False))
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(say.remote("my last words", True))
        assert keep_logs(Place.of(str(tmp_path / "logs"))) == []
    finally:
        ray.shutdown()
    (node,) = (tmp_path / "logs").iterdir()
    assert all(file.suffix == ".err" for file in node.iterdir()), list(node.iterdir())
    printed = "".join(file.read_text() for file in node.iterdir())
    assert "all is well\n" in printed and "my last words\n" in printed and "another job's" not in printed
