"""One side of a benchmark in a process of its own: `python side.py MODULE.FUNCTION`, which the harness calls.

Takes commands as lines of JSON and answers each with one. It imports nothing beyond the standard library, as it runs in peers'
environments too; the function's module does.

    {"work": ..., "folder": ..., "memory_gib": ...}    imports the module and calls FUNCTION(work, folder), which gives a callable
    "repeat"                                            calls that: one repetition, which gives (units of work, what was found)
"""

import importlib
import json
import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def resident(name: str) -> int:
    """Bytes of this process as the kernel counts them: VmRSS now, VmHWM at the peak."""
    match = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, torch on a GPU, or torch on a CPU (which has no type of its own for it) found no memory."""
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return isinstance(error, MemoryError) or named or "DefaultCPUAllocator" in str(error)


def cpu_seconds() -> float:
    """User and system time of this process, all threads, and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def gpu() -> dict[str, Any]:
    """Name of the GPU, and bytes that torch held there at the peak; nothing where torch uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"GPU": torch.cuda.get_device_name(), "GPU peak bytes": torch.cuda.max_memory_allocated()}


def answers(name: str, given: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Build the side; what one repetition answers."""
    module, _, function = name.rpartition(".")
    build = getattr(importlib.import_module(f"sides.{module}"), function)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel counts the peak anew
    repetition = build(given["work"], Path(given["folder"]))

    def repeat() -> dict[str, Any]:
        wall, cpu = time.perf_counter(), cpu_seconds()
        units, found = repetition()
        taken = {"seconds": time.perf_counter() - wall, "CPU seconds": cpu_seconds() - cpu}
        memory = {"resident bytes before": before, "peak resident bytes": resident("VmHWM")}
        return {"units": units, **taken, **memory, **gpu(), "found": found}

    return repeat


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(work: Callable[[], dict[str, Any]]) -> None:
        try:
            found = work()
        except Exception as error:
            kind = "out of memory" if is_out_of_memory(error) else "error"
            found = {kind: str(error) if kind == "out of memory" else traceback.format_exc()}
        print(json.dumps(found), file=out, flush=True)

    given = json.loads(sys.stdin.readline())
    limit = int(given["memory_gib"] * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    repeat: list[Callable[[], dict[str, Any]]] = []

    def build() -> dict[str, Any]:
        start = time.perf_counter()
        repeat.append(answers(sys.argv[1], given))
        return {"seconds": time.perf_counter() - start}

    answer(build)
    for _ in sys.stdin:
        answer(repeat[0])


if __name__ == "__main__":
    main()
