"""The process group of real workers of Ray Train, in a job of its own: what listens is settled before Ray is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKERS = 2


def work(config: dict[str, str]) -> None:
    import psutil
    import torch
    import torch.distributed as dist

    total = torch.full((1,), float(dist.get_rank() + 1))
    dist.all_reduce(total)
    connections = psutil.Process().net_connections("tcp")
    listens = [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]
    found = {"total": total.item(), "workers": dist.get_world_size(), "listens": listens}
    (Path(config["folder"]) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()


def run(folder: str) -> None:
    from sellarec.artifacts import Place
    from sellarec.training.cluster import connect
    from sellarec.training.progress import Console

    connect(WORKERS, Console(), Place.of(folder), device="cpu")
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from sellarec.training.rendezvous import OneAddress

    TorchTrainer(
        work,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(num_workers=WORKERS),
        torch_config=OneAddress(backend="gloo", timeout_s=60),
    ).fit()


@pytest.mark.ray
def test_workers_of_a_local_run_meet_and_listen_on_loopback_alone(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for rank in range(WORKERS):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["total"] == 3 and found["workers"] == WORKERS
        assert found["listens"] and {address.removeprefix("::ffff:") for address in found["listens"]} == {"127.0.0.1"}


if __name__ == "__main__":
    run(sys.argv[1])
