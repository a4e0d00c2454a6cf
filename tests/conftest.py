import pytest
from commands import TINY, run
from hypothesis import settings

import train

settings.register_profile("any machine", deadline=None)  # laws are not timed
settings.load_profile("any machine")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="SIGKILLs in test_faults.py")


@pytest.fixture
def kills(request):
    return request.config.getoption("--kills")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run: one step is enough to sample from."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, train, TINY, "--steps 1 --out", out)
    return out
