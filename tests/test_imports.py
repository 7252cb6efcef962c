"""What loads without what: language, alignment and fusion know neither Ray nor TorchRec."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sys
from importlib.abc import MetaPathFinder

BLOCKED = {"ray", "torchrec", "fbgemm_gpu"}


class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Blocked())

import numpy as np
import pyarrow as pa
import torch

from sellarec.alignment.contrastive import Views, contrastive_loss
from sellarec.config import Adapt, Align, Prompt
from sellarec.fusion.projection import HybridProjection, Projection
from sellarec.language.adapt import build_adapt
from sellarec.language.llm import find_llm
from sellarec.training.task import Alone

torch.manual_seed(0)


def step(module, loss):
    # one step of SGD
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in trained]
    loss.backward()
    torch.optim.SGD(trained, lr=1.0).step()
    assert loss.isfinite() and all(weight.isfinite().all() for weight in trained)
    assert any(not torch.equal(weight, old) for weight, old in zip(trained, before, strict=True))


# language
prompt = Prompt(template="compact")
task = build_adapt(find_llm(sys.argv[1], None), ["the harbor sea", "Toy Story", "x"], prompt, "movie", Adapt(rank=2))
rows = pa.table(
    {
        "row": [0, 1],
        "item": [2, 1],
        "label": pa.array([1, 0], pa.int8()),
        "history": pa.array([[0, 1], []], pa.list_(pa.int64())),
        "weight": pa.array([1, 1], pa.float32()),
    }
)
batch = task.collate(task.prepare(rows, 0, np.zeros(2, np.int64)), 0)
step(task.model, task.loss(task.model, batch, {}, Alone()))

# alignment and fusion
ids, weight = torch.tensor([0, 1, 0]), torch.ones(3)
user, item, semantic = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 8)
projection = Projection(4, 6, 8)
views = Views.gather(projection(item), semantic, ids, weight, Align(), Alone())
step(projection, contrastive_loss(views, Align(), Alone()).sum())
hybrid = HybridProjection(
    ("user", "item", "semantic"), {"collaborative": projection, "semantic": torch.nn.Linear(8, 8)}, norm=torch.tensor(1.0)
)
tokens = hybrid({"user": user, "item": item, "semantic": semantic})
step(hybrid, sum((token * torch.randn(8)).sum() for token in tokens.values()))
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
print("done")
"""


def test_language_alignment_and_fusion_take_a_step_without_ray_and_torchrec(decoder):
    """In a process in which neither can be imported."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, decoder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
