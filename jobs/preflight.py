"""Check the cluster that RAY_ADDRESS names for a run: versions, storage, network, clocks, disks and room. `--help` lists all."""

import sys

from sellarec.environment import check_environment
from sellarec.errors import UserError, exit_status


def main(arguments: list[str]) -> None:
    check_environment()
    from sellarec.command_line import parse_preflight  # after the check: these import what it looks for

    settings = parse_preflight(arguments)
    from sellarec.artifacts import Place, Store
    from sellarec.training.cluster import connect, joins_cluster
    from sellarec.training.progress import Console

    if not joins_cluster():
        raise UserError(
            "RAY_ADDRESS names no cluster: export it, or submit this job with `ray job submit` (docs/cluster.md)"
        )
    workspace = Place.of(settings.workspace)
    Store(workspace).check_writable()
    connect(
        settings.min_workers or settings.workers,
        Console(),
        workspace,
        settings.concurrent,
        settings.share,
        device=settings.device,
        autoscaler=settings.autoscaler,
        node_timeout=settings.node_timeout,
    )


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
