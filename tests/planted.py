"""train.py with a number planted in the noise of some examples, under python or torchrun:

    python planted.py nan 9 10 -- TRAIN-OPTIONS
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import sample
import train


def main():
    split = sys.argv.index("--")
    value, examples = float(sys.argv[1]), set(map(int, sys.argv[2:split]))
    del sys.argv[1 : split + 1]
    honest = train.Examples.__getitem__

    def planted(self, k):
        x_0, label, noise, z, u = honest(self, k)
        if k in examples and self.purpose == "train":
            noise[0, 0, 0] = value
        return x_0, label, noise, z, u

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Examples, "__getitem__", planted)
        return train.main()


if __name__ == "__main__":
    sample.run_main(main)
