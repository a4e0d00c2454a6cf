import pytest
from commands import TINY, run

import train


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run: one step is enough to sample from."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, train, TINY, "--steps 1 --out", out)
    return out
