"""Commands as a user types them, run in this process or under torchrun."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from sample import newest_checkpoint

ROOT = Path(__file__).parents[1]
TINY = """--model DiP-Nano/16 --set hidden_size=16 depth=2 num_heads=2 head_depth=2 head_width=4
    patch_size=4 --image-size 16 --batch-size 4 --lr 1e-3 --device cpu"""


def run(monkeypatch, module, *words):
    """`python module.py words`, in this process."""
    arguments = shlex.split(" ".join(map(str, words)))
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    module.main()


def torchrun(processes, script, *words, cwd):
    """`torchrun --nproc_per_node=processes script words`, in folder cwd."""
    command = f"-m torch.distributed.run --standalone --nproc_per_node={processes} {ROOT / script}"
    arguments = shlex.split(" ".join(map(str, (command, *words))))
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]


def checkpoint(folder):
    """The newest checkpoint of a run."""
    return torch.load(newest_checkpoint(folder), weights_only=True)
