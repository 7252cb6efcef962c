"""The process group of Ray's workers, with a store that listens on one address alone."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import ray
import torch.distributed as dist
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.torch.config import TorchConfig, _set_torch_distributed_env_vars, _TorchBackend

_listening: list[socket.socket] = []
"""Worker 0's, until its store takes it over."""


@dataclass
class OneAddress(TorchConfig):
    """Ray's own configuration, whose store listens on all interfaces of worker 0's machine, but for that: here it listens on the
    address that Ray knows the node by, which is 127.0.0.1 where Ray is local."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: TorchConfig) -> None:
        address, port = worker_group.execute_single(0, _listen)
        worker_group.execute(_set_torch_distributed_env_vars)
        workers = len(worker_group)
        joined = [
            worker_group.execute_single_async(
                rank, _join, backend_config.backend, address, port, rank, workers, backend_config.timeout_s
            )
            for rank in range(workers)
        ]
        ray.get(joined)


def _listen() -> tuple[str, int]:
    """Listen on a free port of this node's address."""
    address = ray.util.get_node_ip_address()
    _listening.append(socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET))
    return address, _listening[-1].getsockname()[1]


def _join(backend: str, address: str, port: int, rank: int, workers: int, timeout: int) -> None:
    """Args: timeout: seconds that any operation of the group may take."""
    limit = timedelta(seconds=timeout)
    taken = _listening.pop().detach() if rank == 0 else None
    store = dist.TCPStore(address, port, workers, rank == 0, limit, master_listen_fd=taken)
    os.environ.setdefault(
        "TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"
    )  # a collective that fails ends the worker, as Ray sets it
    dist.init_process_group(backend, store=store, rank=rank, world_size=workers, timeout=limit)
