"""What workers are started with."""

import os
import subprocess
import sys

from sellarec.training.launch import KEEP_FREED_MEMORY

CODE = """
import resource
import threading
import torch

torch.set_num_threads(1)

def steps(number):
    for _ in range(number):
        torch.zeros(20_000_000).add_(1)

def work():  # as Ray Train runs a worker's function: not in the main thread
    steps(10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    steps(20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def test_large_tensors_that_come_and_go_are_not_taken_from_the_system_again() -> None:
    faults = {}
    for how, variables in (("kept", KEEP_FREED_MEMORY), ("given back", {})):
        command, environment = [sys.executable, "-c", CODE], {**os.environ, **variables}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        faults[how] = int(done.stdout)
    assert faults["given back"] > 50_000, "pages larger than 4 KiB hide what this is about"
    assert faults["kept"] < faults["given back"] / 10
