import signal

import pytest
import torch
from commands import TINY, end_all, run
from hypothesis import settings

import train
from sample import start_processes

torch.set_num_threads(1)                                     # two are slower on a busy machine
start_processes("cpu")                                       # as every command does first
settings.register_profile("any machine", deadline=None)      # laws are not timed
settings.load_profile("any machine")


LIMIT = 300              # seconds of one test: a deadlock fails, and the next test begins


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    def too_long(*_):
        raise TimeoutError(f"this test has not ended in {LIMIT} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        end_all()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run of one step, which is enough to sample from; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, train, TINY, "--steps 1 --out", out)
    return out


@pytest.fixture(scope="session")
def twenty(tmp_path_factory):
    """A command of 20 steps, and the folder of its run: one process, one micro-batch a step."""
    out = tmp_path_factory.mktemp("runs") / "twenty"
    command = f"{TINY} --steps 20 --save-every 10 --sample-every 20 --log-every 1"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, train, command, "--out", out)
    return command, out
