"""Encoding a catalog with a model that workers hold together, without Ray."""

from dataclasses import dataclass, field
from typing import Any

import engine_cases

from sellarec.errors import StageFailed
from sellarec.language import distil
from sellarec.training import dense
from sellarec.training import encoding as encoding_module
from sellarec.training.encoding import Encoding, encode


@dataclass
class Board:
    """Keeps what worker 0 tells."""

    told: list[dict[str, Any]] = field(default_factory=list)

    @property
    def put(self) -> Any:
        return self

    def remote(self, record: dict[str, Any]) -> None:
        self.told.append(record)


def run(encoding: Encoding, block_rows: int, break_at: int | None = None) -> dict[str, Any]:
    """What a worker tells, and which shares of the weights it held.

    Args:
        break_at: the part at whose writing storage fails for good.
    """
    workers, board, held = engine_cases.workers_of(), Board(), {}
    object.__setattr__(encoding, "board", board)
    shard, write = dense.shard, encoding_module.write_part

    def spied(model: Any, blocks: Any, *arguments: Any) -> None:
        held["read"] = sum(weight.numel() for weight in model.parameters() if not weight.is_meta)
        shard(model, blocks, *arguments)
        held["whole"] = sum(weight.numel() for weight in model.parameters())
        held["own"] = sum(weight.to_local().numel() for weight in model.parameters())
        held["blocks"] = len(blocks)

    def broken(part: Any, written: dict[str, Any], *arguments: Any) -> dict[str, Any]:
        if written["parts"] == break_at:
            raise OSError("the disk is full")
        return write(part, written, *arguments)

    least, dense.MIN_BLOCK_BYTES = dense.MIN_BLOCK_BYTES, 0
    rows, encoding_module.BLOCK_ROWS = encoding_module.BLOCK_ROWS, block_rows
    distil.shard, encoding_module.write_part = spied, broken
    failure = ""
    try:
        encode(encoding, workers)
    except StageFailed as error:
        failure = str(error)
    finally:
        dense.MIN_BLOCK_BYTES, encoding_module.BLOCK_ROWS = least, rows
        distil.shard, encoding_module.write_part = shard, write
    return {"told": board.told, "held": held, "failure": failure}
