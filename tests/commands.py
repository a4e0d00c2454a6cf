"""Commands as a user types them: in this process, or in processes of their own; and what they
leave behind."""

import ctypes
import importlib
import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from sample import explain, find_checkpoint
from sample import run as run_command

ROOT = Path(__file__).parents[1]
TINY = """--model DiP-Nano/8 --set hidden_size=16 depth=2 num_heads=2 head_depth=2 head_width=4
    patch_size=4 --image-size 16 --batch-size 4 --lr 1e-3 --warmup 0 --cooldown 0 --time-mean 0
    --sample-every 0 --device cpu"""


def run(monkeypatch, module, *words):
    """`python module.py words`, in this process; returns its exit code."""
    arguments = shlex.split(" ".join(map(str, words)))
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    return module.main()


def error_line(monkeypatch, module, *words):
    """The one line in which a command ends that its user has to correct."""
    with pytest.raises((Exception, SystemExit)) as ended:
        run(monkeypatch, module, *words)
    line = explain(ended.value)
    assert line and "\n" not in line and len(line) <= 500, f"no single line: {ended.value!r}"
    return line


# --- processes of their own -----------------------------------------------------------------------


STARTED = []             # leaders of sessions, which end_all() ends


def launch(script, *words, processes=1, **settings):
    """`python script words`, or the same under torchrun, in the background: a subprocess.Popen."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes}"
    start = torchrun if processes > 1 else ""
    command = shlex.split(" ".join(map(str, (start, ROOT / script, *words))))
    settings["env"] = {**os.environ, "OMP_NUM_THREADS": "1", **settings.get("env", {})}
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, start_new_session=True, **settings)
    STARTED.append(process.pid)
    return process


def outcome(process, seconds=120):
    """Wait for the end of launch(); returns its exit code and the texts of stdout and stderr."""
    try:
        texts = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end_group(process.pid)
        raise AssertionError(f"not ended in {seconds} s: {process.communicate()}") from None
    end_group(process.pid)
    return process.returncode, *texts


def end_group(leader):
    """Kill a process that a test started, if it lives, and what is left of its children."""
    if leader in STARTED:
        STARTED.remove(leader)
        with suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)


def end_all():
    for leader in [*STARTED]:
        end_group(leader)


class Background:
    """`python module.py words` in the background, as rank `rank` of `world`.

    The process is forked from a server that has imported torch already, which saves five seconds.
    """

    server = None

    def __init__(self, module, *words, rank=0, world=1, port=0, cwd=".", first=None):
        if Background.server is None:
            with pytest.MonkeyPatch.context() as patch:      # where the server finds the modules
                patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
                Background.server = multiprocessing.get_context("forkserver")
                Background.server.set_forkserver_preload(["commands", "train", "torch._dynamo"])
                Background.server.Process(target=int).start()
        self.files = [tempfile.NamedTemporaryFile("r") for _ in range(2)]
        ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="localhost",
                     MASTER_PORT=port) if world > 1 else {}
        self.process = Background.server.Process(target=in_background, args=(
            module, shlex.split(" ".join(map(str, words))), [file.name for file in self.files],
            {name: str(value) for name, value in ranks.items()}, str(cwd), first))
        self.process.start()
        self.pid = self.process.pid
        STARTED.append(self.pid)

    def is_alive(self):
        return self.process.is_alive()

    def end(self, seconds=120):
        """Wait for its end; returns its exit code and the texts of stdout and stderr."""
        self.process.join(seconds)
        alive = self.is_alive()
        end_group(self.pid)
        assert not alive, f"not ended in {seconds} s: {self.texts()}"
        return self.process.exitcode, *self.texts()

    def texts(self):
        return [Path(file.name).read_text() for file in self.files]


def in_background(module, words, files, ranks, cwd, first):
    """What a Background process does: it has its own session, as under a cluster's scheduler."""
    os.setsid()
    if sys.platform == "linux":                              # do not outlive the tests: 1 is
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)           # PR_SET_PDEATHSIG
    multiprocessing.set_start_method("fork", force=True)     # for loaders: the default of a command
    for number, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    os.environ.update(ranks, OMP_NUM_THREADS="1")
    os.chdir(cwd)
    torch.set_num_threads(1)
    if first:
        first()
    sys.argv = [f"{module}.py", *words]
    run_command(importlib.import_module(module).main)


def run_ranks(world, module, *words, **settings):
    """The processes that torchrun would start on one machine, in the background."""
    port = free_port()
    return [Background(module, *words, rank=rank, world=world, port=port, **settings)
            for rank in range(world)]


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


# --- what they leave behind -----------------------------------------------------------------------


def checkpoint(folder):
    """The newest checkpoint of a run."""
    return torch.load(find_checkpoint(folder), weights_only=True)


def leaves(tree, name=""):
    """(name, value) of everything in nested dicts and lists that is neither."""
    if isinstance(tree, (list, tuple)):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return [(name, tree)]
    return [leaf for key in tree for leaf in leaves(tree[key], f"{name}.{key}")]


def assert_same_state(one, other, keys, atol=0):
    """Two checkpoints have the same tensors and numbers under these keys; atol 0: bit for bit."""
    torch.testing.assert_close(*({key: dict(leaves(state[key])) for key in keys}
                                 for state in (one, other)), rtol=0, atol=atol)
