"""What a worker sets up for itself before it trains."""

import subprocess
import sys

CODE = """
import resource
import sys
import torch
from sellarec.training.engine import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
torch.set_num_threads(1)

def step():
    torch.zeros(20_000_000).add_(1)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_large_tensors_that_come_and_go_take_their_memory_from_the_system_once() -> None:
    faults = {}
    for how in ("kept", "given back"):
        done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        faults[how] = int(done.stdout)
    assert faults["given back"] > 10_000, "the system hands out pages larger than 4 KiB: this shows nothing"
    assert faults["kept"] < faults["given back"] / 4
