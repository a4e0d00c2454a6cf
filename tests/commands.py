"""Commands as a user types them, run in this process or in others, and what they left behind."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sample import Processes, find_checkpoint, run_main

ROOT = Path(__file__).parents[1]
TINY = """--model DiP-Nano/16 --set hidden_size=16 depth=2 num_heads=2 head_depth=2 head_width=4
    patch_size=4 --image-size 16 --batch-size 4 --lr 1e-3 --warmup 0 --cooldown 0 --time-mean 0
    --device cpu"""


def run(monkeypatch, module, *words):
    """`python module.py words`, in this process; returns its exit code."""
    arguments = shlex.split(" ".join(map(str, words)))
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    return module.main()


def complaint(monkeypatch, module, *words):
    """The one line that a command ends in."""
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: run(monkeypatch, module, *words))
    line = ended.value.code
    assert isinstance(line, str), f"ended with code {line} and no line"
    assert "\n" not in line and line.startswith(f"{module.__name__}.py: error: ")
    return line


def launch(script, *words, processes=1, agent=None, **settings):
    """`python script words`, or the same under torchrun, going on by itself: a subprocess.Popen."""
    agent = agent or "--standalone" * (processes > 1)
    start = f"-m torch.distributed.run {agent} --nproc_per_node={processes}" if agent else ""
    command = shlex.split(" ".join(map(str, (start, ROOT / script, *words))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if start else None
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, env=environment,
                            stderr=subprocess.PIPE, text=True, **settings)


def torchrun(processes, script, *words, cwd):
    """`torchrun --nproc_per_node=processes script words`, in folder cwd, to its good end."""
    process = launch(script, *words, processes=processes, cwd=cwd)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors


def checkpoint(folder):
    """The newest checkpoint of a run."""
    return torch.load(find_checkpoint(folder), weights_only=True)


def alone(device="cpu"):
    """The only process there is."""
    return Processes(rank=0, world=1, device=torch.device(device))


def flat(tree):
    """All tensors and numbers in a nested dict, by path."""
    if isinstance(tree, dict):
        return {
            f"{key}.{path}": leaf for key, sub in tree.items() for path, leaf in flat(sub).items()
        }
    if isinstance(tree, (list, tuple)):
        return flat(dict(enumerate(tree)))
    return {"": tree}


def assert_same(a, b, **tolerance):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for path in a:
        if torch.is_tensor(a[path]):
            torch.testing.assert_close(
                a[path], b[path], msg=lambda text: f"{path}: {text}", **tolerance
            )
